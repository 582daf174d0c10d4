"""Conversion: selection of videos, accounting of label rows, incremental and resumed runs, errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from motip.config import load_curriculum
from motip.data.convert import convert, process_map
from motip.data.convert_report import ConversionUi, inspect_shards
from motip.data.convert_sequence import BAD_IMAGE, NOT_SELECTED, TAIL
from motip.data.dancetrack_export import export_dancetrack
from motip.data.formats import motchallenge
from motip.data.image_check import image_hash, image_problem, near_duplicates
from motip.data.manifest import Manifest, entry_path
from motip.data.shards import read_labels
from motip.errors import MotipError
from tests.helpers.raw_datasets import bdd_video, curriculum, jpeg, mix, source, visdrone_video, write_images, write_mot

BDD = ("bdd", "bdd100k", "bdd")


@pytest.fixture
def bdd(tmp_path: Path) -> Path:
    """Data root with six training and two validation videos of ten frames."""
    for index in range(6):
        bdd_video(tmp_path / "bdd", f"train{index}", 10)
    for index in range(2):
        bdd_video(tmp_path / "bdd", f"val{index}", 10, split="val")
    return tmp_path


def plan(videos: int | None = None, **changes: Any) -> Any:
    stage = {key: changes.pop(key) for key in ("frame_budget", "allow_fewer") if key in changes}
    values = {"name": "bdd", "format": "bdd100k", "root": "bdd", "classes": {"car": ("car",)}, **changes}
    return curriculum([source(**values)], [mix("bdd", videos, **stage)])


def files(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.stat().st_ino) for p in folder.rglob("*.parquet")}


def test_real_samples_end_to_end(samples_dir: Path, tmp_path: Path) -> None:
    sources = [
        source("bdd", "bdd100k", "bdd100k"),
        source(
            "visdrone", "visdrone", "visdrone", classes={"pedestrian": ("pedestrian", "people"), "car": ("car", "van")}
        ),
        source("dance", "motchallenge", "dancetrack", splits={"val": "val"}, classes={"pedestrian": ("pedestrian",)}),
    ]
    stages = ([mix("bdd", 1)], [mix("visdrone", 1)])
    # The street video has only cars, the aerial stand-ins only people: a stage needs its own labels.
    for allowed, missing in (((), "'pedestrian' of stage 'stage1'"), (("pedestrian",), "'car' of stage 'stage2'")):
        one_sided = curriculum(sources, *stages, classes=("pedestrian", "car"), allow_unlabelled=allowed)
        with pytest.raises(MotipError, match=f"class {missing} has no label in any of its training videos"):
            convert(one_sided, samples_dir, tmp_path)
    both = curriculum(sources, *stages, classes=("pedestrian", "car"), allow_unlabelled=("pedestrian", "car"))
    report = convert(both, samples_dir, tmp_path)
    assert [note.partition(",")[0] for note in report.notes if "as allowed" in note] == [
        "stage stage1 trains pedestrian without any label of it",
        "stage stage2 trains car without any label of it",
    ]
    rows = {(s, split): c["rows"] for s, splits in report.splits.items() for split, c in splits.items()}
    assert {key: value["raw"] for key, value in rows.items()} == {
        ("bdd", "train"): 167,
        ("bdd", "val"): 87,
        ("visdrone", "train"): 128,
        ("visdrone", "val"): 121,
        ("dance", "val"): 336,
    }
    for value in rows.values():
        assert value["raw"] == value["kept"] + sum(value["dropped"].values())
    assert report.splits["bdd"]["train"]["classes"]["car"] == {"boxes": 143, "tracks": 25}
    assert report.splits["bdd"]["val"]["categories"]["truck"]["boxes"] == 8
    assert json.loads((tmp_path / "shards" / "report.json").read_text())["sources"] == report.splits
    for name in both.sources:
        overlay = cv2.imread(str(tmp_path / "shards" / f"{name}_overlay.png"))
        assert overlay.shape[1] == 4 * 640
        assert overlay.std() > 20
    # The two VisDrone stand-ins are from one camera at different times: a note, not an error.
    assert any("look the same" in note for note in report.notes)
    with pytest.raises(MotipError, match="look the same"):
        convert(both, samples_dir, tmp_path, strict=True)


def test_larger_request_adds_videos_without_rewriting_shards(bdd: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    first = convert(plan(2), bdd, store)
    before = files(store)
    second = convert(plan(5), bdd, store)
    after = files(store)
    assert (first.written, second.written) == (4, 3)
    assert {name: after[name] for name in before} == before
    assert first.manifest.select("bdd") == second.manifest.select("bdd", videos=2)
    assert first.manifest.of("bdd", "val") == second.manifest.of("bdd", "val")
    assert first.splits["bdd"]["train"]["sequences_not_selected"] == 4
    again = convert(plan(5), bdd, store)
    assert again.written == 0
    assert again.manifest == second.manifest
    assert files(store) == after


def test_changed_label_or_image_rewrites_only_its_video(bdd: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    first = convert(plan(6), bdd, store)
    labels = bdd / "bdd" / "labels" / "box_track_20" / "train" / "train3.json"
    frames = json.loads(labels.read_text())
    frames[0]["labels"][0]["box2d"]["x1"] += 1
    labels.write_text(json.dumps(frames))
    second = convert(plan(6), bdd, store)
    assert second.written == 1
    changed = {e.video for e, f in zip(second.manifest.videos, first.manifest.videos, strict=True) if e != f}
    assert changed == {"train3"}
    assert second.manifest.digest() != first.manifest.digest()
    image = bdd / "bdd" / "images" / "track" / "train" / "train2" / "train2-0000004.jpg"
    image.write_bytes(jpeg(99))
    assert convert(plan(6), bdd, store).written == 1
    # Other content of the same size is detected by the modification time.
    size, digest = image.stat().st_size, convert(plan(6), bdd, store).manifest.digest()
    data = bytearray(image.read_bytes())
    data[size // 2] ^= 0x10
    image.write_bytes(bytes(data))
    third = convert(plan(6), bdd, store)
    assert image.stat().st_size == size
    assert third.written == 1
    assert third.manifest.digest() != digest


def test_missing_and_corrupt_shards_are_rewritten_with_the_same_manifest(bdd: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    first = convert(plan(3), bdd, store)
    damaged = [entry_path(store, entry) for entry in first.manifest.videos[:2]]
    damaged[0].unlink()
    damaged[1].write_bytes(b"PAR1 truncated")
    second = convert(plan(3), bdd, store)
    assert second.written == 2
    assert second.manifest == first.manifest


KILLED = """
import os, sys
sys.path.insert(0, {repo!r})
from pathlib import Path
from motip.data.convert import convert
from motip.data.convert_sequence import convert_sequence
from tests.data.test_convert import plan

