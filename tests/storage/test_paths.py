"""Storage paths: local folders and S3 (an S3-compatible server on loopback) through the same interface."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from motip.config import Config
from motip.data.clip_loader import ClipLoader, local_batches, plan_videos
from motip.data.clips import plan_clips
from motip.data.convert import convert
from motip.data.manifest import Manifest, entry_path
from motip.data.sequence import ClassMap
from motip.data.shards import read_frames, read_labels
from motip.errors import MotipError
from motip.storage import paths, retries
from motip.storage.paths import Location, RemotePath, location
from tests.helpers.object_store import object_store
from tests.helpers.raw_datasets import bdd_video, curriculum, mix, source


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """Address of an empty bucket on a server of this process."""
    with object_store() as store:
        yield store.uri


@pytest.fixture(params=["local", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    if request.param == "local":
        return tmp_path / "store"
    return location(f"{request.getfixturevalue('s3')}/{request.node.name.replace('[', '-').replace(']', '')}")


def test_addresses() -> None:
    assert location("~/motip") == Path.home() / "motip"
    assert location("file:///data") == Path("/data")
    remote = location("s3://bucket/a/b.txt/")
    assert isinstance(remote, RemotePath)
    assert (remote.name, remote.stem, remote.suffix) == ("b.txt", "b", ".txt")
    assert str(remote.parent / "c") == "s3://bucket/a/c"
    assert location(remote) is remote
    for bad in ("gs://bucket/a", "s3://"):
        with pytest.raises(MotipError, match="unsupported storage address"):
            location(bad)


def test_reading_writing_and_listing(folder: Location, tmp_path: Path) -> None:
    before = time.time() - 5
    paths.write_json(folder / "x" / "a.json", {"b": 1})
    paths.write_bytes(folder / "x" / "data.bin", b"0123456789")
    assert paths.read_json(folder / "x" / "a.json") == {"b": 1}
    assert (folder / "x" / "data.bin").read_bytes() == b"0123456789"
    assert (folder / "x").is_dir()
    assert (folder / "x" / "data.bin").is_file()
    assert not (folder / "x" / "none").is_file()
    assert not (folder / "x" / "none").exists()
    assert sorted(item.name for item in (folder / "x").iterdir()) == ["a.json", "data.bin"]
    size, modified = paths.size_and_time(folder / "x" / "data.bin")
    assert size == 10
    assert modified >= before
    assert paths.sizes_and_times(folder / "x")["data.bin"] == (size, modified)
    assert paths.sha256(folder / "x" / "data.bin") == "84d89877f0d4041efb6bf91a16f0248f2fd573e6af05c19f96bedb9f882f7882"
    assert paths.download(folder / "x" / "data.bin", tmp_path / "copy").read_bytes() == b"0123456789"
    with pytest.raises(MotipError):
        paths.read_json(folder / "x" / "none.json")


def test_atomic_output_is_published_only_on_success(folder: Location) -> None:
    with pytest.raises(ValueError), paths.atomic_output(folder / "f.bin") as path:
        path.write_bytes(b"half")
        raise ValueError
    assert not (folder / "f.bin").exists()
    with paths.atomic_output(folder / "f.bin") as path:
        path.write_bytes(b"complete")
    assert (folder / "f.bin").read_bytes() == b"complete"


def test_unavailable_locks_are_logged_and_do_not_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unknown(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    done = []
    with paths.exclusive_lock(location("s3://bucket/lock"), "a test"):
        done.append("an object store has none")
    with paths.exclusive_lock(tmp_path / "lock", "a test"):
        done.append("free")
    assert caplog.messages == []
    monkeypatch.setattr(paths.fcntl, "flock", unknown)
    with paths.exclusive_lock(tmp_path / "lock", "a test"):
        done.append("not supported")
    with paths.exclusive_lock(tmp_path / "none" / "lock", "a test"):
        done.append("not to be opened")
    assert len(done) == 4
    assert [message.startswith("continuing without a lock") for message in caplog.messages] == [True, True]


def test_stale_files_of_killed_processes_are_removed(tmp_path: Path) -> None:
    for name in (".a.1234.tmp.parquet", ".b.1234.tmp.parquet", "c.parquet"):
        (tmp_path / name).write_bytes(b"x")
    os.utime(tmp_path / ".a.1234.tmp.parquet", (0, 0))
    os.utime(tmp_path / "c.parquet", (0, 0))
    assert paths.remove_stale_files(tmp_path) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [".b.1234.tmp.parquet", "c.parquet"]


def test_raw_data_and_shards_in_s3_equal_local_ones(s3: str, tmp_path: Path) -> None:
    for split, video in (("train", "a"), ("train", "b"), ("val", "c")):
        bdd_video(tmp_path / "raw", video, 10, split=split)
    remote = location(f"{s3}/raw")
    for path in (tmp_path / "raw").rglob("*.*"):
        if path.is_file():
            paths.write_bytes(remote / path.relative_to(tmp_path / "raw").as_posix(), path.read_bytes())
    plan = curriculum([source("bdd", "bdd100k", ".", classes={"car": ("car",)})], [mix("bdd", 2)])
    plan.sources["bdd"].root = f"{s3}/raw"
    remote_report = convert(plan, s3, f"{s3}/store")
    plan.sources["bdd"].root = "raw"
    local_report = convert(plan, tmp_path, tmp_path / "store")
    shas = [[entry.shard_sha256 for entry in each.manifest.videos] for each in (remote_report, local_report)]
    assert remote_report.manifest.digest() == local_report.manifest.digest()
    assert shas[0] == shas[1]
    loaded = Manifest.load(f"{s3}/store")
    path = entry_path(f"{s3}/store", loaded.select("bdd", videos=1)[0])
    assert [frame.number for frame in read_frames(path, [9, 0])] == [9, 0]
    assert len(read_labels(path).frames) == 10
    plan.sources["bdd"].root = f"{s3}/raw"
    assert convert(plan, s3, f"{s3}/store").written == 0


def test_clips_from_s3_equal_local_ones(s3: str, tmp_path: Path) -> None:
    for split, video in (("train", "a"), ("val", "b")):
        bdd_video(tmp_path / "raw", video, 12, split=split)
    plan = curriculum([source("bdd", "bdd100k", "raw", classes={"car": ("car",)})], [mix("bdd", 1)])
    classes = {"bdd": ClassMap(("car",), {"car": ("car",)})}
    config = Config(
        NUM_CLASSES=1,
        CLASSES=("car",),
        AUG_RESIZE_SCALES=(48,),
        AUG_RANDOM_RESIZE=(48,),
        AUG_RANDOM_CROP_MIN=20,
        AUG_RANDOM_CROP_MAX=40,
        AUG_NUM_GROUPS=2,
        sampler_lengths=(3,),
        sample_intervals=(1, 2),
    )
    batches = []
    for store in (f"{s3}/clips", tmp_path / "clips"):
        entries = convert(plan, tmp_path, store).manifest.of("bdd", "train")
        videos = plan_videos(entries, classes, store)
        clips = plan_clips(videos, config.clip_schedule(0), epoch=0, seed=1)
        batches.append(list(local_batches(clips, ClipLoader(config, classes, store))))
    assert len(batches[0]) == len(batches[1]) > 5
    for remote, local in zip(*batches, strict=True):
        assert remote.names == local.names
        assert torch.equal(remote.images, local.images)
        assert remote.slots is not None and local.slots is not None
        assert torch.equal(remote.slots.unknown_labels, local.slots.unknown_labels)


@pytest.fixture
def no_region(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An environment with neither region nor endpoint."""
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    caches = (paths.s3, paths._bucket_region)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def test_requests_go_to_the_region_of_the_bucket(no_region: None, monkeypatch: pytest.MonkeyPatch) -> None:
    resolved = []

    def resolve(bucket: str) -> str:
        resolved.append(bucket)
        return {"one": "eu-west-1", "two": "ap-south-1"}[bucket]

    monkeypatch.setattr(paths.pafs, "resolve_s3_region", resolve)
    assert [paths.s3(bucket).region for bucket in ("one", "two", "one")] == ["eu-west-1", "ap-south-1", "eu-west-1"]
    assert paths.s3("one", paths.STREAM_TRIES).region == "eu-west-1"
    assert resolved == ["one", "two"]
    paths.s3.cache_clear()
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-north-1")
    assert paths.s3("one").region == "eu-north-1"
    monkeypatch.setenv("AWS_REGION", "sa-east-1")
    paths.s3.cache_clear()
    assert paths.s3("one").region == "sa-east-1"
    monkeypatch.delenv("AWS_REGION")
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    paths.s3.cache_clear()
    assert paths.s3("three").region == paths.CUSTOM_ENDPOINT_REGION
    assert resolved == ["one", "two"]


def test_unresolvable_region_is_an_error(no_region: None, monkeypatch: pytest.MonkeyPatch) -> None:
    responses = iter(["AWS Error NETWORK_CONNECTION during HeadBucket operation", "Bucket 'gone' not found"])
    tries = []

    def resolve(bucket: str) -> str:
        tries.append(bucket)
        raise OSError(next(responses))

    monkeypatch.setattr(paths.pafs, "resolve_s3_region", resolve)
    monkeypatch.setattr(retries, "FIRST_DELAY_S", 0.01)
    with pytest.raises(MotipError, match="cannot resolve the region of the bucket gone: Bucket") as caught:
        location("s3://gone/x").exists()
    assert "set AWS_REGION" in str(caught.value.fix)
    assert len(tries) == 2, "a lost connection is retried, a missing bucket is not"


def test_missing_bucket_is_an_error(s3: str) -> None:
    with pytest.raises(MotipError, match=r"S3|no such object"):
        paths.write_bytes(location("s3://no-such-bucket/x"), b"1")
    plan = curriculum([source("bdd", "bdd100k", "raw")], [mix("bdd", 1)])
    with pytest.raises(MotipError, match="data root is missing"):
        convert(plan, f"{s3}/nothing-here", f"{s3}/store")
