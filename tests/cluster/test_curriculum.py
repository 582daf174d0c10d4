"""The four stages on a real Ray cluster at their smallest: trained, then skipped; an error in a worker."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import ray

from motip.cluster import Cluster
from motip.lineage import Lineage
from tests.cluster.conftest import QUICK
from tests.helpers.small_curriculum import run, write_files
from tests.lineage.test_secrets import found_in

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).resolve().parents[2]
STAGES = ["BDD-Foundation", "BDD-Refinement", "Vis-Adaptation", "Vis-Specialist"]


def test_four_stages_with_two_workers_then_skipped(tmp_path: Path, local_ray: Cluster) -> None:
    path = write_files(tmp_path, domains=False)
    storage = tmp_path / "storage"
    lineage = Lineage(storage=storage)
    result, ui, _ = run(path, storage, workers=2, cluster=local_ray, lineage=lineage)
    assert ui.begun == STAGES
    again, ui, _ = run(path, storage, workers=2, cluster=local_ray, lineage=lineage)
    assert ui.begun == []
    assert [record.sha256 for record in again.records] == [record.sha256 for record in result.records]
    steps = [step for step in lineage.chain(result.records[-1].run_id) if step.kind == "stage"]
    assert [step.stage for step in steps] == STAGES
    assert all(step.status == "FINISHED" for step in steps)
    assert all("HOTA" in step.scores for step in steps)
    # Ray Train stops its cleaner without waiting for a timeout.
    logs = Path(ray._private.worker._global_node.get_logs_dir_path())
    assert found_in(logs, ["Failed to stop PlacementGroupCleaner"]) == []


def test_error_in_a_worker_is_one_message(tmp_path: Path) -> None:
    """A deterministic error: the workers are not restarted, and the message carries none of Ray's wrapping."""
    path = write_files(tmp_path, domains=False)
    command = [sys.executable, "ray_jobs/curriculum.py", "--config", str(path), "--data-root", str(tmp_path)]
    command += ["--storage", str(tmp_path / "storage"), "--until", "BDD-Foundation"]
    command += ["--set", "ONLY_DETR=True", "--set", "DETR_NUM_TRAIN_FRAMES=0"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    result = subprocess.run(
        command, cwd=ROOT, env={**environment, **QUICK}, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 2, result.stdout[-2000:] + result.stderr[-4000:]
    message = result.stderr[result.stderr.index("error:") :]
    assert "Traceback" not in message and "ray" not in message.lower()
    assert "fix:" in message
