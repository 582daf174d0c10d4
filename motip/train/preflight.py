"""Before a stage starts: its worst clip, and the memory that a step with it takes on each rung of the ladder."""

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
from motip.train.oom import Rung, give_back_memory, ladder
from motip.train.optimizer import build_optimizer
from motip.train.setup import fresh_model
from motip.train.step import TrainStep

if TYPE_CHECKING:
    from motip.data.batch import ClipBatch
    from motip.data.manifest import VideoEntry

SPARE = 0.1
"""Share of the card's memory that a rung must leave."""

Tell = Callable[[Rung], object]
"""Called with each rung before it is weighed."""


@dataclass(frozen=True)
class ClipShape:
    """What the memory of a clip depends on.

    Attributes:
        name: where the clip comes from, for messages.
        size_hw: pixels of its augmented images.
        track_ids: ids of the objects of each frame.
        ignored: ignore regions in its fullest frame.
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
        """Different objects of the clip."""
        return len({track for frame in self.track_ids for track in frame})

    @property
    def rank(self) -> tuple[int, int]:
        """Objects x frames x pixels, then boxes: what clips are compared by. No object counts as one."""
        pixels = self.frames * self.size_hw[0] * self.size_hw[1]
        return max(1, self.objects) * pixels, sum(map(len, self.track_ids))


@dataclass(frozen=True)
class RungMemory:
    """Bytes that a step takes on a rung.

    Attributes:
        allocated: most that tensors take at once; None where the device had too little.
        reserved: most that the allocator took from the device; None where it was not measured.
    """

    rung: Rung
    allocated: int | None
    reserved: int | None = None

    @property
    def needed(self) -> int | None:
        """Bytes of the card: what was reserved, or the estimate."""
        return self.allocated if self.reserved is None else self.reserved

    def fits(self, card: int) -> bool:
        """Whether the rung leaves a tenth of a card with this many bytes."""
        return self.needed is not None and self.needed <= (1 - SPARE) * card


@dataclass
class Preflight:
    """What a stage's worst clip takes.

    Attributes:
        measured: on a device, else estimated.
        rungs: from the fastest down.
    """

    clip: ClipShape
    measured: bool
    rungs: list[RungMemory] = field(default_factory=list)

    def cheapest(self, card: int) -> RungMemory | None:
        """The first rung that leaves a tenth of the card; it takes the least time."""
        return next((rung for rung in self.rungs if rung.fits(card)), None)


def made_up_clip(objects: int, frames: int, size_hw: tuple[int, int]) -> ClipShape:
    """A clip that nobody has: the same objects in every frame.

    Raises:
        MotipError: a number is out of range.
    """
    for name, value, least in (("--objects", objects, 0), ("--frames", frames, 1), ("--size", min(size_hw), 32)):
        if value < least:
            raise MotipError("there is no such clip", where=name, found=value, expected=f"{least} or more")
    return ClipShape("made up", size_hw, (tuple(range(objects)),) * frames)


def schedules(config: Config) -> list[ClipSchedule]:
    """The different ways in which clips are cut over the epochs."""
    found: list[ClipSchedule] = []
    for epoch in range(config.EPOCHS):
        schedule = config.clip_schedule(epoch)
        if schedule not in found:
            found.append(schedule)
    return found


def worst_clip(
    entries: Iterable[VideoEntry], class_maps: Mapping[str, ClassMap], storage: Location | str, config: Config
) -> ClipShape:
    """The training clip with the most objects x frames x pixels, at the largest size that augmentation gives it.

    Reads labels, no images. A crop may show fewer objects than the whole frame; none is counted on.

    Raises:
        MotipError: a shard is missing, or no clip fits any video.
    """
    settings = AugmentSettings.from_config(config)
    worst: ClipShape | None = None
    seen = 0
    for entry in entries:
        seen += 1
        frames = read_labels(shard_path(storage, entry.shard)).frames
        split = [class_maps[entry.source].split(frame) for frame in frames]
        ids = [tuple(track_ids.tolist()) for _, track_ids, _, _ in split]
        regions = [len(ignore) for _, _, _, ignore in split]
        size_hw = largest_size(settings, entry.height, entry.width, single_image=len(frames) == 1)
        for rows in _windows(len(frames), entry.fps, schedules(config)):
            name = f"{entry.source}/{entry.video} frames {', '.join(str(frames[row].number) for row in rows)}"
            clip = ClipShape(name, size_hw, tuple(ids[row] for row in rows), max(regions[row] for row in rows))
            if worst is None or clip.rank > worst.rank:
                worst = clip
    if worst is None:
        raise MotipError(
            "no clip of this stage fits its videos",
            where="sampler_lengths, sample_intervals",
            found=f"{seen} training videos",
            expected="a video as long as the shortest clip",
            fix="use shorter clips or smaller intervals, or ask about --objects, --frames and --size",
        )
    return worst


def _windows(frames: int, fps: float, plans: Iterable[ClipSchedule]) -> Iterator[tuple[int, ...]]:
    """Rows of every clip that can be cut from a video."""
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
    """(height, width) of the largest image that augmentation makes of a source image, crops included.

    A crop of another shape than the image can be larger than the whole, because the short side is what is set.

    Args:
        single_image: the clip repeats one image, of which each frame shows a shifted window.
    """
    shortest = [side - int(settings.max_shift_ratio * side) if single_image else side for side in (height, width)]
    shapes = {(h, width) for h in range(shortest[0], height + 1)} | {(height, w) for w in range(shortest[1], width + 1)}
    views = {(height, width), (shortest[0], width), (height, shortest[1])}
    for view in views:
        for short in settings.random_resize:
            first = resize_size(*view, short, None)
            (low_h, high_h), (low_w, high_w) = (
                (min(settings.crop_min, side), min(settings.crop_max, side)) for side in first
            )
            shapes |= {first}
            shapes |= {(h, w) for h in (low_h, high_h) for w in range(low_w, high_w + 1)}
            shapes |= {(h, w) for w in (low_w, high_w) for h in range(low_h, high_h + 1)}
    sizes = {resize_size(*shape, short, settings.max_size) for shape in shapes for short in settings.scales}
    return max(sizes, key=lambda size: (size[0] * size[1], size))


def batch_of(clip: ClipShape, config: Config) -> ClipBatch:
    """BATCH_SIZE clips of this shape, with noise for images and boxes, on the host."""
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
    """(count, 4) float32 boxes inside the image."""
    centres, sizes = rng.uniform(0.3, 0.7, (count, 2)), rng.uniform(0.02, 0.3, (count, 2))
    return np.hstack([centres, sizes]).astype(np.float32)


def estimated(config: Config, clip: ClipShape, device_type: str = "cuda", tell: Tell | None = None) -> Preflight:
    """The memory of each rung by `motip.train.memory_estimate`; takes seconds a rung and next to no memory."""
    batch = batch_of(clip, config)
    return _each_rung(
        config, clip, False, tell, lambda rung: RungMemory(rung, estimate_peak(config, batch, rung, device_type))
    )


def measured(config: Config, clip: ClipShape, device: torch.device, tell: Tell | None = None) -> Preflight:
    """Train on the clip on each rung on a CUDA device, with fresh weights, and ask its allocator."""
    batch = batch_of(clip, config)
    return _each_rung(config, clip, True, tell, lambda rung: _measured_rung(config, batch, rung, device))


def _each_rung(
    config: Config, clip: ClipShape, measured: bool, tell: Tell | None, weigh: Callable[[Rung], RungMemory]
) -> Preflight:
    result = Preflight(clip, measured)
    for rung in all_rungs(config):
        if tell is not None:
            tell(rung)
        result.rungs.append(weigh(rung))
    return result


def keys_to_start_on(rung: Rung, config: Config, clip: ClipShape) -> dict[str, Any]:
    """Configuration keys whose change makes this rung the first; empty for the configured one.

    Images with gradient that fit one chunk are not recomputed, so the chunk is set below their number. One image alone
    always fits: MEMORY_EFFICIENT alone then leads to the rung, after a failed try.
    """
    if rung == ladder(config)[0]:
        return {}
    keys: dict[str, Any] = {} if config.MEMORY_EFFICIENT else {"MEMORY_EFFICIENT": True}
    images = min(config.DETR_NUM_TRAIN_FRAMES, clip.frames) * config.BATCH_SIZE
    chunk = min(rung.plan.chunk, max(1, images - 1))
    if chunk != config.DETR_NUM_CHECKPOINT_FRAMES:
        keys["DETR_NUM_CHECKPOINT_FRAMES"] = chunk
    if rung.recompute_decoder and not config.USE_DECODER_CHECKPOINT:
        keys["USE_DECODER_CHECKPOINT"] = True
    if rung.scale != 1.0:
        keys["AUG_RESIZE_SCALES"] = [round(scale * rung.scale) for scale in config.AUG_RESIZE_SCALES]
        keys["AUG_MAX_SIZE"] = round(config.AUG_MAX_SIZE * rung.scale)
    return keys


def all_rungs(config: Config) -> tuple[Rung, ...]:
    """The whole ladder, also where MEMORY_EFFICIENT does not allow it yet."""
    return ladder(config.replaced(MEMORY_EFFICIENT=True))


def train_on(config: Config, batch: ClipBatch, rung: Rung, device: torch.device) -> bool:
    """Two optimiser steps on a rung, the second with moments and gathered gradients there; False without memory."""
    config = config.replaced(NONFINITE_LIMIT=100)  # a rung without memory for the clip is an answer, no reason to stop
    step = TrainStep(fresh_model(config).train().to(device), config, SingleProcess())
    step.rungs = (rung,)
    optimizer = build_optimizer(step.model, config)
    order = torch.arange(batch.images.shape[1])
    for gathered in (1, min(2, config.ACCUMULATE_STEPS)):
        for _ in range(gathered):
            step.accumulate(batch, order, seed=config.SEED)
        if step.counters.out_of_memory:
            return False
        step.apply(optimizer)
    return True


def _measured_rung(config: Config, batch: ClipBatch, rung: Rung, device: torch.device) -> RungMemory:
    gc.collect()
    give_back_memory(device)
    torch.cuda.reset_peak_memory_stats(device)
    try:
        enough = train_on(config, batch, rung, device)
    except torch.OutOfMemoryError:  # the optimiser's own tensors, which the ladder cannot make smaller
        enough = False
    if not enough:
        return RungMemory(rung, None, None)
    return RungMemory(rung, torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device))
