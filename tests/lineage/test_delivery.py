"""Delivery of event logs to MLflow: outages, refusals, kills at any point, full disks, moved storages."""

from __future__ import annotations

import errno
import fcntl
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

from motip.errors import MotipError
from motip.events import (
    START,
    ArtifactWritten,
    CheckpointChosen,
    Ended,
    EpochDone,
    Event,
    EventLog,
    Imported,
    MetricsLogged,
    Note,
    Resumed,
    Scored,
    StepLogged,
    TableWritten,
    TagsSet,
    TextWritten,
    WeightsTransferred,
)
from motip.lineage import Lineage, recorder
from motip.lineage.recorder import MlflowRecorder
from motip.stage_folder import StageFolder
from motip.storage import driver_process
from motip.storage.atomic import sha256_file
from tests.helpers.mlflow_database import lineage_on

RUN, OTHER = "a" * 32, "b" * 32


class FakeMlflow:
    """An MLflow in memory with the client's methods that a delivery needs.

    Attributes:
        away: every call raises a connection error.
        error: raised by the artifacts of ``failing_runs``.
        everything: raised by every call.
        gone: the run was deleted.
        dies_at: number of the call that does not return, as in a killed process.
    """

    def __init__(self) -> None:
        self.away = False
        self.error: Callable[[], Exception] | None = None
        self.everything: Exception | None = None
        self.gone = False
        self.failing_runs = {RUN}
        self.dies_at = 0
        self.calls = 0
        self.got: list[tuple[str, str]] = []
        self.points: set[tuple[str, str, Any, int, int]] = set()
        self.tags: dict[str, dict[str, str]] = {}
        self.files: dict[tuple[str, str], str] = {}
        self.status: dict[str, tuple[str, int]] = {}

    def content(self) -> Any:
        """Everything that a user sees of the runs."""
        return self.points, self.tags, self.files, self.status

    def log_batch(self, run_id: str, metrics: Any = (), tags: Any = ()) -> None:
        self._called()
        if self.gone or any("*" in metric.key for metric in metrics):
            raise MlflowException("not taken", INVALID_PARAMETER_VALUE)
        self.got += [(run_id, metric.key) for metric in metrics]
        self.points |= {
            # As in MLflow's database, where two NaN are equal.
            (run_id, each.key, "nan" if each.value != each.value else each.value, each.step, each.timestamp)
            for each in metrics
        }
        self.tags.setdefault(run_id, {}).update({each.key: each.value for each in tags})

    def set_tag(self, run_id: str, key: str, value: str) -> None:
        self._called()
        self.tags.setdefault(run_id, {})[key] = value

    def get_run(self, run_id: str) -> Any:
        self._called()
        if self.gone:
            raise MlflowException("gone", RESOURCE_DOES_NOT_EXIST)
        data = SimpleNamespace(tags=self.tags.get(run_id, {}))
        return SimpleNamespace(info=SimpleNamespace(lifecycle_stage="active"), data=data)

    def get_experiment(self, experiment_id: str) -> Any:
        self._called()
        return SimpleNamespace(experiment_id=experiment_id)

    def log_text(self, run_id: str, text: str, path: str) -> None:
        self._called()
        if self.error is not None and run_id in self.failing_runs:
            raise self.error()
        self.got.append((run_id, text))
        self.files[run_id, path] = text

    def log_artifact(self, run_id: str, path: str, folder: str | None) -> None:
        self.log_text(run_id, Path(path).read_text(), f"{folder or '.'}/{Path(path).name}")

    def update_run(self, run_id: str, status: str) -> None:
        self._called()
        self.status[run_id] = (status, 0)

    def set_terminated(self, run_id: str, status: str, end_time: int) -> None:
        self._called()
        self.status[run_id] = (status, end_time)

    def _called(self) -> None:
        self.calls += 1
        if self.calls == self.dies_at:
            raise KeyboardInterrupt
        if self.away:
            raise requests.exceptions.ConnectionError("away")
        if self.everything is not None:
            raise self.everything


