"""Sweep files: validation and its messages; every shipped sweep fits its stage; overlays of tuned values."""

from __future__ import annotations

from pathlib import Path

import pytest

from motip.config import Config, load_config, load_curriculum
from motip.config.sweep_file import Choices, Range, SweepFile, baseline_values, check_sweep, load_sweep
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
        ("space: {sample_intervals: {choices: [[1], [1]]}}", ["listed twice"]),
        ("space: {SEED: {choices: [1, 2]}}", ["SEED cannot be searched", "confirmed with other seeds"]),
        ("space: {USE_WANDB: {choices: [true]}}", ["USE_WANDB cannot be searched", "MLflow"]),
        (f"trials: many\nspace: {{{LR}}}", ["trials: Input should be a valid integer", "'many'"]),
        (f"search: grid\nspace: {{{LR}}}", ["search: Input should be 'tpe' or 'random'"]),
        (f"set: {{EPOCSH: 3}}\nspace: {{{LR}}}", ["unknown configuration key EPOCSH", "did you mean EPOCHS?"]),
        (f"set: {{LR: 3}}\nspace: {{{LR}}}", ["under `set:` and under `space:`"]),
        (f"confirm: {{seeds: 0}}\nspace: {{{LR}}}", ["confirm.seeds"]),
    ],
)
def test_an_invalid_sweep_file_is_one_error(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(MotipError) as caught:
        sweep(tmp_path, text)
    message = caught.value.render()
    assert [word for word in words if word not in message] == [], message


@pytest.mark.parametrize("key", ["baseline", "hand_set"])
def test_confirm_reads_the_key_of_version_0_1_and_writes_it(tmp_path: Path, key: str) -> None:
    """The written form is part of a digest that finds the sweep's MLflow run."""
    found = sweep(tmp_path, f"confirm: {{seeds: 1, {key}: false}}\nspace: {{{LR}}}")
    assert not found.confirm.baseline
    assert found.model_dump(mode="json", by_alias=True)["confirm"] == {"seeds": 1, "hand_set": False}


def test_both_names_of_the_confirm_key_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(MotipError, match="two names of one key"):
        sweep(tmp_path, f"confirm: {{baseline: true, hand_set: false}}\nspace: {{{LR}}}")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("space: {LR: {choices: [fast]}}\nprune: null", ["LR", "valid number", "'fast'"]),
        ("space: {EPOCHS: {low: 2, high: 4.5}}\nprune: null", ["EPOCHS", "4.5"]),
        ("space: {NUM_ID_VOCABULARY: {low: 0, high: 4}}\nprune: null", ["NUM_ID_VOCABULARY"]),
        (
            "space: {LR_DROP: {choices: [2]}, SCHEDULER_MILESTONES: {choices: [[2]]}}\nprune: null",
            ["LR_DROP and SCHEDULER_MILESTONES are the same setting"],
        ),
        (f"space: {{{LR}}}", ["no trial could be pruned", "scores every 6 epochs, 6 epochs", "EVALUATE_EVERY_EPOCHS"]),
        (f"space: {{{LR}}}\nset: {{EVALUATE_EVERY_EPOCHS: 2}}\nprune: {{first: 5}}", ["no trial could be pruned"]),
    ],
)
def test_values_that_are_invalid_for_the_stage_are_errors(
    repo_root: Path, tmp_path: Path, text: str, words: list[str]
) -> None:
    config = load_config(repo_root / "configs/demo/stage1.yaml", ["EPOCHS=6", "EVALUATE_EVERY_EPOCHS=6"])
    with pytest.raises(MotipError) as caught:
        check_sweep(sweep(tmp_path, text), config)
    message = caught.value.render()
    assert [word for word in words if word not in message] == [], message


@pytest.mark.parametrize("name", ["lr_and_intervals", "bdd_stage2", "visdrone_stage1", "visdrone_stage2"])
def test_shipped_sweeps_fit_their_stages(repo_root: Path, name: str) -> None:
    found = load_sweep(repo_root / f"configs/sweeps/{name}.yaml")
    stages = ["bdd_stage2", "visdrone_stage2"] if name == "lr_and_intervals" else [name]
    for stage in stages:
        config = load_config(repo_root / f"configs/{stage}.yaml")
        check_sweep(found, config)
        own = baseline_values(config, found.space)
        assert [key for key in ("LR", "LR_BACKBONE_SCALE") if not found.space[key].contains(own[key])] == []


def test_every_stage_of_the_curriculum_and_the_demos_first_have_a_sweep(repo_root: Path) -> None:
    curriculum = load_curriculum(repo_root / "configs/curriculum.yaml")
    assert all(stage.sweep is not None for stage in curriculum.stages)
    for stage in curriculum.stages:
        check_sweep(load_sweep(repo_root / f"configs/sweeps/{stage.config.name}.yaml"), stage.config)
    demo = load_curriculum(repo_root / "configs/demo/curriculum.yaml")
    check_sweep(load_sweep(repo_root / "configs/demo/sweep.yaml"), demo.stages[0].config)


