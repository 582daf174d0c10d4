"""Demo dataset: raw formats on disk, determinism, gaps, crowds, atomic replacement of the folder."""

from __future__ import annotations

import configparser
import json
import multiprocessing
import shutil
import time
from collections import defaultdict
from pathlib import Path

import cv2
import numpy as np
import pytest

from motip.data.formats.registry import reader
from motip.demo import DEMO_DATASET, DatasetReport, write_demo_dataset
from motip.demo.rendering import Canvas, make_sprite
from motip.errors import MotipError
from motip.storage.atomic import sha256_file

SMALL = {
    "dance": {"train": 2, "val": 1},
    "ground": {"train": 2},
    "aerial": {"train": {"sequences": 2, "crowd": 0.5}},
}
FRAMES = 24


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> DatasetReport:
    return write_demo_dataset(tmp_path_factory.mktemp("data") / "dataset", seed=3, domains=SMALL, frames=FRAMES)


def rows(path: Path) -> np.ndarray:
    return np.loadtxt(path, delimiter=",", dtype=int, ndmin=2)


def tree(root: Path) -> dict[str, str]:
    """Digest of every file except the marker, which contains the elapsed time."""
    files = [path for path in root.rglob("*") if path.is_file() and path.name != "world.json"]
    return {str(path.relative_to(root)): sha256_file(path) for path in files}


def test_dancetrack_folder(dataset: DatasetReport) -> None:
    root = dataset.root / "dancetrack"
    assert (root / "train_seqmap.txt").read_text().split() == ["name", "dance-train-0000", "dance-train-0001"]
    sequence = root / "train" / "dance-train-0000"
    info = configparser.ConfigParser()
    info.read(sequence / "seqinfo.ini")
    section = info["Sequence"]
    assert (section["frameRate"], section["seqLength"], section["imWidth"], section["imHeight"]) == (
        *("20", str(FRAMES)),
        *("224", "128"),
    )
    names = sorted(path.name for path in (sequence / "img1").iterdir())
    assert names == [f"{number:08d}.jpg" for number in range(1, FRAMES + 1)]
    assert cv2.imread(str(sequence / "img1" / names[0])).shape == (128, 224, 3)
    truth = rows(sequence / "gt" / "gt.txt")
    assert truth.shape[1] == 9
    assert set(truth[:, 0]) == set(range(1, FRAMES + 1))
    assert (truth[:, 6:] == 1).all()
    assert 4 <= len(np.unique(truth[:, 1])) <= 8


def test_bdd100k_folder(dataset: DatasetReport) -> None:
    root = dataset.root / "bdd100k"
    video = "ground-train-0001"
    frames = json.loads((root / "labels" / "box_track_20" / "train" / f"{video}.json").read_text())
    images = root / "images" / "track" / "train" / video
    assert [frame["frameIndex"] for frame in frames] == list(range(FRAMES))
    assert [frame["name"] for frame in frames] == sorted(path.name for path in images.iterdir())
    assert frames[0]["name"] == f"{video}-0000001.jpg"
    assert {frame["videoName"] for frame in frames} == {video}
    labels = [label for frame in frames for label in frame["labels"]]
    assert {label["category"] for label in labels} >= {"car", "pedestrian"}
    assert all(isinstance(label["id"], str) for label in labels)
    assert all(set(label["attributes"]) == {"occluded", "truncated", "crowd"} for label in labels)
    assert any(label["attributes"]["occluded"] for label in labels)
    assert any(label["attributes"]["truncated"] for label in labels)
    for frame in frames:
        ids = [label["id"] for label in frame["labels"]]
        assert len(ids) == len(set(ids))
        for label in frame["labels"]:
            box = label["box2d"]
            assert 0 <= box["x1"] < box["x2"] <= 224
            assert 0 <= box["y1"] < box["y2"] <= 128


