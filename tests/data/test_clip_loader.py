"""Clip loading from shards: bit-equal in every process, labels consistent with frames, errors with the frame."""

from __future__ import annotations

import math
import multiprocessing
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from motip.config import Config
from motip.data.clip_loader import ClipLoader, ClipSample, collate, local_batches, plan_videos, read_video_frames
from motip.data.clips import ClipPlan, ClipRef, pad_to, plan_clips
from motip.data.decode import decode_rgb, image_height_width, reduction_for
from motip.data.id_labels import SLOT_FIELDS
from motip.data.image_check import image_problem
from motip.data.sequence import UNTRACKED, ClassMap, Frame, Sequence
from motip.data.shards import shard_path, write_shard
from motip.data.stream import _clip_table, _iter_packed_clips, _prefetch_one, data_resources, pack, unpack
from motip.errors import MotipError

CLASS_MAP = ClassMap(("pedestrian", "car"), {"pedestrian": ("person",), "car": ("car", "van")})
CONFIG = Config(
    NUM_CLASSES=2,
    AUG_RESIZE_SCALES=(96, 128),
    AUG_MAX_SIZE=256,
    AUG_RANDOM_RESIZE=(100, 120),
    AUG_RANDOM_CROP_MIN=60,
    AUG_RANDOM_CROP_MAX=100,
    AUG_NUM_GROUPS=2,
    sampler_lengths=(3,),
    sample_intervals=(1, 2),
)


def _jpeg(seed: int, height: int, width: int) -> bytes:
    small = np.random.default_rng(seed).integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
    done, encoded = cv2.imencode(".jpg", cv2.resize(small, (width, height)))
    assert done
    return encoded.tobytes()


