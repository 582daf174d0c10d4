"""Preflight of a stage: its largest training clip, and the memory of a step with it per out-of-memory fallback."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from motip.config import Config
from motip.config.keys import ClipSchedule
from motip.data.augment import AugmentSettings, resize_size
from motip.data.clip_loader import ClipSample, collate
from motip.data.id_labels import IdSettings, draw_id_slots
from motip.data.sequence import ClassMap
from motip.data.shards import read_labels, shard_path
from motip.errors import MotipError
from motip.storage.paths import Location
from motip.train.collectives import SingleProcess
from motip.train.memory_estimate import estimate_peak
from motip.train.oom import OomFallback, oom_fallbacks, release_memory
from motip.train.optimizer import build_optimizer
from motip.train.setup import fresh_model
from motip.train.step import TrainStep

if TYPE_CHECKING:
    from motip.data.batch import ClipBatch
    from motip.data.manifest import VideoEntry

_MEMORY_MARGIN = 0.1
"""Fraction of the GPU's memory that a fallback must leave free."""

_OnFallback = Callable[[OomFallback], object]
"""Called with each fallback before it is measured or estimated."""


@dataclass(frozen=True)
class ClipShape:
    """Properties of a clip that determine its memory.

    Attributes:
        name: source, sequence and frames, for messages.
        size_hw: pixels of its augmented images.
        track_ids: track ids of the objects of each frame.
        ignored: maximum number of ignore regions in a frame.
    """

    name: str
    size_hw: tuple[int, int]
    track_ids: tuple[tuple[int, ...], ...]
    ignored: int = 0

    @property
    def frames(self) -> int:
        return len(self.track_ids)

    @property
    def objects(self) -> int:
        """Distinct objects of the clip."""
        return len({track for frame in self.track_ids for track in frame})

    @property
    def rank(self) -> tuple[int, int]:
        """Sort key: objects x frames x pixels, then boxes. Zero objects count as one."""
        pixels = self.frames * self.size_hw[0] * self.size_hw[1]
        return max(1, self.objects) * pixels, sum(map(len, self.track_ids))


@dataclass(frozen=True)
class FallbackMemory:
    """Memory of a step with a fallback, in bytes.

    Attributes:
        allocated: peak of all tensors; None if the device ran out of memory.
        reserved: peak reserved by the allocator; None if estimated or out of memory.
    """

    fallback: OomFallback
    allocated: int | None
    reserved: int | None = None

    @property
    def needed(self) -> int | None:
        """Required GPU memory: `reserved` if measured, else `allocated`."""
        return self.allocated if self.reserved is None else self.reserved

    def fits(self, gpu_bytes: int) -> bool:
        """Whether the fallback leaves a tenth of a GPU with this many bytes free."""
        return self.needed is not None and self.needed <= (1 - _MEMORY_MARGIN) * gpu_bytes


@dataclass
class Preflight:
    """Memory of a step with a stage's largest clip.

    Attributes:
        measured: on a device; False: estimated.
        fallbacks: from the fastest to the one that needs the least memory.
    """

    clip: ClipShape
    measured: bool
    fallbacks: list[FallbackMemory] = field(default_factory=list)

    def cheapest(self, gpu_bytes: int) -> FallbackMemory | None:
        """The first (fastest) fallback that leaves a tenth of the GPU free, None if none does."""
        return next((fallback for fallback in self.fallbacks if fallback.fits(gpu_bytes)), None)


def synthetic_clip(objects: int, frames: int, size_hw: tuple[int, int]) -> ClipShape:
    """A synthetic clip with the same objects in every frame.

    Raises:
        MotipError: a number is out of range.
    """
    for name, value, minimum in (("--objects", objects, 0), ("--frames", frames, 1), ("--size", min(size_hw), 32)):
        if value < minimum:
            raise MotipError("invalid clip", where=name, found=value, expected=f"{minimum} or more")
    return ClipShape("synthetic", size_hw, (tuple(range(objects)),) * frames)


def schedules(config: Config) -> list[ClipSchedule]:
    """The distinct clip schedules of the epochs."""
    return list(dict.fromkeys(map(config.clip_schedule, range(config.EPOCHS))))


