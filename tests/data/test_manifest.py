"""Manifest and selection: digests, locks, nested selections, cutting of sequences."""

from __future__ import annotations

import json
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from motip.data.convert_report import count_boxes
from motip.data.manifest import Manifest, VideoEntry, entries_digest, entry_path, manifest_path, summarise_labels
from motip.data.selection import (
    MIN_SEGMENT_FRAMES,
    cut_segments,
    segment_count,
    segment_limit_for,
    shortage_note,
    too_few_videos,
)
from motip.data.sequence import UNTRACKED, Frame
from motip.errors import MotipError


def entry(
    sequence: str = "s", segment: int = 0, *, source: str = "bdd", split: str = "train", frames: int = 10
) -> VideoEntry:
    video = f"{sequence}_{segment}"
    return VideoEntry(
        source=source,
        dataset="bdd100k",
        split=split,
        sequence=sequence,
        video=video,
        segment=segment,
        first_frame=0,
        last_frame=frames - 1,
        frames=frames,
        fps=5.0,
        width=64,
        height=48,
        labels_sha256="a" * 64,
        images_sha256="b" * 64,
        shard=f"{source}/{split}/{video}.parquet",
        shard_sha256="c" * 64,
        shard_bytes=9,
        rows_per_group=8,
        boxes={"car": 5, "bus": 2},
        ignored={"bus": 2},
        tracks={"car": 1},
        track_count=1,
        objects=5,
        max_objects=1,
        max_window_ids=1,
        empty_frames=0,
    )


def manifest(entries: SequenceOf[VideoEntry]) -> Manifest:
    return Manifest(tuple(entries), {"bdd": {"val": ["v", "w"]}}, (), {"seed": 3})


def test_digest_depends_on_content_but_not_on_order_or_storage() -> None:
    entries = [entry("a"), entry("b"), entry("c", split="val")]
    one = manifest(entries)
    assert one.digest() == manifest(entries[::-1]).digest()
    moved = [replace(item, shard="elsewhere", shard_sha256="d" * 64, inputs="x") for item in entries]
    assert one.digest() == manifest(moved).digest()
    assert one.digest() == replace(one, locked={"bdd": {"val": ["w", "v"]}}).digest()
    assert one.digest() != replace(one, locked={"bdd": {"val": ["v"]}}).digest()
    changed = [replace(entries[0], labels_sha256="e" * 64), *entries[1:]]
    assert one.digest() != manifest(changed).digest()
    assert entries_digest(entries) == entries_digest(entries[::-1]) != entries_digest(entries[:2])


def test_manifest_round_trip(tmp_path: Path) -> None:
    one = manifest([replace(entry("a"), bad_images=("x.jpg: empty file",), image_hashes=("00:11",)), entry("b")])
    one.save(tmp_path)
    assert Manifest.load(tmp_path) == one
    assert entry_path(tmp_path, one.videos[0]) == tmp_path / "shards" / "bdd" / "train" / "a_0.parquet"


def test_missing_corrupt_or_edited_manifest_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(MotipError, match="no such file"):
        Manifest.load(tmp_path)
    path = Path(manifest([entry("a")]).save(tmp_path))
    values = json.loads(path.read_text())
    values["videos"][0]["frames"] = 99
    path.write_text(json.dumps(values))
    with pytest.raises(MotipError, match="does not match its own digest"):
        Manifest.load(tmp_path)
    del values["videos"][0]["frames"]
    path.write_text(json.dumps(values))
    with pytest.raises(MotipError, match="corrupt"):
        Manifest.load(tmp_path)
    path.write_text(json.dumps({"version": 99}))
    with pytest.raises(MotipError, match="not a manifest of this version"):
        Manifest.load(tmp_path)
    path.write_text("{")
    with pytest.raises(MotipError, match="not a JSON file"):
        Manifest.load(tmp_path)
    assert manifest_path(tmp_path) == path


def test_selections_are_nested_and_take_first_segments_first() -> None:
    everything = manifest([entry(name, segment) for name in "abcdefgh" for segment in range(3)])
    picks = [everything.select("bdd", videos=count) for count in range(1, 25)]
    for smaller, larger in pairwise(picks):
        assert larger[: len(smaller)] == smaller
    assert {item.sequence for item in picks[7]} == set("abcdefgh")
    assert everything.select("bdd", videos=8, seed=3) == picks[7]
    assert everything.select("bdd", videos=8, seed=4) != picks[7]
    assert manifest(everything.videos[::-1]).select("bdd", videos=9) == picks[8]
    assert len(everything.select("bdd")) == 24


