"""Resuming the run of an interrupted stage: changed keys, and runs driven by other processes."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from motip.errors import MotipError
from motip.lineage import Lineage
from motip.lineage.store import Store, Unreachable
from motip.lineage.tags import MAX_VALUE, Tag, join_params
from motip.storage.driver_process import driver_is_alive, this_driver
from tests.helpers.mlflow_database import lineage_on
from tests.lineage.test_recorder import CONFIG, DIGEST, client_of


@pytest.fixture(autouse=True)
def no_tracking_uri(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("storage")


@pytest.fixture
def lineage(storage: Path) -> Lineage:
    """Shares one database among all tests. Each test has its own curriculum."""
    return lineage_on(storage, patience=2, retry_interval=0.2)


def test_a_resume_may_change_resumable_keys_and_records_them(lineage: Lineage, storage: Path) -> None:
    parent = lineage.start_curriculum("resumable", {})
    config = {**CONFIG, "NUM_WORKERS": 4, "PLACES": {"data": "/a"}, "_name": "one"}
    resumable = {"NUM_WORKERS", "PLACES", "EXTRA", "_name"}
    run_id = lineage.start_stage(parent, "a", config, DIGEST, None, resumable_keys=resumable)

    again = Lineage(None, storage)
    now = {**config, "NUM_WORKERS": 1, "PLACES": {"data": "/b" * MAX_VALUE}, "EXTRA": 2, "_name": "two"}
    assert again.start_stage(parent, "a", now, DIGEST, None, run_id, resumable_keys=resumable) == run_id
    assert again.start_stage(parent, "a", {**now, "PLACES": {}}, DIGEST, None, resumable_keys=resumable) == run_id, (
        "found by inputs"
    )
    run = client_of(again).get_run(run_id)
    assert (run.data.params["NUM_WORKERS"], run.data.params["EXTRA"]) == ("4", "2")
    assert join_params(run.data.params)["PLACES"] == '{"data": "/a"}'
    first, second = (json.loads(run.data.tags[f"{Tag.RESUMED}.{number}"])["changed"] for number in (1, 2))
    assert first[0] == second[0] == "NUM_WORKERS 4 -> 1"
    assert first[1].startswith('PLACES {"data": "/a"} -> {"data": "/b/b')
    assert second[1] == 'PLACES {"data": "/a"} -> {}'
    assert json.loads(Path(client_of(again).download_artifacts(run_id, "config.json")).read_text())["NUM_WORKERS"] == 1

    with pytest.raises(MotipError, match="started with other parameters: LR\n") as refused:
        again.start_stage(parent, "a", {**now, "LR": 1}, DIGEST, None, run_id, resumable_keys=resumable)
    assert "NUM_WORKERS" not in str(refused.value)


# ---- drivers --------------------------------------------------------------------------------------------------------


def _begin_a_stage(storage: str, stage: str, connection: Connection) -> None:
    """Another driver on the same storage, running until killed."""
    lineage = Lineage(None, storage)
    parent = lineage.start_curriculum("two drivers", {})
    connection.send((parent, lineage.start_stage(parent, stage, CONFIG, DIGEST, None), this_driver()))
    time.sleep(600)


def test_a_stage_with_a_live_driver_is_not_interrupted_by_another(lineage: Lineage, storage: Path) -> None:
    own = lineage.start_curriculum("two drivers", {})
    before = lineage.start_stage(own, "Mine", CONFIG, DIGEST, None)
    here, there = multiprocessing.Pipe()
    other = multiprocessing.get_context("spawn").Process(target=_begin_a_stage, args=(str(storage), "Theirs", there))
    other.start()
    try:
        assert here.poll(300)
        parent, run_id, driver = here.recv()
        assert parent == own
        tags = client_of(lineage).get_run(run_id).data.tags
        assert tags[Tag.DRIVER] == driver and driver_is_alive(driver)
        assert client_of(lineage).get_run(own).data.tags[Tag.DRIVER] == this_driver(), (
            "the parent run is still driven by this process"
        )
        # Neither process interrupts the other's stage; this one interrupts its own earlier stage.
        assert client_of(lineage).get_run(before).info.status == "RUNNING"
        assert lineage.start_curriculum("two drivers", {}) == own
        assert client_of(lineage).get_run(run_id).info.status == "RUNNING"
        assert client_of(lineage).get_run(before).info.status == "KILLED"
    finally:
        other.kill()
        other.join(60)
    assert not driver_is_alive(driver)
    assert lineage.start_curriculum("two drivers", {}) == own
    assert client_of(lineage).get_run(run_id).info.status == "KILLED"
    assert client_of(lineage).get_run(own).data.tags[Tag.DRIVER] == this_driver()
    assert lineage.start_stage(own, "Theirs", CONFIG, DIGEST, None) == run_id
    assert client_of(lineage).get_run(run_id).data.tags[Tag.DRIVER] == this_driver(), "updated by the resuming process"


def test_a_run_without_a_local_driver_counts_as_interrupted(lineage: Lineage) -> None:
    parent = lineage.start_curriculum("no driver", {})
    runs = [lineage.start_stage(parent, stage, CONFIG, DIGEST, None) for stage in ("a", "b")]
    client_of(lineage).delete_tag(runs[0], Tag.DRIVER)
    client_of(lineage).set_tag(runs[1], Tag.DRIVER, "elsewhere/1/1")
    assert lineage.start_curriculum("no driver", {}) == parent
    assert [client_of(lineage).get_run(run_id).info.status for run_id in runs] == ["KILLED", "KILLED"]


def test_a_driver_is_identified_by_host_pid_and_start_time() -> None:
    host, pid, start = this_driver().split("/")
    assert (host, pid) == (socket.gethostname(), str(os.getpid()))
    assert driver_is_alive(this_driver())
    assert not driver_is_alive(f"{host}/{pid}/{int(start) + 1}"), "a reused pid"
    assert not driver_is_alive(f"another-{host}/{pid}/{start}")
    for unknown in ("", "nonsense", f"{host}/{pid}", f"{host}/{pid}/", f"{host}/x/{start}", f"{host}/0/{start}"):
        assert not driver_is_alive(unknown), unknown


def test_a_zombie_is_not_alive() -> None:
    child = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from motip.storage.driver_process import this_driver; print(this_driver(), flush=True); input()",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdin is not None and child.stdout is not None
    driver = child.stdout.readline().strip()
    try:
        assert driver_is_alive(driver)
    finally:
        child.stdin.close()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not driver_is_alive(driver)
    child.wait(60)
    child.stdout.close()


def test_without_proc_a_driver_has_no_start_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    full = this_driver()
    monkeypatch.setattr("motip.storage.driver_process._PROC", tmp_path)
    assert this_driver() == f"{socket.gethostname()}/{os.getpid()}/"
    monkeypatch.setattr("motip.storage.driver_process._command", lambda pid: "/usr/bin/Python -m pytest")
    assert driver_is_alive(this_driver())
    assert not driver_is_alive(full), "the start time cannot be compared"
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait(60)
    assert not driver_is_alive(f"{socket.gethostname()}/{ended.pid}/")


@pytest.mark.skipif(shutil.which("ps") is None, reason="no ps here")
def test_without_proc_a_reused_pid_of_another_program_is_not_alive(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("motip.storage.driver_process._PROC", tmp_path)
    python = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    sleep = subprocess.Popen(["sleep", "60"])
    try:
        assert driver_is_alive(f"{socket.gethostname()}/{python.pid}/")
        assert not driver_is_alive(f"{socket.gethostname()}/{sleep.pid}/")
        python.kill()
        os.waitid(os.P_PID, python.pid, os.WEXITED | os.WNOWAIT)
        assert not driver_is_alive(f"{socket.gethostname()}/{python.pid}/"), "a zombie"
        assert driver_is_alive(this_driver())
        monkeypatch.setenv("PATH", str(tmp_path))
        assert not driver_is_alive(this_driver()), "unknown without ps"
    finally:
        for process in (python, sleep):
            process.kill()
            process.wait(60)


def test_start_time_of_a_process_with_a_non_utf8_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("motip.storage.driver_process._PROC", tmp_path)
    (tmp_path / "77").mkdir()
    fields = " ".join(str(number) for number in range(4, 53))
    (tmp_path / "77" / "stat").write_bytes(b"77 (a\xff\xfe) b) S " + fields.encode() + b"\n")
    assert driver_is_alive(f"{socket.gethostname()}/77/22")
    assert not driver_is_alive(f"{socket.gethostname()}/77/23")
    (tmp_path / "77" / "stat").write_bytes(b"77 (cut off")
    assert not driver_is_alive(f"{socket.gethostname()}/77/22")


# ---- runs of other processes ----------------------------------------------------------------------------------------


def test_an_unfinished_stage_of_a_live_process_is_not_taken_over(lineage: Lineage, other_driver: str) -> None:
    parent = lineage.start_curriculum("taken over", {})
    theirs = lineage.start_stage(parent, "a", CONFIG, DIGEST, None)
    client = client_of(lineage)
    client.set_tag(theirs, Tag.DRIVER, other_driver)
    assert lineage.start_stage(parent, "a", CONFIG, DIGEST, None) != theirs
    run = client.get_run(theirs)
    assert (run.info.status, run.data.tags[Tag.DRIVER]) == ("RUNNING", other_driver)
    assert Tag.RESUMED not in run.data.tags
    # After its end any process may resume it, also while the first process lives.
    client.set_terminated(theirs, "FAILED")
    for run_id in [each.info.run_id for each in lineage._find_runs(f"tags.`{Tag.PARENT_RUN}` = '{parent}'")]:
        if run_id != theirs:
            client.delete_run(run_id)
    assert lineage.start_stage(parent, "a", CONFIG, DIGEST, None) == theirs


def test_a_parent_run_of_a_live_process_is_ended_by_that_process_only(lineage: Lineage, other_driver: str) -> None:
    parent = lineage.start_curriculum("left", {})
    client = client_of(lineage)
    client.set_tag(parent, Tag.DRIVER, other_driver)
    assert lineage.start_curriculum("left", {}) == parent
    stage = lineage.start_stage(parent, "a", CONFIG, DIGEST, None)
    lineage.finish(stage)
    lineage.mark_interrupted(parent)
    lineage.finish(parent)
    run = client.get_run(parent)
    assert (run.info.status, run.data.tags[Tag.DRIVER]) == ("RUNNING", other_driver)
    assert Tag.INTERRUPTED not in run.data.tags
    assert client.get_run(stage).info.status == "FINISHED"
    # This process can end it once the other has exited.
    client.set_tag(parent, Tag.DRIVER, other_driver + "0")
    lineage.finish(parent)
    assert client.get_run(parent).info.status == "FINISHED"


def test_a_late_end_does_not_end_a_resumed_run(
    lineage: Lineage, storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow is unreachable at the end of one job and at the start of the next, and back within its patience."""
    parent = lineage.start_curriculum("late end", {})
    run_id = lineage.start_stage(parent, "a", CONFIG, DIGEST, None)

    def unreachable(self: Store) -> None:
        raise Unreachable("unreachable")

    with monkeypatch.context() as patched:
        patched.setattr(Store, "client", unreachable)
        lineage.log_text(run_id, "kept", "late.txt")
        lineage.finish(run_id, "FAILED")
        lineage.finish(parent, "FAILED")
    again = Lineage(None, storage, patience=5, retry_interval=0.1)
    with monkeypatch.context() as patched:
        patched.setattr(again, "deliver_all", lambda: 2)  # still unreachable
        assert again.start_curriculum("late end", {}) == parent
        assert again.start_stage(parent, "a", CONFIG, DIGEST, None, resume_run_id=run_id) == run_id
    again.log_metrics(run_id, {"loss": 1.0}, 1)
    again.log_metrics(parent, {"loss": 1.0}, 1)
    assert [client_of(again).get_run(each).info.status for each in (parent, run_id)] == ["RUNNING", "RUNNING"]
    assert Path(client_of(again).download_artifacts(run_id, "late.txt")).read_text() == "kept"
    # Also if the logs are delivered from their beginnings.
    shutil.rmtree(storage / "mlflow" / "readers")
    assert Lineage(None, storage).deliver_all() == 0
    assert [client_of(again).get_run(each).info.status for each in (parent, run_id)] == ["RUNNING", "RUNNING"]


def test_a_log_that_cannot_be_delivered_does_not_prevent_a_start(
    lineage: Lineage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    parent = lineage.start_curriculum("no delivery", {})
    run_id = lineage.start_stage(parent, "a", CONFIG, DIGEST, None)

    def read_only(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("motip.lineage.recorder.write_json_atomic", read_only)
    assert lineage.start_curriculum("no delivery", {}) == parent
    assert lineage.start_stage(parent, "a", CONFIG, DIGEST, None) == run_id
    assert "Read-only file system" in caplog.text
    assert client_of(lineage).get_run(run_id).info.status == "RUNNING"
