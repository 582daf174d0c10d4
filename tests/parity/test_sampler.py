"""The published schedule against the recorded clips of the published sampler, in order."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from motip.data.clips import PlanVideo
from tests.parity.sizes import reference_files

PUBLISHED_SEED = 1025
"""Seed of the published sampler; the epoch is added."""


def published_order(
    videos: Sequence[PlanVideo],
    *,
    epoch: int,
    sample_steps: Sequence[int],
    sample_lengths: Sequence[int],
    sample_intervals: Sequence[int],
    length_per_iteration: int | None = None,
    repeats: int = 1,
) -> list[tuple[str, tuple[int, ...]]]:
    """The published sampler's epoch, exactly: (video, rows) in training order.

    Unlike ``plan_clips`` it depends on the order of ``videos``, drops every clip that touches a frame without objects
    and, with ``length_per_iteration``, never uses the tail of the list. ``repeats`` is the integer dataset weight.
    """
    stage = max(index for index, step in enumerate(sample_steps) if step <= epoch)
    length, max_interval = sample_lengths[stage], sample_intervals[stage]
    rng = random.Random(PUBLISHED_SEED + epoch)
    entries: list[tuple[str, tuple[int, ...]]] = []
    for video in videos:
        frames = len(video.frame_numbers)
        if frames == 1:
            entries += [(video.video, (0,) * length)] * repeats
            continue
        for start in range(frames - length + 1):
            interval = rng.randint(1, max_interval)
            if length > 1:
                interval = min(interval, (frames - 1 - start) // (length - 1))
            rows = tuple(start + interval * step for step in range(length))
            if all(video.objects[row] > 0 for row in rows):
                entries += [(video.video, rows)] * repeats
    if length_per_iteration:
        entries = entries[: len(entries) // (length // length_per_iteration)]
    generator = torch.Generator().manual_seed(PUBLISHED_SEED + epoch)
    return [entries[index] for index in torch.randperm(len(entries), generator=generator).tolist()]


def _runs(path: Path) -> tuple[dict, list[PlanVideo]]:
    data = json.loads(path.read_text())
    videos = []
    for name, frames in data["lengths"].items():
        illegal = set(data["illegal"].get(name, []))
        objects = tuple(0 if row in illegal else 1 for row in range(frames))
        videos.append(PlanVideo("D", name, f"{name}.parquet", tuple(range(frames)), objects))
    return data["runs"], videos


@pytest.mark.parametrize("path", reference_files("sampler*.json"))
def test_published_order_equals_the_published_sampler(path: Path) -> None:
    runs, videos = _runs(path)
    compared = 0
    for key, expected in runs.items():
        tag, _, epoch = key.partition("_epoch")
        if not epoch:
            continue
        config = runs[f"{tag}_cfg"]
        weights = config.get("data_weights", {"D": {"train": 1}})
        order = published_order(
            videos,
            epoch=int(epoch),
            sample_steps=config["sample_steps"],
            sample_lengths=config["sample_lengths"],
            sample_intervals=config["sample_intervals"],
            length_per_iteration=config["length_per_iteration"],
            repeats=weights["D"]["train"],
        )
        assert [[video, list(rows)] for video, rows in order] == expected, key
        compared += 1
    assert compared >= 1, f"no run named <tag>_epoch<n> among {sorted(runs)}"
