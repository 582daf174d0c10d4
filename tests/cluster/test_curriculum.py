"""The four stages on a real Ray cluster at their smallest: train, skip, go on; and as a submitted job."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from pathlib import Path

import pytest

from motip.cluster import connect, disconnect
from motip.lineage import Lineage
from tests.cluster.heads import Head, running_head
from tests.small_curriculum import run, write_files

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).resolve().parents[2]
STAGES = ["BDD-Foundation", "BDD-Refinement", "Vis-Adaptation", "Vis-Specialist"]


def test_four_stages_with_two_workers_then_skipped_then_only_what_is_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    path = write_files(tmp_path)
    storage = tmp_path / "storage"
    lineage = Lineage(storage=storage)
    cluster = connect(num_cpus=2)
    try:
        result, ui, _ = run(path, storage, workers=2, cluster=cluster, lineage=lineage)
        assert ui.begun == STAGES
        again, ui, _ = run(path, storage, workers=2, cluster=cluster, lineage=lineage)
        assert ui.begun == []
        assert [record.sha256 for record in again.records] == [record.sha256 for record in result.records]
        _, ui, _ = run(
            path, storage, workers=1, cluster=cluster, lineage=lineage, overrides=("Vis-Specialist:LR=1.0e-5",)
        )
        assert ui.begun == STAGES[3:]
    finally:
        disconnect()
    steps = [step for step in lineage.walk(result.records[-1].run_id) if step.kind == "stage"]
    assert [step.stage for step in steps] == STAGES
    assert all(step.status == "FINISHED" for step in steps)
    assert all("HOTA" in step.scores for step in steps)


def test_a_submitted_job_leaves_its_results_in_the_storage(tmp_path: Path) -> None:
    with running_head(tmp_path) as head:
        _submit(head, tmp_path)


def _submit(head: Head, tmp_path: Path) -> None:
    path = write_files(tmp_path, domains=False)
    storage = tmp_path / "storage"
    command = [head.ray, "job", "submit", "--working-dir", ".", "--", "python", "ray_jobs/curriculum.py"]
    command += ["--config", str(path), "--data-root", str(tmp_path), "--storage", str(storage)]
    command += ["--until", "BDD-Foundation"]
    result = subprocess.run(command, cwd=ROOT, env=head.environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "Stages:" in result.stdout and "BDD-Foundation" in result.stdout
    assert len(list((storage / "curricula" / "small" / "BDD-Foundation").glob("*/checkpoint_best.pth"))) == 1
    assert (storage / "mlflow" / "mlflow.db").is_file()
    without = {key: value for key, value in head.environment.items() if key != "RAY_AUTH_TOKEN_PATH"}
    refused = subprocess.run(
        [head.ray, "job", "list"], env={**without, "RAY_AUTH_TOKEN": "wrong" * 13}, capture_output=True, text=True
    )
    assert refused.returncode != 0


def test_the_uploaded_package_is_small() -> None:
    """Code and configurations only, decided by .rayignore and .gitignore."""
    from ray._private.runtime_env.packaging import (
        create_package,
        get_uri_for_directory,  # noqa: F401 - the private path is the real one
    )

    target = Path(os.environ.get("TMPDIR", "/tmp")) / f"motip_package_{secrets.token_hex(4)}.zip"
    try:
        create_package(str(ROOT), target, include_gitignore=True)
        assert target.stat().st_size < 5 * 2**20
        names = subprocess.run(
            [sys.executable, "-m", "zipfile", "-l", str(target)], capture_output=True, text=True, check=True
        ).stdout
        assert "motip/curriculum/run.py" in names and "configs/curriculum.yaml" in names
        assert "tests/" not in names and "docs/" not in names
    finally:
        target.unlink(missing_ok=True)


def test_an_error_in_a_worker_is_one_message(tmp_path: Path) -> None:
    """It would come again however often the workers are restarted, so they are not, and it is not wrapped in Ray's."""
    path = write_files(tmp_path, domains=False)
    command = [sys.executable, "ray_jobs/curriculum.py", "--config", str(path), "--data-root", str(tmp_path)]
    command += ["--storage", str(tmp_path / "storage"), "--until", "BDD-Foundation"]
    command += ["--set", "ONLY_DETR=True", "--set", "DETR_NUM_TRAIN_FRAMES=0"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 2, result.stdout[-2000:] + result.stderr[-4000:]
    message = result.stderr[result.stderr.index("error:") :]
    assert "Traceback" not in message and "ray" not in message.lower()
    assert "fix:" in message