def test_visdrone_folder(dataset: DatasetReport) -> None:
    root = dataset.root / "visdrone" / "VisDrone2019-MOT-train"
    plain, crowd = "aerial-train-0000", "aerial-train-0001-crowd"
    assert sorted(path.name for path in (root / "sequences").iterdir()) == [plain, crowd]
    assert len(list((root / "sequences" / plain).glob("00000??.jpg"))) == FRAMES
    table = rows(root / "annotations" / f"{plain}.txt")
    assert table.shape[1] == 10
    objects = table[table[:, 7] != 0]
    assert (objects[:, 1] > 0).all()
    assert (objects[:, 6] == 1).all()
    assert set(objects[:, 7]) <= {1, 2, 4, 5, 6, 9, 11}
    assert set(objects[:, 8]) <= {0, 1}
    assert set(objects[:, 9]) <= {0, 1, 2}
    keys = objects[:, 0] * 100000 + objects[:, 1]
    assert len(keys) == len(np.unique(keys))
    in_view = np.bincount(objects[:, 0])[1:]
    assert 6 <= in_view.mean() <= 16
    crowded = rows(root / "annotations" / f"{crowd}.txt")
    in_crowd = np.bincount(crowded[crowded[:, 7] != 0][:, 0])[1:]
    assert in_crowd.mean() > 18, "well above the base ID vocabulary of 16"
    assert in_crowd.max() <= 64


def test_aerial_domain_has_ignored_regions_and_others(tmp_path: Path) -> None:
    report = write_demo_dataset(tmp_path / "dataset", domains={"aerial": {"train": 8}}, frames=4)
    tables = [rows(path) for path in (report.root / "visdrone").rglob("annotations/*.txt")]
    table = np.concatenate(tables)
    regions = table[table[:, 7] == 0]
    assert report.splits["aerial"]["train"].regions == len(regions) > 0
    assert (regions[:, [1, 6]] == 0).all()
    assert 11 in table[:, 7]


def test_tracks_have_gaps_entries_and_exits(tmp_path: Path) -> None:
    report = write_demo_dataset(
        tmp_path / "dataset", domains={"dance": {"train": 4}, "ground": {"train": 3}}, frames=40
    )
    gaps = 0
    for path in (report.root / "dancetrack").rglob("gt.txt"):
        table = rows(path)
        for track in np.unique(table[:, 1]):
            seen = np.sort(table[table[:, 1] == track, 0])
            gaps += int(seen[-1] - seen[0] + 1 - len(seen))
    assert gaps > 0
    starts, ends = [], []
    for path in (report.root / "bdd100k").rglob("box_track_20/train/*.json"):
        spans: dict[str, list[int]] = defaultdict(list)
        for frame in json.loads(path.read_text()):
            for label in frame["labels"]:
                spans[label["id"]].append(frame["frameIndex"])
        starts += [min(span) for span in spans.values()]
        ends += [max(span) for span in spans.values()]
    assert sum(start > 5 for start in starts) >= 3
    assert sum(end < 35 for end in ends) >= 3


def test_boxes_and_visibility_match_the_painted_pixels() -> None:
    """A bright square at a known position: its box, and its visible share under occluders of known size."""
    square = make_sprite(np.full((60, 60, 3), 250, np.uint8), np.full((60, 60), 255, np.uint8), (30, 30), 3)
    canvas = Canvas(np.zeros((64, 80, 3), np.float32))
    canvas.paint(square, 40, 30, track_id=7, category="car")
    labels, hidden = canvas.labels()
    assert (labels[0].box_xyxy, labels[0].visible, labels[0].inside, hidden) == ((30, 20, 50, 40), 1.0, 1.0, 0)
    lit = np.argwhere(canvas.image[..., 0] > 125)
    assert (lit.min(axis=0).tolist(), (lit.max(axis=0) + 1).tolist()) == ([20, 30], [40, 50])

    canvas.paint(square, 50, 30)
    assert canvas.labels()[0][0].visible == pytest.approx(0.5)
    canvas.paint(square, 42, 30)
    labels, hidden = canvas.labels()
    assert labels == []
    assert hidden == 1


@pytest.mark.parametrize("scale", [0.25, 0.5, 0.9, 1.7])
def test_boxes_follow_scale_and_rotation(scale: float) -> None:
    square = make_sprite(np.full((120, 120, 3), 250, np.uint8), np.full((120, 120), 255, np.uint8), (60, 60), 3)
    canvas = Canvas(np.zeros((200, 200, 3), np.float32))
    canvas.paint(square, 100, 90, scale=scale, angle=np.pi / 4, track_id=1, category="car")
    x1, y1, x2, y2 = canvas.labels()[0][0].box_xyxy
    half = 20 * scale * np.sqrt(2)
    assert np.allclose([x1, y1, x2, y2], [100 - half, 90 - half, 100 + half, 90 + half], atol=1.6)


