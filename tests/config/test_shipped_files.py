"""Shipped YAML files: each loads, has a header with its purpose and command, and has the training plan's values."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from motip.config import Curriculum, load_config, load_curriculum
from motip.config.experiment_file import is_experiment
from motip.errors import MotipError

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted((ROOT / "configs").rglob("*.yaml"))
CURRICULA = [path for path in SHIPPED if "\nstages:" in path.read_text()]
EXPERIMENTS = [path for path in SHIPPED if is_experiment(path)]
SWEEPS = [path for path in SHIPPED if "sweeps" in path.parts or path.stem.startswith("sweep")]
STAGE_FILES = [path for path in SHIPPED if path not in (*CURRICULA, *EXPERIMENTS, *SWEEPS)]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_header_has_purpose_and_command(path: Path) -> None:
    header = [line for line in path.read_text().splitlines()[:8] if line.startswith("#")]
    assert len(header) >= 2
    assert any("python ray_jobs/" in line or "ray job submit" in line for line in header)


@pytest.mark.parametrize("path", STAGE_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_stage_files_load(path: Path) -> None:
    assert load_config(path).NUM_CLASSES >= 1


@pytest.mark.parametrize("path", CURRICULA, ids=lambda path: str(path.relative_to(ROOT)))
def test_curricula_load_and_have_four_stages(path: Path) -> None:
    assert len(load_curriculum(path).stages) == (1 if path.name == "base.yaml" else 4)


@pytest.mark.parametrize("name", ["curriculum.yaml", "curriculum_replay.yaml"])
def test_the_demo_has_the_training_plans_numbers_of_videos(name: str) -> None:
    curriculum = load_curriculum(ROOT / "configs" / "demo" / name)
    assert [stage.data[0].videos for stage in curriculum.stages] == [56, 150, 80, 150]


@pytest.mark.parametrize("stage", [2, 3])
def test_replay_is_30_percent_of_the_aerial_stages_clips(stage: int) -> None:
    curriculum = load_curriculum(ROOT / "configs" / "demo" / "curriculum_replay.yaml")
    aerial, *others = [(mix.videos or 0) * mix.weight for mix in curriculum.stages[stage].data]
    assert sum(others) / (aerial + sum(others)) == pytest.approx(0.3, abs=0.01)


def test_the_curriculum_has_the_training_plans_values() -> None:
    curriculum = load_curriculum(ROOT / "configs" / "curriculum.yaml")
    assert [stage.name for stage in curriculum.stages] == [
        "BDD-Foundation",
        "BDD-Refinement",
        "Vis-Adaptation",
        "Vis-Specialist",
    ]
    assert [stage.data[0].videos for stage in curriculum.stages] == [56, 150, 80, 150]
    assert [stage.config.EPOCHS for stage in curriculum.stages] == [20] * 4
    assert [stage.config.LR for stage in curriculum.stages] == [2e-5, 1e-5, 2e-5, 1e-5]
    first, second, third, _ = [stage.config for stage in curriculum.stages]
    assert first.lr_milestones == [15] and second.lr_milestones == [10]
    assert first.clip_schedule(0).lengths == (5,) and first.clip_schedule(0).intervals == (2, 3)
    assert second.clip_schedule(0).lengths == (3,) and second.clip_schedule(0).intervals == (1, 2)
    assert third.clip_schedule(0).lengths == (2,)
    assert first.backbone_lr_scale == pytest.approx(0.1)
    assert all(stage.config.class_names == ("pedestrian", "car") for stage in curriculum.stages)
    assert curriculum.stages[0].weights == "./pretrains/motip_dancetrack.pth"
    assert curriculum.parent_of(curriculum.stages[3]) is curriculum.stages[2]


def test_overrides_apply_to_all_stages_or_one() -> None:
    path = ROOT / "configs" / "curriculum.yaml"
    curriculum = load_curriculum(path, ["EPOCHS=3", "Vis-Adaptation:LR=5e-5"])
    assert [stage.config.EPOCHS for stage in curriculum.stages] == [3] * 4
    assert curriculum.stage("Vis-Adaptation").config.LR == 5e-5
    with pytest.raises(MotipError, match="stage that does not exist"):
        load_curriculum(path, ["Vis-Nothing:LR=5e-5"])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("source: bdd100k, videos: 56", "source: bdd10k, videos: 56", "unknown source bdd10k"),
        ("    car: [car]\n", "", "no source of this stage has labels for: car"),
        ("weights: ./pretrains/motip_dancetrack.pth", "weights: previous", "no previous one"),
        ("format: visdrone", "format: visdron", "format"),
        ("videos: 56", "videos: 56, frame_budget: 100", "set either videos or frame_budget"),
        ("name: BDD-Refinement", "name: BDD-Foundation", "same name"),
        ("config: bdd_stage2.yaml", "config: bdd_stage9.yaml", "file not found"),
        (
            "name: BDD-Refinement",
            "name: BDD-Refinement\n    allow_unlabelled: [cat]",
            "cat is not a class",
        ),
        ("    best: HOTA ", "    best: hota ", "unknown metric for the best checkpoint"),
        ("    best: HOTA ", "    best: IDSW ", "unknown metric for the best checkpoint"),
        ("    best: HOTA ", "    best: HOTA/truck ", "unknown metric for the best checkpoint"),
        ("    best: HOTA ", "    best: bdd100k/HOTA ", "unknown metric for the best checkpoint"),
    ],
)
def test_an_invalid_curriculum_is_an_error(tmp_path: Path, old: str, new: str, message: str) -> None:
    text = _without_sweeps((ROOT / "configs" / "curriculum.yaml").read_text())
    if old == "    car: [car]\n":
        text = text.replace("      car: [car]\n", "", 1)
    else:
        assert old in text
        text = text.replace(old, new, 1)
    for path in STAGE_FILES:
        if path.parent == ROOT / "configs":
            (tmp_path / path.name).write_text(path.read_text())
    broken = tmp_path / "curriculum.yaml"
    broken.write_text(text)
    with pytest.raises(MotipError, match=message):
        load_curriculum(broken)


@pytest.mark.parametrize("name", ["IDF1", "HOTA/car", "det_avg/AssA", "agnostic/MOTA"])
def test_other_metrics_may_select_the_best(tmp_path: Path, name: str) -> None:
    assert _with_line(tmp_path, "    best: HOTA ", f"    best: {name} ").stages[-1].best == name


def test_a_metric_of_one_of_several_sources_may_select_the_best(tmp_path: Path) -> None:
    line = "    best: visdrone/HOTA/car\n    val: [visdrone, bdd100k] "
    assert _with_line(tmp_path, "    best: HOTA ", line).stages[-1].best == "visdrone/HOTA/car"


def _without_sweeps(text: str) -> str:
    """The curriculum without its sweep files, to be written to another folder."""
    return re.sub(r"\n    sweep: .*", "", text)


def _with_line(folder: Path, old: str, new: str) -> Curriculum:
    text = _without_sweeps((ROOT / "configs" / "curriculum.yaml").read_text())
    assert old in text
    path = folder / "curriculum.yaml"
    path.write_text(text.replace(old, new, 1))
    for stage_file in (ROOT / "configs").glob("*.yaml"):
        if stage_file.name != path.name:
            (folder / stage_file.name).write_text(stage_file.read_text())
    return load_curriculum(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sources: [a]\nstages: []\n", "sources: must be a block"),
        ("sources: a\nstages: []\n", "sources: must be a block"),
        ("sources: {a: 1}\nstages: []\n", "must be a block of `key: value` lines"),
        ("stages: {name: a}\n", "stages: must be a list"),
        ("stages: a\n", "stages: must be a list"),
        ("stages: [a]\n", "must be a block of `key: value` lines"),
    ],
)
def test_a_block_in_place_of_a_list_or_a_value_is_an_error(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "curriculum.yaml").write_text(text)
    with pytest.raises(MotipError, match=message) as caught:
        load_curriculum(tmp_path / "curriculum.yaml")
    assert "curriculum.yaml" in str(caught.value)
