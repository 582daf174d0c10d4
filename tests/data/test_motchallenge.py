"""MOTChallenge and DanceTrack: reader, and the DanceTrack folder writer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from motip.config import DatasetFormat
from motip.data.formats import motchallenge
from motip.data.formats.common import RawSequence
from motip.data.formats.dancetrack_writer import seqmap_path, write_dancetrack, write_seqmap
from motip.data.formats.registry import READERS, reader
from motip.data.sequence import ClassMap, ReadReport, Sequence
from motip.errors import MotipError
from tests.helpers.raw_datasets import write_mot, write_table


def read(root: Path, rows: list[list[object]], **options: object) -> tuple[Sequence, ReadReport]:
    write_mot(root, "s", rows, options.pop("frames", 2), **options)
    (raw,) = motchallenge.list_sequences(root, "train")
    return motchallenge.read_sequence(raw)


def test_dancetrack_sample(samples_dir: Path) -> None:
    (raw,) = motchallenge.list_sequences(samples_dir / "dancetrack", "val")
    sequence, report = motchallenge.read_sequence(raw)
    assert (report.raw, report.kept, len(sequence.frames), sequence.fps) == (336, 336, 8, 30.0)
    assert (sequence.width, sequence.height) == (1920, 1080)
    assert sequence.frames[0].categories[0] == "pedestrian"


@pytest.mark.parametrize(("name", "rows"), [("TUD-Campus", 359), ("TUD-Stadtmitte", 1156)])
def test_ten_columns_of_mot15_have_no_class(samples_dir: Path, name: str, rows: int) -> None:
    sequence, report = motchallenge.read_sequence(RawSequence(name, "train", samples_dir / "mot15" / name / "gt.txt"))
    assert (report.raw, report.kept) == (rows, rows)
    assert {c for frame in sequence.frames for c in frame.categories} == {"pedestrian"}


@pytest.mark.parametrize("columns", range(6, 11))
def test_six_to_ten_columns(tmp_path: Path, columns: int) -> None:
    sequence, report = read(tmp_path, [[1, 3, 5, 6, 10, 12, 1, 1, 0.5, -1][:columns]])
    frame = sequence.frames[0]
    assert (report.raw, report.kept) == (1, 1)
    assert (frame.number, frame.track_ids.tolist(), frame.categories) == (0, [3], ("pedestrian",))
    np.testing.assert_array_equal(frame.boxes_xyxy, [[5, 6, 15, 18]])
    assert frame.occlusion.tolist() == [1 if columns == 9 else 0]


def test_flag_zero_and_other_classes(tmp_path: Path) -> None:
    sequence, _ = read(tmp_path, [[1, 1, 5, 6, 10, 12, 0, 3, 1], [1, 2, 5, 6, 10, 12, 1, 99, 1]])
    assert sequence.frames[0].ignore.tolist() == [True, False]
    assert sequence.frames[0].categories == ("car", "class 99")


def test_wrong_seq_length_is_ignored_and_noted(tmp_path: Path) -> None:
    sequence, report = read(
        tmp_path, [[1, 1, 5, 6, 10, 12, 1, 1, 1], [3, 1, 5, 6, 10, 12, 1, 1, 1]], frames=3, length=9
    )
    assert len(sequence.frames) == 3
    assert report.repaired[motchallenge.WRONG_LENGTH] == 1
    assert "seqLength is 9" in report.notes[0]


def test_frame_rate_comes_from_the_source_then_seqinfo_then_a_default(tmp_path: Path) -> None:
    folder = write_mot(tmp_path, "s", [[1, 1, 5, 6, 10, 12, 1, 1, 1]], 1)
    (raw,) = motchallenge.list_sequences(tmp_path, "train")
    assert motchallenge.read_sequence(raw)[0].fps == 20.0
    assert motchallenge.read_sequence(replace(raw, fps=12.5))[0].fps == 12.5
    (folder / "seqinfo.ini").unlink()
    sequence, report = motchallenge.read_sequence(raw)
    assert sequence.fps == 30.0
    assert motchallenge.NO_SEQINFO in report.notes[0]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[0, 1, 5, 6, 10, 12, 1, 1, 1]], "frame number is not an integer >= 1"),
        ([[1, -1, 5, 6, 10, 12, 1, -1, -1]], "detections, not of tracks"),
        ([[1, 1, 5, 6, 10, 12, 1, 0, 1]], "class is not an integer >= 1"),
        ([[1, 1, 5, 6, 10]], "wrong number of columns"),
        ([[1, 1, 5, 6, 10, 12], [1, 1, 5, 6, 10, 12, 1]], "wrong number of columns"),
    ],
)
def test_invalid_label_files_are_errors(tmp_path: Path, rows: list[list], message: str) -> None:
    with pytest.raises(MotipError, match=message):
        read(tmp_path, rows)


def test_corrupt_seqinfo_and_missing_folders_are_errors(tmp_path: Path) -> None:
    with pytest.raises(MotipError, match="split 'train' is missing"):
        motchallenge.list_sequences(tmp_path, "train")
    (tmp_path / "train").mkdir()
    with pytest.raises(MotipError, match="has no sequences"):
        motchallenge.list_sequences(tmp_path, "train")
    folder = write_mot(tmp_path, "s", [[1, 1, 5, 6, 10, 12]], 1)
    (folder / "seqinfo.ini").write_text("[Sequence]\nframeRate=none\n")
    with pytest.raises(MotipError, match=r"seqinfo\.ini cannot be read"):
        motchallenge.read_sequence(motchallenge.list_sequences(tmp_path, "train")[0])
    (folder / "gt" / "gt.txt").unlink()
    with pytest.raises(MotipError, match="have no ground truth, such as s"):
        motchallenge.list_sequences(tmp_path, "train")


def test_every_configured_format_has_a_reader() -> None:
    assert set(READERS) == set(get_args(DatasetFormat))
    assert all(name == found.DATASET for name, found in READERS.items())


def test_unknown_format_is_an_error_with_the_known_formats() -> None:
    with pytest.raises(MotipError, match="bdd100k, visdrone, motchallenge"):
        reader("coco")


def test_dancetrack_folder_round_trip(samples_dir: Path, tmp_path: Path) -> None:
    (raw,) = reader("bdd100k").list_sequences(samples_dir / "bdd100k", "val")
    sequence, _ = reader("bdd100k").read_sequence(raw)
    classes = ClassMap(("pedestrian", "car"), {"pedestrian": ("pedestrian",), "car": ("car",)})
    counts = write_dancetrack(sequence, tmp_path, "val", classes)
    write_seqmap(seqmap_path(tmp_path, "val"), [sequence.name])
    assert (tmp_path / "val_seqmap.txt").read_text() == f"name\n{sequence.name}\n"
    again, report = motchallenge.read_sequence(motchallenge.list_sequences(tmp_path, "val")[0])
    assert counts == {"frames": 6, "objects": report.kept, "ignored": 87 - report.kept}
    assert [frame.number for frame in again.frames] == list(range(6))
    assert not report.repaired.keys() & {motchallenge.WRONG_LENGTH}
    for before, after in zip(sequence.frames, again.frames, strict=True):
        labels = classes.split(before)
        np.testing.assert_allclose(after.boxes_xyxy, labels.boxes_xyxy, atol=1e-3)
        assert after.track_ids.tolist() == (labels.track_ids + 1).tolist()
        assert after.categories == tuple(classes.names[index] for index in labels.class_ids)
        assert after.image.read_bytes() == before.image.read_bytes()
    assert again.fps == 5.0


def test_dancetrack_folder_without_images_is_an_error(samples_dir: Path, tmp_path: Path) -> None:
    sequence, _ = motchallenge.read_sequence(
        RawSequence("x", "train", write_table(tmp_path / "gt.txt", [[1, 1, 5, 6, 10, 12]]))
    )
    with pytest.raises(MotipError, match="has no image"):
        write_dancetrack(sequence, tmp_path, "val", ClassMap(("pedestrian",), {"pedestrian": ("pedestrian",)}))
