"""Parquet shards: exact round trip, partial reads, atomic writes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from motip.data import shards
from motip.data.formats.registry import reader
from motip.data.sequence import Frame, Sequence
from motip.data.shards import (
    ROWS_PER_GROUP,
    Shard,
    ShardWriter,
    header_of,
    read_frames,
    read_header,
    read_labels,
    write_shard,
)
from motip.errors import MotipError


def frame(number: int, objects: int = 3) -> Frame:
    rng = np.random.default_rng(number)
    return Frame(
        number=number,
        image=bytes(rng.integers(0, 256, 500, dtype=np.uint8)),
        boxes_xyxy=rng.normal(size=(objects, 4)).astype(np.float32),
        track_ids=np.arange(objects, dtype=np.int64) - 1,
        categories=("car", "pedestrian", "other vehicle")[:objects],
        ignore=np.arange(objects) == 1,
        occlusion=np.arange(objects, dtype=np.int8),
        truncation=np.zeros(objects, np.int8),
    )


def sequence(count: int = 21) -> Sequence:
    # Frame numbers start above 0 and have a gap; some frames are empty.
    frames = tuple(frame(165 + number + 3 * (number > 10), number % 4) for number in range(count))
    return Sequence("clip", "bdd100k", "train", 5.0, 1280, 720, frames, track_names=("a", "b"))


def assert_same(found: Frame, expected: Frame, *, image: bool = True) -> None:
    assert found.number == expected.number
    assert found.categories == expected.categories
    assert found.image == (expected.image if image else None)
    for name in ("boxes_xyxy", "track_ids", "ignore", "occlusion", "truncation"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), strict=True)


def test_frames_are_returned_in_the_requested_order(tmp_path: Path) -> None:
    original = sequence()
    write_shard(original, tmp_path / "clip.parquet")
    requested = [20, 0, 7, 8, 7, 15]
    for position, found in zip(requested, read_frames(tmp_path / "clip.parquet", requested), strict=True):
        assert_same(found, original.frames[position])
    for position, found in enumerate(read_frames(tmp_path / "clip.parquet", range(21))):
        assert_same(found, original.frames[position])
    assert read_frames(tmp_path / "clip.parquet", []) == []


def test_labels_are_returned_without_images(tmp_path: Path) -> None:
    original = sequence()
    write_shard(original, tmp_path / "clip.parquet", video="clip_part")
    found = read_labels(tmp_path / "clip.parquet")
    assert (found.name, found.dataset, found.fps, found.width, found.height) == ("clip_part", "bdd100k", 5.0, 1280, 720)
    assert found.track_names == ("a", "b")
    for before, after in zip(original.frames, found.frames, strict=True):
        assert_same(after, before, image=False)


def test_only_requested_row_groups_and_columns_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shard(sequence(), tmp_path / "clip.parquet")
    shard = Shard(tmp_path / "clip.parquet")
    reads = []
    real = shard._file

    class Spy:
        def read_row_groups(self, groups: list[int], columns: list[str], **options: object) -> object:
            reads.append((groups, "image" in columns))
            return real.read_row_groups(groups, columns=columns, **options)

    monkeypatch.setattr(shard, "_file", Spy())
    shard.read_frames([17, 1])
    shard.read_labels()
    assert reads == [([0, 2], True), ([0, 1, 2], False)]


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_shard(sequence(), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    changed = sequence()
    changed.frames[5].boxes_xyxy[0, 0] += 1
    write_shard(changed, tmp_path / "c")
    assert read_header(tmp_path / "a").labels_sha256 != read_header(tmp_path / "c").labels_sha256
    assert read_header(tmp_path / "a").images_sha256 == read_header(tmp_path / "c").images_sha256


def test_shards_are_plain_parquet_with_uncompressed_images(tmp_path: Path) -> None:
    original = sequence()
    write_shard(original, tmp_path / "clip.parquet", source="bdd")
    table = pq.read_table(tmp_path / "clip.parquet")
    assert table.schema.equals(shards.SCHEMA)
    assert table.column("image").to_pylist() == [frame.image for frame in original.frames]
    assert table.column("position").to_pylist() == list(range(21))
    assert set(table.column("source").to_pylist()) == {"bdd"}
    metadata = pq.read_metadata(tmp_path / "clip.parquet")
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [8, 8, 5]
    image = next(
        metadata.row_group(0).column(i)
        for i in range(metadata.num_columns)
        if metadata.row_group(0).column(i).path_in_schema == "image"
    )
    assert (image.compression, image.is_stats_set) == ("UNCOMPRESSED", False)


def test_real_images_are_stored_byte_for_byte(samples_dir: Path, tmp_path: Path) -> None:
    (raw,) = reader("bdd100k").list_sequences(samples_dir / "bdd100k", "val")
    original, _ = reader("bdd100k").read_sequence(raw)
    write_shard(original, tmp_path / "clip.parquet")
    for before, after in zip(original.frames, read_frames(tmp_path / "clip.parquet", range(6)), strict=True):
        assert_same(after, replace(before, image=before.image.read_bytes()))


def test_error_during_writing_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError), ShardWriter(tmp_path / "clip.parquet", header_of(sequence(), source="s")) as writer:
        for item in sequence().frames[: ROWS_PER_GROUP + 1]:
            writer.add(item)
        raise ValueError
    assert list(tmp_path.iterdir()) == []


def test_position_outside_the_video_is_an_error(tmp_path: Path) -> None:
    write_shard(sequence(), tmp_path / "clip.parquet")
    for position in (21, -1):
        with pytest.raises(MotipError, match="outside the video"):
            read_frames(tmp_path / "clip.parquet", [position])


def test_files_other_than_shards_are_errors(tmp_path: Path) -> None:
    with pytest.raises(MotipError, match="shard is missing"):
        Shard(tmp_path / "none.parquet")
    (tmp_path / "text.parquet").write_text("x" * 100)
    with pytest.raises(MotipError, match="not a readable Parquet file"):
        Shard(tmp_path / "text.parquet")
    pq.write_table(pq.read_table(_written(tmp_path)).replace_schema_metadata(None), tmp_path / "other.parquet")
    with pytest.raises(MotipError, match="not a shard of this project"):
        Shard(tmp_path / "other.parquet")
    complete = _written(tmp_path).read_bytes()
    (tmp_path / "truncated.parquet").write_bytes(complete[: len(complete) // 2])
    with pytest.raises(MotipError, match="not a readable Parquet file"):
        Shard(tmp_path / "truncated.parquet")


def test_other_format_version_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _written(tmp_path)
    monkeypatch.setattr(shards, "SHARD_VERSION", 2)
    with pytest.raises(MotipError, match="another format version"):
        Shard(path)


def _written(folder: Path) -> Path:
    write_shard(sequence(), folder / "clip.parquet")
    return folder / "clip.parquet"