def test_baseline_values_are_converted_to_the_searched_keys(repo_root: Path) -> None:
    config = load_config(repo_root / "configs/bdd_stage2.yaml")
    assert config.LR_BACKBONE_SCALE is None
    assert baseline_values(config, {"LR_BACKBONE_SCALE": 0, "LR_DROP": 0}) == {
        "LR_BACKBONE_SCALE": pytest.approx(0.1),
        "LR_DROP": 10,
    }
    by_milestones = load_config(repo_root / "configs/demo/stage1.yaml", ["SCHEDULER_MILESTONES=[3, 5]"])
    assert baseline_values(by_milestones, {"LR_DROP": 0}) == {"LR_DROP": None}


def test_contains_of_ranges_and_choices() -> None:
    stepped = Range(low=6, high=15, step=3)
    assert [value for value in range(5, 17) if stepped.contains(value)] == [6, 9, 12, 15]
    assert not stepped.contains(None) and not stepped.contains(True)
    lists = Choices(choices=([1], [1, 2]))
    assert lists.contains([1, 2]) and lists.contains((1,)) and not lists.contains([2]) and not lists.contains(None)


def test_size_is_the_number_of_settings() -> None:
    space = {"LR_DROP": Range(low=6, high=15, step=3), "sample_intervals": Choices(choices=([1], [1, 2]))}
    assert SweepFile(space=space).size() == 8
    assert SweepFile(space={**space, "LR": Range(low=1, high=2)}).size() == float("inf")
    assert SweepFile(space={"LR_DROP": Range(low=2, high=5)}).size() == 4


def test_an_overlay_is_read_back_and_overrides_the_configuration_but_not_set(repo_root: Path, tmp_path: Path) -> None:
    path = tmp_path / "tuned.yaml"
    values = {"LR": 1e-05, "LR_DROP": 4, "sample_intervals": [1, 2], "DETR_AUX_LOSS": True}
    path.write_text(overlay_text(values, ["HOTA 46.1", ""]))
    assert path.read_text().startswith("# HOTA 46.1\n#\nLR: 1.0e-05\n")
    assert read_overlay(path) == values
    config = load_config(repo_root / "configs/demo/stage1.yaml")
    assert config.SCHEDULER_MILESTONES is not None
    tuned = with_overlay(config, path, ["LR=0.5"])
    assert (tuned.LR, tuned.LR_DROP, tuned.SCHEDULER_MILESTONES) == (0.5, 4, None)
    assert tuned.name == config.name
    assert (tuned.origin("LR"), tuned.origin("LR_DROP")) == ("--set", str(path))


def test_an_overlay_without_values_changes_nothing(repo_root: Path, tmp_path: Path) -> None:
    path = tmp_path / "tuned.yaml"
    path.write_text(overlay_text({}, ["the baseline is kept"]))
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
    with pytest.raises(MotipError, match="the file of tuned values does not exist"):
        load_curriculum(path)
    # The sweep starts from the baseline, so the tuned values need not exist yet, and are ignored.
    assert load_curriculum(path, tune=True).stages[0].config.LR == 1e-4
    (tmp_path / "tuned.yaml").write_text("LR: 3.0e-4\n")
    assert load_curriculum(path).stages[0].config.LR == 3e-4
    assert load_curriculum(path, ["LR=5.0e-4"]).stages[0].config.LR == 5e-4
    assert load_curriculum(path, tune=True).stages[0].config.LR == 1e-4
    assert load_curriculum(path, tune="only").stages[0].config.LR == 1e-4
    assert load_curriculum(path, tune="another").stages[0].config.LR == 3e-4
    sweep_file = load_curriculum(path).stages[0].sweep
    assert sweep_file is not None and list(sweep_file.space) == ["LR"]


def test_an_error_in_tuned_values_names_their_file(tmp_path: Path) -> None:
    path = write_curriculum(tmp_path, "tuned: tuned.yaml")
    (tmp_path / "tuned.yaml").write_text("LRR: 3.0e-4\n")
    with pytest.raises(MotipError, match="unknown configuration key LRR") as caught:
        load_curriculum(path)
    assert "tuned.yaml" in str(caught.value.where)


def test_a_fractional_step_of_an_integer_key_is_an_error() -> None:
    sweep = SweepFile(space={"EPOCHS": Range(low=2, high=8, step=2.5)})
    with pytest.raises(MotipError, match="takes integers"):
        check_sweep(sweep, Config())
