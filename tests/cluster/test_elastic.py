"""`--workers 1:2` on a cluster that gains a node and loses it: the same global batches, each step once."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from motip.storage.paths import read_json
from motip.train.ray_train import completed
from motip.weights import load_checkpoint
from tests.helpers.small_curriculum import write_files

# Slow: the duration depends on when Ray polls for resources.
pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]


def test_training_uses_a_new_node_and_continues_after_its_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    path = write_files(tmp_path, domains=False)
    path.write_text(path.read_text().replace("frames: 4}", "frames: 40}"))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    log = tmp_path / "driver.log"
    driver = None
    try:
        with log.open("wb") as output:
            driver = subprocess.Popen(
                _command(path, tmp_path),
                cwd=ROOT,
                env=_environment(cluster.address),
                stdout=output,
                stderr=output,
            )
        _wait_until(lambda: _step(tmp_path) >= 2, driver, log)
        node = cluster.add_node(num_cpus=1)
        _wait_until(lambda: "resumed with 2 workers; the run began with 1" in log.read_text(), driver, log)
        grown = _step(tmp_path)
        _wait_until(lambda: _step(tmp_path) >= grown + 2, driver, log)
        cluster.remove_node(node, allow_graceful=False)
        assert driver.wait(timeout=300) == 0, log.read_text()[-3000:]
    finally:
        if driver is not None and driver.poll() is None:
            driver.kill()
        cluster.shutdown()
    (folder,) = (tmp_path / "storage").glob("curricula/small/BDD-Foundation/*")
    epochs = completed(str(folder))
    steps = int(read_json(folder / "epoch_000" / "metrics.json")["step"])
    assert sorted(epochs.steps.values()) == [steps * (number + 1) for number in range(len(epochs.steps))]
    last = load_checkpoint(epochs.checkpoints[max(epochs.checkpoints)])
    assert last["position"]["world"] == 1  # batches are those of the one worker at the start
    assert last["position"]["global_batch"] == 2
    assert last["position"]["clips"] == 2 * steps * len(epochs.steps)


def _command(path: Path, folder: Path) -> list[str]:
    command = [sys.executable, "ray_jobs/curriculum.py", "--config", str(path), "--data-root", str(folder)]
    command += ["--storage", str(folder / "storage"), "--workers", "1:2", "--until", "BDD-Foundation"]
    settings = {
        "EPOCHS": 6,
        "CLIPS_PER_EPOCH": 28,
        "EVALUATE_EVERY_EPOCHS": 6,
        "BATCH_SIZE": 2,
        "CHECKPOINT_EVERY_STEPS": 1,
        "RESIZE_EVERY_S": 5,
    }
    for key, value in settings.items():
        command += ["--set", f"{key}={value}"]
    return command


def _environment(address: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return {**kept, "RAY_ADDRESS": address, "OMP_NUM_THREADS": "1"}


def _step(folder: Path) -> int:
    """Optimiser step of the newest checkpoint."""
    found = folder.glob("storage/curricula/*/*/*/step_*/checkpoint_step_*.pth")
    return max([0, *(int(path.parent.name[5:]) for path in found)])


def _wait_until(happened, driver: subprocess.Popen[bytes], log: Path) -> None:
    begin = time.monotonic()
    while not happened():
        assert driver.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() - begin < 240, log.read_text()[-3000:]
        time.sleep(0.1)
