"""Figures of docs/cluster.md and docs/scale.md follow from the shipped stage files and from each other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from motip.config import load_curriculum
from motip.data.clips import PlanVideo, plan_clips

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = (ROOT / "docs" / "cluster.md").read_text()
SCALE = (ROOT / "docs" / "scale.md").read_text()
FRAMES = {"bdd100k": 200, "visdrone": 160}
"""Of a video; VisDrone's is the segment length of the curriculum file."""


def rows() -> dict[str, list[str]]:
    """Cells of the table of stages, by stage."""
    lines = [line for line in CLUSTER.splitlines() if re.match(r"\| (BDD|Vis)-|\| sum", line)]
    return {cells[0]: cells[1:] for cells in ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)}


def test_every_stage_has_its_row() -> None:
    curriculum = load_curriculum(ROOT / "configs" / "curriculum.yaml")
    assert [*rows()] == [*(stage.name for stage in curriculum.stages), "sum"]
    assert curriculum.sources["visdrone"].max_frames_per_video == FRAMES["visdrone"]


@pytest.mark.parametrize("number", range(4))
def test_clips_hours_and_pace_of_a_stage(number: int) -> None:
    stage = load_curriculum(ROOT / "configs" / "curriculum.yaml").stages[number]
    (mixed,) = stage.data
    frames = FRAMES[mixed.source]
    videos = [
        PlanVideo(mixed.source, f"{index}", f"{index}", tuple(range(frames)), (1,) * frames, 30.0)
        for index in range(int(mixed.videos or 0))
    ]
    clips = len(plan_clips(videos, stage.config.clip_schedule(0), epoch=0, seed=0))
    total = clips * stage.config.EPOCHS
    row = rows()[stage.name]
    hours = float(row[3])
    pace = f"{total / hours / 3600:.2f}"
    assert row == [str(len(videos)), str(clips), str(total), f"{hours:g}", pace, f"{total / 3600:.1f}"]


def test_the_sums_of_the_table() -> None:
    table = rows()
    stages = [cells for name, cells in table.items() if name != "sum"]
    total, hours = sum(int(cells[2]) for cells in stages), sum(float(cells[3]) for cells in stages)
    assert table["sum"][2:] == [str(total), f"{hours:g}", f"{total / hours / 3600:.2f}", f"{total / 3600:.1f}"]


def test_the_costs_are_products() -> None:
    found = re.findall(r"= (\d\.\d+) \| (?:([\d.]+) h: )(\d+) \$ \| (?:([\d.]+) h: )?(\d+) \$", CLUSTER)
    assert len(found) == 2
    for rate, hours, cost, slow, slow_cost in found:
        assert round(float(rate) * float(hours)) == int(cost)
        assert round(float(rate) * float(slow or 427.1)) == pytest.approx(int(slow_cost), abs=1)
    for left, right in re.findall(r"\| ?([\d.+ x]+) = (\d\.\d{3}) \|", CLUSTER):
        added = sum(_product(term) for term in left.split("+"))
        assert added == pytest.approx(float(right), abs=0.001)


def _product(text: str) -> float:
    product = 1.0
    for factor in text.split("x"):
        product *= float(factor.strip().replace(" ", ""))
    return product


def test_products_and_quotients_on_the_page_of_scale_are_right() -> None:
    """`a x b = c` and `a / b = c` of plain numbers, to the digits that are written."""
    number = r"\d[\d ]*(?:\.\d+)?"
    checked = 0
    for left, right in re.findall(rf"((?:{number} [x/] )+{number}) = ({number})(?= (?:clips|s\b|times|=))", SCALE):
        parts = re.split(r" ([x/]) ", left)
        value = float(parts[0].replace(" ", ""))
        for sign, factor in zip(parts[1::2], parts[2::2], strict=True):
            value = value * float(factor.replace(" ", "")) if sign == "x" else value / float(factor.replace(" ", ""))
        assert value == pytest.approx(float(right.replace(" ", "")), rel=0.02), f"{left} = {right}"
        checked += 1
    assert checked >= 4


def test_the_sizes_are_those_of_the_network() -> None:
    import torch

    from motip.model import ModelSpec, build_model

    config = load_curriculum(ROOT / "configs" / "curriculum.yaml").stages[0].config
    with torch.device("meta"):
        model = build_model(ModelSpec.from_config(config))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    everything = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    assert f"{4 * trained / 1e6:.1f} MB (**M**)" in SCALE
    assert f"{4 * (everything + 2 * trained) / 1e6:.1f} MB with AdamW's moments" in SCALE