def killed(function, jobs):
    for count, job in enumerate(jobs):
        if function is convert_sequence and count == 4:
            (Path({store!r}) / "shards" / "bdd" / "train" / ".half.1234.tmp.parquet").write_bytes(b"half")
            os._exit(137)
        yield function(job)

convert(plan(6), {root!r}, {store!r}, map_fn=killed)
"""


def test_killed_conversion_resumes_to_the_same_manifest(bdd: Path, tmp_path: Path, repo_root: Path) -> None:
    undisturbed = convert(plan(6), bdd, tmp_path / "undisturbed")
    store = tmp_path / "store"
    script = KILLED.format(repo=str(repo_root), root=str(bdd), store=str(store))
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, cwd=repo_root)
    assert ended.returncode == 137, ended.stderr
    assert not (store / "shards" / "manifest.json").exists()
    assert len(files(store)) == 5  # four complete, one partial
    second = convert(plan(6), bdd, store)
    assert second.written == 4
    assert second.manifest.digest() == undisturbed.manifest.digest()
    assert second.manifest == undisturbed.manifest


def test_result_does_not_depend_on_job_execution(bdd: Path, tmp_path: Path) -> None:
    def backwards(function: Callable[[Any], Any], jobs: list[Any]) -> Iterator[Any]:
        return map(function, reversed(jobs))

    calls = []
    one = convert(plan(4), bdd, tmp_path / "a", progress=lambda *values: calls.append(values))
    other = convert(plan(4), bdd, tmp_path / "b", map_fn=backwards)
    assert one.manifest == other.manifest
    assert ("converting", 6, 6) in calls
    assert convert(plan(4), bdd, tmp_path / "c", map_fn=process_map(2)).manifest == one.manifest


def test_result_does_not_depend_on_directory_listing_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "raw"
    for split, prefix in (("train", "t"), ("val", "v")):
        for index in range(2):
            bdd_video(root / "bdd", f"{prefix}{index}", 10, split=split)
            visdrone_video(root / "vis", f"{prefix}{index}", 10, split=split)
            rows = [[frame, 1, 5, 6, 10 + index, 12, 1, 1, 1] for frame in range(1, 11)]
            folder = write_mot(root / "mot", f"{prefix}{index}", rows, 10, split=split)
            write_images(folder / "img1", [f"{n:08d}.jpg" for n in range(1, 11)], seed=900 + 7 * index + ord(prefix))
    sources = [
        source("bdd", "bdd100k", "bdd"),
        source("vis", "visdrone", "vis"),
        source("mot", "motchallenge", "mot"),
    ]
    stages = curriculum(sources, [mix("bdd", 2), mix("vis", 2), mix("mot", 2)])
    listed = convert(stages, root, tmp_path / "listed")
    plain = Path.iterdir

    def shuffled(folder: Path) -> Iterator[Path]:
        items = sorted(plain(folder))
        return iter(np.random.default_rng(len(items)).permutation(np.array(items, dtype=object)).tolist())

    monkeypatch.setattr(Path, "iterdir", shuffled)
    assert [p.name for p in (root / "mot" / "train" / "t0" / "img1").iterdir()] != sorted(
        p.name for p in plain(root / "mot" / "train" / "t0" / "img1")
    )
    other = convert(stages, root, tmp_path / "shuffled")
    assert len(other.manifest.videos) == 12
    assert other.manifest.digest() == listed.manifest.digest()
    assert [e.shard_sha256 for e in other.manifest.videos] == [e.shard_sha256 for e in listed.manifest.videos]


def test_validation_is_locked_by_the_first_conversion(bdd: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    first = convert(plan(2), bdd, store)
    assert first.manifest.locked == {"bdd": {"val": ["val0", "val1"]}}
    bdd_video(bdd / "bdd", "val2", 10, split="val")
    second = convert(plan(4), bdd, store)
    assert second.manifest.locked == first.manifest.locked
    assert second.manifest.of("bdd", "val") == first.manifest.of("bdd", "val")
    assert any("1 new val sequences are not locked" in note for note in second.notes)
    os.rename(bdd / "bdd" / "images" / "track" / "val" / "val0", bdd / "gone")
    with pytest.raises(MotipError, match=r"1 locked val sequences .* are gone, such as val0"):
        convert(plan(4), bdd, store)


def test_splits_that_a_conversion_does_not_handle_stay_locked(bdd: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    first = convert(plan(2), bdd, store)
    second = convert(plan(4, splits={"train": "train"}), bdd, store)
    assert second.manifest.locked == first.manifest.locked == {"bdd": {"val": ["val0", "val1"]}}
    assert second.manifest.of("bdd", "val") == first.manifest.of("bdd", "val")
    assert [item for item in second.manifest.sequences if item.split == "val"] == [
        item for item in first.manifest.sequences if item.split == "val"
    ]
    assert {entry.sequence for entry in second.manifest.of("bdd", "train")}.isdisjoint({"val0", "val1"})
    with pytest.raises(MotipError, match="2 val sequences of source 'bdd' are also in train, such as val0"):
        convert(plan(1, splits={"train": "val"}), bdd, store)
    bdd_video(bdd / "bdd", "val2", 10, split="val")
    third = convert(plan(4), bdd, store)
    assert third.manifest.locked == first.manifest.locked
    assert third.written == 0


def test_long_sequences_are_cut_and_all_rows_counted(tmp_path: Path) -> None:
    for name, length in (("a", 65), ("b", 50), ("c", 107)):
        visdrone_video(tmp_path / "vis", name, length)
    visdrone_video(tmp_path / "vis", "v", 70, split="val")
    sources = [source("vis", "visdrone", "vis", max_frames_per_video=50, classes={"pedestrian": ("pedestrian",)})]
    report = convert(curriculum(sources, [mix("vis", 3)], classes=("pedestrian",)), tmp_path, tmp_path / "store")
    # a: 50 and a tail of 15; b: 50; c: two of 50 and a tail of 7.
    train = report.manifest.of("vis", "train")
    assert sorted(e.video for e in train) == ["a", "b", "c_000000-000049"]
    assert [e.frames for e in report.manifest.of("vis", "val")] == [70]
    rows = report.splits["vis"]["train"]["rows"]
    assert rows["raw"] == 2 * (65 + 50 + 107)
    assert rows["dropped"] == {TAIL: 2 * 15, NOT_SELECTED: 2 * 57}
    before = files(tmp_path / "store")
    more = convert(curriculum(sources, [mix("vis", 4)], classes=("pedestrian",)), tmp_path, tmp_path / "store")
    assert more.written == 1
    assert before.items() <= files(tmp_path / "store").items()
    assert more.splits["vis"]["train"]["rows"]["dropped"] == {TAIL: 2 * (15 + 7)}


def test_shortage_of_videos_cuts_shorter_segments_with_a_note(tmp_path: Path) -> None:
    for name, length in (("a", 60), ("b", 45)):
        visdrone_video(tmp_path / "vis", name, length)
    visdrone_video(tmp_path / "vis", "v", 20, split="val")
    sources = [source("vis", "visdrone", "vis", classes={"pedestrian": ("pedestrian",)})]

    def convert_mixes(*mixes: Any, **options: Any) -> Any:
        stages = curriculum(sources, list(mixes), classes=("pedestrian",))
        return convert(stages, tmp_path, tmp_path / "store", **options)

    report = convert_mixes(mix("vis", 4))
    assert len(report.manifest.of("vis", "train")) == 4
    assert any("make 2 videos of at most 200 frames; 4 were requested" in note for note in report.notes)
    assert not any("are not used by this curriculum" in note for note in report.notes)
    with pytest.raises(
        MotipError, match="fewer videos than requested: source 'vis' has 5 at most, a stage requests 9"
    ) as caught:
        convert_mixes(mix("vis", 9))
    assert "`allow_fewer: true`" in str(caught.value.fix)
    fewer = convert_mixes(mix("vis", 9), allow_fewer=True)
    assert len(fewer.manifest.of("vis", "train")) == 2
    assert any("4 shards are not used by this curriculum" in note for note in fewer.notes)
    tolerant = convert_mixes(mix("vis", 9, allow_fewer=True), mix("vis", 3))
    assert len(tolerant.manifest.of("vis", "train")) >= 3
    with pytest.raises(MotipError, match="fewer videos than requested"):
        convert_mixes(mix("vis", 20, allow_fewer=True), mix("vis", 9))


def test_frame_budget(bdd: Path, tmp_path: Path) -> None:
    report = convert(plan(frame_budget=35), bdd, tmp_path / "store")
    assert sum(entry.frames for entry in report.manifest.of("bdd", "train")) == 30
    more = convert(plan(frame_budget=1000), bdd, tmp_path / "store")
    assert len(more.manifest.of("bdd", "train")) == 6


def test_ignore_regions_are_stored(bdd: Path, tmp_path: Path) -> None:
    report = convert(plan(1), bdd, tmp_path / "store")
    (entry,) = report.manifest.of("bdd", "train")
    labels = read_labels(entry_path(tmp_path / "store", entry))
    assert all(frame.ignore.tolist() == [False, True] for frame in labels.frames)
    assert (entry.boxes, entry.ignored) == ({"car": 20}, {"car": 10})
    assert report.splits["bdd"]["train"]["boxes_to_ignore"] == 10


@pytest.mark.parametrize(
    ("corrupt", "problem"),
    [
        (lambda data: data[: len(data) // 2], "truncated JPEG"),
        (lambda data: b"", "empty file"),
        (lambda data: b"<html>not found</html>", "no JPEG or PNG"),
        (lambda data: jpeg(1, 32, 32), "is 32x32, the sequence is 64x48"),
    ],
)
def test_broken_images_are_reported_and_errors_when_strict(
    bdd: Path, tmp_path: Path, corrupt: Callable[[bytes], bytes], problem: str
) -> None:
    image = bdd / "bdd" / "images" / "track" / "val" / "val1" / "val1-0000004.jpg"
    image.write_bytes(corrupt(image.read_bytes()))
    store = tmp_path / "store"
    for _ in range(2):  # counted again for an up-to-date shard
        report = convert(plan(1), bdd, store)
        counts = report.splits["bdd"]["val"]
        assert counts["bad_images"] == [f"val1/val1-0000004.jpg: {problem}"]
        assert counts["rows"]["dropped"] == {BAD_IMAGE: 2}
        assert counts["frames"] == 19
    for target in (store, tmp_path / "fresh"):
        with pytest.raises(MotipError, match=r"val1.* broken") as caught:
            convert(plan(1), bdd, target, strict=True)
        assert "val1-0000004.jpg" in str(caught.value)


def test_video_without_an_intact_image_counts_as_missing(bdd: Path, tmp_path: Path) -> None:
    # The headers are readable, but every file is truncated.
    for image in (bdd / "bdd" / "images" / "track" / "train" / "train1").iterdir():
        image.write_bytes(image.read_bytes()[:-40])
    with pytest.raises(MotipError, match="fewer videos than requested: the manifest has 5"):
        convert(plan(6), bdd, tmp_path / "store")
    report = convert(plan(6, allow_fewer=True), bdd, tmp_path / "store")
    assert len(report.manifest.of("bdd", "train")) == 5
    assert not (tmp_path / "store" / "shards" / "bdd" / "train" / "train1.parquet").exists()


def test_sequence_in_train_and_val_is_an_error(bdd: Path, tmp_path: Path) -> None:
    bdd_video(bdd / "bdd", "train2", 10, split="val")
    with pytest.raises(MotipError, match="1 val sequences of source 'bdd' are also in train, such as train2"):
        convert(plan(2), bdd, tmp_path / "store")


def test_copied_video_under_another_name_is_an_error(bdd: Path, tmp_path: Path) -> None:
    images = bdd / "bdd" / "images" / "track"
    for number in range(1, 11):
        data = (images / "train" / "train0" / f"train0-{number:07d}.jpg").read_bytes()
        (images / "val" / "val1" / f"val1-{number:07d}.jpg").write_bytes(data)
    with pytest.raises(MotipError, match="share a frame") as caught:
        convert(plan(6), bdd, tmp_path / "store")
    assert "bdd/train/train0 and bdd/val/val1" in str(caught.value)
    assert not (tmp_path / "store" / "shards" / "manifest.json").exists()


def test_training_and_evaluating_the_same_sequences_by_two_sources_is_an_error(bdd: Path, tmp_path: Path) -> None:
    swapped = source("swapped", "bdd100k", "bdd", splits={"train": "val", "val": "train"}, classes={"car": ("car",)})
    both = curriculum([source(*BDD, classes={"car": ("car",)}), swapped], [mix("bdd", 6), mix("swapped", 1)])
    with pytest.raises(MotipError, match="trains on sequences that"):
        convert(both, bdd, tmp_path / "store")


def test_other_sources_of_a_storage_are_not_changed(bdd: Path, tmp_path: Path) -> None:
    visdrone_video(bdd / "vis", "a", 20)
    visdrone_video(bdd / "vis", "v", 20, split="val")
    store = tmp_path / "store"
    first = convert(plan(2), bdd, store)
    vis = source("vis", "visdrone", "vis", classes={"pedestrian": ("pedestrian",)})
    second = convert(curriculum([vis], [mix("vis", 1)], classes=("pedestrian",)), bdd, store)
    assert second.manifest.locked == {"bdd": {"val": ["val0", "val1"]}, "vis": {"val": ["v"]}}
    assert [e for e in second.manifest.videos if e.source == "bdd"] == list(first.manifest.videos)


def test_training_videos_of_a_source_that_is_only_evaluated_are_kept(bdd: Path, tmp_path: Path) -> None:
    """Two curricula on one storage, one with replay: converting the other must not remove the replayed videos."""
    visdrone_video(bdd / "vis", "a", 20)
    visdrone_video(bdd / "vis", "v", 20, split="val")
    both = [source("bdd", "bdd100k", "bdd"), source("vis", "visdrone", "vis", classes={"pedestrian": ("pedestrian",)})]
    store = tmp_path / "store"
    replay = convert(curriculum(both, [mix("bdd", 2), mix("vis", 1)], classes=("pedestrian",)), bdd, store)
    other = convert(curriculum(both, [mix("vis", 1)], classes=("pedestrian",)), bdd, store)
    assert len(replay.manifest.of("bdd", "train")) == 2
    assert other.manifest.digest() == replay.manifest.digest()
    assert other.written == 0


def test_invalid_input_is_an_error(bdd: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    with pytest.raises(MotipError, match="the data root is missing"):
        convert(plan(1), bdd / "none", store)
    with pytest.raises(MotipError, match="the data of source 'bdd' is missing"):
        convert(plan(1, root="none"), bdd, store)
    (bdd / "empty").mkdir()
    with pytest.raises(MotipError, match="BDD100K images of split"):
        convert(plan(1, root="empty"), bdd, store)
    with pytest.raises(MotipError, match="the class 'car' of stage 'stage1' has no label") as caught:
        convert(plan(1, classes={"car": ("automobile",)}), bdd, store)
    assert "car 10" in str(caught.value.found)
    assert "automobile" in str(caught.value.expected)
    with pytest.raises(MotipError, match="unknown data format"):
        convert(plan(1, format="coco"), bdd, store)
    assert not (store / "shards" / "manifest.json").exists()
    (tmp_path / "file").write_text("x")
    with pytest.raises(MotipError, match="cannot create the folder"):
        convert(plan(1), bdd, tmp_path / "file" / "store")


def test_every_stage_needs_labels_of_its_classes_in_its_own_videos(tmp_path: Path) -> None:
    bdd_video(tmp_path / "bdd", "a", 10, categories=("car", "rider"))
    bdd_video(tmp_path / "bdd", "v", 10, split="val")
    for sequence in ("a", "b"):
        visdrone_video(tmp_path / "vis", sequence, 20)
    visdrone_video(tmp_path / "vis", "v", 20, split="val")
    sources = [
        source("bdd", "bdd100k", "bdd", classes={"pedestrian": ("rider",), "car": ("car",)}),
        source("vis", "visdrone", "vis"),
    ]

    def convert_stages(*stages: Any, **options: Any) -> Any:
        plan = curriculum(sources, *stages, classes=("pedestrian", "car"), **options)
        return convert(plan, tmp_path, tmp_path / "store")

    with pytest.raises(MotipError, match="class 'car' of stage 'stage2' has no label") as caught:
        convert_stages([mix("bdd", 1)], [mix("vis", 1)])
    assert caught.value.where == "classes of vis"
    assert caught.value.found == "vis: pedestrian 20"
    assert caught.value.expected == "vis: car"
    assert "allow_unlabelled: [car]" in str(caught.value.fix)
    # A second source in the stage itself is sufficient.
    mixed = convert_stages([mix("vis", 1), mix("bdd", 1)])
    assert not any("as allowed" in note for note in mixed.notes)
    allowed = convert_stages([mix("bdd", 1)], [mix("vis", 2)], allow_unlabelled=("car",))
    assert [note for note in allowed.notes if "as allowed" in note] == [
        "stage stage2 trains car without any label of it, as allowed; found vis: pedestrian 40"
    ]


def test_only_videos_of_the_stage_count_for_its_classes(tmp_path: Path) -> None:
    for name in "abcdef":
        bdd_video(tmp_path / "bdd", name, 10, categories=("car",) if name == "c" else ("bus",))
    bdd_video(tmp_path / "bdd", "v", 10, split="val")
    one = source("bdd", "bdd100k", "bdd", classes={"car": ("car",)})
    every = convert(curriculum([one], [mix("bdd", 6)]), tmp_path, tmp_path / "store")
    first = [entry.sequence for entry in every.manifest.select("bdd", videos=6)].index("c")
    assert first > 0
    with pytest.raises(MotipError, match="class 'car' of stage 'stage2' has no label") as caught:
        convert(curriculum([one], [mix("bdd", 6)], [mix("bdd", first)]), tmp_path, tmp_path / "store")
    assert caught.value.found == f"bdd: bus {10 * first}"
    convert(curriculum([one], [mix("bdd", 6)], [mix("bdd", first + 1)]), tmp_path, tmp_path / "store")


def test_category_without_labels_is_noted(bdd: Path, tmp_path: Path) -> None:
    report = convert(plan(1, classes={"car": ("car", "van")}), bdd, tmp_path / "store")
    assert any("no training label has the category van" in note for note in report.notes)


def test_terminal_tables(bdd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ConversionUi() as ui:
        report = convert(plan(2), bdd, tmp_path / "store", progress=ui.progress)
    ui.show(report)
    ui.console.print(inspect_shards(Manifest.load(tmp_path / "store")))
    printed = capsys.readouterr().out
    assert "converting: 4 sequences" in printed
    assert printed.count("bdd/train") == 2
    assert "2 of 6" in printed
    assert "40, kept 40" in printed
    assert "4 videos written" in printed


def test_dancetrack_folder_from_shards(bdd: Path, tmp_path: Path) -> None:
    report = convert(plan(2), bdd, tmp_path / "store")
    counts = export_dancetrack(
        report.manifest, tmp_path / "store", tmp_path / "dance", ("car",), {"bdd": {"car": ("car",)}}
    )
    assert counts["train"] == {"videos": 2, "frames": 20, "objects": 20, "ignored": 20}
    assert (tmp_path / "dance" / "val_seqmap.txt").read_text() == "name\nval0\nval1\n"
    for raw in motchallenge.list_sequences(tmp_path / "dance", "train"):
        sequence, rows = motchallenge.read_sequence(raw)
        assert (len(sequence.frames), rows.kept, rows.repaired) == (10, 10, {})
    with pytest.raises(MotipError, match="nothing to export"):
        export_dancetrack(report.manifest, tmp_path / "store", tmp_path / "dance", ("car",), {"none": {}})


def test_near_duplicates_are_found_after_recompression_and_scaling() -> None:
    image = cv2.imdecode(np.frombuffer(jpeg(5, 640, 480), np.uint8), cv2.IMREAD_COLOR)
    original = cv2.imencode(".jpg", image)[1].tobytes()
    small = cv2.imencode(".jpg", cv2.resize(image, (320, 240)), [cv2.IMWRITE_JPEG_QUALITY, 60])[1].tobytes()
    other = jpeg(6, 640, 480)
    ours = [("train", [image_hash(original)])]
    assert near_duplicates(ours, [("small", [image_hash(small)]), ("other", [image_hash(other)])]) == [
        ("train", "small", False)
    ]
    assert near_duplicates(ours, [("same", [image_hash(original)])]) == [("train", "same", True)]
    assert near_duplicates(ours, []) == []


def test_intact_images_have_no_problem(tmp_path: Path) -> None:
    write_images(tmp_path, ["1.jpg"])
    assert image_problem((tmp_path / "1.jpg").read_bytes(), (64, 48)) is None
    png = cv2.imencode(".png", np.zeros((48, 64, 3), np.uint8))[1].tobytes()
    assert image_problem(png, (64, 48)) is None
    assert image_problem(png[:60], (64, 48)) == "does not decode"


def job(repo_root: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "ray_jobs/convert.py", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(repo_root)}
    return subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=repo_root, env=environment)


def test_job_reports_invalid_input_without_a_traceback(repo_root: Path, tmp_path: Path) -> None:
    ended = job(repo_root, "--config", "configs/samples/curriculum.yaml", "--data-root", tmp_path / "none")
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: the data root is missing")
    assert "Traceback" not in ended.stderr
    assert "--storage" in job(repo_root, "--help").stdout


@pytest.mark.cluster
def test_job_on_ray_equals_a_local_conversion(samples_dir: Path, repo_root: Path, tmp_path: Path) -> None:
    config = repo_root / "configs" / "samples" / "curriculum.yaml"
    ended = job(repo_root, "--config", config, "--data-root", samples_dir, "--storage", tmp_path / "ray")
    assert ended.returncode == 0, ended.stderr
    assert "bdd100k/train" in ended.stdout
    here = convert(load_curriculum(config), samples_dir, tmp_path / "here")
    assert Manifest.load(tmp_path / "ray") == here.manifest
