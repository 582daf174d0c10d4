"""Retries of transient object-store errors, immediate permanent errors, atomic writes."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterator
from pathlib import Path

import pyarrow.fs as pafs
import pytest

from motip.errors import MotipError
from motip.storage import paths, retries
from motip.storage.atomic_filesystem import AtomicFilesystem, atomic_filesystem
from motip.storage.paths import RemotePath, location
from motip.storage.retries import with_retries
from tests.helpers.object_store import ObjectStore, object_store

CLIENT_TRIES = 3
"""Attempts of the S3 client itself; one more failure reaches `with_retries`."""


@pytest.fixture(scope="module")
def shared_store() -> Iterator[ObjectStore]:
    with object_store() as store:
        yield store


@pytest.fixture
def store(shared_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    monkeypatch.setattr(retries, "FIRST_DELAY_S", 0.01)
    shared_store.failures.clear()
    shared_store.requests.clear()
    return shared_store


def _at(store: ObjectStore, name: str) -> RemotePath:
    path = location(f"{store.uri}/{name}")
    assert isinstance(path, RemotePath)
    return path


@pytest.mark.parametrize("drop", [False, True], ids=["503", "dropped"])
def test_every_operation_retries_transient_errors(
    store: ObjectStore, drop: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = _at(store, f"verbs-{drop}/a.bin")
    (tmp_path / "source").write_bytes(b"source")
    verbs = {
        "writing": lambda: path.write_bytes(b"0123"),
        "reading": lambda: path.read_bytes() == b"0123",
        "inspecting": lambda: path.stat().st_size == 4,
        "listing": lambda: [each.name for each in path.parent.files(recursive=True)] == ["a.bin"],
        "storing": lambda: paths.upload(tmp_path / "source", path),
        "removing": path.unlink,
    }
    for verb, action in verbs.items():
        store.requests.clear()
        caplog.clear()
        store.fail("", CLIENT_TRIES + 1, drop)
        with caplog.at_level(logging.WARNING):
            assert action() in (True, None), verb
        assert len(store.failed()) >= CLIENT_TRIES + 1
        assert f"{'writing' if verb == 'storing' else verb} {path if verb != 'listing' else path.parent}" in caplog.text
        assert "failed (try 1), again in" in caplog.text
    assert not path.exists() and path.parent.is_dir()
    path.unlink(missing_ok=True)
    with pytest.raises(MotipError, match="no such object"):
        path.unlink()


def test_chunked_read_retries_only_the_failed_chunk(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "CHUNK_BYTES", 4)
    monkeypatch.setattr(paths, "STREAM_TRIES", 1)
    path = _at(store, "bits.bin")
    path.write_bytes(b"0123456789")
    chunks = []
    for chunk in path.chunks():
        chunks.append(chunk)
        store.fail("^GET", 1)
    assert chunks == [b"0123", b"4567", b"89"]
    assert len(store.failed()) == 2
    store.failures.clear()


def test_retries_are_limited_and_permanent_errors_are_not_retried(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(MotipError, match=r"S3|no such object"):
        location("s3://no-such-bucket/x").write_bytes(b"1")
    assert len([each for each in store.requests if "no-such-bucket" in each]) == 1
    monkeypatch.setattr(retries.with_retries, "__defaults__", (0.0, *retries.with_retries.__defaults__[1:]))  # type: ignore[index]
    store.fail("", 1000)
    with pytest.raises(MotipError, match="SLOW_DOWN"):
        _at(store, "x").write_bytes(b"1")
    assert len(store.failed()) == CLIENT_TRIES


def test_delays_grow_and_are_logged() -> None:
    lines: list[str] = []
    left = [3]

    def action() -> str:
        left[0] -= 1
        if left[0] >= 0:
            raise OSError("AWS Error SLOW_DOWN during PutObject operation: busy")
        return "done"

    delays: list[float] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retries.time, "sleep", delays.append)
        assert with_retries(action, "writing x", log=lines.append) == "done"
    assert len(delays) == len(lines) == 3 and delays[0] < delays[1] < delays[2]
    assert lines[0].startswith("writing x failed (try 1)") and "SLOW_DOWN" in lines[0]
    with pytest.raises(OSError, match="ACCESS_DENIED"):
        with_retries(lambda: _raise(OSError("AWS Error ACCESS_DENIED")), "writing x", log=lines.append)
    assert len(lines) == 3


def _raise(error: Exception) -> None:
    raise error


def test_failed_upload_keeps_the_previous_object(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _at(store, "big.pth")
    path.write_bytes(b"previous")
    (tmp_path / "big.pth").write_bytes(bytes(12 << 20))
    monkeypatch.setattr(retries.with_retries, "__defaults__", (0.0, *retries.with_retries.__defaults__[1:]))  # type: ignore[index]
    store.fail("partNumber=2", 1000)
    with pytest.raises(MotipError, match="SLOW_DOWN"):
        path.upload(tmp_path / "big.pth")
    assert path.read_bytes() == b"previous"
    store.failures.clear()
    path.upload(tmp_path / "big.pth")
    assert path.stat().st_size == 12 << 20
    (tmp_path / "empty").write_bytes(b"")
    path.upload(tmp_path / "empty")
    assert path.read_bytes() == b""


def test_atomic_filesystem_is_picklable_and_retries(store: ObjectStore) -> None:
    files = atomic_filesystem(remote=True)
    copy = pickle.loads(pickle.dumps(files))  # noqa: S301 - our own
    assert (
        copy == files and files != atomic_filesystem(remote=False) and AtomicFilesystem(True) == AtomicFilesystem(True)
    )
    folder = store.uri.removeprefix("s3://") + "/run"
    copy.create_dir(f"{folder}/step_1")
    store.fail("", CLIENT_TRIES + 1)
    with copy.open_output_stream(f"{folder}/snapshot.json") as stream:
        stream.write(b"{}")
    assert len(store.failed()) == CLIENT_TRIES + 1
    with copy.open_input_file(f"{folder}/snapshot.json") as stream:
        assert stream.read() == b"{}"
    infos = copy.get_file_info(pafs.FileSelector(folder))
    assert {info.base_name: info.is_file for info in infos} == {"snapshot.json": True, "step_1": False}
    assert copy.get_file_info(f"{folder}/none").type == pafs.FileType.NotFound
    copy.delete_dir(f"{folder}/step_1")
    assert copy.get_file_info(f"{folder}/step_1").type == pafs.FileType.NotFound


@pytest.mark.parametrize("remote", [False, True], ids=["local", "s3"])
def test_failed_write_keeps_the_previous_file(store: ObjectStore, tmp_path: Path, remote: bool) -> None:
    files = atomic_filesystem(remote)
    path = f"{store.uri.removeprefix('s3://')}/broken.json" if remote else str(tmp_path / "broken.json")

    def read() -> bytes:
        with files.open_input_file(path) as stream:
            return bytes(stream.read())

    with files.open_output_stream(path) as stream:
        stream.write(b"old")
    with pytest.raises(KeyError), files.open_output_stream(path) as stream:
        stream.write(b"ha")
        raise KeyError
    assert read() == b"old"
    # A complete write while an exception is handled is published, also after a handled exception of its own.
    try:
        raise ValueError
    except ValueError:
        with files.open_output_stream(path) as stream:
            stream.write(b"new")
            with pytest.raises(KeyError):
                _raise(KeyError())
    assert read() == b"new"


def test_full_disk_keeps_the_previous_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = atomic_filesystem(remote=False)

    def write(text: bytes) -> None:
        with files.open_output_stream(str(tmp_path / "snapshot.json")) as stream:
            stream.write(text)

    write(b"old")
    real = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        real(path, data[:1])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(MotipError, match="No space left"):
            write(b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["snapshot.json"]
    assert (tmp_path / "snapshot.json").read_bytes() == b"old"
    write(b"new")
    assert (tmp_path / "snapshot.json").read_bytes() == b"new"
