"""A sweep on a real Ray: killed inside a trial, resumed, one trial pruned, no actor left."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from motip.cluster import Cluster, connect, disconnect
from motip.config import load_curriculum
from motip.curriculum import Options
from motip.lineage import Lineage
from motip.tune import SweepResult, Tuning, run_sweep
from tests.helpers.ray_heads import descendants
from tests.helpers.small_curriculum import QuietUi
from tests.helpers.small_sweep import write_sweep_files

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]

SWEEP = """trials: 3
startup: 1
seed: 1
metric: agnostic/HOTA
set: {NEWBORN_THRESH: 0.012}
space:
  DET_THRESH: {choices: [0.012, 0.95]}
prune: {first: 1, reduction: 2}
confirm: {seeds: 1, hand_set: false}
"""
"""After a few steps a low threshold tracks something and a high one nothing."""

RAY_ACTORS = {"_AutoscalingCoordinatorActor": 1}
"""Named actor of Ray Data, one per cluster; it reserves no resources and serves later jobs."""


@pytest.mark.timeout(2400)
def test_killed_sweep_resumes_prunes_one_trial_and_leaves_no_actor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_sweep_files(tmp_path, SWEEP)
    # Epochs long enough that a trial receives the stop request inside one.
    path.write_text(path.read_text().replace("frames: 4}", "frames: 24}", 1))
    stage = tmp_path / "one.yaml"
    longer = stage.read_text().replace("EPOCHS: 2", "EPOCHS: 4").replace("CLIPS_PER_EPOCH: 2", "CLIPS_PER_EPOCH: 24")
    stage.write_text(longer + "DET_THRESH: 0.9\n")
    _start_and_kill(tmp_path, path)
    kept = [*tmp_path.rglob("trials/000.json"), *tmp_path.rglob("trials/001-*/epoch_000/metrics.json")]
    before = [(path, path.read_text(), path.stat().st_mtime_ns) for path in kept]
    assert len(before) == 2

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    lineage, ui = Lineage(storage=tmp_path / "storage"), QuietUi()
    cluster = connect(num_cpus=2)
    try:
        result = _sweep(path, tmp_path, cluster, lineage, ui)
        left = _remaining()
    finally:
        disconnect()
    assert left == [], left
    status = {trial.key: trial.status for trial in result.trials}
    assert status == {"000": "finished", "001": "finished", "002": "pruned"}, ui.notes
    again = [(path, path.read_text(), path.stat().st_mtime_ns) for path in kept]
    assert again == before, "finished work is not repeated: the killed trial resumed after its epoch"
    assert result.values == {"DET_THRESH": 0.012} == yaml.safe_load((tmp_path / "tuned.yaml").read_text())
    assert [trial.key for trial in result.repeats] == ["001-seed30"] and result.repeats[0].status == "finished"
    runs = lineage._find_runs(f"tags.`mlflow.parentRunId` = '{result.run_id}'")
    ends = {run.data.tags["motip.trial"]: run.info.status for run in runs}
    assert ends == {"000": "FINISHED", "001": "FINISHED", "002": "KILLED", "001-seed30": "FINISHED"}
    assert len(runs) == len(ends), "one run per trial, restarts included"
    pruned = next(run for run in runs if run.data.tags["motip.trial"] == "002")
    assert "others were better" in pruned.data.tags["motip.pruned"]
    resumed = next(run for run in runs if run.data.tags["motip.trial"] == "001")
    assert resumed.data.tags["motip.resumed"] == "1"


def _start_and_kill(folder: Path, path: Path) -> None:
    """Run the command and kill all its processes while the second trial trains."""
    command = [sys.executable, "ray_jobs/tune.py", "--config", str(path), "--stage", "BDD-Foundation"]
    command += ["--data-root", str(folder), "--storage", str(folder / "storage"), "--tuned", str(folder / "tuned.yaml")]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_") or "timeout" in key}
    with (folder / "first.log").open("wb") as log:
        job = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            while not _begun(folder, "001"):
                assert job.poll() is None, (folder / "first.log").read_text()[-3000:]
                time.sleep(0.2)
        finally:
            for pid in (job.pid, *(pid for pid, _ in descendants(job.pid))):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            job.wait(timeout=60)


def _begun(folder: Path, key: str) -> bool:
    """The trial's first epoch is stored and the second has begun."""
    return bool(list(folder.rglob(f"trials/{key}-*/epoch_000/metrics.json")))


def _sweep(path: Path, folder: Path, cluster: Cluster, lineage: Lineage, ui: QuietUi) -> SweepResult:
    curriculum = load_curriculum(path, tune="BDD-Foundation")
    tuning = Tuning(workers=1, overlay=str(folder / "tuned.yaml"))
    options = Options(str(folder), str(folder / "storage"), 1, config_path=str(path))
    return run_sweep(curriculum, curriculum.stages[0], options, cluster, lineage, ui, tuning)


def _remaining() -> list[str]:
    """Live actors and placement groups after Ray had time to remove its own."""
    import ray
    from ray._private.state import actors

    left: list[str] = []
    for _ in range(60):
        groups = ray.util.placement_group_table().values()
        left = [f"placement group {group['bundles']}" for group in groups if group["state"] != "REMOVED"]
        alive = [str(each["ActorClassName"]) for each in actors().values() if each["State"] != "DEAD"]
        left += [f"actors {name}" for name in set(alive) if alive.count(name) > RAY_ACTORS.get(name, 0)]
        if not left:
            break
        time.sleep(0.5)
    return left
