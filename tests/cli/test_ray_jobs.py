"""The command lines of the jobs in ray_jobs/: help, flags and invalid input, in separate processes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Motip

JOBS = ["convert", "curriculum", "evaluate", "train", "tune"]


def run(root: Path, job: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, f"ray_jobs/{job}.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=120)


@pytest.mark.parametrize("job", JOBS)
def test_help_shows_the_submission_and_imports_no_engine(repo_root: Path, job: str) -> None:
    # Engines are blocked, so that importing one for the help would fail.
    blocked = "import sys; sys.modules.update(dict.fromkeys(('ray', 'torch', 'mlflow'))); "
    code = (
        f"{blocked}import runpy; sys.argv = ['x', '--help']; runpy.run_path('ray_jobs/{job}.py', run_name='__main__')"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=repo_root)
    assert ended.returncode == 0, ended.stderr
    assert f"python ray_jobs/{job}.py --c" in ended.stdout
    assert "ray job submit --working-dir . --" in ended.stdout
    assert "--storage" in ended.stdout and "--data-root" in ended.stdout


@pytest.mark.parametrize("job", JOBS)
def test_jobs_have_at_most_10_lines(repo_root: Path, job: str) -> None:
    assert len((repo_root / f"ray_jobs/{job}.py").read_text().splitlines()) <= 10


@pytest.mark.parametrize("job", JOBS)
def test_job_and_verb_have_the_same_options(repo_root: Path, job: str, motip: Motip) -> None:
    def options(text: str) -> set[str]:
        return set(re.findall(r"--[a-z][\w-]*", text))

    assert options(run(repo_root, job, "--help").stdout) == options(motip(job, "--help").out)


@pytest.mark.parametrize(
    ("job", "arguments"), [("train", ["--workers", "0"]), ("tune", []), ("evaluate", ["--workers", "0"])]
)
def test_missing_required_option_is_exit_status_2(repo_root: Path, job: str, arguments: list[str]) -> None:
    ended = run(repo_root, job, *arguments)
    assert ended.returncode == 2 and "Missing" in ended.stderr and "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("job", "arguments", "message"),
    [
        ("train", ["--config", "gone.yaml"], "configuration file not found"),
        ("train", ["--config", "configs/bdd_stage2.yaml", "--data-root", "gone"], "data root does not exist"),
        ("train", ["--config", "configs/bdd_stage2.yaml", "--data-root", "configs"], "dataset BDD100K was not found"),
        ("train", ["--config", "configs/bdd_stage2.yaml", "--set", "LERNRATE=1"], "unknown configuration key LERNRATE"),
        ("evaluate", ["--checkpoint", "gone.pth"], "weights file does not exist"),
        ("evaluate", ["--checkpoint", "README.md"], ""),
        ("evaluate", ["--checkpoint", "gone.pth", "--config", "gone.yaml"], "configuration file not found"),
        ("evaluate", ["--checkpoint", "gone.pth", "--workers", "-2"], "workers is negative"),
        ("tune", ["--config", "configs/bdd_stage2.yaml"], "a sweep file with the search space is required"),
        ("tune", ["--config", "configs/bdd_stage2.yaml", "--sweep", "gone.yaml"], "configuration file not found"),
        ("tune", ["--config", "configs/demo/curriculum.yaml", "--trials", "1"], "the number is too small"),
        ("tune", ["--config", "configs/demo/curriculum.yaml"], "the stage to tune is required"),
        ("tune", ["--config", "configs/demo/curriculum.yaml", "--stage", "Base"], "there is no such stage"),
    ],
)
def test_invalid_input_is_one_message(
    repo_root: Path, tmp_path: Path, job: str, arguments: list[str], message: str
) -> None:
    ended = run(repo_root, job, *arguments, "--storage", tmp_path / "s")
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.startswith("error: ") and message in ended.stderr and "Traceback" not in ended.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_missing_weights_are_an_error(repo_root: Path, tmp_path: Path) -> None:
    from tests.helpers.small_dataset import write_dance_dataset

    write_dance_dataset(tmp_path / "datasets")
    arguments = ["--config", "configs/samples/stage1.yaml", "--data-root", tmp_path, "--workers", 0]
    ended = run(repo_root, "train", *arguments, "--storage", tmp_path / "s", "--set", "DETR_PRETRAIN=gone.pth")
    assert ended.returncode == 2 and "gone.pth" in ended.stderr and "Traceback" not in ended.stderr


def test_class_without_labels_in_the_training_videos_is_an_error(
    repo_root: Path, samples_dir: Path, tmp_path: Path
) -> None:
    arguments = ["--config", "configs/samples/stage1.yaml", "--data-root", samples_dir, "--workers", 0]
    ended = run(repo_root, "train", *arguments, "--storage", tmp_path / "s", "--set", "DATASETS=[BDD100K]")
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert "the class 'pedestrian' of stage 'stage1' has no label in any of its training videos" in ended.stderr
    assert "car 143" in ended.stderr and "drop the class (CLASSES, NUM_CLASSES)" in ended.stderr


def test_evaluate_without_shards_is_an_error(repo_root: Path, tmp_path: Path) -> None:
    from tests.helpers.small_dataset import write_checkpoint, write_curriculum

    curriculum = write_curriculum(tmp_path / "curriculum.yaml", repo_root)
    checkpoint = write_checkpoint(tmp_path / "tiny.pth", tmp_path / "stage.yaml")
    arguments = ["--checkpoint", checkpoint, "--config", curriculum, "--storage", tmp_path / "s", "--workers", 0]
    ended = run(repo_root, "evaluate", *arguments)
    assert ended.returncode == 2 and "manifest.json" in ended.stderr
