"""Spool: refused entries, outages, full disks and moved folders, with a fake MLflow client."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests
from boto3.exceptions import S3UploadFailedError
from botocore.exceptions import ClientError
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, RESOURCE_DOES_NOT_EXIST, UNAUTHENTICATED
from motip.lineage.spool import Spool

from motip.errors import MotipError
from motip.lineage import Lineage

RUN, OTHER = "a" * 32, "b" * 32


class FakeClient:
    """Fake of the MLflow client for deliveries.

    Attributes:
        away: every call raises a connection error.
        error: raised by the artifacts of ``failing_runs``.
        everything: raised by every call.
        gone: the run was deleted.
    """

    def __init__(self) -> None:
        self.away = True
        self.error: Callable[[], Exception] | None = None
        self.everything: Exception | None = None
        self.requests = 0
        self.gone = False
        self.failing_runs = {RUN}
        self.got: list[tuple[str, str]] = []

    def log_batch(self, run_id: str, metrics: Any = (), tags: Any = ()) -> None:
        self._reached()
        self.requests += 1
        if self.gone or any("*" in metric.key for metric in metrics):
            raise MlflowException("not taken", INVALID_PARAMETER_VALUE)
        self.got += [(run_id, metric.key) for metric in metrics]

    def get_run(self, run_id: str) -> Any:
        if self.gone:
            raise MlflowException("gone", RESOURCE_DOES_NOT_EXIST)
        return SimpleNamespace(info=SimpleNamespace(lifecycle_stage="active"))

    def get_experiment(self, experiment_id: str) -> Any:
        self._reached()
        return SimpleNamespace(experiment_id=experiment_id)

    def log_artifact(self, run_id: str, path: str, folder: str | None) -> None:
        self._reached()
        if self.error is not None and run_id in self.failing_runs:
            raise self.error()
        self.got.append((run_id, Path(path).read_text()))

    def _reached(self) -> None:
        if self.away:
            raise requests.exceptions.ConnectionError("away")
        if self.everything is not None:
            raise self.everything


def lineage_on(storage: Path) -> tuple[Lineage, FakeClient]:
    lineage, server = Lineage("http://127.0.0.1:9", storage, retry_interval=0), FakeClient()
    lineage._store._client = server  # type: ignore[assignment]
    return lineage, server


def spooled(storage: Path) -> None:
    """A queue of one artifact and, behind it, a metric."""
    lineage, _ = lineage_on(storage)
    lineage.log_text(RUN, "the only copy", "notes.txt")
    lineage.log_metrics(RUN, {"HOTA": 1.0}, 1)


def set_aside(storage: Path) -> list[dict[str, Any]]:
    path = storage / "mlflow" / "spool" / f"{RUN}.rejected.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def http(status: int) -> Exception:
    response = requests.Response()
    response.status_code = status
    return requests.exceptions.HTTPError(f"{status} Client Error: for url http://me:pa55@host/x", response=response)


def s3(status: int, code: str) -> Exception:
    """As boto3 raises for an upload: its own error, raised while the client error is handled."""
    try:
        try:
            response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
            raise ClientError(response, "PutObject")
        except ClientError as error:
            raise S3UploadFailedError(f"Failed to upload: {error}")  # noqa: B904
    except S3UploadFailedError as error:
        return error


@pytest.mark.parametrize(
    "refusal",
    [
        lambda: http(413),
        lambda: http(403),
        lambda: MlflowException("API request to endpoint /x failed with error code 413 != 200. Response body: ''"),
        lambda: s3(403, "AccessDenied"),
        lambda: PermissionError(errno.EACCES, "Permission denied"),
        lambda: NotADirectoryError(errno.ENOTDIR, "Not a directory"),
        lambda: KeyError("an unexpected error"),
    ],
    ids=["413", "403", "413 to mlflow", "s3", "permission", "no folder", "unknown"],
)
def test_a_permanently_refused_artifact_does_not_block_the_queue(
    refusal: Callable[[], Exception], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spooled(tmp_path)
    lineage, server = lineage_on(tmp_path)
    server.away, server.error = False, refusal
    caplog.clear()
    assert lineage.flush() == 0
    assert server.got == [(RUN, "HOTA")]
    (entry,) = set_aside(tmp_path)
    assert str(refusal().args[-1])[:20] in entry["reason"] and "pa55" not in entry["reason"]
    assert (tmp_path / "mlflow" / "spool" / entry["path"]).read_text() == "the only copy"
    (warning,) = caplog.messages
    assert "1 entries set aside" in warning and entry["reason"] in warning
    lineage.log_metrics(RUN, {"HOTA": 2.0}, 2)
    assert (lineage.flush(), len(server.got)) == (0, 2)


@pytest.mark.parametrize(
    "failure",
    [
        lambda: http(503),
        lambda: http(429),
        lambda: http(408),
        lambda: s3(400, "ExpiredToken"),
        lambda: s3(503, "SlowDown"),
        lambda: requests.exceptions.ConnectionError("no route"),
        lambda: OSError(errno.ENOSPC, "No space left"),
        lambda: OSError(errno.EROFS, "Read-only file system"),
        lambda: MlflowException("API request to /x failed with exception timed out"),
    ],
    ids=["503", "429", "408", "s3 token", "s3 busy", "away", "full", "read-only", "mlflow away"],
)
def test_entries_that_cannot_be_accepted_now_stay_queued(
    failure: Callable[[], Exception], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spooled(tmp_path)
    lineage, server = lineage_on(tmp_path)
    server.away, server.error = False, failure
    caplog.clear()
    assert lineage.flush() == 2
    (warning,) = caplog.messages
    assert warning.startswith("2 earlier entries") and str(failure().args[-1])[:12] in warning
    assert (server.got, set_aside(tmp_path)) == ([], [])
    server.error = None
    assert lineage.flush() == 0
    assert server.got == [(RUN, "the only copy"), (RUN, "HOTA")]
    assert not list((tmp_path / "mlflow" / "spool").rglob("*.txt"))


@pytest.mark.parametrize("bad", [0, 1, 6, 19])
def test_one_refused_metric_does_not_reject_others(bad: int, tmp_path: Path) -> None:
    lineage, _ = lineage_on(tmp_path)
    names = [f"m*{number}" if number == bad else f"m{number}" for number in range(20)]
    for name in names:
        lineage.log_metrics(RUN, {name: 1.0}, 1)
    lineage, server = lineage_on(tmp_path)
    server.away = False
    assert lineage.flush() == 0
    assert [name for _, name in server.got] == [name for name in names if "*" not in name], "in their order"
    (entry,) = set_aside(tmp_path)
    assert [point[0] for point in entry["points"]] == [names[bad]]


def test_only_refused_points_of_an_entry_are_set_aside(tmp_path: Path) -> None:
    lineage, _ = lineage_on(tmp_path)
    lineage.log_metrics(RUN, {"a": 1.0, "b*": 2.0, "c": 3.0}, 1)
    lineage.log_metrics(RUN, {"d": 1.0}, 2)
    lineage, server = lineage_on(tmp_path)
    server.away = False
    assert lineage.flush() == 0
    assert server.got == [(RUN, name) for name in "acd"]
    (entry,) = set_aside(tmp_path)
    assert [point[0] for point in entry["points"]] == ["b*"]


def test_metrics_of_a_deleted_run_are_set_aside_without_a_request_per_point(tmp_path: Path) -> None:
    lineage, _ = lineage_on(tmp_path)
    for step in range(64):
        lineage.log_metrics(RUN, {f"m{number}": 1.0 for number in range(10)}, step)
    lineage, server = lineage_on(tmp_path)
    server.away, server.gone = False, True
    assert lineage.flush() == 0
    assert len(set_aside(tmp_path)) == 64
    assert server.requests < 80


@pytest.mark.parametrize(
    "refusal",
    [
        http(401),
        MlflowException("You are not authenticated", UNAUTHENTICATED),
        MlflowException("API request to endpoint /x failed with error code 401 != 200. Response body: ''"),
    ],
    ids=["http", "mlflow", "status"],
)
def test_entries_refused_for_an_expired_token_stay_queued(
    refusal: Exception, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spooled(tmp_path)
    lineage, server = lineage_on(tmp_path)
    server.away, server.everything = False, refusal
    caplog.clear()
    assert lineage.flush() == 2
    lineage.log_metrics(RUN, {"HOTA": 2.0}, 2)
    assert all("the login is not accepted" in message for message in caplog.messages) and caplog.messages
    assert set_aside(tmp_path) == []
    with pytest.raises(MotipError, match="the login is not accepted") as refused:
        lineage._store.retry(lambda: server._reached(), 60)
    assert "MLFLOW_TRACKING_TOKEN" in str(refused.value) and "pa55" not in str(refused.value)
    server.everything = None
    assert lineage.flush() == 0
    assert server.got == [(RUN, "the only copy"), (RUN, "HOTA"), (RUN, "HOTA")]


def test_a_full_disk_after_an_entry_was_queued_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    spooled(tmp_path)
    lineage, server = lineage_on(tmp_path)
    server.away = False

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Spool, "_write", full)
        caplog.clear()
        lineage.log_metrics(RUN, {"loss": 2.0}, 2)
    assert "the queue cannot be used" in caplog.text
    server.got.clear()
    assert lineage.flush() == 0
    assert server.got == [(RUN, "the only copy"), (RUN, "HOTA"), (RUN, "loss")], "delivered twice, which is harmless"


def test_a_full_disk_for_one_run_does_not_block_another(tmp_path: Path) -> None:
    spooled(tmp_path)
    lineage, server = lineage_on(tmp_path)
    lineage.log_text(OTHER, "of another", "notes.txt")
    server.away, server.error = False, lambda: OSError(errno.ENOSPC, "No space left")
    assert lineage.flush() == 2
    assert server.got == [(OTHER, "of another")]


def test_nothing_is_set_aside_if_the_store_refuses_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    spooled(tmp_path)
    lineage, _ = lineage_on(tmp_path)

    def refuses() -> None:
        raise MotipError("MLflow refuses: wrong password")

    monkeypatch.setattr(lineage._store, "client", refuses)
    caplog.clear()
    assert lineage.flush() == 2
    assert "wrong password" in caplog.text
    assert set_aside(tmp_path) == []


@pytest.mark.parametrize("status", [403, 404])
def test_a_proxy_that_refuses_everything_counts_as_an_outage(status: int, tmp_path: Path) -> None:
    spooled(tmp_path)
    lineage, server = lineage_on(tmp_path)
    answer = f"API request to endpoint /x failed with error code {status} != 200. Response body: 'page not found'"
    server.away, server.everything = False, MlflowException(answer)
    lineage.log_metrics(OTHER, {"loss": 2.0}, 2)
    lineage.log_metrics(RUN, {"loss": 1.0}, 2)
    assert lineage.flush() == 4 and set_aside(tmp_path) == []
    server.everything = None
    assert lineage.flush() == 0
    assert server.got == [(RUN, "the only copy"), (RUN, "HOTA"), (RUN, "loss"), (OTHER, "loss")]


def test_a_refused_file_is_set_aside_without_an_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lineage, server = lineage_on(tmp_path)
    server.away, server.error = False, lambda: http(413)
    lineage.log_text(RUN, "too large", "scores.json")
    lineage.log_metrics(RUN, {"HOTA": 1.0}, 1)
    (entry,) = set_aside(tmp_path)
    assert "413" in entry["reason"] and "set aside in" in caplog.text
    assert server.got == [(RUN, "HOTA")] and not lineage._spool.has_entries(RUN)


def test_an_entry_that_cannot_be_queued_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lineage, _ = lineage_on(tmp_path)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(MotipError, match="cannot be spooled: No space left"):
        lineage.log_text(RUN, "text", "notes.txt")


def test_a_spool_can_be_moved_with_queued_entries(tmp_path: Path) -> None:
    spooled(tmp_path / "before")
    shutil.move(tmp_path / "before", tmp_path / "after")
    lineage, server = lineage_on(tmp_path / "after")
    server.away = False
    assert lineage.flush() == 0
    assert server.got == [(RUN, "the only copy"), (RUN, "HOTA")]
    assert not list((tmp_path / "after").rglob("*.txt"))


@pytest.mark.parametrize("moved", [False, True])
def test_a_spool_with_absolute_paths_is_read(moved: bool, tmp_path: Path) -> None:
    """As written by older versions."""
    storage = tmp_path / "before"
    spooled(storage)
    queue = storage / "mlflow" / "spool" / f"{RUN}.jsonl"
    artifact, metric = (json.loads(line) for line in queue.read_text().splitlines())
    artifact["path"] = str(storage / "mlflow" / "spool" / artifact["path"])
    queue.write_text(json.dumps(artifact) + "\n" + json.dumps(metric) + "\n")
    if moved:
        storage = Path(shutil.move(storage, tmp_path / "after"))
    lineage, server = lineage_on(storage)
    server.away = False
    assert lineage.flush() == 0
    assert server.got == [(RUN, "the only copy"), (RUN, "HOTA")]
    assert not list(storage.rglob("*.txt"))


def test_a_missing_spooled_file_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    spooled(tmp_path)
    shutil.rmtree(tmp_path / "mlflow" / "spool" / "files")
    lineage, server = lineage_on(tmp_path)
    server.away = False
    assert lineage.flush() == 0
    assert server.got == [(RUN, "HOTA")]
    (entry,) = set_aside(tmp_path)
    assert entry["reason"] == "the stored file of this artifact is missing"
    assert "set aside" in caplog.text


def test_a_damaged_line_does_not_block_the_queue(tmp_path: Path) -> None:
    spooled(tmp_path)
    queue = tmp_path / "mlflow" / "spool" / f"{RUN}.jsonl"
    queue.write_bytes(b"\0\0\0 half a line\n[1]\n" + queue.read_bytes())
    lineage, server = lineage_on(tmp_path)
    server.away = False
    assert lineage.flush() == 0
    assert server.got == [(RUN, "the only copy"), (RUN, "HOTA")]
    assert [entry["line"] for entry in set_aside(tmp_path)] == ["\0\0\0 half a line", "[1]"]


def test_a_process_that_ends_before_the_queue_is_written_loses_no_file(tmp_path: Path) -> None:
    spooled(tmp_path)
    lineage, server = lineage_on(tmp_path)
    server.away = False
    delivered = server.log_batch

    def ends(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    server.log_batch = ends  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        lineage.flush()
    assert server.got == [(RUN, "the only copy")]
    server.log_batch = delivered  # type: ignore[method-assign]
    assert lineage.flush() == 0
    assert server.got == [(RUN, "the only copy"), (RUN, "the only copy"), (RUN, "HOTA")]
    assert set_aside(tmp_path) == []


def test_a_partial_line_does_not_block_the_queue(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.append("run", {"kind": "tags", "tags": {"a": "1"}})
    with (tmp_path / "run.jsonl").open("a") as stream:
        stream.write('{"kind": "tags", "ta')
    delivered: list[dict] = []

    def deliver(entries: list[dict]) -> int:
        delivered.append(entries[0])
        return 1

    assert spool.replay("run", deliver, lambda entry: "") == 0
    assert delivered == [{"kind": "tags", "tags": {"a": "1"}}]
    assert spool.runs() == []


def test_an_entry_after_a_partial_line_is_not_lost(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    with (tmp_path / "run.jsonl").open("a") as stream:
        stream.write('{"kind": "tags", "ta')
    spool.append("run", {"kind": "tags", "tags": {"b": "2"}})
    assert spool.count("run") == 1


def test_a_queue_emptied_by_another_process_meanwhile_is_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool, other = Spool(tmp_path), Spool(tmp_path)
    spool.append("run", {"kind": "tags", "tags": {}})
    real = Path.stat

    def stat(self: Path, **how: Any) -> Any:
        found = real(self, **how)
        with monkeypatch.context() as patched:
            patched.setattr(Path, "stat", real)
            other.replay("run", len, lambda entry: "")
        return found

    with monkeypatch.context() as patched:
        patched.setattr(Path, "stat", stat)
        assert spool.has_entries("run"), "before the other process emptied it"
    assert not spool.has_entries("run") and spool.runs() == []


@pytest.mark.parametrize("reason", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_mount_without_locks_is_used_with_a_warning(
    reason: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lineage, server = lineage_on(tmp_path)

    def no_locks(*_: object) -> None:
        raise OSError(reason, "no locks here")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    lineage.log_metrics(RUN, {"loss": 1.0}, 1)
    lineage.log_metrics(RUN, {"loss": 2.0}, 2)
    assert [message for message in caplog.messages if "without a lock" in message] == [
        f"continuing without a lock: {tmp_path / 'mlflow' / 'spool'} cannot be locked (no locks here)"
    ]
    server.away = False
    assert lineage.flush() == 0
    assert server.got == [(RUN, "loss")] * 2


def test_a_long_queue_is_not_read_for_every_entry(tmp_path: Path) -> None:
    class Queue(io.BytesIO):
        taken = 0

        def read(self, size: int | None = -1, /) -> bytes:
            content = super().read(size)
            self.taken += len(content)
            return content

    queue = Queue(b'{"kind": "tags"}\n' * 10_000)
    Spool._truncate_partial_line(queue)
    assert queue.taken == 1
    for content, kept in ((b"", b""), (b"half", b""), (b"one\n", b"one\n"), (b"one\nhalf", b"one\n")):
        queue = Queue(content)
        Spool._truncate_partial_line(queue)
        assert (queue.getvalue(), queue.tell()) == (kept, len(kept))
