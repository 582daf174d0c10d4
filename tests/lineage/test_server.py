"""Lineage through an MLflow server on loopback, with an outage."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from motip.lineage import Lineage
from tests.helpers.mlflow_server import Server, serving
from tests.lineage.test_recorder import CONFIG, client_of, history, record_stage


@pytest.fixture(autouse=True)
def no_tracking_uri(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def _write_points(job: tuple[str, str, str, int, int]) -> int:
    address, storage, run_id, writer, points = job
    lineage = Lineage(address, storage)
    for step in range(points):
        lineage.log_metrics(run_id, {f"loss_{writer}": float(step)}, step)
    return lineage.deliver_all()


def _write_from_processes(
    lineage: Lineage, address: str, storage: Path, processes: int, points: int, meanwhile: Callable[[str], None]
) -> str:
    run_id = lineage.start_curriculum("demo", {"processes": processes})
    jobs = [(address, str(storage), run_id, writer, points) for writer in range(processes)]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        work = pool.map_async(_write_points, jobs, chunksize=1)
        meanwhile(run_id)
        work.get(400)
    assert lineage.deliver_all() == 0
    for writer in range(processes):
        assert history(lineage, run_id, f"loss_{writer}") == {step: float(step) for step in range(points)}
    return run_id


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "server").mkdir()
    with serving(tmp_path / "server") as running:
        yield running


@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_a_chain_through_a_server(server: Server, tmp_path: Path) -> None:
    storage = tmp_path / "storage"
    lineage = Lineage(server.address, storage)
    parent = lineage.start_curriculum("demo", {})
    first = record_stage(lineage, storage, parent, "bdd-foundation", CONFIG, None, {"HOTA": 1})
    second = record_stage(lineage, storage, parent, "bdd-refinement", {**CONFIG, "LR": 5e-5}, first, {"HOTA": 2})
    lineage.finish(parent)
    assert [step.stage for step in lineage.chain(parent)] == ["bdd-foundation", "bdd-refinement"]
    assert [check.state for check in lineage.verify(parent)] == ["same", "same"]
    version = client_of(lineage).get_model_version_by_alias("motip-curriculum", "bdd-refinement")
    assert (version.run_id, version.source.startswith("models:/")) == (second["run_id"], True)
    command, url = lineage.compare_url_hint([first["run_id"], second["run_id"]])
    assert (command, url.startswith(server.address)) == ("", True)


@pytest.mark.cluster
@pytest.mark.timeout(900)
@pytest.mark.parametrize("outage_s", [5, pytest.param(60, marks=pytest.mark.slow)])
def test_eight_processes_lose_nothing_during_an_outage(server: Server, tmp_path: Path, outage_s: float) -> None:
    lineage = Lineage(server.address, tmp_path / "storage")

    def outage(run_id: str) -> None:
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline and len(history(lineage, run_id, "loss_0")) < 20:
            time.sleep(0.2)
        server.stop()
        time.sleep(outage_s)
        server.start()

    _write_from_processes(lineage, server.address, tmp_path / "storage", 8, 500, meanwhile=outage)
