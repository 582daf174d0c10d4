"""VisDrone reader: samples, and a fixture for every label defect."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from motip.data.formats import visdrone
from motip.data.formats.common import (
    CLASS_CHANGE,
    CROSSES,
    DUPLICATE,
    FROM_ZERO,
    NO_IMAGE,
    UNLABELLED,
    ZERO_AREA,
    RawSequence,
)
from motip.data.sequence import UNTRACKED, ReadReport, Sequence
from motip.errors import MotipError
from tests.helpers.raw_datasets import write_images, write_table, write_visdrone


def read(root: Path, rows: list[list[object]], frames: int = 3) -> tuple[Sequence, ReadReport]:
    write_visdrone(root, "s", rows, frames)
    (raw,) = visdrone.list_sequences(root, "train")
    return visdrone.read_sequence(raw)


def row(
    frame: int = 1, track: int = 1, box: tuple[float, ...] = (5, 6, 10, 12), score: int = 1, category: int = 4
) -> list:
    return [frame, track, *box, score, category, 0, 0]


def test_samples_are_read_completely(samples_dir: Path) -> None:
    for split, rows in (("train", 128), ("val", 121)):
        (raw,) = visdrone.list_sequences(samples_dir / "visdrone", split)
        sequence, report = visdrone.read_sequence(raw)
        assert (report.raw, report.kept, len(sequence.frames)) == (rows, rows, 16)
        assert (sequence.width, sequence.height) == (768, 576)
        assert {c for frame in sequence.frames for c in frame.categories} == {"pedestrian"}


@pytest.mark.parametrize("name", ["uav_uavdt_M0208_v", "uav_uavdt_M0301_v"])
def test_real_aerial_labels_without_images(samples_dir: Path, name: str) -> None:
    path = samples_dir / "labels_only" / "visdrone" / "annotations" / f"{name}.txt"
    sequence, report = visdrone.read_sequence(RawSequence(name, "train", path))
    assert report.raw == len(path.read_text().splitlines()) == report.kept + sum(report.dropped.values())
    regions = [frame.ignore & (frame.track_ids == UNTRACKED) for frame in sequence.frames]
    assert sum(map(np.sum, regions)) == sum(line.split(",")[7] == "0" for line in path.read_text().splitlines())


def test_root_may_contain_the_sequences_directly(samples_dir: Path) -> None:
    (raw,) = visdrone.list_sequences(samples_dir / "visdrone" / "VisDrone2019-MOT-val", "val")
    assert raw.name == "uav_pets09_s2l1_00734_v"


def test_ten_columns_become_boxes_ids_and_flags(tmp_path: Path) -> None:
    rows = [[2, 7, 5, 6, 10, 12, 1, 5, 1, 2], [2, 0, 30, 30, 20, 10, 0, 0, 0, 0], [2, 9, 1, 1, 4, 4, 1, 11, 0, 0]]
    rows += [[2, 8, 20, 5, 9, 9, 0, 4, 0, 0], [1, 7, 5, 6, 10, 12, 1, 5, 0, 0]]
    sequence, report = read(tmp_path, rows)
    frame = sequence.frames[1]
    assert (frame.number, frame.categories) == (1, ("van", "ignored-regions", "others", "car"))
    np.testing.assert_array_equal(frame.boxes_xyxy[0], [5, 6, 15, 18])
    assert frame.track_ids.tolist() == [7, UNTRACKED, 9, 8]
    assert frame.ignore.tolist() == [False, True, True, True]
    assert (frame.truncation[0], frame.occlusion[0]) == (1, 2)
    assert report.kept == 5


def test_regions_share_id_zero_without_being_duplicates(tmp_path: Path) -> None:
    _, report = read(tmp_path, [row(), row(track=0, category=0, score=0), row(track=0, category=0, score=0)])
    assert report.kept == 3
    assert not report.dropped


def test_detection_file_is_an_error(samples_dir: Path) -> None:
    (path,) = (samples_dir / "labels_only" / "visdrone_det" / "annotations").iterdir()
    with pytest.raises(MotipError, match="VisDrone-DET file"):
        visdrone.read_sequence(RawSequence("x", "train", path))


def test_invalid_rows_are_dropped_by_reason(tmp_path: Path) -> None:
    rows = [row(), row(box=(1, 1, 4, 4)), row(track=2, box=(1, 1, 0, 4)), row(frame=9), row(track=4, box=(-3, 1, 9, 9))]
    _, report = read(tmp_path, rows)
    assert (report.raw, report.kept) == (5, 2)
    assert report.dropped == {DUPLICATE: 1, ZERO_AREA: 1, NO_IMAGE: 1}
    assert report.repaired[CROSSES] == 1


def test_category_change_is_kept_and_counted(tmp_path: Path) -> None:
    sequence, report = read(tmp_path, [row(1, category=4), row(2, category=5)])
    assert report.repaired[CLASS_CHANGE] == 1
    assert [frame.categories for frame in sequence.frames] == [("car",), ("van",)]


def test_images_outside_the_labels_are_left_out_and_frames_between_are_empty(tmp_path: Path) -> None:
    sequence, report = read(tmp_path, [row(2), row(4)], frames=6)
    assert [(frame.number, len(frame.categories)) for frame in sequence.frames] == [(1, 1), (2, 0), (3, 1)]
    assert report.repaired[UNLABELLED] == 3


def test_missing_image_is_a_gap_and_does_not_shift_labels(tmp_path: Path) -> None:
    write_visdrone(tmp_path, "s", [row(1, 1), row(2, 2), row(3, 3)], 3)
    (tmp_path / "VisDrone2019-MOT-train" / "sequences" / "s" / "0000002.jpg").unlink()
    sequence, report = visdrone.read_sequence(visdrone.list_sequences(tmp_path, "train")[0])
    assert [(frame.number, frame.track_ids.tolist()) for frame in sequence.frames] == [(0, [1]), (2, [3])]
    assert report.dropped == {NO_IMAGE: 1}
    assert report.repaired["frame number without an image, left out"] == 1


def test_images_named_from_zero_are_renumbered_and_counted(tmp_path: Path) -> None:
    write_table(tmp_path / "annotations" / "s.txt", [row(1), row(2)])
    write_images(tmp_path / "sequences" / "s", ["0000000.jpg", "0000001.jpg"])
    sequence, report = visdrone.read_sequence(visdrone.list_sequences(tmp_path, "train")[0])
    assert [frame.image.name for frame in sequence.frames] == ["0000000.jpg", "0000001.jpg"]
    assert report.repaired[FROM_ZERO] == 2


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row(0)], "frame number is not an integer >= 1"),
        ([row(1.5)], "frame number is not an integer"),
        ([row(category=12)], "unknown VisDrone category 12"),
        ([row()[:9]], "wrong number of columns"),
        ([[*row()[:3], "x", *row()[4:]]], "not a number"),
        ([row(50)], "do not match"),
        ([], "no label rows"),
    ],
)
def test_invalid_label_files_are_errors_with_the_file(tmp_path: Path, rows: list[list], message: str) -> None:
    with pytest.raises(MotipError, match=message) as caught:
        read(tmp_path, rows)
    assert "s.txt" in str(caught.value.where)


def test_two_images_with_one_number_are_an_error(tmp_path: Path) -> None:
    write_visdrone(tmp_path, "s", [row()], 1)
    write_images(tmp_path / "VisDrone2019-MOT-train" / "sequences" / "s", ["1.jpg"])
    with pytest.raises(MotipError, match="two images have the frame number 1"):
        visdrone.read_sequence(visdrone.list_sequences(tmp_path, "train")[0])


def test_missing_and_empty_folders_are_errors(tmp_path: Path) -> None:
    with pytest.raises(MotipError, match="no VisDrone-MOT data"):
        visdrone.list_sequences(tmp_path, "train")
    (tmp_path / "VisDrone2019-MOT-train" / "sequences").mkdir(parents=True)
    with pytest.raises(MotipError, match="annotations is missing"):
        visdrone.list_sequences(tmp_path, "train")
    (tmp_path / "VisDrone2019-MOT-train" / "annotations").mkdir()
    with pytest.raises(MotipError, match="has no sequences"):
        visdrone.list_sequences(tmp_path, "train")
    (tmp_path / "VisDrone2019-MOT-train" / "sequences" / "s").mkdir()
    with pytest.raises(MotipError, match="have no annotations, such as s"):
        visdrone.list_sequences(tmp_path, "train")
    write_table(tmp_path / "VisDrone2019-MOT-train" / "annotations" / "s.txt", [row()])
    with pytest.raises(MotipError, match="has no images"):
        visdrone.read_sequence(visdrone.list_sequences(tmp_path, "train")[0])
