"""The four stages on a real Ray cluster at their smallest: train, skip, go on; and as a submitted job."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from motip.cluster import connect, disconnect
from motip.lineage import Lineage
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


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def head(tmp_path: Path):
    """A head with token authentication on; yields the environment for talking to it."""
    token = tmp_path / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {
        "PATH": f"{Path(sys.executable).parent}:{environment.get('PATH', '')}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    port, dashboard, agent = _free_port(), _free_port(), _free_port()
    # Ray's socket paths must stay under 108 characters, which pytest's folders do not.
    session = Path("/tmp") / f"ray_{secrets.token_hex(4)}"
    ray = shutil.which("ray", path=environment["PATH"])
    assert ray is not None
    start = [ray, "start", "--head", "--port", str(port), "--dashboard-port", str(dashboard)]
    start += ["--dashboard-agent-listen-port", str(agent), "--temp-dir", str(session), "--num-cpus", "2"]
    server = subprocess.Popen(
        [*start, "--block"], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    environment["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{dashboard}"
    try:
        for _ in range(120):
            if subprocess.run([ray, "job", "list"], env=environment, capture_output=True).returncode == 0:
                break
            time.sleep(1)
        yield ray, environment
    finally:
        server.terminate()
        server.wait(timeout=60)
        shutil.rmtree(session, ignore_errors=True)


def test_a_submitted_job_leaves_its_results_in_the_storage(head, tmp_path: Path) -> None:
    ray, environment = head
    path = write_files(tmp_path)
    storage = tmp_path / "storage"
    command = [ray, "job", "submit", "--working-dir", ".", "--", "python", "ray_jobs/curriculum.py"]
    command += ["--config", str(path), "--data-root", str(tmp_path), "--storage", str(storage)]
    command += ["--until", "BDD-Foundation"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "Stages:" in result.stdout and "BDD-Foundation" in result.stdout
    assert len(list((storage / "curricula" / "small" / "BDD-Foundation").glob("*/checkpoint_best.pth"))) == 1
    assert (storage / "mlflow" / "mlflow.db").is_file()
    without = {key: value for key, value in environment.items() if key != "RAY_AUTH_TOKEN_PATH"}
    refused = subprocess.run(
        [ray, "job", "list"], env={**without, "RAY_AUTH_TOKEN": "wrong" * 13}, capture_output=True, text=True
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
    path = write_files(tmp_path)
    command = [sys.executable, "ray_jobs/curriculum.py", "--config", str(path), "--data-root", str(tmp_path)]
    command += ["--storage", str(tmp_path / "storage"), "--until", "BDD-Foundation"]
    command += ["--set", "ONLY_DETR=True", "--set", "DETR_NUM_TRAIN_FRAMES=0"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 2, result.stdout[-2000:] + result.stderr[-4000:]
    message = result.stderr[result.stderr.index("error:") :]
    assert "Traceback" not in message and "ray" not in message.lower()
    assert "fix:" in message
