"""A resumed run gives the same losses and weights as an uninterrupted one, bit for bit."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

import motip.train.loop as loop
from motip.config import Config
from motip.data.clip_loader import plan_videos
from motip.data.clips import PlanVideo
from motip.errors import MotipError
from motip.events import EpochDone, Event, Note, StepLogged
from motip.train.batch_sources import RayBatchSource
from motip.train.checkpoint_schedule import CheckpointSchedule
from motip.train.collectives import ProcessGroup, SingleProcess, current_process_group
from motip.train.preemption import Stopped
from motip.train.ray_train import completed
from motip.train.stage_job import EpochPlans, StageJob
from motip.weights import load_checkpoint
from tests.helpers.small_training import small_config
from tests.helpers.training_run import CallbackChannel, folder_store, train_in_process
from tests.train.test_loop import CLASSES, SETTINGS, class_maps, write_video

EPOCHS, CLIPS, ACCUMULATE, EVERY = 2, 14, 2, 4
STEPS_OF_THREE = 2 * 5
"""Number of steps with three ranks of one clip each."""


def _config(**changes: Any) -> Config:
    settings = {**SETTINGS, "DETR_DROPOUT": 0.1, **changes}
    return small_config(
        **settings,
        EPOCHS=EPOCHS,
        CLIPS_PER_EPOCH=CLIPS,
        ACCUMULATE_STEPS=ACCUMULATE,
        CHECKPOINT_EVERY_STEPS=EVERY,
        LOG_EVERY_STEPS=1,
    )


def _job(folder: Path, config: Config) -> StageJob:
    video = write_video(folder, "long", frames=18)
    videos = tuple(plan_videos([video], class_maps(config), folder))
    return StageJob("stage", config.to_dict(), videos, {"ground": 1.0}, (), {}, CLASSES, str(folder), None, "")


class Interrupted(Exception):
    """Raised by a test to interrupt the training."""


class Records:
    """Collects the events of a run; calls ``do`` after a number of batches."""

    def __init__(self, after: int | None = None, do: Callable[[], None] | None = None) -> None:
        self.losses: dict[int, dict[str, float]] = {}
        self.epochs: dict[int, dict[str, float]] = {}
        self.notes: list[str] = []
        self._after, self._do = after, do

    def __call__(self, event: Event) -> None:
        if isinstance(event, StepLogged):
            self.losses[event.step] = {k: v for k, v in event.metrics.items() if "loss" in k or "norm" in k}
            if event.step == self._after and self._do is not None:
                self._do()
        elif isinstance(event, EpochDone):
            timed = ("time/", "clips_per_s", "device/")
            self.epochs[event.epoch] = {k: v for k, v in event.metrics.items() if not k.startswith(timed)}
        elif isinstance(event, Note):
            self.notes.append(event.text)


def _interrupt() -> None:
    raise Interrupted


@pytest.fixture(autouse=True)
def _without_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "validate", lambda run, epoch: {})


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(completed(str(folder)).checkpoints[EPOCHS - 1])["model"]


def _newest(folder: Path) -> Path | None:
    with folder_store(folder).newest() as found:
        return found


def _assert_same_run(folder: Path, records: list[Records], full: Path, expected: Records) -> None:
    losses: dict[int, dict[str, float]] = {}
    for part in records:
        for step, values in part.losses.items():
            assert losses.setdefault(step, values) == values, f"step {step} was repeated with another result"
    assert losses == expected.losses
    assert records[-1].epochs == {e: m for e, m in expected.epochs.items() if e in records[-1].epochs}
    found, expected_weights = _weights(folder), _weights(full)
    assert all(torch.equal(found[name], expected_weights[name]) for name in expected_weights)


def test_run_interrupted_twice_at_random_steps(tmp_path: Path) -> None:
    job = _job(tmp_path, _config())
    expected = Records()
    train_in_process(job, tmp_path / "full", expected)
    assert sorted(expected.losses) == list(range(1, EPOCHS * CLIPS + 1))
    first, second = sorted(random.sample(range(EVERY + 1, EPOCHS * CLIPS), 2))
    parts = []
    for after in (first, second):
        parts.append(Records(after, _interrupt))
        with pytest.raises(Interrupted):
            train_in_process(job, tmp_path / "interrupted", parts[-1])
    parts.append(Records())
    train_in_process(job, tmp_path / "interrupted", parts[-1])
    for before, after in itertools.pairwise(parts):
        repeated = set(before.losses) & set(after.losses)
        assert len(repeated) <= EVERY, f"cut at {first} and {second}"
    _assert_same_run(tmp_path / "interrupted", parts, tmp_path / "full", expected)
    assert not list((tmp_path / "interrupted").glob("step_*/*.pth")), "positions inside a finished epoch are removed"


def test_checkpoint_inside_an_epoch_is_complete_and_the_last_two_are_kept(tmp_path: Path) -> None:
    config = _config(SEED=5)
    job = replace(_job(tmp_path, config), run_id="run-7")
    with pytest.raises(Interrupted):
        train_in_process(job, tmp_path / "run", Records(CLIPS - 1, _interrupt))
    files = sorted((tmp_path / "run").glob("step_*/*.pth"))
    assert [file.name for file in files] == ["checkpoint_step_8.pth", "checkpoint_step_12.pth"]
    stored = load_checkpoint(files[-1])
    position = stored["position"]
    assert (position["epoch"], position["step"], position["clips"]) == (0, 12, 12)
    assert (position["world"], position["global_batch"], position["gathered"]) == (1, ACCUMULATE, 0)
    assert position["meter"]["steps"] == 12 and position["meter"]["sums"]["loss"] > 0
    assert stored["rng"] == {"seed": 5, "drawn_from": ["SEED", "epoch", "step"]}
    assert stored["run_id"] == "run-7" and stored["optimizer"]["state"] and stored["scheduler"]["base_lrs"]
    assert stored["scaler"]["counters"]["nonfinite_losses"] == 0
    assert "checkpoint_step_12" in str(_newest(tmp_path / "run"))


def test_partial_files_are_never_resumed(tmp_path: Path) -> None:
    (tmp_path / "step_00000004").mkdir()
    (tmp_path / "step_00000004" / "checkpoint_step_4.pth").write_bytes(b"full")
    (tmp_path / "step_00000008").mkdir()
    (tmp_path / "step_00000008" / ".checkpoint_step_8.1a2b.tmp.pth").write_bytes(b"ha")
    (tmp_path / "epoch_000").mkdir()
    (tmp_path / "epoch_000" / "checkpoint_0.pth").write_bytes(b"its metrics are missing")
    latest = _newest(tmp_path)
    assert latest is not None and latest.name == "checkpoint_step_4.pth"
    (tmp_path / "epoch_000" / "metrics.json").write_text(json.dumps({"epoch": 0, "step": 14, "metrics": {}}))
    latest = _newest(tmp_path)
    assert latest is not None and latest.name == "checkpoint_0.pth"


def test_sigterm_saves_the_position_and_stops(tmp_path: Path) -> None:
    job = _job(tmp_path, _config())
    expected = Records()
    train_in_process(job, tmp_path / "full", expected)
    before = signal.getsignal(signal.SIGTERM)
    stopped = Records(7, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped):
        train_in_process(job, tmp_path / "interrupted", stopped)
    assert signal.getsignal(signal.SIGTERM) is before
    assert max(stopped.losses) == 8, "the current accumulation is finished first"
    note = stopped.notes[-1]
    assert "SIGTERM" in note and "step 8 saved" in note and "after the request" in note
    rest = Records()
    train_in_process(job, tmp_path / "interrupted", rest)
    assert min(rest.losses) == 9, "no step is repeated"
    _assert_same_run(tmp_path / "interrupted", [stopped, rest], tmp_path / "full", expected)


def test_sigterm_during_the_last_validation_stops_after_saving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = _job(tmp_path, _config())
    expected = Records()
    train_in_process(job, tmp_path / "full", expected)
    validated = []

    def validate(run: Any, epoch: int) -> dict[str, float]:
        validated.append(epoch)
        if epoch == EPOCHS - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return {}

    monkeypatch.setattr(loop, "validate", validate)
    first = Records()
    with pytest.raises(Stopped):
        train_in_process(job, tmp_path / "interrupted", first)
    assert validated == list(range(EPOCHS))
    assert f"epoch {EPOCHS} saved" in first.notes[-1] and "after the request" in first.notes[-1]
    again = Records()
    train_in_process(job, tmp_path / "interrupted", again)
    assert again.losses == {} and validated == list(range(EPOCHS)), "no epoch is left to train"
    _assert_same_run(tmp_path / "interrupted", [first], tmp_path / "full", expected)


@pytest.mark.parametrize("when", ["before", "after"])
def test_stop_request_around_an_epoch_without_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Before the epoch is stored, the epoch is saved; afterwards the next optimiser step is."""
    monkeypatch.setattr("motip.train.checkpoint_schedule.POLL_INTERVAL_S", float("inf"))
    never = {"SAVE_CHECKPOINT_PER_EPOCH": EPOCHS, "CHECKPOINT_EVERY_STEPS": None, "CHECKPOINT_EVERY_MINUTES": None}
    job = _job(tmp_path, _config())
    job = replace(job, config={**job.config, **never, "EVALUATE_EVERY_EPOCHS": EPOCHS})
    expected = Records()
    train_in_process(job, tmp_path / "full", expected)
    first = Records()
    channel, store = CallbackChannel(tmp_path / "interrupted", first), folder_store(tmp_path / "interrupted")
    done = store.epoch_done

    def epoch_done(epoch: int, metrics: dict[str, float], folder: Path | None) -> None:
        if when == "after":
            os.kill(os.getpid(), signal.SIGTERM)
        done(epoch, metrics, folder)

    def stop_requested() -> bool:
        return when == "before" and len(first.losses) == CLIPS

    store.epoch_done = epoch_done  # type: ignore[method-assign]
    channel.stop_requested = stop_requested  # type: ignore[method-assign]
    with pytest.raises(Stopped):
        train_in_process(job, tmp_path / "interrupted", first, channel=channel, store=store)
    assert [path.name for path in (tmp_path / "interrupted").glob("*/*.pth")] == [
        "checkpoint_0.pth" if when == "before" else f"checkpoint_step_{CLIPS + ACCUMULATE}.pth"
    ]
    assert max(first.losses) == (CLIPS if when == "before" else CLIPS + ACCUMULATE)
    rest = Records()
    train_in_process(job, tmp_path / "interrupted", rest)
    assert min(rest.losses) == max(first.losses) + 1
    _assert_same_run(tmp_path / "interrupted", [first, rest], tmp_path / "full", expected)