def worst_clip(
    entries: Iterable[VideoEntry], class_maps: Mapping[str, ClassMap], storage: Location | str, config: Config
) -> ClipShape:
    """The training clip with the most objects x frames x pixels, at its largest augmented size.

    Reads labels only, no images. Assumes that no crop removes an object.

    Raises:
        MotipError: a shard is missing, or no clip fits any video.
    """
    videos = list(entries)
    settings, plans = AugmentSettings.from_config(config), schedules(config)
    clips = (clip for entry in videos for clip in _clips(entry, class_maps[entry.source], storage, settings, plans))
    worst = max(clips, key=lambda clip: clip.rank, default=None)
    if worst is None:
        raise MotipError(
            "no clip of this stage fits its videos",
            where="sampler_lengths, sample_intervals",
            found=f"{len(videos)} training videos",
            expected="a video as long as the shortest clip",
            fix="use shorter clips or smaller intervals, or give --objects, --frames and --size",
        )
    return worst


def _clips(
    entry: VideoEntry,
    class_map: ClassMap,
    storage: Location | str,
    settings: AugmentSettings,
    plans: Iterable[ClipSchedule],
) -> Iterator[ClipShape]:
    """Every clip that can be sampled from a video."""
    frames = read_labels(shard_path(storage, entry.shard)).frames
    split = [class_map.split(frame) for frame in frames]
    ids = [tuple(track_ids.tolist()) for _, track_ids, _, _ in split]
    size_hw = largest_size(settings, entry.height, entry.width, single_image=len(frames) == 1)
    for rows in _windows(len(frames), entry.fps, plans):
        name = f"{entry.source}/{entry.video} frames {', '.join(str(frames[row].number) for row in rows)}"
        yield ClipShape(name, size_hw, tuple(ids[row] for row in rows), max(len(split[row][3]) for row in rows))


def _windows(frames: int, fps: float, plans: Iterable[ClipSchedule]) -> Iterator[tuple[int, ...]]:
    """Frame rows of every clip that can be sampled from a video."""
    for plan in plans:
        intervals: Iterable[int] = plan.intervals or range(1, (plan.max_interval or 1) + 1)
        if plan.interval_seconds:
            intervals = [max(1, round(seconds * fps)) for seconds in plan.interval_seconds]
        for length in sorted(set(plan.lengths)):
            if frames == 1:
                yield (0,) * length
                continue
            for interval in sorted(set(intervals)):
                span = (length - 1) * interval
                yield from (tuple(range(start, start + span + 1, interval)) for start in range(frames - span))


@lru_cache(maxsize=256)
def largest_size(settings: AugmentSettings, height: int, width: int, single_image: bool = False) -> tuple[int, int]:
    """(height, width) of the largest image that augmentation produces from a source image, crops included.

    A crop with another aspect ratio can become larger than the uncropped image, because the short side is fixed.

    Args:
        single_image: the clip repeats one image; each frame shows a shifted window of it.
    """
    # Windows of a shifted single image, or the image itself.
    shortest = [side - int(settings.max_shift_ratio * side) if single_image else side for side in (height, width)]
    shapes = {(h, width) for h in range(shortest[0], height + 1)} | {(height, w) for w in range(shortest[1], width + 1)}
    views = {(height, width), (shortest[0], width), (height, shortest[1])}
    # Random resize and the extremes of the random crop.
    for view in views:
        for short in settings.random_resize:
            first = resize_size(*view, short, None)
            (low_h, high_h), (low_w, high_w) = (
                (min(settings.crop_min, side), min(settings.crop_max, side)) for side in first
            )
            shapes |= {first}
            shapes |= {(h, w) for h in (low_h, high_h) for w in range(low_w, high_w + 1)}
            shapes |= {(h, w) for w in (low_w, high_w) for h in range(low_h, high_h + 1)}
    # Final resize of every shape to every scale.
    sizes = {resize_size(*shape, short, settings.max_size) for shape in shapes for short in settings.scales}
    return max(sizes, key=lambda size: (size[0] * size[1], size))


def synthetic_batch(clip: ClipShape, config: Config) -> ClipBatch:
    """BATCH_SIZE clips of this shape with random images and boxes, on the CPU."""
    rng = np.random.default_rng(0)
    height, width = clip.size_hw
    counts = [len(frame) for frame in clip.track_ids]
    slots = None
    if not config.ONLY_DETR:
        ids = [np.array(frame, dtype=np.int64) for frame in clip.track_ids]
        slots = draw_id_slots(ids, IdSettings.from_config(config), rng)
    sample = ClipSample(
        images=rng.integers(0, 256, (clip.frames, 3, height, width), dtype=np.uint8),
        boxes_cxcywh=[_boxes(count, rng) for count in counts],
        classes=[rng.integers(0, config.NUM_CLASSES, count) for count in counts],
        ignore_cxcywh=[_boxes(clip.ignored, rng) for _ in counts],
        slots=slots,
        name=clip.name,
        weight=1,
    )
    return collate([sample] * config.BATCH_SIZE)


