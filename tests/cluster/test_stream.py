"""Clips through a real Ray cluster: two concurrent ranks on two CPUs, every batch equal to the one without Ray."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch

from motip.cluster import Cluster
from motip.config import Config
from motip.data.clip_loader import ClipLoader, local_batches, plan_videos
from motip.data.clips import ClipPlan, ClipRef, pad_to, plan_clips, rank_rows
from motip.data.sequence import ClassMap, Frame, Sequence
from motip.data.shards import shard_path, write_shard
from motip.data.stream import clip_dataset, data_resources, iterate
from motip.errors import MotipError

pytestmark = pytest.mark.cluster

CLASSES = {"bdd": ClassMap(("car",), {"car": ("car",)})}
CONFIG = Config(
    NUM_CLASSES=1,
    CLASSES=("car",),
    AUG_RESIZE_SCALES=(96, 128),
    AUG_MAX_SIZE=224,
    AUG_RANDOM_RESIZE=(100,),
    AUG_RANDOM_CROP_MIN=60,
    AUG_RANDOM_CROP_MAX=90,
    AUG_NUM_GROUPS=2,
    sampler_lengths=(2, 3),
    sample_intervals=(1, 2),
)


def _write(storage: Path, name: str, frames: int, broken: int | None = None) -> SimpleNamespace:
    images = [np.random.default_rng(n).integers(0, 256, (15, 20, 3), dtype=np.uint8) for n in range(frames)]
    encoded = [cv2.imencode(".jpg", cv2.resize(image, (320, 240)))[1].tobytes() for image in images]
    if broken is not None:
        encoded[broken] = encoded[broken][:500]
    objects = [n % 4 for n in range(frames)]  # every fourth frame is empty: annotations are ragged
    labelled = tuple(
        Frame(
            number=n,
            image=encoded[n],
            boxes_xyxy=np.tile(np.array([10, 10, 90, 70], np.float32) + n, (count, 1)),
            track_ids=np.arange(count),
            categories=("car",) * count,
            ignore=np.zeros(count, bool),
            occlusion=np.zeros(count, np.int8),
            truncation=np.zeros(count, np.int8),
        )
        for n, count in enumerate(objects)
    )
    shard = f"bdd/train/{name}.parquet"
    write_shard(Sequence(name, "test", "train", 5.0, 320, 240, labelled), shard_path(storage, shard), source="bdd")
    return SimpleNamespace(source="bdd", video=name, shard=shard, fps=5.0)


def _names_and_sums(
    loader: ClipLoader, rows: list[ClipRef], batch_size: int, prefetch: int, cpus: float
) -> list[tuple]:
    """Fingerprints of the batches that a training worker receives."""
    torch.set_num_threads(1)
    dataset = clip_dataset(rows, loader, actors=1, actor_cpus=cpus)
    return [_fingerprint(batch) for batch in iterate(dataset, rows, batch_size, prefetch)]


def _fingerprint(batch) -> tuple:
    pixels = batch.images.long()
    weights = torch.arange(pixels.numel()).reshape(pixels.shape) % 1009
    boxes = [tuple(box.flatten().tolist()) for clip in batch.boxes_cxcywh for box in clip]
    slots = tuple(batch.slots.unknown_labels.flatten().tolist()), tuple(batch.slots.trajectory_ann.flatten().tolist())
    return tuple(batch.names), tuple(batch.weights.tolist()), int((pixels * weights).sum()), tuple(boxes), slots


def _plan(storage: Path) -> tuple[ClipPlan, ClipLoader]:
    entries = [_write(storage, "a", 9), _write(storage, "b", 6)]
    videos = plan_videos(entries, CLASSES, storage)
    plan = plan_clips(videos, CONFIG.clip_schedule(0), epoch=0, seed=3, global_batch=4)
    return pad_to(plan, 4), ClipLoader(CONFIG, CLASSES, storage)


def test_two_ranks_receive_the_clip_plan_bit_for_bit(local_ray: Cluster, tmp_path: Path) -> None:
    import ray

    plan, loader = _plan(tmp_path)
    assert plan.counts["padding"] > 0 and plan.counts["clips_the_published_sampler_drops"] > 0
    resources = data_resources(total_cpus=2, workers=2, actors_per_worker=1)
    worker = ray.remote(num_cpus=resources.worker_cpus)(_names_and_sums)
    rows = [rank_rows(plan, 2, rank, 2) for rank in (0, 1)]
    pending = [worker.remote(loader, rows[rank], 2, rank * 2, resources.actor_cpus) for rank in (0, 1)]
    seen = ray.get(pending, timeout=120)
    for rank in (0, 1):
        expected = [_fingerprint(batch) for batch in local_batches(plan, loader, rank, 2, 2)]
        assert seen[rank] == expected


def test_undecodable_frame_is_one_message_in_the_worker(local_ray: Cluster, tmp_path: Path) -> None:
    _write(tmp_path, "bad", 3, broken=1)
    clip = ClipRef("bdd", "bad", "bdd/train/bad.parquet", (0, 1), (0, 1), 1, seed=1)
    dataset = clip_dataset([clip], ClipLoader(CONFIG, CLASSES, tmp_path), actors=1, actor_cpus=0.5)
    with pytest.raises(MotipError, match="cannot be decoded") as caught:
        list(iterate(dataset, [clip], 1))
    assert "bdd/bad frame 1" in str(caught.value)
