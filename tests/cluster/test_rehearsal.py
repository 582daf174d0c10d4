"""A five-node cluster on one machine: conversion, a stage with three workers, an evaluation; each loses a node.

    python -m pytest -m "cluster and slow" tests/cluster/test_rehearsal.py -s

Nodes are Ray processes on loopback, killed with SIGKILL. The storage is a folder that all of them see, like S3 on a
real cluster; the driver runs on the head, which is not killed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from motip.data.manifest import Manifest, manifest_path
from motip.data.shards import shard_path
from motip.storage.paths import read_json, sha256
from motip.train.ray_train import completed
from tests.helpers.ray_heads import descendants
from tests.helpers.small_curriculum import write_files

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(3600)]

ROOT = Path(__file__).resolve().parents[2]
VIDEOS, VAL, FRAMES = 40, 12, 40
WAIT_S = 900.0
WORKING = {"convert": "ray::convert_sequence", "train": "RayTrainWorker", "evaluate": "VideoTracker.track"}
"""Part of the process title of a worker of each job."""


class Machines:
    """A head without CPUs and nodes with one each."""

    def __init__(self) -> None:
        # A killed node closes its connections immediately; a long timeout tolerates a busy machine.
        patience = {"health_check_timeout_ms": 120_000}
        head = {"num_cpus": 0, "include_dashboard": False, "_system_config": patience}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.nodes: list[Any] = []

    def grow(self, number: int) -> None:
        while len(self.nodes) < number:
            self.nodes.append(self.cluster.add_node(num_cpus=1))
        self.cluster.wait_for_nodes()

    def kill_node_running(
        self, title: str, driver: subprocess.Popen[bytes], log: Path, until: Any = lambda: True
    ) -> int:
        """Kill the first node with a process of this title; returns its number of such processes."""
        begin = time.monotonic()
        while True:
            assert driver.poll() is None, f"ended before a node was lost: {log.read_text()[-3000:]}"
            assert time.monotonic() - begin < WAIT_S, log.read_text()[-3000:]
            if until():
                for node in self.nodes:
                    raylet = node.all_processes["raylet"][0].process.pid
                    working = [each for _, each in descendants(raylet) if title in each]
                    if working:
                        self.nodes.remove(node)
                        self.cluster.remove_node(node, allow_graceful=False)
                        return len(working)
            time.sleep(0.05)

    def stop(self) -> None:
        self.cluster.shutdown()


@pytest.fixture
def machines(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machines]:
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    machines = Machines()
    yield machines
    machines.stop()


def test_each_job_loses_a_node_and_finishes(machines: Machines, tmp_path: Path) -> None:
    config, storage = _curriculum(tmp_path), tmp_path / "storage"
    shared = ["--config", str(config), "--storage", str(storage)]
    machines.grow(4)

    driver, log = _start(machines, tmp_path, "convert", [*shared, "--data-root", str(tmp_path)])
    shards = lambda: bool(list(storage.glob("shards/ground/*/*.parquet")))  # noqa: E731
    _print_loss("conversion", machines.kill_node_running(WORKING["convert"], driver, log, shards), machines)
    _finish(driver, log)
    entries = Manifest.load(storage).of("ground", "train") + Manifest.load(storage).of("ground", "val")
    assert len(entries) == VIDEOS + VAL
    assert all(sha256(shard_path(storage, entry.shard)) == entry.shard_sha256 for entry in entries)
    before = manifest_path(storage).read_bytes()

    machines.grow(4)
    options = [*shared, "--data-root", str(tmp_path), "--workers", "3", "--until", "BDD-Foundation"]
    for setting in (
        "EPOCHS=2",
        "BATCH_SIZE=1",
        "CLIPS_PER_EPOCH=48",
        "CHECKPOINT_EVERY_STEPS=2",
        "EVALUATE_EVERY_EPOCHS=2",
    ):
        options += ["--set", setting]
    driver, log = _start(machines, tmp_path, "curriculum", options)
    trained = lambda: bool(list(storage.glob("curricula/small/*/*/step_*/checkpoint_step_*.pth")))  # noqa: E731
    _print_loss("stage", machines.kill_node_running(WORKING["train"], driver, log, trained), machines)
    machines.grow(4)  # as the autoscaler does
    _finish(driver, log)
    assert manifest_path(storage).read_bytes() == before
    (folder,) = storage.glob("curricula/small/BDD-Foundation/*")
    epochs = completed(str(folder))
    assert sorted(epochs.steps.values()) == [16, 32]  # three workers of one clip: 48 clips in 16 steps, twice

    machines.grow(4)
    best = read_json(folder / "stage.json")["checkpoint"]
    scores = tmp_path / "scores.json"
    options = [*shared, "--checkpoint", best, "--sources", "ground", "--workers", "4", "--json", str(scores)]
    driver, log = _start(machines, tmp_path, "evaluate", options)
    _print_loss("evaluation", machines.kill_node_running(WORKING["evaluate"], driver, log), machines)
    _finish(driver, log)
    assert "a worker is gone" in log.read_text()
    tracked = list(storage.glob("evaluations/*/tracks/ground/val/*.txt"))
    assert len(tracked) == VAL
    assert json.loads(scores.read_text())


def _curriculum(folder: Path) -> Path:
    """The small curriculum with enough videos that work remains after the loss of a node."""
    path = write_files(folder, domains=False)
    text = path.read_text().replace(
        "{train: 2, val: 1}, frames: 4}", f"{{train: {VIDEOS}, val: {VAL}}}, frames: {FRAMES}}}", 1
    )
    path.write_text(text.replace("{source: ground, videos: 1}", f"{{source: ground, videos: {VIDEOS}}}"))
    return path


def _start(machines: Machines, folder: Path, job: str, options: list[str]) -> tuple[subprocess.Popen[bytes], Path]:
    log = folder / f"{job}.log"
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment = {**kept, "RAY_ADDRESS": machines.cluster.address, "OMP_NUM_THREADS": "1"}
    print(f"\n{job}: {' '.join(options)}", flush=True)
    with log.open("wb") as output:
        command = [sys.executable, f"ray_jobs/{job}.py", *options]
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output), log


def _finish(driver: subprocess.Popen[bytes], log: Path) -> None:
    begin = time.monotonic()
    try:
        assert driver.wait(timeout=WAIT_S) == 0, log.read_text()[-3000:]
    finally:
        if driver.poll() is None:
            driver.kill()
    print(f"{log.stem} finished {time.monotonic() - begin:.0f} s after the loss", flush=True)


def _print_loss(what: str, processes: int, machines: Machines) -> None:
    print(f"{what}: lost a node with {processes} working processes, {len(machines.nodes)} left", flush=True)
