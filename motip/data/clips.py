"""Clip plan: frames and order of an epoch's clips, a pure function of data, schedule, epoch and seed."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from motip.errors import MotipError

if TYPE_CHECKING:
    from motip.config import ClipSchedule, Config

_ROW_STRIDE = 1 << 32
"""Start frames are encoded as video index * _ROW_STRIDE + row; larger than the number of rows of any video."""


@dataclass(frozen=True, slots=True)
class PlanVideo:
    """A video as the clip plan sees it.

    Attributes:
        source: name of the source, the key of the mix weights.
        video: name, unique within the source.
        shard: path of the Parquet shard, relative to the shard root or a URI.
        frame_numbers: frame number in the source sequence of each row of the shard, ascending.
        objects: number of objects to train on in each row.
        fps: frames per second.
    """

    source: str
    video: str
    shard: str
    frame_numbers: tuple[int, ...]
    objects: tuple[int, ...]
    fps: float = 30.0

    @property
    def key(self) -> tuple[str, str]:
        return self.source, self.video


@dataclass(frozen=True, slots=True)
class ClipRef:
    """T frames of one video; ``seed`` determines all random choices of the clip.

    Attributes:
        positions: rows of the shard, ascending (or one row T times for a single image).
        frame_numbers: frame numbers of these rows.
        interval: distance of consecutive positions, in rows.
        seed: derived from the run's seed, the epoch and the position in the plan; 0 <= seed < 2**63.
        weight: 1, or 0 for a padding clip that keeps the ranks in step.
    """

    source: str
    video: str
    shard: str
    positions: tuple[int, ...]
    frame_numbers: tuple[int, ...]
    interval: int
    seed: int
    weight: int = 1

    @property
    def name(self) -> str:
        return f"{self.source}/{self.video} frames {','.join(map(str, self.frame_numbers))}"


@dataclass(frozen=True)
class ClipPlan:
    """The clips of one epoch in training order.

    Attributes:
        clips: global batch b is ``clips[b * global_batch : (b + 1) * global_batch]``; its clips have one length.
        counts: start frames used and dropped by reason, and statistics of the clips.
        global_batch: clips per step over all ranks.
    """

    clips: tuple[ClipRef, ...]
    counts: dict[str, int]
    global_batch: int = 1

    def __len__(self) -> int:
        return len(self.clips)

    @property
    def steps(self) -> int:
        return -(-len(self.clips) // self.global_batch)

    def from_step(self, step: int) -> ClipPlan:
        """The remaining plan after ``step`` completed steps; raises MotipError for a step outside 0..``steps``."""
        if not 0 <= step <= self.steps:
            raise MotipError(
                "the checkpoint's step is outside the clip plan",
                found=f"step {step}",
                expected=f"0..{self.steps} steps of {self.global_batch} clips",
                fix="resume with the data, seed and batch size that the checkpoint was written with",
            )
        return replace(self, clips=self.clips[step * self.global_batch :])


def plan_clips(
    videos: Iterable[PlanVideo],
    schedule: ClipSchedule,
    *,
    epoch: int,
    seed: int,
    global_batch: int = 1,
    weights: Mapping[str, float] | None = None,
    max_clips: int | None = None,
    length_per_iteration: int | None = None,
) -> ClipPlan:
    """Plan one epoch: one clip per start frame that fits, shuffled, batched by length.

    Frames without objects are kept; ``counts`` has the number of clips the published sampler would drop for them.
    The order of ``videos`` has no influence.

    Args:
        global_batch: clips per step over all ranks; all clips of a step have one length.
        weights: per source, number of repeats of each of its clips (2.5: two, and a third for a random half).
        max_clips: maximum number of clips; a random subset is kept.
        length_per_iteration: published key: keep a random subset of total // (length // length_per_iteration) clips
            (the published sampler keeps the head of the directory listing).

    Raises:
        MotipError: no clip fits, no video has an object, two videos have one name, or a weight is not positive.
    """
    # Start frames.
    ordered = sorted(videos, key=lambda video: video.key)
    _check_names(ordered)
    counts: Counter[str] = Counter(videos=len(ordered), frames=sum(len(video.frame_numbers) for video in ordered))
    choices = [_intervals(video, schedule) for video in ordered]
    starts = _start_frames(ordered, choices, min(schedule.lengths), counts)
    if not len(starts):
        raise _no_clip_error(ordered, choices, schedule)
    if not any(any(video.objects) for video in ordered):
        raise MotipError(
            "there is no object to train on",
            where=f"{len(ordered)} videos of {', '.join(sorted({video.source for video in ordered}))}",
            expected="labels whose categories belong to a class of this stage",
            fix="check the source's classes: raw categories must be spelled as in the dataset",
        )

    # Mix weights, order and limit.
    starts = _apply_weights(ordered, starts, weights or {}, np.random.default_rng([seed, epoch, 0]), counts)
    draw = np.random.default_rng([seed, epoch, 1])
    draw.shuffle(starts)
    limit = _limit(len(starts), schedule, max_clips, length_per_iteration)
    if limit < len(starts):
        counts["starts_not_drawn_limit"] = len(starts) - limit
        starts = starts[:limit]

    # Lengths and intervals; steps of one length; seeds.
    drafts = [
        _sample_clip(ordered[start // _ROW_STRIDE], start % _ROW_STRIDE, choices[start // _ROW_STRIDE], schedule, draw)
        for start in map(int, starts)
    ]
    drafts = _batch_by_length(drafts, schedule.lengths, global_batch, draw, counts)
    clips = [replace(draft, seed=_clip_seed(seed, epoch, position)) for position, draft in enumerate(drafts)]
    _count_contents(clips, {video.key: video for video in ordered}, counts)
    return ClipPlan(tuple(clips), dict(counts), global_batch)


def pad_to(plan: ClipPlan, multiple: int) -> ClipPlan:
    """Pad the plan to a multiple of ``multiple`` clips with weight-0 repeats of its last step.

    All ranks then take the same number of steps; ``counts["padding"]`` is the number of repeats.
    """
    missing = -len(plan.clips) % multiple
    if missing == 0:
        return plan
    tail = plan.clips[(plan.steps - 1) * plan.global_batch :]  # clips of the same length
    padding = tuple(replace(tail[i % len(tail)], weight=0) for i in range(missing))
    counts = {**plan.counts, "padding": plan.counts.get("padding", 0) + missing}
    return replace(plan, clips=plan.clips + padding, counts=counts)


def _divided_among(plan: ClipPlan, world_size: int) -> ClipPlan:
    """The same steps of the same clips for another number of ranks; uneven shares are padded with weight-0 repeats."""
    per_rank = -(-plan.global_batch // world_size)
    if per_rank * world_size == plan.global_batch:
        return plan
    clips: list[ClipRef] = []
    for begin in range(0, len(plan.clips), plan.global_batch):
        step = plan.clips[begin : begin + plan.global_batch]
        missing = per_rank * world_size - len(step)
        clips += [*step, *(replace(step[i % len(step)], weight=0) for i in range(missing))]
    counts = {**plan.counts, "padding_for_workers": len(clips) - len(plan.clips)}
    return replace(plan, clips=tuple(clips), counts=counts, global_batch=per_rank * world_size)


def plan_epoch(
    videos: Iterable[PlanVideo],
    weights: Mapping[str, float],
    config: Config,
    world_size: int,
    initial_world_size: int | None,
    epoch: int,
) -> ClipPlan:
    """The padded clip plan of one epoch of a stage for a number of ranks.

    Args:
        world_size: ranks of this attempt.
        initial_world_size: ranks at the start of a resumed run, whose global batches are kept; None: ``world_size``.
    """
    global_batch = (initial_world_size or world_size) * config.BATCH_SIZE
    schedule = config.clip_schedule(epoch)
    plan = plan_clips(
        videos,
        schedule,
        epoch=epoch,
        seed=config.SEED,
        global_batch=global_batch,
        weights=weights,
        max_clips=config.CLIPS_PER_EPOCH,
        length_per_iteration=config.LENGTH_PER_ITERATION,
    )
    return _divided_among(pad_to(plan, global_batch), world_size)


def rank_rows(plan: ClipPlan, world_size: int, rank: int, batch_size: int) -> list[ClipRef]:
    """The clips of one rank in order: the ``rank``-th block of ``batch_size`` clips of every global batch.

    Raises:
        ValueError: the plan was not made with, or not padded to, ``world_size * batch_size`` clips per step.
    """
    if plan.global_batch != world_size * batch_size or len(plan.clips) % plan.global_batch:
        raise ValueError(
            f"{len(plan.clips)} clips in steps of {plan.global_batch} cannot be split over {world_size} ranks "
            f"of {batch_size} clips: plan with global_batch={world_size * batch_size} and pad_to() that"
        )
    first = range(rank * batch_size, len(plan.clips), plan.global_batch)
    return [clip for begin in first for clip in plan.clips[begin : begin + batch_size]]


def _check_names(ordered: Sequence[PlanVideo]) -> None:
    twice = sorted({"/".join(a.key) for a, b in itertools.pairwise(ordered) if a.key == b.key})
    if twice:
        raise MotipError(
            f"videos appear twice in the clip plan: {', '.join(twice[:5])}",
            expected="each video of a source once",
            fix="repeat a source by the weight of its mix; do not list its videos twice",
        )


def _intervals(video: PlanVideo, schedule: ClipSchedule) -> tuple[int, ...] | None:
    """Intervals in rows for this video, ascending, or None for the published uniform sampling."""
    if schedule.interval_seconds:
        return tuple(sorted({max(1, round(value * video.fps)) for value in schedule.interval_seconds}))
    return tuple(sorted(set(schedule.intervals))) if schedule.intervals else None


def _start_frames(
    ordered: Sequence[PlanVideo], choices: Sequence[tuple[int, ...] | None], shortest: int, counts: Counter[str]
) -> np.ndarray:
    """(n,) int64 encoded start frames (see _ROW_STRIDE) where the shortest clip fits at the smallest interval.

    One integer each, since every worker keeps tens of millions of them in memory.
    """
    starts: list[np.ndarray] = []
    for index, (video, intervals) in enumerate(zip(ordered, choices, strict=True)):
        frames = len(video.frame_numbers)
        span = (shortest - 1) * (intervals[0] if intervals else 1)
        fitting = frames if frames == 1 else max(0, frames - span)
        counts["starts_too_near_the_end"] += frames - fitting
        counts["videos_too_short"] += fitting == 0
        starts.append(index * _ROW_STRIDE + np.arange(fitting, dtype=np.int64))
    return np.concatenate(starts) if starts else np.empty(0, np.int64)


def _apply_weights(
    ordered: Sequence[PlanVideo],
    starts: np.ndarray,
    weights: Mapping[str, float],
    draw: np.random.Generator,
    counts: Counter[str],
) -> np.ndarray:
    """Repeat or subsample the start frames of each source by its weight."""
    names = sorted({video.source for video in ordered})
    source_of_video = np.array([names.index(video.source) for video in ordered])
    source_of_start = source_of_video[starts // _ROW_STRIDE]
    by_source = {name: starts[source_of_start == names.index(name)] for name in names}
    unknown = sorted(set(weights) - {video.source for video in ordered})
    if unknown:
        raise MotipError(
            f"the mix has weights for sources without videos: {', '.join(unknown)}",
            expected=f"some of {', '.join(sorted({video.source for video in ordered}))}",
            fix="convert these sources for this stage, or remove them from its data",
        )
    weighted: list[np.ndarray] = []
    for source, own in [each for each in by_source.items() if len(each[1])]:
        weight = float(weights.get(source, 1.0))
        if not 0 < weight < float("inf"):
            raise MotipError(
                f"the mix weight of source {source} is not positive",
                found=weight,
                expected="a number above 0",
                fix="remove the source from the stage's data to leave it out",
            )
        total = max(1, round(weight * len(own)))
        repeats, rest = divmod(total, len(own))
        extra = np.sort(draw.permutation(len(own))[:rest])
        weighted += [np.tile(own, repeats), own[extra]]
        if repeats == 0:
            counts["starts_not_drawn_weight"] += len(own) - rest
        else:
            counts["starts_repeated_weight"] += total - len(own)
    return np.concatenate(weighted)


def _limit(total: int, schedule: ClipSchedule, max_clips: int | None, length_per_iteration: int | None) -> int:
    limit = total
    if length_per_iteration:
        longest = max(schedule.lengths)
        if longest % length_per_iteration:
            raise MotipError(
                "the clip length is not a multiple of LENGTH_PER_ITERATION",
                where="LENGTH_PER_ITERATION",
                found=f"{length_per_iteration}, with clips of {longest} frames",
                expected="a divisor of the clip length",
            )
        limit = max(1, total // (longest // length_per_iteration))
    return limit if max_clips is None else min(limit, max(1, max_clips))


def _sample_clip(
    video: PlanVideo, start: int, intervals: tuple[int, ...] | None, schedule: ClipSchedule, draw: np.random.Generator
) -> ClipRef:
    """A clip from ``start`` with random length and interval."""
    available = len(video.frame_numbers) - 1 - start
    if len(video.frame_numbers) == 1:
        return _clip(video, (0,) * int(draw.choice(schedule.lengths)), 1)
    smallest = intervals[0] if intervals else 1
    length = int(draw.choice([length for length in schedule.lengths if (length - 1) * smallest <= available]))
    if intervals:
        interval = int(draw.choice([value for value in intervals if (length - 1) * value <= available]))
    else:
        assert schedule.max_interval is not None
        interval = int(draw.integers(1, schedule.max_interval + 1))
        if length > 1:  # published rule: an interval that does not fit is cut, not sampled again
            interval = min(interval, available // (length - 1))
    return _clip(video, tuple(range(start, start + (length - 1) * interval + 1, interval)), interval)


def _clip(video: PlanVideo, positions: tuple[int, ...], interval: int) -> ClipRef:
    numbers = tuple(int(video.frame_numbers[row]) for row in positions)
    return ClipRef(video.source, video.video, video.shard, positions, numbers, interval, seed=0)


def _batch_by_length(
    drafts: Sequence[ClipRef],
    lengths: Sequence[int],
    global_batch: int,
    draw: np.random.Generator,
    counts: Counter[str],
) -> list[ClipRef]:
    """Reorder so that every step has clips of one length; an incomplete step comes last.

    Clips that do not fill a step of their length are shortened to the next length.
    """
    batches: list[list[ClipRef]] = []
    carried: list[ClipRef] = []
    for length in sorted(set(lengths), reverse=True):
        counts["clips_shortened_to_fill_a_step"] += len(carried)
        pool = [
            replace(clip, positions=clip.positions[:length], frame_numbers=clip.frame_numbers[:length])
            for clip in carried
        ]
        pool += [clip for clip in drafts if len(clip.positions) == length]
        complete = len(pool) // global_batch * global_batch
        batches += [pool[begin : begin + global_batch] for begin in range(0, complete, global_batch)]
        carried = pool[complete:]
    order = draw.permutation(len(batches)) if len(set(lengths)) > 1 else range(len(batches))
    return [clip for index in order for clip in batches[index]] + carried


def _clip_seed(seed: int, epoch: int, position: int) -> int:
    return int(np.random.SeedSequence([seed, epoch, position]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _count_contents(
    clips: Sequence[ClipRef], videos: Mapping[tuple[str, str], PlanVideo], counts: Counter[str]
) -> None:
    counts["clips"] = len(clips)
    for clip in clips:
        video = videos[clip.source, clip.video]
        empty = sum(video.objects[row] == 0 for row in clip.positions)
        counts["clip_frames"] += len(clip.positions)
        counts["clip_frames_without_objects"] += empty
        counts["clips_without_objects"] += empty == len(clip.positions)
        counts["clips_the_published_sampler_drops"] += empty > 0
        numbers = clip.frame_numbers
        steps = {after - before for before, after in itertools.pairwise(numbers)}
        counts["clips_over_frame_gaps"] += len(steps) > 1


def _no_clip_error(
    ordered: Sequence[PlanVideo], choices: Sequence[tuple[int, ...] | None], schedule: ClipSchedule
) -> MotipError:
    shortest = min(schedule.lengths)
    smallest = min((intervals[0] if intervals else 1 for intervals in choices), default=1)
    longest = max((len(video.frame_numbers) for video in ordered), default=0)
    return MotipError(
        "there is no clip to train on",
        where=f"{len(ordered)} videos of {', '.join(sorted({video.source for video in ordered})) or 'no source'}",
        found=f"the longest video has {longest} frames",
        expected=f"{(shortest - 1) * smallest + 1} frames for a clip of {shortest} at interval {smallest}",
        fix="use shorter clips (sampler_lengths), smaller intervals (sample_intervals) or longer videos",
    )