def test_full_disk_stops_training_and_keeps_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import motip.weights.checkpoint as checkpoint

    job = _job(tmp_path, _config())
    expected = Records()
    train_in_process(job, tmp_path / "full", expected)
    real = os.fsync

    def full(descriptor: int) -> None:
        if os.path.exists(tmp_path / "interrupted" / "step_00000004" / "checkpoint_step_4.pth"):
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    first = Records()
    with pytest.raises(MotipError, match=r"(?s)step 8 cannot be written.*No space left.*untouched"):
        train_in_process(job, tmp_path / "interrupted", first)
    monkeypatch.setattr(checkpoint.os, "fsync", real)
    left = [path.name for path in (tmp_path / "interrupted").glob("step_*/*")]
    assert left == ["checkpoint_step_4.pth"], "the partial file is removed, the previous checkpoint is complete"
    rest = Records()
    train_in_process(job, tmp_path / "interrupted", rest)
    assert min(rest.losses) == 5
    _assert_same_run(tmp_path / "interrupted", [first, rest], tmp_path / "full", expected)


def test_minutes_are_measured_by_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("motip.train.checkpoint_schedule.time.monotonic", lambda: now[0])
    schedule = CheckpointSchedule(small_config(CHECKPOINT_EVERY_MINUTES=2.0), SingleProcess())
    now[0] += 119
    assert schedule.decide(1, False).reason == "" and schedule.decide(1, True).reason == "stop"
    now[0] += 1
    assert schedule.decide(50, False).reason == "interval"
    schedule.mark_saved(50)
    assert schedule.decide(51, False).reason == ""


