"""Experiments: arms and seeds, resuming, and the summary with confidence intervals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from motip.cli.launch import checked_options, launch_experiment
from motip.config.experiment_file import is_experiment, load_experiment
from motip.errors import MotipError
from tests.helpers.small_curriculum import ROOT, write_files

EXPERIMENT = """name: small-experiment
curriculum: curriculum.yaml
judge: aerial
seeds: [1, 2]
arms:
  chain: {about: all stages}
  direct:
    about: aerial only
    stages: [Vis-Adaptation, Vis-Specialist]
  forgetful:
    set: ["PRETRAIN_SKIP=[id_decoder.*]"]
"""


def _launch(path: Path, arms: str | None = None) -> Path:
    """Run the experiment with seed 1 in this process; returns its folder in the storage."""
    folder = path.parent
    options = checked_options(str(path), data_root=str(folder), storage=str(folder / "storage"), workers=0)
    found = launch_experiment(load_experiment(path), options, arms, "1")
    assert isinstance(found, Path)
    return found


def _file(folder: Path, text: str = EXPERIMENT) -> Path:
    write_files(folder)
    path = folder / "experiment.yaml"
    path.write_text(text)
    return path


def test_the_shipped_experiment_has_comparable_arms() -> None:
    path = ROOT / "configs" / "demo" / "experiment.yaml"
    assert is_experiment(path) and not is_experiment(path.parent / "curriculum.yaml")
    experiment = load_experiment(path)
    assert len(experiment.seeds) == 3
    arms = {arm.name: experiment.curriculum_of(arm, 1) for arm in experiment.arms}
    clips = {
        name: sum(stage.config.EPOCHS * (stage.config.CLIPS_PER_EPOCH or 0) for stage in arm.stages)
        for name, arm in arms.items()
    }
    replay = clips.pop("replay")
    assert len(set(clips.values())) == 1, "every arm trains on the same number of clips"
    assert replay > clips["chain"], "replay clips are additional"
    for name, arm in arms.items():
        first = arm.stages[0]
        from_base = first.weights == "motip_demo_dance.safetensors"
        assert from_base is (name != "scratch") and bool(first.initialise) is (name == "scratch")
        assert all(stage.weights == "previous" for stage in arm.stages[1:])
        assert all(stage.config.SEED == 1 for stage in arm.stages)
    assert arms["small-vocabulary"].stages[-1].config.NUM_ID_VOCABULARY == 16
    assert arms["chain"].stages[-1].config.NUM_ID_VOCABULARY > 30


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("judge: aerial", "judge: water"), "no source has the domain"),
        (("seeds: [1, 2]", "seeds: [1, 1]"), "a seed is listed twice"),
        (("seeds: [1, 2]", "seeds: []"), "seeds"),
        (("stages: [Vis-Adaptation,", "stages: [Vis-Adoption,"), "unknown stage Vis-Adoption"),
        (('set: ["PRETRAIN_SKIP=', 'set: ["PRETRAIN_SKAP='), "PRETRAIN_SKAP"),
        (("about: aerial only", "abut: aerial only"), "abut"),
        (("arms:", "arms: 3\nother:"), "arms: must be a block"),
    ],
)
def test_an_invalid_experiment_file_is_an_error(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    text = EXPERIMENT.replace(*change)
    assert text != EXPERIMENT
    with pytest.raises(MotipError, match=message):
        load_experiment(_file(tmp_path, text))


def test_arms_share_stages_and_an_experiment_resumes(tmp_path: Path) -> None:
    # two arms
    path = _file(tmp_path)
    folder = _launch(path, "chain,direct")
    first = json.loads((folder / "results.json").read_text())
    assert {name: arm["seeds"] for name, arm in first.items()} == {"chain": [1], "direct": [1]}
    estimates = [value for arm in first.values() for own in arm["stages"].values() for value in own.values()]
    assert estimates and all(value.keys() == {"mean", "low", "high", "each"} for value in estimates)
    stages = tmp_path / "storage" / "curricula" / "small-experiment"
    before = {each: each.stat().st_mtime_ns for each in stages.glob("*/*/checkpoint_best.pth")}
    assert len(before) == 6

    # all arms
    _launch(path)
    after = {each: each.stat().st_mtime_ns for each in stages.glob("*/*/checkpoint_best.pth")}
    assert before.items() <= after.items(), "finished stages are not trained again"
    assert len(after) == 10
    text = (folder / "results.md").read_text()
    for part in ("### Final models", "chain 1, direct 1, forgetful 1", "aerial only", "Vis-Specialist"):
        assert part in text
    assert (folder / "curves.png").stat().st_size > 5000
    dropped = [
        json.loads(each.read_text())["counts"]["file"].get("dropped", 0)
        for each in stages.glob("Vis-Specialist/*/transfer.json")
    ]
    assert sorted(count > 0 for count in dropped) == [False, False, True]


def test_an_unknown_arm_is_an_error_of_the_command(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "ray_jobs" / "curriculum.py"), "--config", str(_file(tmp_path))]
    command += ["--arms", "chian", "--storage", str(tmp_path / "s")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--arms" in done.stderr and "chian" in done.stderr and "forgetful" in done.stderr


def test_a_changed_arm_is_skipped_and_logged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _file(tmp_path)
    folder = _launch(path, "direct")
    assert "direct" in json.loads((folder / "results.json").read_text())
    path.write_text(EXPERIMENT.replace("    stages: [Vis-Adaptation, Vis-Specialist]", "    stages: [Vis-Specialist]"))
    _launch(path, "forgetful")
    assert "arm direct, seed 1: skipped" in capsys.readouterr().out
    assert set(json.loads((folder / "results.json").read_text())) == {"forgetful"}


def test_an_arm_with_a_subset_of_stages_starts_from_detr_pretrain(tmp_path: Path) -> None:
    path = _file(tmp_path)
    file = tmp_path / "curriculum.yaml"
    file.write_text(file.read_text().replace(", initialise: base.yaml", ""))
    stage = tmp_path / "one.yaml"
    stage.write_text(stage.read_text() + "DETR_PRETRAIN: given.pth\n")
    experiment = load_experiment(path)
    assert experiment.curriculum_of(experiment.arm("direct"), 1).stages[0].weights == "given.pth"
