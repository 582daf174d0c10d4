"""Lineage through a real MLflow server on loopback, also while it goes away."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from motip.lineage import Lineage
from tests.test_lineage import CONFIG, client_of, free_port, history, run_stage


@pytest.fixture(autouse=True)
def own_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def _write_points(job: tuple[str, str, str, int, int]) -> int:
    address, storage, run_id, writer, points = job
    lineage = Lineage(address, storage)
    for step in range(points):
        lineage.log_metrics(run_id, {f"loss_{writer}": float(step)}, step)
    return lineage.flush()


def _write_from_processes(
    lineage: Lineage, address: str, storage: Path, processes: int, points: int, meanwhile: Callable[[str], None]
) -> str:
    run_id = lineage.start_curriculum("demo", {"processes": processes})
    jobs = [(address, str(storage), run_id, writer, points) for writer in range(processes)]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        work = pool.map_async(_write_points, jobs, chunksize=1)
        meanwhile(run_id)
        work.get(400)
    assert lineage.flush() == 0
    for writer in range(processes):
        assert history(lineage, run_id, f"loss_{writer}") == {step: float(step) for step in range(points)}
    return run_id


class Server:
    """A real ``mlflow server`` on loopback that can be stopped and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder}/ml.db"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, cwd=self.folder, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"{self.address}/health", timeout=2) as answer:
                    if answer.status == 200:
                        return
            except OSError:
                time.sleep(0.3)
        raise AssertionError(f"mlflow server did not start: {(self.folder / 'server.log').read_text()[-2000:]}")

    def stop(self) -> None:
        if self._process is not None:
            # No farewell: answers get lost after the server has acted, as in a real outage.
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(20)
            self._process = None


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "server").mkdir()
    server = Server(tmp_path / "server")
    server.start()
    yield server
    server.stop()


@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_a_whole_chain_through_a_server(server: Server, tmp_path: Path) -> None:
    storage = tmp_path / "storage"
    lineage = Lineage(server.address, storage)
    parent = lineage.start_curriculum("demo", {})
    first = run_stage(lineage, storage, parent, "bdd-foundation", CONFIG, None, {"HOTA": 1})
    second = run_stage(lineage, storage, parent, "bdd-refinement", {**CONFIG, "LR": 5e-5}, first, {"HOTA": 2})
    lineage.finish(parent)
    assert [step.stage for step in lineage.walk(parent)] == ["bdd-foundation", "bdd-refinement"]
    assert [check.state for check in lineage.verify(parent)] == ["same", "same"]
    version = client_of(lineage).get_model_version_by_alias("motip-curriculum", "bdd-refinement")
    assert (version.run_id, version.source.startswith("models:/")) == (second["run_id"], True)
    command, url = lineage.compare_url_hint([first["run_id"], second["run_id"]])
    assert (command, url.startswith(server.address)) == ("", True)


@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_eight_processes_and_a_server_that_goes_away_lose_nothing(server: Server, tmp_path: Path) -> None:
    lineage = Lineage(server.address, tmp_path / "storage")

    def outage(run_id: str) -> None:
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline and len(history(lineage, run_id, "loss_0")) < 20:
            time.sleep(0.2)
        server.stop()
        time.sleep(5)
        server.start()

    run_id = _write_from_processes(lineage, server.address, tmp_path / "storage", 8, 500, meanwhile=outage)
    # The queue's lock file is made by its first use: without it the outage would have met nobody.
    assert (tmp_path / "storage" / "mlflow" / "spool" / f"{run_id}.lock").exists()