def test_rank_0_polls_every_five_seconds_and_the_other_ranks_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("motip.train.checkpoint_schedule.time.monotonic", lambda: now[0])
    ranks = Ranks()
    first, second = (CheckpointSchedule(small_config(), ranks.of(rank)) for rank in (0, 1))
    polled = []
    for step in range(8):  # two seconds each
        polls = [first.time_to_poll(), second.time_to_poll()]
        assert not polls[1]
        ranks.other = torch.tensor([0.0, 0.0, float(polls[0])])
        assert second.decide(step, False, polls[1]).poll is polls[0]
        ranks.other = torch.zeros(3)
        assert first.decide(step, False, polls[0]) == ("", polls[0])
        polled += [now[0]] * polls[0]
        now[0] += 2
    assert polled == [100, 106, 112], "at the first step, then at the first step after five seconds"


class Ranks:
    """Two ranks, of which one calls at a time and the other contributes `other`."""

    other = torch.zeros(3)

    def of(self, rank: int) -> ProcessGroup:
        comm = SingleProcess()
        comm.rank = rank
        comm.sum_ = lambda tensor: tensor.add_(self.other)  # type: ignore[method-assign]
        return comm


# ---------------------------------------------------------------------------------------------------- several ranks


def _rank(rank: int, world: int, folder: str, data: str, after: int | None) -> None:
    """One attempt; with ``after``, rank 0 kills itself with SIGKILL and the other ranks fail."""
    torch.set_num_threads(1)
    loop.validate = lambda run, epoch: {}  # type: ignore[assignment]
    if world > 1:
        name = f"{folder}/rendezvous_{world}_{after}"
        dist.init_process_group("gloo", init_method=f"file://{name}", rank=rank, world_size=world)
    comm: ProcessGroup = current_process_group()
    # Without crops all clips have one size, so that the padding does not depend on the number of ranks.
    config = _config(DETR_DROPOUT=0.0, AUG_RANDOM_CROP_MIN=1000, AUG_RANDOM_CROP_MAX=1000)
    job = _job_again(Path(data), config)
    records = Records(after, lambda: os.kill(os.getpid(), signal.SIGKILL))
    batch_source = RayBatchSource(job, config, rank, world, 0, 1.0)
    channel, store = CallbackChannel(folder, records), folder_store(folder)
    loop.train_stage_on_worker(job, comm, batch_source, channel, store, torch.device("cpu"))
    if rank == 0:
        torch.save(vars(records)["losses"], f"{folder}/losses_{world}_{after}.pt")
    if world > 1:
        # A rank that exits while gloo threads of its peer still run aborts the peer.
        dist.barrier()
        dist.destroy_process_group()