def test_frame_budget_takes_what_fits_and_at_least_one() -> None:
    everything = manifest([entry(name) for name in "abcdefgh"])
    assert len(everything.select("bdd", frame_budget=35)) == 3
    assert everything.select("bdd", frame_budget=35) == everything.select("bdd", videos=3)
    assert len(everything.select("bdd", frame_budget=1)) == 1
    assert len(everything.select("bdd", frame_budget=10**6)) == 8


def test_request_for_too_many_videos_is_an_error_with_the_counts() -> None:
    everything = manifest([entry(name) for name in "abc"])
    with pytest.raises(MotipError, match="fewer videos than requested: the manifest has 3") as caught:
        everything.select("bdd", videos=4)
    assert caught.value.expected == "4 videos"
    assert len(everything.select("bdd", videos=4, allow_fewer=True)) == 3
    with pytest.raises(MotipError, match="no val videos of source 'bdd'"):
        everything.select("bdd", "val")


def test_boxes_exclude_those_the_format_ignores() -> None:
    assert count_boxes([entry("a"), entry("b")]) == {"car": 10}


@given(st.integers(1, 3000), st.integers(MIN_SEGMENT_FRAMES, 300))
def test_segments_are_even_cover_the_sequence_and_respect_the_limit(length: int, limit: int) -> None:
    segments = cut_segments("s", length, limit)
    assert segments[0].start == 0
    assert all(a.stop == b.start for a, b in pairwise(segments))
    sizes = [segment.frames for segment in segments]
    assert max(sizes) <= limit
    assert max(sizes) - min(sizes) <= 1
    assert 0 <= length - segments[-1].stop < MIN_SEGMENT_FRAMES
    assert len(segments) == segment_count(length, limit)


def test_bdd_videos_of_203_frames_stay_one_video() -> None:
    assert [(s.start, s.stop) for s in cut_segments("s", 203, 200)] == [(0, 200)]
    assert [(s.start, s.stop) for s in cut_segments("s", 220, 200)] == [(0, 110), (110, 220)]
    assert [(s.start, s.stop) for s in cut_segments("s", 6, 200)] == [(0, 6)]
    assert cut_segments("s", 0, 200) == []


def test_visdrone_sized_data_makes_150_videos_by_cutting_slightly_shorter() -> None:
    rng = np.random.default_rng(0)
    lengths = {f"uav{i}": int(n) for i, n in enumerate(rng.integers(60, 800, 56))}
    at_200 = sum(segment_count(n, 200) for n in lengths.values())
    assert segment_limit_for(lengths, at_200, 200) == 200
    requested = at_200 + 12
    limit = segment_limit_for(lengths, requested, 200)
    assert limit is not None
    assert limit < 200
    before = {name: cut_segments(name, n, 200) for name, n in lengths.items()}
    after = {name: cut_segments(name, n, 200, limit) for name, n in lengths.items()}
    assert sum(map(len, after.values())) >= requested
    unchanged = [name for name in lengths if len(before[name]) == len(after[name])]
    assert len(unchanged) > 30
    assert all(before[name] == after[name] for name in unchanged)
    note = shortage_note("visdrone", requested, lengths, 200, limit)
    assert f"make {at_200} videos" in note
    assert f"{requested} were requested" in note


def test_shortage_at_the_minimum_length_is_an_error_with_the_arithmetic() -> None:
    lengths = {"a": 45, "b": 19}
    assert segment_limit_for(lengths, 3, 200) is not None
    assert segment_limit_for(lengths, 4, 200) is None
    error = too_few_videos("visdrone", 4, lengths, 200)
    assert "has 3 at most, a stage requests 4" in error.what
    assert "2 training sequences with 64 frames = 2 videos" in str(error.found)


def test_summary_counts() -> None:
    def frame(number: int, ids: list[int], categories: tuple[str, ...], ignore: list[bool]) -> Frame:
        count = len(ids)
        zeros = np.zeros(count, np.int8)
        return Frame(
            number,
            None,
            np.zeros((count, 4), np.float32),
            np.array(ids),
            categories,
            np.array(ignore, bool),
            zeros,
            zeros,
        )

    frames = [
        frame(4, [1, 2, UNTRACKED], ("car", "bus", "region"), [False, False, True]),
        frame(5, [], (), []),
        frame(9, [1, 3, 4], ("car", "car", "car"), [False, False, True]),
    ]
    assert summarise_labels(frames) == {
        "boxes": {"bus": 1, "car": 4, "region": 1},
        "ignored": {"car": 1, "region": 1},
        "tracks": {"bus": 1, "car": 2},
        "track_count": 3,
        "objects": 4,
        "max_objects": 2,
        "max_window_ids": 3,
        "empty_frames": 1,
        "first_frame": 4,
        "last_frame": 9,
    }
    many = [frame(number, [number], ("car",), [False]) for number in range(50)]
    assert summarise_labels(many)["max_window_ids"] == 30
