"""The experiment: arms and seeds, resumed where they were cut off, and reported with intervals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from motip.cli.launch import launch_experiment
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


def _file(folder: Path, text: str = EXPERIMENT) -> Path:
    write_files(folder)
    path = folder / "experiment.yaml"
    path.write_text(text)
    return path


def test_the_shipped_experiment_holds_the_arms_that_its_docs_name() -> None:
    path = ROOT / "configs" / "demo" / "experiment.yaml"
    assert is_experiment(path) and not is_experiment(path.parent / "curriculum.yaml")
    experiment = load_experiment(path)
    assert len(experiment.seeds) == 3
    arms = {arm.name: experiment.curriculum_of(arm, 1) for arm in experiment.arms}
    epochs = {name: sum(stage.config.EPOCHS * stage.config.CLIPS_PER_EPOCH for stage in arm.stages)
              for name, arm in arms.items()}  # fmt: skip
    replay = epochs.pop("replay")
    assert len(set(epochs.values())) == 1, "every arm sees as many clips"
    assert replay > epochs["chain"], "those of the earlier domains come on top"
    for name, arm in arms.items():
        first = arm.stages[0]
        given = first.weights == "motip_demo_dance.safetensors"
        assert given is (name != "scratch") and bool(first.initialise) is (name == "scratch")
        assert all(stage.weights == "previous" for stage in arm.stages[1:])
        assert all(stage.config.SEED == 1 for stage in arm.stages)
    assert arms["small-vocabulary"].stages[-1].config.NUM_ID_VOCABULARY == 16
    assert arms["chain"].stages[-1].config.NUM_ID_VOCABULARY > 30


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("judge: aerial", "judge: water"), "no source shows the domain"),
        (("seeds: [1, 2]", "seeds: [1, 1]"), "a seed is named twice"),
        (("seeds: [1, 2]", "seeds: []"), "seeds"),
        (("stages: [Vis-Adaptation,", "stages: [Vis-Adoption,"), "there is no stage Vis-Adoption"),
        (('set: ["PRETRAIN_SKIP=', 'set: ["PRETRAIN_SKAP='), "PRETRAIN_SKAP"),
        (("about: aerial only", "abut: aerial only"), "abut"),
        (("arms:", "arms: 3\nother:"), "arms: holds a block"),
    ],
)
def test_a_mistake_in_the_file_is_named(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    text = EXPERIMENT.replace(*change)
    assert text != EXPERIMENT
    with pytest.raises(MotipError, match=message):
        load_experiment(_file(tmp_path, text))


def test_arms_share_stages_and_an_experiment_goes_on_where_it_was(tmp_path: Path) -> None:
    path, storage = _file(tmp_path), tmp_path / "storage"
    folder = launch_experiment(str(path), data_root=str(tmp_path), storage=str(storage), workers=0,
                               arms="chain,direct", seeds="1")  # fmt: skip
    first = json.loads((folder / "results.json").read_text())
    assert {name: arm["seeds"] for name, arm in first.items()} == {"chain": [1], "direct": [1]}
    stages = storage / "curricula" / "small-experiment"
    before = {each: each.stat().st_mtime_ns for each in stages.glob("*/*/checkpoint_best.pth")}
    assert len(before) == 6

    launch_experiment(str(path), data_root=str(tmp_path), storage=str(storage), workers=0, seeds="1")
    after = {each: each.stat().st_mtime_ns for each in stages.glob("*/*/checkpoint_best.pth")}
    assert before.items() <= after.items(), "what was trained is not trained again"
    assert len(after) == 10
    text = (folder / "results.md").read_text()
    for part in ("### Final models", "chain 1, direct 1, forgetful 1", "aerial only", "Vis-Specialist"):
        assert part in text
    assert (folder / "curves.png").stat().st_size > 5000
    skipped = [
        json.loads(each.read_text())["counts"]["file"].get("dropped", 0)
        for each in stages.glob("Vis-Specialist/*/transfer.json")
    ]
    assert sorted(count > 0 for count in skipped) == [False, False, True]


def test_the_command_names_an_arm_that_is_not_there(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "ray_jobs" / "curriculum.py"), "--config", str(_file(tmp_path))]
    done = subprocess.run([*command, "--arms", "chian", "--storage", str(tmp_path / "s")], capture_output=True,
                          text=True, check=False)  # fmt: skip
    assert done.returncode == 2
    assert "--arms" in done.stderr and "chian" in done.stderr and "forgetful" in done.stderr


def test_an_arm_that_was_changed_is_left_out_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, storage = _file(tmp_path), tmp_path / "storage"
    where = {"data_root": str(tmp_path), "storage": str(storage), "workers": 0}
    folder = launch_experiment(str(path), **where, arms="direct", seeds="1")  # type: ignore[arg-type]
    assert "direct" in json.loads((folder / "results.json").read_text())
    path.write_text(EXPERIMENT.replace("    stages: [Vis-Adaptation, Vis-Specialist]", "    stages: [Vis-Specialist]"))
    launch_experiment(str(path), **where, arms="forgetful", seeds="1")  # type: ignore[arg-type]
    assert "arm direct, seed 1: left out" in capsys.readouterr().out
    assert set(json.loads((folder / "results.json").read_text())) == {"forgetful"}


def test_an_arm_that_skips_stages_starts_from_weights_that_a_configuration_names(tmp_path: Path) -> None:
    path = _file(tmp_path)
    file = tmp_path / "curriculum.yaml"
    file.write_text(file.read_text().replace(", initialise: base.yaml", ""))
    stage = tmp_path / "one.yaml"
    stage.write_text(stage.read_text() + "DETR_PRETRAIN: given.pth\n")
    experiment = load_experiment(path)
    assert experiment.curriculum_of(experiment.arm("direct"), 1).stages[0].weights == "given.pth"
