"""Clip plan: deterministic, independent of listing order, equal number of steps on all ranks, all losses counted."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from motip.config import ClipSchedule
from motip.data.clips import PlanVideo, pad_to, plan_clips, rank_rows
from motip.errors import MotipError


def _schedule(
    lengths: tuple[int, ...], intervals: tuple[int, ...] | None = None, max_interval: int | None = None
) -> ClipSchedule:
    return ClipSchedule(lengths, intervals, max_interval)


def video(name: str, frames: int, source: str = "bdd", empty: tuple[int, ...] = (), fps: float = 5.0) -> PlanVideo:
    objects = tuple(0 if row in empty else 2 for row in range(frames))
    return PlanVideo(source, name, f"{source}/train/{name}.parquet", tuple(range(40, 40 + frames)), objects, fps)


VIDEOS = [video("a", 20), video("b", 9), video("c", 14, "vis", empty=(3, 4)), video("d", 3)]
SETS = _schedule((3, 5), (1, 2))


def test_every_start_frame_is_used_once_or_counted() -> None:
    plan = plan_clips(VIDEOS, SETS, epoch=0, seed=1)
    starts = Counter((clip.video, clip.positions[0]) for clip in plan.clips)
    assert set(starts.values()) == {1}
    assert starts.keys() == {(v.video, row) for v in VIDEOS for row in range(len(v.frame_numbers) - 2)}
    assert plan.counts["clips"] + plan.counts["starts_too_near_the_end"] == plan.counts["frames"] == 46


def test_clips_stay_in_their_video_and_come_from_the_sets() -> None:
    plan = plan_clips(VIDEOS, SETS, epoch=0, seed=1)
    by_name = {v.video: v for v in VIDEOS}
    for clip in plan.clips:
        assert len(clip.positions) in (3, 5) and clip.interval in (1, 2)
        assert {b - a for a, b in itertools.pairwise(clip.positions)} == {clip.interval}
        assert clip.positions[-1] < len(by_name[clip.video].frame_numbers)
        assert clip.frame_numbers == tuple(40 + row for row in clip.positions)
    assert {len(clip.positions) for clip in plan.clips} == {3, 5}
    assert {clip.interval for clip in plan.clips} == {1, 2}


def test_interval_is_sampled_from_those_that_fit() -> None:
    plan = plan_clips([video("a", 9)], _schedule((3,), (1, 4)), epoch=0, seed=0)
    late = [clip for clip in plan.clips if clip.positions[0] > 0]
    assert late and all(clip.interval == 1 for clip in late)
    sampled = {
        clip.interval
        for epoch in range(20)
        for clip in plan_clips([video("a", 9)], _schedule((3,), (1, 4)), epoch=epoch, seed=0).clips
        if clip.positions[0] == 0
    }
    assert sampled == {1, 4}


def test_published_rule_cuts_wide_intervals() -> None:
    plan = plan_clips([video("a", 9)], _schedule((3,), None, 4), epoch=0, seed=0)
    assert len(plan) == 7
    for clip in plan.clips:
        assert 1 <= clip.interval <= max(1, (8 - clip.positions[0]) // 2)


def test_seconds_are_converted_with_the_frame_rate_of_each_video() -> None:
    videos = [video("slow", 60, fps=5.0), video("fast", 60, "vis", fps=30.0)]
    plan = plan_clips(videos, ClipSchedule((3,), None, None, (0.4,)), epoch=0, seed=0)
    assert {(clip.video, clip.interval) for clip in plan.clips} == {("slow", 2), ("fast", 12)}


def test_plan_depends_on_seed_and_epoch_but_not_on_listing_order() -> None:
    shuffled = VIDEOS[:]
    random.Random(3).shuffle(shuffled)
    base = plan_clips(VIDEOS, SETS, epoch=2, seed=7, global_batch=2)
    assert plan_clips(shuffled, SETS, epoch=2, seed=7, global_batch=2) == base
    assert plan_clips(VIDEOS, SETS, epoch=3, seed=7, global_batch=2).clips != base.clips
    assert plan_clips(VIDEOS, SETS, epoch=2, seed=8, global_batch=2).clips != base.clips
    seeds = [clip.seed for clip in base.clips]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**63 for seed in seeds)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(0, 50), st.sampled_from([(2,), (2, 4), (3, 5, 6)]))
def test_all_clips_of_a_step_have_one_length(global_batch: int, seed: int, lengths: tuple[int, ...]) -> None:
    plan = pad_to(plan_clips(VIDEOS, _schedule(lengths, (1, 2)), epoch=0, seed=seed, global_batch=global_batch), 12)
    for begin in range(0, len(plan), global_batch):
        assert len({len(clip.positions) for clip in plan.clips[begin : begin + global_batch]}) == 1
    real = [clip for clip in plan.clips if clip.weight]
    starts = len(plan_clips(VIDEOS, _schedule(lengths, (1, 2)), epoch=0, seed=seed))
    assert len(real) == starts == plan.counts["clips"]
    assert plan.counts.get("padding", 0) == len(plan) - len(real)


def test_seven_clips_on_four_ranks() -> None:
    plan = plan_clips([video("a", 8)], _schedule((2,), (1,)), epoch=0, seed=0, global_batch=4)
    assert len(plan) == 7
    plan = pad_to(plan, 4)
    shares = [rank_rows(plan, world_size=4, rank=rank, batch_size=1) for rank in range(4)]
    assert [len(share) for share in shares] == [2, 2, 2, 2]
    assert plan.counts["padding"] == 1 and sum(clip.weight for share in shares for clip in share) == 7
    interleaved = [share[step] for step in range(2) for share in shares]
    assert interleaved == list(plan.clips)


def test_ranks_share_every_global_batch_in_order() -> None:
    plan = pad_to(plan_clips(VIDEOS, SETS, epoch=0, seed=0, global_batch=6), 6)
    shares = [rank_rows(plan, world_size=3, rank=rank, batch_size=2) for rank in range(3)]
    joined = [clip for step in range(plan.steps) for share in shares for clip in share[2 * step : 2 * step + 2]]
    assert joined == list(plan.clips)
    with pytest.raises(ValueError, match="pad_to"):
        rank_rows(plan, world_size=2, rank=0, batch_size=2)


def test_plan_can_be_resumed_at_any_step() -> None:
    plan = pad_to(plan_clips(VIDEOS, SETS, epoch=0, seed=0, global_batch=4), 4)
    for step in range(plan.steps + 1):
        assert plan.from_step(step).clips == plan.clips[4 * step :]
    with pytest.raises(MotipError, match="outside the clip plan"):
        plan.from_step(plan.steps + 1)


def test_weights_repeat_and_subsample_sources_and_are_counted() -> None:
    even = plan_clips(VIDEOS, SETS, epoch=0, seed=0)
    own = Counter(clip.source for clip in even.clips)
    plan = plan_clips(VIDEOS, SETS, epoch=0, seed=0, weights={"bdd": 2.5, "vis": 0.5})
    assert Counter(clip.source for clip in plan.clips) == {"bdd": round(2.5 * own["bdd"]), "vis": own["vis"] // 2}
    assert plan.counts["starts_not_drawn_weight"] == own["vis"] - own["vis"] // 2
    repeats = Counter((clip.video, clip.positions[0]) for clip in plan.clips if clip.source == "bdd")
    assert set(repeats.values()) == {2, 3}
    thinned = set()
    for epoch in range(4):
        plan = plan_clips(VIDEOS, SETS, epoch=epoch, seed=0, weights={"vis": 0.5})
        thinned.add(frozenset((clip.video, clip.positions[0]) for clip in plan.clips if clip.source == "vis"))
    assert len(thinned) > 1, "every epoch subsamples differently"


def test_limits_keep_a_random_subset_and_count_the_rest() -> None:
    plan = plan_clips(VIDEOS, SETS, epoch=0, seed=0, max_clips=5)
    assert len(plan) == 5 and plan.counts["starts_not_drawn_limit"] == 38 - 5
    halved = plan_clips(VIDEOS, _schedule((4,), (1,)), epoch=0, seed=0, length_per_iteration=2)
    full = plan_clips(VIDEOS, _schedule((4,), (1,)), epoch=0, seed=0)
    assert len(halved) == len(full) // 2
    with pytest.raises(MotipError, match="LENGTH_PER_ITERATION"):
        plan_clips(VIDEOS, _schedule((5,), (1,)), epoch=0, seed=0, length_per_iteration=2)


def test_frames_without_objects_are_kept_and_counted() -> None:
    plan = plan_clips([video("c", 14, empty=(3, 4))], _schedule((2,), (1,)), epoch=0, seed=0)
    assert len(plan) == 13
    assert plan.counts["clips_without_objects"] == 1
    assert plan.counts["clips_the_published_sampler_drops"] == 3
    assert plan.counts["clip_frames_without_objects"] == 4


def test_gaps_in_the_frame_numbers_are_counted() -> None:
    gappy = replace(video("a", 5), frame_numbers=(0, 1, 5, 6, 7))
    plan = plan_clips([gappy], _schedule((3,), (1,)), epoch=0, seed=0)
    assert plan.counts["clips_over_frame_gaps"] == 2


def test_single_image_gives_one_clip_of_repeats() -> None:
    plan = plan_clips([video("s", 1), video("a", 6)], _schedule((3,), (2,)), epoch=0, seed=0)
    assert [clip.positions for clip in plan.clips if clip.video == "s"] == [(0, 0, 0)]


def test_no_trainable_clip_is_an_error_with_its_arithmetic() -> None:
    with pytest.raises(MotipError, match="no clip to train on") as caught:
        plan_clips([video("d", 3)], _schedule((5,), (2, 3)), epoch=0, seed=0)
    assert "9 frames for a clip of 5 at interval 2" in str(caught.value)
    assert "longest video has 3 frames" in str(caught.value)
    with pytest.raises(MotipError, match="no clip to train on"):
        plan_clips([], SETS, epoch=0, seed=0)


def test_labels_without_objects_are_an_error() -> None:
    with pytest.raises(MotipError, match="no object to train on"):
        plan_clips([video("a", 9, empty=tuple(range(9)))], SETS, epoch=0, seed=0)


@pytest.mark.parametrize(
    ("videos", "weights", "match"),
    [
        ([video("a", 9), video("a", 9)], None, "appear twice"),
        (VIDEOS, {"bdd": 0.0}, "not positive"),
        (VIDEOS, {"dance": 1.0}, "without videos"),
    ],
)
def test_inconsistent_mixes_are_errors(videos: list[PlanVideo], weights: dict[str, float] | None, match: str) -> None:
    with pytest.raises(MotipError, match=match):
        plan_clips(videos, SETS, epoch=0, seed=0, weights=weights)
