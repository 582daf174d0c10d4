"""Sweep files: what is refused and how it is said, and that every shipped one fits its stage."""

from __future__ import annotations

from pathlib import Path

import pytest

from motip.config import Config, load_config, load_curriculum
from motip.config.sweep_file import Choices, Range, SweepFile, check_sweep, hand_set, load_sweep
from motip.config.tuned import overlay_text, read_overlay, with_overlay
from motip.errors import MotipError

LR = "LR: {low: 1.0e-5, high: 1.0e-3, log: true}"


def sweep(folder: Path, text: str) -> SweepFile:
    path = folder / "sweep.yaml"
    path.write_text(text)
    return load_sweep(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("spcae: {}", ["unknown key spcae", "sweep.yaml:1", "did you mean space?"]),
        ("trials: 4", ["needs a block `space:`"]),
        ("space: {}", ["needs a block `space:`"]),
        ("space: {LERNRATE: {low: 1, high: 2}}", ["unknown configuration key LERNRATE", "space.LERNRATE"]),
        ("space: {LR: {low: 2, high: 1}}", ["the range is empty", "low 2 is not below high 1", "space.LR"]),
        ("space: {LR: {low: 1, high: 1}}", ["the range is empty"]),
        ("space: {LR: {low: slow, high: 1}}", ["low: Input should be a valid number", "'slow'"]),
        ("space: {LR: {low: 0, high: 1, log: true}}", ["starts above 0"]),
        ("space: {LR: {low: 1, high: .inf}}", ["finite"]),
        ("space: {LR: {low: 1, high: 2, log: true, step: 1}}", ["either log or step"]),
        ("space: {LR: {low: 1, hgih: 2}}", ["unknown key hgih", "did you mean high?"]),
        ("space: {LR: 1.0e-4}", ["a range or a list of choices", "0.0001"]),
        ("space: {sample_intervals: {choices: []}}", ["the list of choices is empty"]),
        ("space: {sample_intervals: {choices: [[1], [1]]}}", ["stands twice"]),
        ("space: {SEED: {choices: [1, 2]}}", ["SEED cannot be searched", "seed cannot be what wins"]),
        ("space: {USE_WANDB: {choices: [true]}}", ["USE_WANDB cannot be searched", "MLflow"]),
        (f"trials: many\nspace: {{{LR}}}", ["trials: Input should be a valid integer", "'many'"]),
        (f"search: grid\nspace: {{{LR}}}", ["search: Input should be 'tpe' or 'random'"]),
        (f"set: {{EPOCSH: 3}}\nspace: {{{LR}}}", ["unknown configuration key EPOCSH", "did you mean EPOCHS?"]),
        (f"set: {{LR: 3}}\nspace: {{{LR}}}", ["under `set:` and under `space:`"]),
        (f"confirm: {{seeds: 0}}\nspace: {{{LR}}}", ["confirm.seeds"]),
    ],
)
def test_a_bad_sweep_file_is_one_message(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(MotipError) as caught:
        sweep(tmp_path, text)
    said = caught.value.render()
    assert [word for word in words if word not in said] == [], said


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("space: {LR: {choices: [fast]}}\nprune: null", ["LR", "valid number", "'fast'"]),
        ("space: {EPOCHS: {low: 2, high: 4.5}}\nprune: null", ["EPOCHS", "4.5"]),
        ("space: {NUM_ID_VOCABULARY: {low: 0, high: 4}}\nprune: null", ["NUM_ID_VOCABULARY"]),
        (
            "space: {LR_DROP: {choices: [2]}, SCHEDULER_MILESTONES: {choices: [[2]]}}\nprune: null",
            ["LR_DROP and SCHEDULER_MILESTONES say the same thing"],
        ),
        (f"space: {{{LR}}}", ["no trial could be pruned", "scores every 6 epochs, 6 epochs", "EVALUATE_EVERY_EPOCHS"]),
        (f"space: {{{LR}}}\nset: {{EVALUATE_EVERY_EPOCHS: 2}}\nprune: {{first: 5}}", ["no trial could be pruned"]),
    ],
)
def test_values_that_a_stage_cannot_have_are_refused(
    repo_root: Path, tmp_path: Path, text: str, words: list[str]
) -> None:
    config = load_config(repo_root / "configs/demo/stage1.yaml", ["EPOCHS=6", "EVALUATE_EVERY_EPOCHS=6"])
    with pytest.raises(MotipError) as caught:
        check_sweep(sweep(tmp_path, text), config)
    said = caught.value.render()
    assert [word for word in words if word not in said] == [], said


@pytest.mark.parametrize("name", ["lr_and_intervals", "bdd_stage2", "visdrone_stage1", "visdrone_stage2"])
def test_shipped_sweeps_fit_their_stages(repo_root: Path, name: str) -> None:
    found = load_sweep(repo_root / f"configs/sweeps/{name}.yaml")
    stages = ["bdd_stage2", "visdrone_stage2"] if name == "lr_and_intervals" else [name]
    for stage in stages:
        config = load_config(repo_root / f"configs/{stage}.yaml")
        check_sweep(found, config)
        own = hand_set(config, found.space)
        assert [key for key in ("LR", "LR_BACKBONE_SCALE") if not found.space[key].contains(own[key])] == []


def test_every_stage_of_the_plan_has_a_sweep_and_so_has_the_demo(repo_root: Path) -> None:
    curriculum = load_curriculum(repo_root / "configs/curriculum.yaml")
    for stage in curriculum.stages:
        check_sweep(load_sweep(repo_root / f"configs/sweeps/{stage.config.name}.yaml"), stage.config)
    demo = load_curriculum(repo_root / "configs/demo/curriculum.yaml")
    check_sweep(load_sweep(repo_root / "configs/demo/sweep.yaml"), demo.stages[0].config)