def _frame(number: int, width: int, height: int) -> Frame:
    """Two moving persons and a van, a crowd region, a truck of an unmapped class; every fifth frame is empty."""
    rng = np.random.default_rng(number)
    ids = np.array([7, 3, 11, UNTRACKED, 20]) if number % 5 != 4 else np.zeros(0, np.int64)
    corner = rng.uniform(0.1, 0.5, (len(ids), 2)) * [width, height]
    count = len(ids)
    return Frame(
        number=number,
        image=_jpeg(number, height, width),
        boxes_xyxy=np.hstack([corner, corner + np.array([width, height]) / 4]).astype(np.float32),
        track_ids=ids.astype(np.int64),
        categories=("person", "person", "van", "person", "truck")[:count],
        ignore=np.array([False, False, False, True, False])[:count],
        occlusion=np.zeros(count, np.int8),
        truncation=np.zeros(count, np.int8),
    )


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A storage folder with two videos of different shapes, and its entries."""
    storage = tmp_path_factory.mktemp("storage")
    entries = []
    for name, (width, height), frames in (("tall", (240, 320), 7), ("wide", (400, 240), 12)):
        frame_list = tuple(_frame(n, width, height) for n in range(frames))
        sequence = Sequence(name, "test", "train", 5.0, width, height, frame_list)
        shard = f"bdd/train/{name}.parquet"
        header = write_shard(sequence, shard_path(storage, shard), source="bdd")
        entries.append(
            SimpleNamespace(
                source="bdd",
                video=name,
                shard=shard,
                fps=5.0,
                frames=frames,
                rows_per_group=header.rows_per_group,
            )
        )
    videos = plan_videos(entries, {"bdd": CLASS_MAP}, storage)
    loader = ClipLoader(CONFIG, {"bdd": CLASS_MAP}, storage)
    return SimpleNamespace(storage=storage, entries=entries, videos=videos, loader=loader)


def _plan(dataset: SimpleNamespace, global_batch: int = 1, epoch: int = 0) -> ClipPlan:
    return plan_clips(dataset.videos, CONFIG.clip_schedule(epoch), epoch=epoch, seed=1, global_batch=global_batch)


def _equal(a: ClipSample, b: ClipSample) -> bool:
    if (a.name, a.weight) != (b.name, b.weight) or not np.array_equal(a.images, b.images):
        return False
    for field in ("boxes_cxcywh", "classes", "ignore_cxcywh"):
        if not all(np.array_equal(x, y) for x, y in zip(getattr(a, field), getattr(b, field), strict=True)):
            return False
    assert a.slots is not None and b.slots is not None
    return all(np.array_equal(getattr(a.slots, field), getattr(b.slots, field)) for field in SLOT_FIELDS)


def test_plan_videos_have_object_counts_and_frame_numbers(dataset: SimpleNamespace) -> None:
    assert dataset.videos[0].objects == (3, 3, 3, 3, 0, 3, 3)
    assert dataset.videos[1].frame_numbers == tuple(range(12))


def test_labels_are_mapped_by_name_and_the_rest_is_ignored(dataset: SimpleNamespace) -> None:
    plain = CONFIG.replaced(AUG_FLIP_PROB=0.0, AUG_RANDOM_RESIZE=())
    clip = ClipRef("bdd", "wide", "bdd/train/wide.parquet", (2, 3, 4), (2, 3, 4), 1, seed=5)
    sample = ClipLoader(plain, {"bdd": CLASS_MAP}, dataset.storage).load(clip)
    assert sample.images.dtype == np.uint8 and sample.images.shape[:2] == (3, 3)
    assert [classes.tolist() for classes in sample.classes] == [[0, 0, 1], [0, 0, 1], []]
    assert [len(ignore) for ignore in sample.ignore_cxcywh] == [2, 2, 0], "crowd and truck"
    source = _frame(2, 400, 240).boxes_xyxy[0] / [400, 240, 400, 240]
    expected = [(source[0] + source[2]) / 2, (source[1] + source[3]) / 2, 0.25, 0.25]
    np.testing.assert_allclose(sample.boxes_cxcywh[0][0], expected, atol=1e-5)
    assert sample.slots is not None and sample.slots.unknown_ann.shape == (2, 3, 3)


def test_slots_refer_to_boxes_of_their_frame(dataset: SimpleNamespace) -> None:
    clips = _plan(dataset).clips
    assert clips
    for clip in clips:
        sample = dataset.loader.load(clip)
        assert sample.slots is not None
        for t, boxes in enumerate(sample.boxes_cxcywh):
            for name in ("trajectory_ann", "unknown_ann"):
                assert getattr(sample.slots, name)[:, t].max(initial=-1) < len(boxes)


def test_clips_are_bit_equal_in_any_process_and_order(dataset: SimpleNamespace) -> None:
    clips = list(_plan(dataset).clips)[:8]
    here = [dataset.loader.load(clip) for clip in clips]
    again = [dataset.loader.load(clip) for clip in reversed(clips)][::-1]
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        elsewhere = list(pool.map(dataset.loader.load, clips))
    assert all(_equal(a, b) and _equal(a, c) for a, b, c in zip(here, again, elsewhere, strict=True))
    other = dataset.loader.load(replace(clips[0], seed=clips[0].seed + 1))
    assert not _equal(here[0], other)


def test_batches_are_padded_and_masked(dataset: SimpleNamespace) -> None:
    plan = pad_to(_plan(dataset, global_batch=3), 3)
    batches = list(local_batches(plan, dataset.loader, batch_size=3))
    assert len(batches) == plan.steps
    assert sum(float(batch.weights.sum()) for batch in batches) == plan.counts["clips"]
    for batch, begin in zip(batches, range(0, len(plan), 3), strict=True):
        assert batch.images.dtype == torch.uint8 and batch.images.shape[:3] == (3, 3, 3)
        samples = [dataset.loader.load(clip) for clip in plan.clips[begin : begin + 3]]
        for index, sample in enumerate(samples):
            h, w = sample.images.shape[2:]
            assert torch.equal(batch.images[index, :, :, :h, :w], torch.from_numpy(sample.images))
            assert not batch.masks[index, :, :h, :w].any()
            assert batch.masks[index, :, h:].all() and batch.masks[index, :, :, w:].all()
            assert not batch.images[index, :, :, h:].any() and not batch.images[index, :, :, :, w:].any()
            assert batch.slots is not None and sample.slots is not None
            own = sample.slots.unknown_ann.shape[2]
            assert (batch.slots.unknown_labels[index, :, :, own:] == -1).all()
            assert batch.slots.unknown_masks[index, :, :, own:].all()


def test_a_single_clip_is_not_copied_and_may_be_read_only(dataset: SimpleNamespace) -> None:
    sample = dataset.loader.load(_plan(dataset).clips[0])
    assert np.shares_memory(collate([sample]).images.numpy(), sample.images)
    sample.images.setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batch = collate([sample])
    assert torch.equal(batch.images[0], torch.from_numpy(sample.images.copy())) and not batch.masks.any()
    twice = collate([sample, sample])
    assert torch.equal(twice.images[1], batch.images[0]) and not np.shares_memory(twice.images.numpy(), sample.images)


def test_clips_are_read_from_the_object_store_without_a_copy(dataset: SimpleNamespace) -> None:
    """Complete tables, slices, and a table whose clips share one buffer, as after a concatenation."""
    packed = [(row, *pack(dataset.loader.load(clip))) for row, clip in enumerate(_plan(dataset).clips[:3])]
    table = _clip_table(packed)
    for part, rows in ((table, (0, 1, 2)), (table.slice(1, 2), (1, 2)), (table.slice(2), (2,))):
        found = list(_iter_packed_clips(iter([part])))
        assert [row for row, _, _ in found] == list(rows)
        for row, pixels, labels in found:
            for buffer, array in zip((pixels, labels), packed[row][1:], strict=True):
                read = np.frombuffer(buffer, np.uint8)
                assert np.array_equal(read, array) and np.shares_memory(read, array)
    joined = table.combine_chunks()
    for part, rows in ((joined, (0, 1, 2)), (joined.slice(1), (1, 2))):
        for row, pixels, labels in _iter_packed_clips(iter([part])):
            assert np.array_equal(np.frombuffer(pixels, np.uint8), packed[row][1]) and row in rows
            assert np.array_equal(np.frombuffer(labels, np.uint8), packed[row][2])


def test_objects_beyond_the_vocabulary_are_counted_in_the_batch(dataset: SimpleNamespace) -> None:
    clip = ClipRef("bdd", "wide", "bdd/train/wide.parquet", (0, 1, 2), (0, 1, 2), 1, seed=5)
    plain = {"AUG_RANDOM_RESIZE": ()}
    for rule, expected in (("distractor", (4, 0)), ("drop", (0, 4))):
        config = CONFIG.replaced(NUM_ID_VOCABULARY=1, SUBSET_OVERFLOW=rule, **plain)
        sample = ClipLoader(config, {"bdd": CLASS_MAP}, dataset.storage).load(clip)
        batch = collate([sample, sample, replace(sample, weight=0)])
        assert (batch.distractors, batch.dropped) == expected, "two of three objects in each of two real clips"
        assert (batch.to("cpu").distractors, batch.to("cpu").dropped) == expected


def test_ranks_and_resumed_runs_get_the_batches_of_the_plan(dataset: SimpleNamespace) -> None:
    plan = pad_to(_plan(dataset, global_batch=4), 4)
    names = [clip.name for clip in plan.clips]
    ranks = [list(local_batches(plan, dataset.loader, rank, 2, 2)) for rank in (0, 1)]
    assert [name for pair in zip(*ranks, strict=True) for batch in pair for name in batch.names] == names
    late = list(local_batches(plan, dataset.loader, 1, 2, 2, start_step=2))
    assert [batch.names for batch in late] == [batch.names for batch in ranks[1][2:]]
    assert all(torch.equal(a.images, b.images) for a, b in zip(late, ranks[1][2:], strict=True))


def test_detector_training_has_no_slots(dataset: SimpleNamespace) -> None:
    loader = ClipLoader(CONFIG.replaced(ONLY_DETR=True), {"bdd": CLASS_MAP}, dataset.storage)
    batch = next(local_batches(_plan(dataset), loader))
    assert batch.slots is None


def test_video_frames_are_read_in_order_at_full_size(dataset: SimpleNamespace) -> None:
    frames = list(read_video_frames(dataset.entries[1], dataset.storage))
    assert [number for number, _ in frames] == list(range(12))
    assert all(image.shape == (240, 400, 3) and image.dtype == np.uint8 for _, image in frames)


def test_source_without_classes_is_an_error(dataset: SimpleNamespace) -> None:
    clip = replace(_plan(dataset).clips[0], source="dance")
    with pytest.raises(MotipError, match="dance"):
        dataset.loader.load(clip)


def test_packed_clips_round_trip(dataset: SimpleNamespace) -> None:
    for clip in _plan(dataset).clips[:6]:
        sample = dataset.loader.load(clip)
        pixels, labels = pack(sample)
        assert _equal(unpack(pixels, labels), sample)
        assert pixels.nbytes == sample.images.nbytes and pixels.dtype == np.uint8
        assert labels.nbytes < 16_384
    no_slots = replace(sample, slots=None)
    assert unpack(*pack(no_slots)).slots is None
    empty = replace(sample, boxes_cxcywh=[np.zeros((0, 4), np.float32)] * 3)
    assert [boxes.shape for boxes in unpack(*pack(empty)).boxes_cxcywh] == [(0, 4)] * 3


def test_prefetched_batches_are_equal_and_the_thread_ends_with_the_consumer() -> None:
    made: list[int] = []

    def numbers(last: int) -> Iterator[Any]:
        for number in range(last):
            made.append(number)
            yield number
        raise MotipError("the shard is missing", where="v")

    ahead = _prefetch_one(numbers(3))
    assert [next(ahead) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(MotipError, match="shard is missing"):
        next(ahead)
    made.clear()
    unfinished = _prefetch_one(numbers(1000))
    assert next(unfinished) == 0
    unfinished.close()
    for thread in [thread for thread in threading.enumerate() if thread.name == "motip-batches"]:
        thread.join(timeout=5)
        assert not thread.is_alive()
    assert len(made) <= 3, "one is queued, one is being made"


@pytest.mark.parametrize(
    ("cpus", "workers", "actors"), [(2, 1, 4), (2, 2, 1), (4, 1, 2), (16, 4, 2), (96, 8, 6), (1, 1, 1)]
)
def test_cpu_shares_fit_the_machine(cpus: float, workers: int, actors: int) -> None:
    share = data_resources(cpus, workers, actors)
    assert 1 <= share.actors_per_worker <= actors
    assert workers * (share.worker_cpus + share.actors_per_worker * share.actor_cpus) < cpus
    assert share.worker_cpus <= 1 and share.actor_cpus <= 1


@pytest.mark.parametrize(
    ("nodes", "workers", "actors"), [([0, 1, 1, 1, 1], 3, 1), ([2, 1], 2, 1), ([8] * 4, 5, 4), ([3, 3, 3], 5, 1)]
)
def test_no_process_is_split_over_two_nodes(nodes: list[float], workers: int, actors: int) -> None:
    share = data_resources(sum(nodes), workers, actors, node_cpus=nodes)
    assert share.worker_cpus == share.actor_cpus and share.actors_per_worker == actors
    processes = sum(math.floor(cpus / share.worker_cpus + 1e-9) for cpus in nodes)
    assert processes >= workers * (1 + actors), share


def test_infeasible_cpu_requests_are_errors_with_the_arithmetic() -> None:
    with pytest.raises(MotipError, match="too few CPUs") as caught:
        data_resources(2, workers=12, actors_per_worker=1)
    assert "2 CPUs" in str(caught.value) and "12 workers x (0.1 CPU + 1 decoding actors" in str(caught.value)
    alone = data_resources(2, workers=1, actors_per_worker=0)
    assert (alone.worker_cpus, alone.actor_cpus, alone.actors_per_worker) == (1, 0.0, 0)


def _broken_video(storage: Path, images: list[bytes | None]) -> ClipRef:
    frames = tuple(replace(_frame(n, 240, 320), image=image) for n, image in enumerate(images))
    write_shard(
        Sequence("bad", "test", "train", 5.0, 240, 320, frames),
        shard_path(storage, "bdd/train/bad.parquet"),
        source="bdd",
    )
    numbers = tuple(range(len(images)))
    return ClipRef("bdd", "bad", "bdd/train/bad.parquet", numbers, numbers, 1, seed=0)


@pytest.mark.parametrize(
    ("broken", "match"),
    [
        (_jpeg(1, 320, 240)[:-300], "cannot be decoded"),
        (b"", "cannot be decoded"),
        (b"not an image", "cannot be decoded"),
        (None, "no image"),
        (_jpeg(1, 240, 320), "different sizes"),
    ],
)
def test_broken_frames_are_errors_with_the_frame(tmp_path: Path, broken: bytes | None, match: str) -> None:
    clip = _broken_video(tmp_path, [_jpeg(0, 320, 240), broken])
    with pytest.raises(MotipError, match=match) as caught:
        ClipLoader(CONFIG, {"bdd": CLASS_MAP}, tmp_path).load(clip)
    assert "bdd/bad frame 1" in str(caught.value)


def test_header_sizes_and_reduced_decoding() -> None:
    encoded = _jpeg(0, 240, 400)
    assert image_height_width(encoded) == (240, 400)
    assert [decode_rgb(encoded, k).shape for k in (1, 2, 4, 8)] == [
        (240, 400, 3),
        (120, 200, 3),
        (60, 100, 3),
        (30, 50, 3),
    ]
    assert reduction_for((720, 1280), (360, 640)) == 2
    assert reduction_for((720, 1280), (361, 640)) == 1
    assert reduction_for((2160, 3840), (480, 853)) == 4
    full = cv2.resize(decode_rgb(encoded), (200, 120), interpolation=cv2.INTER_AREA).astype(int)
    assert np.abs(decode_rgb(encoded, 2).astype(int) - full).mean() < 3


def test_grey_and_transparent_and_tagged_images_become_upright_rgb() -> None:
    image = np.random.default_rng(0).integers(0, 256, (40, 64), dtype=np.uint8)
    grey = cv2.imencode(".png", image)[1].tobytes()
    assert image_height_width(grey) == (40, 64)
    assert (decode_rgb(grey) == image[..., None]).all()
    alpha = cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_GRAY2BGRA))[1].tobytes()
    assert decode_rgb(alpha).shape == (40, 64, 3)
    jpeg = cv2.imencode(".jpg", image)[1].tobytes()
    rotate = bytes.fromhex("45786966000049492a0008000000010012010300010000000600000000000000")
    tagged = jpeg[:2] + b"\xff\xe1" + (len(rotate) + 2).to_bytes(2, "big") + rotate + jpeg[2:]
    assert image_height_width(tagged) == (40, 64) and decode_rgb(tagged).shape == (40, 64, 3)
    with pytest.raises(MotipError, match="cannot be decoded"):
        image_height_width(grey[:-20])


def test_image_sizes_of_complete_and_truncated_files() -> None:
    image = np.random.default_rng(0).integers(0, 256, (40, 64, 3), dtype=np.uint8)
    for suffix in (".jpg", ".png"):
        encoded = cv2.imencode(suffix, image)[1].tobytes()
        truncated = encoded[: len(encoded) * 3 // 4]
        assert image_height_width(truncated, complete=False) == image_height_width(encoded) == (40, 64)
        with pytest.raises(MotipError, match="cannot be decoded"):
            image_height_width(truncated)
        with pytest.raises(MotipError, match="cannot be decoded"):
            image_height_width(encoded[:12], complete=False)
        assert image_problem(encoded, (64, 40)) is None
        assert image_problem(encoded, (40, 64)) == "is 64x40, the sequence is 40x64"


def test_real_frames_decode(samples_dir: Path) -> None:
    paths = sorted(samples_dir.rglob("*.jpg"))[::5]
    assert paths
    for path in paths:
        encoded = path.read_bytes()
        height, width = image_height_width(encoded, path)
        assert decode_rgb(encoded, 2, path).shape == (-(-height // 2), -(-width // 2), 3)
        with pytest.raises(MotipError, match="cannot be decoded"):
            decode_rgb(encoded[: len(encoded) // 2], where=path)