def _boxes(count: int, rng: np.random.Generator) -> np.ndarray:
    """(count, 4) float32 boxes inside the image, as normalised (cx, cy, w, h)."""
    centres, sizes = rng.uniform(0.3, 0.7, (count, 2)), rng.uniform(0.02, 0.3, (count, 2))
    return np.hstack([centres, sizes]).astype(np.float32)


def estimate_preflight(
    config: Config, clip: ClipShape, device_type: str = "cuda", on_fallback: _OnFallback | None = None
) -> Preflight:
    """Estimate the memory of each fallback with `motip.train.memory_estimate`; takes some seconds per fallback."""
    batch, result = synthetic_batch(clip, config), Preflight(clip, measured=False)
    for fallback in all_fallbacks(config):
        if on_fallback is not None:
            on_fallback(fallback)
        result.fallbacks.append(FallbackMemory(fallback, estimate_peak(config, batch, fallback, device_type)))
    return result


def measure_preflight(
    config: Config, clip: ClipShape, device: torch.device, on_fallback: _OnFallback | None = None
) -> Preflight:
    """Measure the allocator's peaks on a CUDA device while training the clip with each fallback, with fresh weights."""
    batch, result = synthetic_batch(clip, config), Preflight(clip, measured=True)
    for fallback in all_fallbacks(config):
        if on_fallback is not None:
            on_fallback(fallback)
        result.fallbacks.append(_measured_fallback(config, batch, fallback, device))
    return result


def keys_to_start_with(fallback: OomFallback, config: Config, clip: ClipShape) -> dict[str, Any]:
    """Configuration keys with which training starts with this fallback; empty for the configured one.

    Images with gradient that fit one chunk are not recomputed, so the chunk is set below their number. A single image
    always fits one chunk: then MEMORY_EFFICIENT alone reaches the fallback, after a failed step.
    """
    if fallback == oom_fallbacks(config)[0]:
        return {}
    keys: dict[str, Any] = {} if config.MEMORY_EFFICIENT else {"MEMORY_EFFICIENT": True}
    images = min(config.DETR_NUM_TRAIN_FRAMES, clip.frames) * config.BATCH_SIZE
    chunk = min(fallback.plan.chunk, max(1, images - 1))
    if chunk != config.DETR_NUM_CHECKPOINT_FRAMES:
        keys["DETR_NUM_CHECKPOINT_FRAMES"] = chunk
    if fallback.recompute_decoder and not config.USE_DECODER_CHECKPOINT:
        keys["USE_DECODER_CHECKPOINT"] = True
    if fallback.scale != 1.0:
        keys["AUG_RESIZE_SCALES"] = [round(scale * fallback.scale) for scale in config.AUG_RESIZE_SCALES]
        keys["AUG_MAX_SIZE"] = round(config.AUG_MAX_SIZE * fallback.scale)
    return keys


def all_fallbacks(config: Config) -> tuple[OomFallback, ...]:
    """All fallbacks, as with MEMORY_EFFICIENT: True."""
    return oom_fallbacks(config.replaced(MEMORY_EFFICIENT=True))


def train_on(config: Config, batch: ClipBatch, fallback: OomFallback, device: torch.device) -> bool:
    """Two optimiser steps with a fallback, the second with moments allocated; returns False if out of memory."""
    config = config.replaced(NONFINITE_LIMIT=100)  # out of memory is a result here and must not raise
    step = TrainStep(fresh_model(config).train().to(device), config, SingleProcess())
    step.fallbacks = (fallback,)
    optimizer = build_optimizer(step.model, config)
    order = torch.arange(batch.images.shape[1])
    for micro_steps in (1, min(2, config.ACCUMULATE_STEPS)):
        for _ in range(micro_steps):
            step.accumulate(batch, order, seed=config.SEED)
        if step.counters.out_of_memory:
            return False
        step.apply(optimizer)
    return True


def _measured_fallback(config: Config, batch: ClipBatch, fallback: OomFallback, device: torch.device) -> FallbackMemory:
    gc.collect()
    release_memory(device)
    torch.cuda.reset_peak_memory_stats(device)
    try:
        enough = train_on(config, batch, fallback, device)
    except torch.OutOfMemoryError:  # the optimiser's own tensors, whose size no fallback changes
        enough = False
    if not enough:
        return FallbackMemory(fallback, None, None)
    return FallbackMemory(fallback, torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device))