def on(storage: Path, server: FakeMlflow | None = None) -> tuple[Lineage, FakeMlflow]:
    """A new process on a storage, and its MLflow."""
    lineage, server = Lineage("http://127.0.0.1:9", storage, retry_interval=0), server or FakeMlflow()
    lineage._store._client = server  # type: ignore[assignment]
    return lineage, server


def waiting(storage: Path) -> tuple[Lineage, FakeMlflow]:
    """An artifact and, behind it, a metric that could not be delivered; MLflow is back."""
    lineage, server = on(storage)
    server.away = True
    lineage.log_text(RUN, "the only copy", "notes.txt")
    lineage.log_metrics(RUN, {"HOTA": 1.0}, 1)
    assert server.got == []
    return on(storage)


def set_aside(storage: Path) -> list[dict[str, Any]]:
    path = storage / "mlflow" / "readers" / f"{RUN}.rejected.jsonl"
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


# ---- kills ----------------------------------------------------------------------------------------------------------

STAGE: list[Event] = [
    TextWritten("config.json", "{}\n", time=1.0),
    WeightsTransferred({"summary": "3 tensors"}, time=2.0),
    StepLogged(0, 0, 2, 1, {"step/loss": 3.0, "lr": 0.1}, time=3.0),
    StepLogged(0, 1, 2, 2, {"step/loss": 2.5, "lr": 0.1}, time=4.0),
    Note("a clip was skipped", 2, time=4.5),
    Scored(0, 2, {}, time=5.0),
    EpochDone(0, 2, {"HOTA": 40.0, "train/loss": float("nan")}, time=6.0),
    TagsSet({"state": "cut off"}, time=7.0),
    Ended("KILLED", time=8.0),
    Resumed("host/1/1", time=9.0),
    StepLogged(1, 0, 2, 3, {"step/loss": 2.0}, time=10.0),
    Note("a worker was lost", time=11.0),
    MetricsLogged({"bad*name": 1.0, "best_HOTA": 40.0}, 2, time=12.0),
    TableWritten("evaluation/domains.json", ["stage"], [["a"]], time=13.0),
    ArtifactWritten("missing.png", "missing.png", time=13.5),
    TagsSet({"state": "done"}, time=14.0),
    Ended("FINISHED", time=15.0),
]


def log_of(events: list[Event], folder: Path) -> bytes:
    log = EventLog(folder)
    for event in events:
        log.send(event)
    return (folder / "events.jsonl").read_bytes()


def deliver(storage: Path, folder: Path, server: FakeMlflow) -> MlflowRecorder:
    """One reading of a log by a new process."""
    lineage, _ = on(storage, server)
    reader = lineage._recorder(RUN)
    reader.attach(folder)
    reader.catch_up()
    return reader


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, Any]:
    """The log as bytes, and the content of MLflow after an undisturbed delivery."""
    folder = tmp_path_factory.mktemp("undisturbed")
    log, server = log_of(STAGE, folder / "stage"), FakeMlflow()
    assert deliver(folder, folder / "stage", server).remaining() == 0
    points, tags, files, status = server.content()
    assert len(points) == 8 and tags[RUN]["state"] == "done" and status == {RUN: ("FINISHED", 15000)}
    assert {path for _, path in files} >= {"config.json", "transfer.json", "notes.txt", "scores/epoch_000.json"}
    assert files[RUN, "notes.txt"].count("\n") == 2
    assert [entry["kind"] for entry in set_aside(folder)] == ["metrics", "artifact"]
    return log, server.content()


def same(server: FakeMlflow, expected: tuple[bytes, Any]) -> bool:
    return bool(server.content() == expected[1])


def test_a_log_that_was_read_at_any_length_gives_the_same_result(tmp_path: Path, expected: tuple[bytes, Any]) -> None:
    """The writer was killed after any byte; the reader read that much, and the rest in another process."""
    log = expected[0]
    (tmp_path / "stage").mkdir()
    file = tmp_path / "stage" / "events.jsonl"
    for length in range(0, len(log), 7):
        shutil.rmtree(tmp_path / "mlflow", ignore_errors=True)
        file.write_bytes(log[:length])
        server = FakeMlflow()
        assert deliver(tmp_path, file.parent, server).remaining() == 0
        file.write_bytes(log)
        deliver(tmp_path, file.parent, server)
        assert same(server, expected), f"read at {length} bytes"


