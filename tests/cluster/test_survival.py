"""kill -9 of a worker, of the driver and of the whole head: the stage ends as if nothing had happened."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from motip.data.storage import read_json
from motip.model.weights import load_checkpoint
from motip.train.fit import completed
from tests.cluster.heads import Head, running_head
from tests.small_curriculum import write_files

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
STEPS = 16
"""Optimiser steps of the stage: two epochs of eight, one clip per worker."""


def _start(head: Head, path: Path, storage: Path) -> subprocess.Popen[bytes]:
    """The curriculum's first stage with two workers on this head."""
    command = [sys.executable, "ray_jobs/curriculum.py", "--config", str(path), "--data-root", str(path.parent)]
    command += ["--storage", str(storage), "--workers", "2", "--until", "BDD-Foundation"]
    for setting in ("EPOCHS=2", "CLIPS_PER_EPOCH=16", "CHECKPOINT_EVERY_STEPS=1", "LOG_EVERY_STEPS=1"):
        command += ["--set", setting]
    said = (storage.parent / f"{storage.name}.log").open("ab")
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**head.environment, "RAY_ADDRESS": head.address, "OMP_NUM_THREADS": "1"},
        stdout=said,
        stderr=said,
    )


def _reached(storage: Path) -> int:
    """Steps that a checkpoint holds, of this attempt or one before."""
    steps = [int(path.parent.name[5:]) for path in storage.glob("curricula/*/*/*/step_*/checkpoint_step_*.pth")]
    epochs = [8 * (int(path.parent.name[6:]) + 1) for path in storage.glob("curricula/*/*/*/epoch_*/metrics.json")]
    return max([0, *steps, *epochs])


def _wait_for(step: int, driver: subprocess.Popen[bytes], storage: Path) -> None:
    while _reached(storage) < step:
        assert driver.poll() is None, (storage.parent / f"{storage.name}.log").read_text()[-3000:]
        time.sleep(0.05)


def _finish(driver: subprocess.Popen[bytes], storage: Path) -> None:
    assert driver.wait(timeout=240) == 0, (storage.parent / f"{storage.name}.log").read_text()[-3000:]


def test_a_stage_struck_three_times_ends_as_if_undisturbed(tmp_path: Path) -> None:
    path = write_files(tmp_path, domains=False)
    path.write_text(path.read_text().replace("frames: 4}", "frames: 24}"))  # enough start frames for 16 clips
    whole, struck = tmp_path / "whole", tmp_path / "struck"
    draw = random.Random(int(time.time()))
    for_worker, for_driver, for_head = draw.randint(1, 4), draw.randint(5, 7), draw.randint(9, 12)
    print("killed after steps", for_worker, for_driver, for_head)
    with running_head(tmp_path) as head:
        _finish(_start(head, path, whole), whole)

        driver = _start(head, path, struck)
        _wait_for(for_worker, driver, struck)
        os.kill(draw.choice(head.workers()), signal.SIGKILL)
        _wait_for(for_driver, driver, struck)
        driver.kill()
        driver.wait(timeout=60)

        driver = _start(head, path, struck)
        _wait_for(for_head, driver, struck)
        head.kill()
        assert driver.wait(timeout=240) != 0
    with running_head(tmp_path) as head:
        _finish(_start(head, path, struck), struck)

    expected = _steps(whole)
    assert expected.keys() == set(range(1, STEPS + 1))
    # What a driver that is killed had not fetched yet, of its last half second, is missing in MLflow.
    assert STEPS in _steps(struck) and len(_steps(struck)) >= STEPS - 6
    for step, losses in _steps(struck).items():
        assert set(losses) == set(expected[step]), f"step {step}"
    # A checkpoint may still have been on its way when it was struck: one step more than the interval.
    repeated = sum(len(losses) - 1 for losses in _steps(struck).values())
    assert repeated <= 3 * 2
    for epoch in (0, 1):
        one, other = (load_checkpoint(_epochs(storage)[epoch])["model"] for storage in (whole, struck))
        assert all(torch.equal(one[name], other[name]) for name in one), f"epoch {epoch + 1}"


def _epochs(storage: Path) -> dict[int, str]:
    (folder,) = storage.glob("curricula/small/BDD-Foundation/*")
    return completed(str(folder)).checkpoints


def _steps(storage: Path) -> dict[int, list[float]]:
    """The losses that were recorded of each step, in MLflow."""
    (folder,) = storage.glob("curricula/small/BDD-Foundation/*")
    run_id = read_json(folder / "stage.json")["run_id"]
    history: dict[int, list[float]] = {}
    for point in MlflowClient(f"sqlite:///{storage}/mlflow/mlflow.db").get_metric_history(run_id, "step/loss"):
        history.setdefault(point.step, []).append(point.value)
    return history