def test_object_leaving_the_frame_is_clipped_then_dropped() -> None:
    square = make_sprite(np.full((60, 60, 3), 250, np.uint8), np.full((60, 60), 255, np.uint8), (30, 30), 3)
    canvas = Canvas(np.zeros((64, 80, 3), np.float32))
    canvas.paint(square, 80, 30, track_id=1, category="car")
    label = canvas.labels()[0][0]
    assert label.box_xyxy == (70, 20, 80, 40)
    assert label.inside == pytest.approx(0.5)
    canvas = Canvas(np.zeros((64, 80, 3), np.float32))
    canvas.paint(square, 88, 30, track_id=1, category="car")
    assert canvas.labels() == ([], 0)


def test_equal_seeds_give_equal_bytes_and_other_seeds_other_images(dataset: DatasetReport, tmp_path: Path) -> None:
    again = write_demo_dataset(tmp_path / "again", seed=3, domains=SMALL, frames=FRAMES)
    assert tree(again.root) == tree(dataset.root)
    other = write_demo_dataset(tmp_path / "other", seed=4, domains=SMALL, frames=FRAMES)
    same = {name for name, key in tree(other.root).items() if tree(dataset.root).get(name) == key}
    assert not {name for name in same if name.endswith((".jpg", "gt.txt", ".json"))}


def test_adding_sequences_does_not_change_existing_ones(dataset: DatasetReport, tmp_path: Path) -> None:
    more = write_demo_dataset(tmp_path / "more", seed=3, domains={"dance": {"train": 3}}, frames=FRAMES)
    earlier = tree(dataset.root / "dancetrack" / "train")
    later = tree(more.root / "dancetrack" / "train")
    assert earlier.items() <= later.items()
    assert len(later) > len(earlier)


def test_splits_do_not_share_sequences(dataset: DatasetReport) -> None:
    train = set(tree(dataset.root / "dancetrack" / "train").values())
    val = set(tree(dataset.root / "dancetrack" / "val").values())
    assert not train & val


def test_second_call_reuses_the_dataset_and_repairs_missing_files(tmp_path: Path) -> None:
    domains = {"dance": {"val": 1}}
    first = write_demo_dataset(tmp_path / "dataset", domains=domains, frames=3)
    image = first.root / "dancetrack" / "val" / "dance-val-0000" / "img1" / "00000002.jpg"
    written = image.stat().st_mtime_ns
    second = write_demo_dataset(tmp_path / "dataset", domains=domains, frames=3)
    assert (first.written, second.written) == (True, False)
    assert image.stat().st_mtime_ns == written
    assert second.splits == first.splits
    assert second.source("dance") == {
        "root": str(first.root / "dancetrack"),
        "format": "motchallenge",
        "fps": 20.0,
        "domain": "dance",
    }
    image.unlink()
    assert write_demo_dataset(tmp_path / "dataset", domains=domains, frames=3).written
    assert image.is_file()


def test_other_settings_replace_the_dataset(tmp_path: Path) -> None:
    write_demo_dataset(tmp_path / "dataset", domains={"dance": {"val": 2}}, frames=3)
    write_demo_dataset(tmp_path / "dataset", domains={"dance": {"val": 1}}, frames=3)
    assert [path.name for path in (tmp_path / "dataset" / "dancetrack" / "val").iterdir()] == ["dance-val-0000"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".dataset.lock", "dataset"]


def test_folder_with_other_contents_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "thesis.txt").write_text("precious")
    with pytest.raises(MotipError, match="has other contents") as error:
        write_demo_dataset(tmp_path / "dataset", domains={"dance": {"val": 1}}, frames=2)
    assert str(tmp_path / "dataset") in str(error.value)
    assert [path.name for path in (tmp_path / "dataset").iterdir()] == ["thesis.txt"]


def test_failure_leaves_no_partial_dataset(tmp_path: Path) -> None:
    def fail(name: str, done: int, total: int) -> None:
        if done == 2:
            raise RuntimeError("pulled the plug")

    with pytest.raises(RuntimeError, match="pulled the plug"):
        write_demo_dataset(tmp_path / "dataset", domains={"dance": {"val": 3}}, frames=2, progress=fail)
    assert [path.name for path in tmp_path.iterdir()] == [".dataset.lock"]