def test_a_reader_killed_at_any_call_gives_the_same_result(tmp_path: Path, expected: tuple[bytes, Any]) -> None:
    log_of(STAGE, tmp_path / "stage")
    died = 0
    for call in range(1, 100):
        shutil.rmtree(tmp_path / "mlflow", ignore_errors=True)
        server = FakeMlflow()
        server.dies_at = call
        try:
            deliver(tmp_path, tmp_path / "stage", server)
        except KeyboardInterrupt:
            died += 1
        deliver(tmp_path, tmp_path / "stage", server)
        assert same(server, expected), f"killed at call {call}"
        if server.calls < call:
            break
    assert died > 20


def test_a_reader_killed_before_it_saves_its_offset_gives_the_same_result(
    tmp_path: Path, expected: tuple[bytes, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    log_of(STAGE, tmp_path / "stage")
    server = FakeMlflow()
    with monkeypatch.context() as patched:
        patched.setattr(recorder, "write_json_atomic", lambda *_: None)
        for _ in range(3):
            deliver(tmp_path, tmp_path / "stage", server)
    deliver(tmp_path, tmp_path / "stage", server)
    assert same(server, expected)


def test_a_log_delivered_again_from_zero_gives_the_same_result(tmp_path: Path, expected: tuple[bytes, Any]) -> None:
    log_of(STAGE, tmp_path / "stage")
    server = FakeMlflow()
    deliver(tmp_path, tmp_path / "stage", server)
    shutil.rmtree(tmp_path / "mlflow" / "readers")
    deliver(tmp_path, tmp_path / "stage", server)
    assert same(server, expected)


def test_half_a_line_is_completed_by_the_next_writer(tmp_path: Path) -> None:
    log = log_of(STAGE[:3], tmp_path)
    (tmp_path / "events.jsonl").write_bytes(log[:-9])
    assert len(list(EventLog(tmp_path))) == 2
    EventLog(tmp_path).send(STAGE[3])
    assert list(EventLog(tmp_path)) == [*STAGE[:2], STAGE[3]]


def test_two_drivers_deliver_one_log(tmp_path: Path, expected: tuple[bytes, Any]) -> None:
    """Each reads and delivers what is new, in turns, while the log grows."""
    server = FakeMlflow()
    readers = []
    for _ in range(2):
        lineage, _ = on(tmp_path, server)
        readers.append(lineage._recorder(RUN))
        readers[-1].attach(tmp_path / "stage")
    log = EventLog(tmp_path / "stage")
    for number, event in enumerate(STAGE):
        log.send(event)
        readers[number % 2].catch_up()
    assert same(server, expected) and [reader.remaining() for reader in readers] == [0, 0]


# ---- the real database ----------------------------------------------------------------------------------------------


def test_sqlite_has_no_duplicates_after_a_second_delivery(tmp_path: Path) -> None:
    lineage = lineage_on(tmp_path)
    run_id = lineage.start_stage(lineage.start_curriculum("demo", {}), "a", {}, "d" * 64, None, folder=tmp_path / "a")
    chosen = []
    for name in ("one", "two"):
        (tmp_path / name).write_text(name)
        chosen.append(CheckpointChosen(str(tmp_path / name), sha256_file(tmp_path / name), 2, time=20.0))
    log = EventLog(tmp_path / "a")
    for event in [*STAGE[:-1], *chosen, *STAGE[-1:]]:
        log.send(event)
    lineage.catch_up(run_id)
    before = recorded(lineage, run_id)
    for _ in range(2):
        shutil.rmtree(tmp_path / "mlflow" / "readers")
        again = lineage_on(tmp_path)
        again._recorder(run_id).attach(tmp_path / "a")
        again.catch_up(run_id)
        assert recorded(again, run_id) == before
    history, status, models, alias, tags = before
    assert history["step/loss"] == [(1, 3.0, 3000), (2, 2.5, 4000), (3, 2.0, 10000)]
    assert len(history["train/loss"]) == 1 and status == ("FINISHED", 15000)
    assert len(models) == 2 and alias == chosen[1].sha256
    assert tags["state"] == "done"


def recorded(lineage: Lineage, run_id: str) -> Any:
    """History of every metric, end, models, checkpoint of the alias, and tags of a run."""
    client = lineage._store.client()
    run = client.get_run(run_id)
    history = {
        name: [
            (each.step, each.value if each.value == each.value else None, each.timestamp)
            for each in client.get_metric_history(run_id, name)
        ]
        for name in run.data.metrics
    }
    models = sorted(each.model_id for each in run.outputs.model_outputs)
    version = client.get_model_version_by_alias("motip-curriculum", "a")
    return history, (run.info.status, run.info.end_time), models, version.tags["sha256"], run.data.tags


def test_two_thousand_steps_need_few_requests(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "stage")
    log.create(StepLogged(0, step, 2500, step, {"loss": 1.0, "lr": 0.1}, time=step) for step in range(2500))
    server = FakeMlflow()
    reader = deliver(tmp_path, tmp_path / "stage", server)
    assert len(server.points) == 5000 and server.calls <= 6
    calls = server.calls
    for _ in range(10):
        reader.catch_up()
    assert server.calls == calls, "nothing is new"


# ---- refusals -------------------------------------------------------------------------------------------------------


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
def test_a_permanently_refused_artifact_does_not_block_the_log(
    refusal: Callable[[], Exception], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lineage, server = waiting(tmp_path)
    server.error = refusal
    caplog.clear()
    assert lineage.deliver_all() == 0
    assert server.got == [(RUN, "HOTA")]
    (entry,) = set_aside(tmp_path)
    assert str(refusal().args[-1])[:20] in entry["reason"] and "pa55" not in entry["reason"]
    assert (entry["path"], entry["text"]) == ("notes.txt", "the only copy")
    (warning,) = caplog.messages
    assert "set aside" in warning and entry["reason"] in warning
    lineage.log_metrics(RUN, {"HOTA": 2.0}, 2)
    assert (lineage.deliver_all(), len(server.got)) == (0, 2)


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
def test_events_that_cannot_be_accepted_now_are_delivered_later(
    failure: Callable[[], Exception], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lineage, server = waiting(tmp_path)
    server.error = failure
    caplog.clear()
    assert lineage.deliver_all() == 2
    assert [message for message in caplog.messages if message.startswith("2 earlier events")]
    assert all(str(failure().args[-1])[:12] in message for message in caplog.messages)
    assert (server.got, set_aside(tmp_path)) == ([], [])
    server.error = None
    assert lineage.deliver_all() == 0
    assert server.got == [(RUN, "the only copy"), (RUN, "HOTA")]


@pytest.mark.parametrize("bad", [0, 1, 6, 19])
def test_one_refused_metric_does_not_reject_others(bad: int, tmp_path: Path) -> None:
    names = [f"m*{number}" if number == bad else f"m{number}" for number in range(20)]
    log_of([MetricsLogged({name: 1.0}, 1) for name in names], tmp_path / "stage")
    server = FakeMlflow()
    assert deliver(tmp_path, tmp_path / "stage", server).remaining() == 0
    assert [name for _, name in server.got] == [name for name in names if "*" not in name], "in their order"
    (entry,) = set_aside(tmp_path)
    assert list(entry["metrics"]) == [names[bad]]


def test_only_refused_points_of_an_event_are_set_aside(tmp_path: Path) -> None:
    log_of([MetricsLogged({"a": 1.0, "b*": 2.0, "c": 3.0}, 1), MetricsLogged({"d": 1.0}, 2)], tmp_path / "stage")
    server = FakeMlflow()
    assert deliver(tmp_path, tmp_path / "stage", server).remaining() == 0
    assert server.got == [(RUN, name) for name in "acd"]
    (entry,) = set_aside(tmp_path)
    assert list(entry["metrics"]) == ["b*"]


def test_events_of_a_deleted_run_are_set_aside_with_few_requests_and_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log_of([MetricsLogged({f"m{n}": 1.0 for n in range(10)}, step) for step in range(64)], tmp_path / "stage")
    server = FakeMlflow()
    server.gone = True
    reader = deliver(tmp_path, tmp_path / "stage", server)
    for step in range(3):
        reader.log.send(MetricsLogged({"late": 1.0}, step))
        reader.catch_up()
    assert reader.remaining() == 0 and len(set_aside(tmp_path)) == 67
    assert server.calls < 20
    assert sum("set aside" in message for message in caplog.messages) == 1


@pytest.mark.parametrize(
    "refusal",
    [
        http(401),
        MlflowException("You are not authenticated", UNAUTHENTICATED),
        MlflowException("API request to endpoint /x failed with error code 401 != 200. Response body: ''"),
    ],
    ids=["http", "mlflow", "status"],
)
def test_events_refused_for_an_expired_token_are_delivered_later(
    refusal: Exception, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lineage, server = waiting(tmp_path)
    server.everything = refusal
    caplog.clear()
    assert lineage.deliver_all() == 2
    lineage.log_metrics(RUN, {"HOTA": 2.0}, 2)
    assert all("the login is not accepted" in message for message in caplog.messages) and caplog.messages
    assert set_aside(tmp_path) == []
    with pytest.raises(MotipError, match="the login is not accepted") as refused:
        lineage._store.retry(lambda: server._called())
    assert "MLFLOW_TRACKING_TOKEN" in str(refused.value) and "pa55" not in str(refused.value)
    server.everything = None
    assert lineage.deliver_all() == 0
    assert server.got == [(RUN, "the only copy"), (RUN, "HOTA"), (RUN, "HOTA")]


def test_nothing_is_set_aside_if_the_store_refuses_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lineage, _ = waiting(tmp_path)

    def refuses() -> None:
        raise MotipError("MLflow refuses: wrong password")

    monkeypatch.setattr(lineage._store, "client", refuses)
    caplog.clear()
    assert lineage.deliver_all() == 2
    assert "wrong password" in caplog.text
    assert set_aside(tmp_path) == []


@pytest.mark.parametrize("status", [403, 404, 502])
def test_a_proxy_that_refuses_everything_counts_as_one_outage(
    status: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lineage, server = waiting(tmp_path)
    answer = f"API request to endpoint /x failed with error code {status} != 200. Response body: 'page not found'"
    server.everything = MlflowException(answer)
    caplog.clear()
    lineage.log_metrics(OTHER, {"loss": 2.0}, 2)
    lineage.log_metrics(RUN, {"loss": 1.0}, 2)
    assert sum("cannot be used now" in message for message in caplog.messages) == 1
    assert lineage.deliver_all() == 4 and set_aside(tmp_path) == []
    server.everything = None
    assert lineage.deliver_all() == 0
    assert server.got == [(RUN, "the only copy"), (RUN, "HOTA"), (RUN, "loss"), (OTHER, "loss")]


def test_a_full_disk_for_one_run_does_not_block_another(tmp_path: Path) -> None:
    lineage, server = waiting(tmp_path)
    lineage._retry_interval = 60.0
    server.error = lambda: OSError(errno.ENOSPC, "No space left")
    assert lineage.deliver_all() == 2
    lineage.log_text(OTHER, "of another", "notes.txt")
    assert server.got == [(OTHER, "of another")]


# ---- disks and files ------------------------------------------------------------------------------------------------


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_at_the_offset_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lineage, server = waiting(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(recorder, "write_json_atomic", full)
        lineage.log_metrics(RUN, {"loss": 2.0}, 2)
    assert lineage.deliver_all() == 0
    assert len(server.points) == 2 and len(server.files) == 1, "delivered twice, which is harmless"


def test_an_event_that_cannot_be_written_is_an_error_and_leaves_whole_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lineage, server = on(tmp_path)
    lineage.log_text(RUN, "first", "first.txt")
    before = (tmp_path / "mlflow" / "logs" / RUN / "events.jsonl").read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        with pytest.raises(MotipError, match="cannot be written: No space left"):
            lineage.log_text(RUN, "text", "notes.txt")
    assert (tmp_path / "mlflow" / "logs" / RUN / "events.jsonl").read_bytes() == before
    lineage.log_metrics(RUN, {"loss": 1.0}, 1)
    assert server.got == [(RUN, "first"), (RUN, "text"), (RUN, "loss")], "kept and written with the next event"


def test_a_storage_can_be_moved_with_undelivered_events(tmp_path: Path) -> None:
    lineage, server = on(tmp_path / "before")
    server.away = True
    lineage._recorder(RUN).attach(tmp_path / "before" / "stage")
    (tmp_path / "before" / "stage").mkdir()
    for name in ("stage/of the stage.png", "of the storage.png"):
        (tmp_path / "before" / name).write_text(name)
        lineage.log_artifact(RUN, tmp_path / "before" / name)
    shutil.move(tmp_path / "before", tmp_path / "after")
    lineage, server = on(tmp_path / "after")
    assert lineage.deliver_all() == 0
    assert [*dict.fromkeys(server.got)] == [(RUN, "stage/of the stage.png"), (RUN, "of the storage.png")]


def test_an_artifact_keeps_its_content_during_an_outage(tmp_path: Path) -> None:
    """Later runs write to the same file."""
    lineage, server = on(tmp_path)
    server.away = True
    picture = tmp_path / "domains.png"
    picture.write_text("of this run")
    lineage.log_artifact(RUN, picture, "domains/heatmap.png")
    picture.write_text("of a later run")
    lineage, server = on(tmp_path)
    assert lineage.deliver_all() == 0
    assert server.files[RUN, "domains/heatmap.png"] == "of this run"


def test_a_run_that_has_ended_is_read_again_only_after_a_further_event(tmp_path: Path) -> None:
    lineage, server = on(tmp_path)
    lineage.log_metrics(RUN, {"HOTA": 1.0}, 1)
    lineage.finish(RUN)
    assert MlflowRecorder.attached(lineage._store) == [] and lineage._recorder(RUN).ended()
    server.away = True
    lineage.set_tags(RUN, {"motip.forgotten": "nothing"})
    assert MlflowRecorder.attached(lineage._store) == [RUN]
    lineage, server = on(tmp_path)
    assert lineage.deliver_all() == 0 and server.tags[RUN]["motip.forgotten"] == "nothing"


def test_a_missing_artifact_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log_of([ArtifactWritten("gone.png", "gone.png"), MetricsLogged({"HOTA": 1.0}, 1)], tmp_path / "stage")
    server = FakeMlflow()
    assert deliver(tmp_path, tmp_path / "stage", server).remaining() == 0
    assert server.got == [(RUN, "HOTA")]
    (entry,) = set_aside(tmp_path)
    assert entry["reason"] == "the file of this artifact is missing"
    assert "set aside" in caplog.text


def test_a_damaged_line_does_not_block_the_log(tmp_path: Path) -> None:
    lines = log_of(STAGE[2:4], tmp_path / "stage")
    (tmp_path / "stage" / "events.jsonl").write_bytes(b"\0\0\0 half a line\n[1]\n" + lines)
    server = FakeMlflow()
    assert deliver(tmp_path, tmp_path / "stage", server).remaining() == 0
    assert len(server.points) == 4


def test_a_damaged_offset_delivers_the_log_again(tmp_path: Path, expected: tuple[bytes, Any]) -> None:
    log_of(STAGE, tmp_path / "stage")
    server = FakeMlflow()
    deliver(tmp_path, tmp_path / "stage", server)
    (tmp_path / "mlflow" / "readers" / f"{RUN}.json").write_text("{")
    assert deliver(tmp_path, tmp_path / "stage", server).remaining() == 0
    assert same(server, expected)


def test_a_deleted_and_written_log_is_delivered_from_its_beginning(tmp_path: Path) -> None:
    log_of(STAGE, tmp_path / "stage")
    server = FakeMlflow()
    deliver(tmp_path, tmp_path / "stage", server)
    shutil.rmtree(tmp_path / "stage")
    lineage, _ = on(tmp_path, server)
    reader = lineage._recorder(RUN)
    reader.attach(tmp_path / "stage")
    reader.log.send(MetricsLogged({"again": 1.0}, 1))
    reader.catch_up()
    assert (RUN, "again") in server.got


@pytest.mark.parametrize("reason", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_mount_without_locks_is_used(
    reason: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lineage, server = on(tmp_path)

    def no_locks(*_: object) -> None:
        raise OSError(reason, "no locks here")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    lineage.log_metrics(RUN, {"loss": 1.0}, 1)
    lineage.log_metrics(RUN, {"loss": 2.0}, 2)
    assert server.got == [(RUN, "loss")] * 2 and caplog.messages == []


# ---- attempts -------------------------------------------------------------------------------------------------------


def test_a_stage_continues_in_another_run_with_all_its_events(tmp_path: Path) -> None:
    """Its first run was deleted in MLflow: the log goes to the new one only."""
    log = EventLog(tmp_path / "stage")
    log.create(STAGE[:9])
    server = FakeMlflow()
    deliver(tmp_path, tmp_path / "stage", server)
    lineage, _ = on(tmp_path, server)
    other = lineage._recorder(OTHER)
    other.attach(tmp_path / "stage")
    log.send(Resumed("host/2/2"))
    assert lineage.deliver_all() == 0
    assert {point[1:] for point in server.points if point[0] == OTHER} > {("step/loss", 3.0, 1, 3000)}
    assert server.status[OTHER][0] == "RUNNING" and server.status[RUN][0] == "KILLED"
    assert MlflowRecorder.attached(lineage._store) == [OTHER]


def test_events_of_version_0_1_are_not_delivered_again(tmp_path: Path) -> None:
    """Version 0.1 recorded them itself; what its queue still had is delivered, also if MLflow is away at first."""
    spool = tmp_path / "mlflow" / "spool"
    kept = spool / "files" / "1" / "late.txt"
    kept.parent.mkdir(parents=True)
    kept.write_text("of the queue")
    entries = [
        {"kind": "metrics", "points": [["loss", 2.0, 5000, 3]]},
        {"kind": "artifact", "path": "/elsewhere/mlflow/spool/files/1/late.txt", "folder": ""},
        {"kind": "status", "status": "FAILED", "time": 9000},
    ]
    (spool / f"{RUN}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in entries) + '{"kind": "ta')
    stage = tmp_path / "stage"
    (stage / "epoch_000").mkdir(parents=True)
    (stage / "history.json").write_text(json.dumps({"epochs": {"0": {"HOTA": 1.0}}}))
    StageFolder(stage).complete_log()
    assert [type(event) for event in EventLog(stage)] == [EpochDone, Imported]

    lineage, server = on(tmp_path)
    server.away = True
    assert lineage.deliver_all() == 3
    assert not list(spool.glob("*.jsonl"))
    lineage._recorder(RUN).attach(stage)
    lineage._send(RUN, Resumed(driver_process.this_driver()))
    server.away = False
    assert lineage.deliver_all() == 0
    assert server.points == {(RUN, "loss", 2.0, 3, 5000)} and server.files == {(RUN, "./late.txt"): "of the queue"}
    assert server.status[RUN][0] == "RUNNING", "the queued end belongs to the earlier attempt"


def test_the_offset_of_an_unchanged_log_is_kept(tmp_path: Path) -> None:
    log_of(STAGE, tmp_path / "stage")
    server = FakeMlflow()
    reader = deliver(tmp_path, tmp_path / "stage", server)
    assert reader._offset() != START
    calls = server.calls
    deliver(tmp_path, tmp_path / "stage", server)
    assert server.calls == calls