def _job_again(folder: Path, config: Config) -> StageJob:
    values = json.loads((folder / "videos.json").read_text())
    videos = tuple(
        PlanVideo(**{**v, "frame_numbers": tuple(v["frame_numbers"]), "objects": tuple(v["objects"])}) for v in values
    )
    return StageJob("stage", config.to_dict(), videos, {"ground": 1.0}, (), {}, CLASSES, str(folder), None, "")


def _attempt(world: int, folder: Path, data: Path, after: int | None = None) -> None:
    folder.mkdir(exist_ok=True)
    arguments = (world, str(folder), str(data), after)
    if after is None:
        multiprocessing.spawn(_rank, args=arguments, nprocs=world)
        return
    with pytest.raises(Exception, match=r"SIGKILL|terminated|answer"):
        multiprocessing.spawn(_rank, args=arguments, nprocs=world)


def test_two_workers_killed_and_resumed_with_two_and_with_one(tmp_path: Path) -> None:
    job = _job(tmp_path, _config())
    (tmp_path / "videos.json").write_text(json.dumps([asdict(video) for video in job.train]))
    _attempt(2, tmp_path / "full", tmp_path)
    _attempt(2, tmp_path / "interrupted", tmp_path, after=random.randint(EVERY + 1, CLIPS - 2))
    position = load_checkpoint(_newest(tmp_path / "interrupted"))["position"]
    assert position["world"] == 2 and position["clips"] > 0
    shutil.copytree(tmp_path / "interrupted", tmp_path / "alone")
    _attempt(2, tmp_path / "interrupted", tmp_path)
    _attempt(1, tmp_path / "alone", tmp_path)
    full = torch.load(tmp_path / "full" / "losses_2_None.pt", weights_only=True)
    again = torch.load(tmp_path / "interrupted" / "losses_2_None.pt", weights_only=True)
    alone = torch.load(tmp_path / "alone" / "losses_1_None.pt", weights_only=True)
    assert len(again) < len(full) and again == {step: full[step] for step in again}
    expected, found = _weights(tmp_path / "full"), _weights(tmp_path / "interrupted")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    # One worker trains the same global batches; only the order of summation differs.
    assert set(alone) == set(again)
    for step, values in alone.items():
        assert values["step/loss"] == pytest.approx(full[step]["step/loss"], rel=1e-3), step


def test_three_workers_killed_and_resumed(tmp_path: Path) -> None:
    """With three ranks the order of summation in gloo is not deterministic."""
    job = _job(tmp_path, _config())
    (tmp_path / "videos.json").write_text(json.dumps([asdict(video) for video in job.train]))
    _attempt(3, tmp_path / "full", tmp_path)
    _attempt(3, tmp_path / "interrupted", tmp_path, after=random.randint(EVERY + 1, STEPS_OF_THREE - 2))
    _attempt(3, tmp_path / "interrupted", tmp_path)
    full = torch.load(tmp_path / "full" / "losses_3_None.pt", weights_only=True)
    again = torch.load(tmp_path / "interrupted" / "losses_3_None.pt", weights_only=True)
    assert 0 < len(again) < len(full)
    for step, values in again.items():
        assert values["step/loss"] == pytest.approx(full[step]["step/loss"], rel=1e-6), step
    expected, found = _weights(tmp_path / "full"), _weights(tmp_path / "interrupted")
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-6)


def test_other_numbers_of_workers_train_the_same_steps(tmp_path: Path) -> None:
    job = _job(tmp_path, _config())
    config = Config.from_dict(job.config)
    first = EpochPlans(job, config, world_size=4)(0)
    assert first.steps > 0
    for world_size in (1, 2, 3, 5):
        plan = EpochPlans(job, config, world_size, initial_world_size=4)(0)
        assert plan.steps == first.steps and plan.global_batch % world_size == 0
        for step in range(plan.steps):
            real = [c for c in plan.clips[step * plan.global_batch : (step + 1) * plan.global_batch] if c.weight]
            assert real == [c for c in first.clips[step * 4 : (step + 1) * 4] if c.weight]