def _write_in_process(root: str) -> bool:
    return write_demo_dataset(root, domains={"dance": {"val": 2}}, frames=4).written


def test_concurrent_processes_write_the_dataset_once(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        written = pool.map(_write_in_process, [str(tmp_path / "dataset")] * 3)
    assert sorted(written) == [False, False, True]


def test_progress_is_reported_for_every_sequence(tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    write_demo_dataset(
        tmp_path / "dataset",
        domains={"dance": {"val": 2}, "ground": {"train": 1}},
        frames=2,
        progress=lambda *state: calls.append(state),
    )
    assert calls == [("dance-val-0000", 1, 3), ("dance-val-0001", 2, 3), ("ground-train-0000", 3, 3)]


@pytest.mark.parametrize("size", [(64, 64), (270, 480), (200, 100)])
def test_objects_scale_with_the_frame_size(tmp_path: Path, size: tuple[int, int]) -> None:
    report = write_demo_dataset(
        tmp_path / "dataset", domains={name: {"val": 1} for name in ("dance", "ground", "aerial")}, frames=6, size=size
    )
    unit = min(size[0] / 128, size[1] / 224)
    table = rows(report.root / "dancetrack" / "val" / "dance-val-0000" / "gt" / "gt.txt")
    assert 30 * unit < np.median(table[:, 5]) < 70 * unit
    images = list(report.root.rglob("*0000003.jpg"))
    assert len(images) == 3
    for image in images:
        assert cv2.imread(str(image)).shape == (*size, 3)
    assert all(report.splits[domain]["val"].boxes > 0 for domain in report.splits)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"domains": {}}, "at least one domain"),
        ({"domains": {"sea": {"train": 1}}}, "no such domain"),
        ({"domains": {"dance": {}}}, "needs splits"),
        ({"domains": {"dance": {"../up": 1}}}, "used as a folder name"),
        ({"domains": {"dance": {"val": 0}}}, "sequences of a synthetic split is out of range"),
        ({"domains": {"dance": {"val": {"sequences": 1, "frames": 1}}}}, "frames of a synthetic split is out of range"),
        ({"domains": {"dance": {"val": {"sequences": 1, "crowd": 2}}}}, "crowd of a synthetic split is out of range"),
        ({"domains": {"dance": {"val": {"sequence": 1}}}}, "invalid settings"),
        ({"size": (10, 10)}, "size of the synthetic frames"),
        ({"seed": -1}, "seed of the synthetic dataset"),
    ],
)
def test_invalid_settings_are_errors(tmp_path: Path, arguments: dict, message: str) -> None:
    with pytest.raises(MotipError, match=message):
        write_demo_dataset(tmp_path / "dataset", **{"domains": {"dance": {"val": 1}}, **arguments})
    assert not (tmp_path / "dataset").exists()


def test_unwritable_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MotipError, match="cannot write next to the synthetic dataset"):
        write_demo_dataset(tmp_path / "file" / "dataset", domains={"dance": {"val": 1}}, frames=2)


def test_demo_dataset_has_enough_validation_sequences() -> None:
    assert all(splits["val"]["sequences"] >= 15 for splits in DEMO_DATASET.values())


def test_rendering_speed(tmp_path: Path) -> None:
    """The target is 30 s for 2000 frames; the best of three attempts counts, so that a busy machine passes."""
    rates = []
    for attempt in range(3):
        started = time.process_time()
        report = write_demo_dataset(tmp_path / "dataset", seed=attempt, domains={"aerial": {"train": 1}}, frames=60)
        rates.append(report.frames / (time.process_time() - started))
        shutil.rmtree(report.root)
    assert max(rates) > 60


@pytest.mark.parametrize(("domain", "split"), [("dance", "train"), ("ground", "train"), ("aerial", "train")])
def test_dataset_readers_need_no_repair(dataset: DatasetReport, domain: str, split: str) -> None:
    source = dataset.source(domain)
    formats = reader(source["format"])
    sequences = formats.list_sequences(Path(source["root"]), split)
    kept = 0
    for raw in sequences:
        sequence, report = formats.read_sequence(raw)
        assert not report.dropped
        assert not report.repaired
        assert (len(sequence.frames), sequence.width, sequence.height) == (FRAMES, 224, 128)
        kept += report.kept
    written = dataset.splits[domain][split]
    assert (len(sequences), kept) == (written.sequences, written.boxes + written.regions)