def test_hand_set_values_in_the_terms_of_the_sweep(repo_root: Path) -> None:
    config = load_config(repo_root / "configs/bdd_stage2.yaml")
    assert config.LR_BACKBONE_SCALE is None
    assert hand_set(config, {"LR_BACKBONE_SCALE": 0, "LR_DROP": 0}) == {
        "LR_BACKBONE_SCALE": pytest.approx(0.1),
        "LR_DROP": 10,
    }
    by_milestones = load_config(repo_root / "configs/demo/stage1.yaml", ["SCHEDULER_MILESTONES=[3, 5]"])
    assert hand_set(by_milestones, {"LR_DROP": 0}) == {"LR_DROP": None}


def test_what_a_range_and_a_list_contain() -> None:
    stepped = Range(low=6, high=15, step=3)
    assert [value for value in range(5, 17) if stepped.contains(value)] == [6, 9, 12, 15]
    assert not stepped.contains(None) and not stepped.contains(True)
    lists = Choices(choices=([1], [1, 2]))
    assert lists.contains([1, 2]) and lists.contains((1,)) and not lists.contains([2]) and not lists.contains(None)


def test_size_counts_settings() -> None:
    space = {"LR_DROP": Range(low=6, high=15, step=3), "sample_intervals": Choices(choices=([1], [1, 2]))}
    assert SweepFile(space=space).size() == 8
    assert SweepFile(space={**space, "LR": Range(low=1, high=2)}).size() == float("inf")
    assert SweepFile(space={"LR_DROP": Range(low=2, high=5)}).size() == 4


def test_an_overlay_is_read_back_and_stands_between_configuration_and_set(repo_root: Path, tmp_path: Path) -> None:
    path = tmp_path / "tuned.yaml"
    values = {"LR": 1e-05, "LR_DROP": 4, "sample_intervals": [1, 2], "DETR_AUX_LOSS": True}
    path.write_text(overlay_text(values, ["evidence: 46.1", ""]))
    assert path.read_text().startswith("# evidence: 46.1\n#\nLR: 1.0e-05\n")
    assert read_overlay(path) == values
    config = load_config(repo_root / "configs/demo/stage1.yaml")
    assert config.SCHEDULER_MILESTONES is not None
    tuned = with_overlay(config, path, ["LR=0.5"])
    assert (tuned.LR, tuned.LR_DROP, tuned.SCHEDULER_MILESTONES) == (0.5, 4, None)
    assert tuned.name == config.name
    assert (tuned.origin("LR"), tuned.origin("LR_DROP")) == ("--set", str(path))


def test_an_overlay_without_values_changes_nothing(repo_root: Path, tmp_path: Path) -> None:
    path = tmp_path / "tuned.yaml"
    path.write_text(overlay_text({}, ["the hand-set values stay"]))
    config = load_config(repo_root / "configs/demo/stage1.yaml")
    assert with_overlay(config, path).to_dict() == config.to_dict()


def write_curriculum(folder: Path, stage_lines: str) -> Path:
    (folder / "stage.yaml").write_text("NUM_CLASSES: 1\nEPOCHS: 4\nLR: 1.0e-4\n")
    (folder / "sweep.yaml").write_text(f"space:\n  {LR}\n")
    path = folder / "curriculum.yaml"
    path.write_text(
        "name: c\nsources:\n  dance: {format: motchallenge, root: D, domain: dance}\n"
        f"stages:\n  - {{name: only, config: stage.yaml, data: [{{source: dance, videos: 2}}], {stage_lines}}}\n"
    )
    return path


def test_a_stage_names_its_sweep_and_its_tuned_values(tmp_path: Path) -> None:
    path = write_curriculum(tmp_path, "sweep: sweep.yaml, tuned: tuned.yaml")
    with pytest.raises(MotipError, match="the tuned values are not there"):
        load_curriculum(path)
    # The sweep starts from the hand-set values, so the tuned ones need not be there yet, and do not count.
    assert load_curriculum(path, tune=True).stages[0].config.LR == 1e-4
    (tmp_path / "tuned.yaml").write_text("LR: 3.0e-4\n")
    assert load_curriculum(path).stages[0].config.LR == 3e-4
    assert load_curriculum(path, ["LR=5.0e-4"]).stages[0].config.LR == 5e-4
    assert load_curriculum(path, tune=True).stages[0].config.LR == 1e-4
    assert load_curriculum(path, tune="only").stages[0].config.LR == 1e-4
    assert load_curriculum(path, tune="another").stages[0].config.LR == 3e-4
    sweep_file = load_curriculum(path).stages[0].sweep
    assert sweep_file is not None and list(sweep_file.space) == ["LR"]


def test_a_bad_tuned_value_names_its_file(tmp_path: Path) -> None:
    path = write_curriculum(tmp_path, "tuned: tuned.yaml")
    (tmp_path / "tuned.yaml").write_text("LRR: 3.0e-4\n")
    with pytest.raises(MotipError, match="unknown configuration key LRR") as caught:
        load_curriculum(path)
    assert "tuned.yaml" in str(caught.value.where)


def test_a_broken_step_of_a_whole_key_is_refused_before_anything_is_trained() -> None:
    sweep = SweepFile(space={"EPOCHS": Range(low=2, high=8, step=2.5)})
    with pytest.raises(MotipError, match="takes whole numbers"):
        check_sweep(sweep, Config())
