"""BDD100K reader: real samples, and a fixture for every label defect."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from motip.data.formats import bdd100k
from motip.data.formats.common import (
    CLASS_CHANGE,
    CROSSES,
    DUPLICATE,
    NO_IMAGE,
    OUTSIDE,
    UNLABELLED,
    ZERO_AREA,
    RawSequence,
)
from motip.data.sequence import ReadReport, Sequence
from motip.errors import MotipError
from tests.helpers.raw_datasets import bdd_frame, bdd_label, bdd_video, write_bdd, write_images


def read(root: Path, frames: list[dict], **options: object) -> tuple[Sequence, ReadReport]:
    write_bdd(root, "v", frames, **options)
    (raw,) = bdd100k.list_sequences(root, "train")
    return bdd100k.read_sequence(raw)


def test_real_samples_are_read_completely(samples_dir: Path) -> None:
    found = {}
    for split in ("train", "val"):
        for raw in bdd100k.list_sequences(samples_dir / "bdd100k", split):
            found[split] = bdd100k.read_sequence(raw)
    train, report = found["train"]
    assert (report.raw, report.kept, len(train.track_names)) == (167, 167, 29)
    assert (train.width, train.height, train.fps) == (1280, 720, 5.0)
    val, report = found["val"]
    assert [frame.number for frame in val.frames] == [165, 166, 167, 168, 169, 170]
    assert [frame.image.name[-11:] for frame in val.frames][:2] == ["0000166.jpg", "0000167.jpg"]
    assert (report.raw, report.kept, sum(int(frame.ignore.sum()) for frame in val.frames)) == (87, 87, 1)


def test_published_labels_without_images(samples_dir: Path) -> None:
    path = samples_dir / "labels_only" / "bdd100k" / "b1c66a42-6f7d68ca.frames_001_100.json"
    sequence, report = bdd100k.read_sequence(RawSequence("b1c66a42-6f7d68ca", "train", path))
    raw = json.loads(path.read_text())
    assert report.raw == sum(len(frame["labels"]) for frame in raw) == 2138 == report.kept
    assert len({category for frame in sequence.frames for category in frame.categories}) == 6
    assert sequence.track_names[0] == "a-00122062"
    first = sequence.frames[0]
    assert first.image is None
    np.testing.assert_allclose(first.boxes_xyxy[0], [0, 346.554829, 75.4127617, 407.449630], rtol=1e-6)


def test_labels_without_images_are_dropped_and_counted(samples_dir: Path) -> None:
    path = samples_dir / "labels_only" / "bdd100k" / "b1c66a42-6f7d68ca.frames_001_100.json"
    images = samples_dir / "bdd100k" / "images" / "track" / "train" / "b1c66a42-6f7d68ca"
    sequence, report = bdd100k.read_sequence(RawSequence("b1c66a42-6f7d68ca", "train", path, images))
    assert len(sequence.frames) == 6
    assert report.dropped[NO_IMAGE] == 2138 - report.kept > 0
    assert report.repaired["label frame without an image, left out"] == 94


def test_images_without_labels_are_left_out_and_counted(tmp_path: Path) -> None:
    sequence, report = read(tmp_path, [bdd_frame("v", 0, [bdd_label()])], images=range(4))
    assert len(sequence.frames) == 1
    assert report.repaired[UNLABELLED] == 3


def test_old_key_names_are_equivalent_to_new_ones(tmp_path: Path) -> None:
    new = [bdd_frame("v", n, [bdd_label(crowd=n == 1, occluded=True)]) for n in range(2)]
    old = json.loads(json.dumps(new))
    for frame in old:
        frame["index"] = frame.pop("frameIndex")
        for label in frame["labels"]:
            label["attributes"] = {key.capitalize(): value for key, value in label["attributes"].items()}
    expected, clean = read(tmp_path / "new", new)
    found, report = read(tmp_path / "old", old)
    assert not clean.repaired
    assert report.repaired[bdd100k.OLD_KEY] == 4  # two frames and two labels
    for a, b in zip(expected.frames, found.frames, strict=True):
        assert (a.number, a.ignore.tolist(), a.occlusion.tolist()) == (
            b.number,
            b.ignore.tolist(),
            b.occlusion.tolist(),
        )
    assert found.frames[1].ignore.tolist() == [True]


def test_one_file_for_all_videos_equals_one_file_each(tmp_path: Path) -> None:
    for video in ("a", "b"):
        bdd_video(tmp_path / "each", video, 3)
        bdd_video(tmp_path / "all", video, 3)
    labels = tmp_path / "all" / "labels" / "box_track_20" / "train"
    frames = [frame for video in ("b", "a") for frame in json.loads((labels / f"{video}.json").read_text())]
    for path in list(labels.iterdir()):
        path.unlink()
    (labels / "box_track_labels_train.json").write_text(json.dumps({"frames": frames, "groups": None}))
    each = [bdd100k.read_sequence(raw)[0] for raw in bdd100k.list_sequences(tmp_path / "each", "train")]
    together = [bdd100k.read_sequence(raw)[0] for raw in bdd100k.list_sequences(tmp_path / "all", "train")]
    assert [s.name for s in together] == ["a", "b"]
    for a, b in zip(each, together, strict=True):
        np.testing.assert_array_equal(
            np.concatenate([f.boxes_xyxy for f in a.frames]), np.concatenate([f.boxes_xyxy for f in b.frames])
        )


def test_ids_are_strings_and_numbered_within_the_video(tmp_path: Path) -> None:
    frames = [bdd_frame("v", 0, [bdd_label("00a"), bdd_label("7")]), bdd_frame("v", 1, [bdd_label("7")])]
    sequence, _ = read(tmp_path, frames)
    assert sequence.track_names == ("00a", "7")
    assert [frame.track_ids.tolist() for frame in sequence.frames] == [[0, 1], [1]]


@pytest.mark.parametrize("labels", [None, ...])
def test_missing_or_null_labels_are_a_frame_without_objects(tmp_path: Path, labels: object) -> None:
    sequence, report = read(tmp_path, [bdd_frame("v", 0, [bdd_label()]), bdd_frame("v", 1, labels)])
    assert [len(frame.categories) for frame in sequence.frames] == [1, 0]
    assert report.repaired[bdd100k.NULL_LABELS] == 1


def test_unordered_frames_are_sorted_by_number(tmp_path: Path) -> None:
    frames = [bdd_frame("v", number, [bdd_label(str(number))]) for number in (2, 0, 1)]
    sequence, report = read(tmp_path, frames)
    assert [frame.number for frame in sequence.frames] == [0, 1, 2]
    assert [frame.image.name for frame in sequence.frames] == [f"v-{n:07d}.jpg" for n in (1, 2, 3)]
    assert report.repaired[bdd100k.OUT_OF_ORDER] == 3


def test_gaps_and_a_late_start_keep_their_numbers(tmp_path: Path) -> None:
    frames = [bdd_frame("v", number, [bdd_label()]) for number in (165, 166, 169)]
    sequence, report = read(tmp_path, frames, images=(165, 166, 169))
    assert [frame.number for frame in sequence.frames] == [165, 166, 169]
    assert report.repaired["frame number missing from the labels, left out"] == 2


def test_frame_number_is_taken_from_the_name_where_it_is_missing(tmp_path: Path) -> None:
    sequence, report = read(tmp_path, [bdd_frame("v", 4, [bdd_label()], frameIndex=...)], images=[4])
    assert sequence.frames[0].number == 4
    assert report.repaired[bdd100k.FROM_NAME] == 1


def test_invalid_rows_are_dropped_by_reason(tmp_path: Path) -> None:
    labels = [
        bdd_label("a"),
        bdd_label("a", box=(1, 1, 9, 9)),
        bdd_label("b", box=(4, 4, 4, 9)),
        bdd_label("c", box=(100, 100, 120, 120)),
        {**bdd_label("d"), "box2d": None},
        {**bdd_label("e"), "category": None},
        bdd_label("f", box=(-5, 3, 12, 60)),
        bdd_label("g", box=(float("nan"), 3, 12, 20)),
    ]
    sequence, report = read(tmp_path, [bdd_frame("v", 0, labels)])
    assert (report.raw, report.kept) == (8, 2)
    assert report.dropped == {
        DUPLICATE: 1,
        ZERO_AREA: 1,
        OUTSIDE: 1,
        "label without box2d": 1,
        "label without category": 1,
        "box coordinates are not finite numbers": 1,
    }
    assert report.repaired[CROSSES] == 1
    np.testing.assert_array_equal(sequence.frames[0].boxes_xyxy[1], [-5, 3, 12, 60])
    np.testing.assert_array_equal(sequence.frames[0].boxes_xyxy[0], [5, 5, 20, 20])


def test_first_of_duplicate_frames_is_kept(tmp_path: Path) -> None:
    frames = [bdd_frame("v", 0, [bdd_label("a")]), bdd_frame("v", 0, [bdd_label("b"), bdd_label("c")])]
    sequence, report = read(tmp_path, frames)
    assert len(sequence.frames) == 1
    assert report.dropped[bdd100k.TWICE] == 2


def test_track_with_changing_category_is_kept_and_counted(tmp_path: Path) -> None:
    frames = [bdd_frame("v", 0, [bdd_label("a", "car")]), bdd_frame("v", 1, [bdd_label("a", "truck")])]
    sequence, report = read(tmp_path, frames)
    assert report.repaired[CLASS_CHANGE] == 1
    assert [frame.categories for frame in sequence.frames] == [("car",), ("truck",)]


def test_image_with_another_name_is_found_by_number(tmp_path: Path) -> None:
    sequence, report = read(tmp_path, [bdd_frame("v", 1, [bdd_label()], name="other-0000002.png")], images=[0, 1])
    assert sequence.frames[0].image.name == "v-0000002.jpg"
    assert report.repaired["image found by number, not by the label's name"] == 1


def read_error(root: Path, split: str = "train") -> str:
    with pytest.raises(MotipError) as caught:
        for raw in bdd100k.list_sequences(root, split):
            bdd100k.read_sequence(raw)
    assert caught.value.where is not None
    return str(caught.value)


def test_labels_of_single_images_are_an_error(tmp_path: Path) -> None:
    write_bdd(tmp_path, "v", [bdd_frame("v", 0, [bdd_label()], videoName=..., frameIndex=...)])
    assert "single images" in read_error(tmp_path)


def test_labels_of_another_video_are_an_error(tmp_path: Path) -> None:
    write_bdd(tmp_path, "v", [bdd_frame("v", 0, [bdd_label()])], images=[500])
    assert "do not match" in read_error(tmp_path)


def test_missing_and_empty_folders_are_errors(tmp_path: Path) -> None:
    assert "images of split 'train' is missing" in read_error(tmp_path)
    (tmp_path / "images" / "track" / "train").mkdir(parents=True)
    assert "labels of split 'train' is missing" in read_error(tmp_path)
    (tmp_path / "labels" / "box_track_20" / "train").mkdir(parents=True)
    assert "is empty" in read_error(tmp_path)
    write_images(tmp_path / "images" / "track" / "train" / "v", ["v-0000001.jpg"])
    (tmp_path / "labels" / "box_track_20" / "train" / "w.json").write_text(json.dumps([bdd_frame("w", 0, [])]))
    assert "have no labels, such as v" in read_error(tmp_path)


@pytest.mark.parametrize("text", ["{", '"x"', "[1]"])
def test_corrupt_labels_are_an_error(tmp_path: Path, text: str) -> None:
    write_bdd(tmp_path, "v", [])
    write_images(tmp_path / "images" / "track" / "train" / "v", ["v-0000001.jpg"])
    path = tmp_path / "labels" / "box_track_20" / "train" / "v.json"
    path.write_text(text)
    assert str(path) in read_error(tmp_path)
