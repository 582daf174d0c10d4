"""A run that is cut off goes on as if nothing had happened: the same losses, the same weights, bit for bit."""

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
from motip.train.batch_sources import LocalFeed, RayFeed
from motip.train.checkpoints import Cadence
from motip.train.collectives import Communicator, SingleProcess, current_communicator
from motip.train.preemption import Stopped
from motip.train.ray_train import FolderReporter, completed
from motip.train.stage_job import EpochPlans, StageJob
from motip.weights.pretrained import load_checkpoint
from tests.helpers.small_training import small_config
from tests.train.test_loop import CLASSES, SETTINGS, class_maps, write_video

EPOCHS, CLIPS, ACCUMULATE, EVERY = 2, 14, 2, 4
STEPS_OF_THREE = 2 * 5
"""Steps of three ranks with one clip each."""


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


class Cut(Exception):
    """The plug is pulled."""


class Records:
    """What a run says; pulls the plug, or does something else, after a number of batches."""

    def __init__(self, after: int | None = None, do: Callable[[], None] | None = None) -> None:
        self.losses: dict[int, dict[str, float]] = {}
        self.epochs: dict[int, dict[str, float]] = {}
        self.notes: list[str] = []
        self._after, self._do = after, do

    def __call__(self, kind: str, values: dict[str, Any]) -> None:
        if kind == "step":
            self.losses[values["step"]] = {k: v for k, v in values["metrics"].items() if "loss" in k or "norm" in k}
            if values["step"] == self._after and self._do is not None:
                self._do()
        elif kind == "epoch":
            timed = ("time/", "clips_per_s", "device/")
            self.epochs[values["epoch"]] = {k: v for k, v in values["metrics"].items() if not k.startswith(timed)}
        elif kind == "note":
            self.notes.append(values["text"])


def _pull() -> None:
    raise Cut


def _run(job: StageJob, folder: Path, records: Records) -> None:
    config = Config.from_dict(job.config)
    loop.run_stage(job, SingleProcess(), LocalFeed(job, config), FolderReporter(folder, records), torch.device("cpu"))


@pytest.fixture(autouse=True)
def _without_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "validate", lambda run, epoch: {})


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(completed(str(folder)).checkpoints[EPOCHS - 1])["model"]


def _assert_same_run(folder: Path, records: list[Records], whole: Path, expected: Records) -> None:
    losses: dict[int, dict[str, float]] = {}
    for part in records:
        for step, values in part.losses.items():
            assert losses.setdefault(step, values) == values, f"step {step} was repeated with another result"
    assert losses == expected.losses
    assert records[-1].epochs == {e: m for e, m in expected.epochs.items() if e in records[-1].epochs}
    found, wanted = _weights(folder), _weights(whole)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_cut_twice_at_random_steps_in_one_process(tmp_path: Path) -> None:
    job = _job(tmp_path, _config())
    expected = Records()
    _run(job, tmp_path / "whole", expected)
    assert sorted(expected.losses) == list(range(1, EPOCHS * CLIPS + 1))
    first, second = sorted(random.sample(range(EVERY + 1, EPOCHS * CLIPS), 2))
    parts = []
    for after in (first, second):
        parts.append(Records(after, _pull))
        with pytest.raises(Cut):
            _run(job, tmp_path / "cut", parts[-1])
    parts.append(Records())
    _run(job, tmp_path / "cut", parts[-1])
    for before, after in itertools.pairwise(parts):
        repeated = set(before.losses) & set(after.losses)
        assert len(repeated) <= EVERY, f"cut at {first} and {second}"
    _assert_same_run(tmp_path / "cut", parts, tmp_path / "whole", expected)
    assert not list((tmp_path / "cut").glob("step_*/*.pth")), "a finished epoch replaces the positions inside it"


def test_a_checkpoint_inside_an_epoch_holds_everything_and_only_the_last_two_stay(tmp_path: Path) -> None:
    config = _config(SEED=5)
    job = replace(_job(tmp_path, config), run_id="run-7")
    with pytest.raises(Cut):
        _run(job, tmp_path / "run", Records(CLIPS - 1, _pull))
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
    assert "checkpoint_step_12" in str(FolderReporter(tmp_path / "run", Records()).latest())


def test_half_written_files_are_never_picked_up(tmp_path: Path) -> None:
    reporter = FolderReporter(tmp_path, Records())
    (tmp_path / "step_00000004").mkdir()
    (tmp_path / "step_00000004" / "checkpoint_step_4.pth").write_bytes(b"whole")
    (tmp_path / "step_00000008").mkdir()
    (tmp_path / "step_00000008" / ".checkpoint_step_8.1a2b.tmp.pth").write_bytes(b"ha")
    (tmp_path / "epoch_000").mkdir()
    (tmp_path / "epoch_000" / "checkpoint_0.pth").write_bytes(b"its metrics are missing")
    latest = reporter.latest()
    assert latest is not None and latest.name == "checkpoint_step_4.pth"
    (tmp_path / "epoch_000" / "metrics.json").write_text(json.dumps({"epoch": 0, "step": 14, "metrics": {}}))
    latest = reporter.latest()
    assert latest is not None and latest.name == "checkpoint_0.pth"


def test_sigterm_saves_the_position_and_stops(tmp_path: Path) -> None:
    job = _job(tmp_path, _config())
    expected = Records()
    _run(job, tmp_path / "whole", expected)
    before = signal.getsignal(signal.SIGTERM)
    told = Records(7, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped):
        _run(job, tmp_path / "cut", told)
    assert signal.getsignal(signal.SIGTERM) is before
    assert max(told.losses) == 8, "the accumulation that was under way is finished first"
    assert "SIGTERM" in told.notes[-1] and "step 8 saved" in told.notes[-1] and "after the notice" in told.notes[-1]
    rest = Records()
    _run(job, tmp_path / "cut", rest)
    assert min(rest.losses) == 9, "nothing is repeated"
    _assert_same_run(tmp_path / "cut", [told, rest], tmp_path / "whole", expected)


def test_sigterm_while_the_last_epoch_is_validated_is_not_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = _job(tmp_path, _config())
    expected = Records()
    _run(job, tmp_path / "whole", expected)
    validated = []

    def told(run: Any, epoch: int) -> dict[str, float]:
        validated.append(epoch)
        if epoch == EPOCHS - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return {}

    monkeypatch.setattr(loop, "validate", told)
    first = Records()
    with pytest.raises(Stopped):
        _run(job, tmp_path / "cut", first)
    assert validated == list(range(EPOCHS))
    assert f"epoch {EPOCHS} saved" in first.notes[-1] and "after the notice was heard" in first.notes[-1]
    again = Records()
    _run(job, tmp_path / "cut", again)
    assert again.losses == {} and validated == list(range(EPOCHS)), "nothing is left to do"
    _assert_same_run(tmp_path / "cut", [first], tmp_path / "whole", expected)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_notice_around_an_epoch_that_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """Before it is handed over it is saved after all; afterwards it is too late, and the next optimiser step is."""
    monkeypatch.setattr("motip.train.checkpoints.LOOK_EVERY_S", float("inf"))
    never = {"SAVE_CHECKPOINT_PER_EPOCH": EPOCHS, "CHECKPOINT_EVERY_STEPS": None, "CHECKPOINT_EVERY_MINUTES": None}
    job = _job(tmp_path, _config())
    job = replace(job, config={**job.config, **never, "EVALUATE_EVERY_EPOCHS": EPOCHS})
    expected = Records()
    _run(job, tmp_path / "whole", expected)
    first = Records()
    reporter = FolderReporter(tmp_path / "cut", first)
    done = reporter.epoch_done

    def epoch_done(epoch: int, metrics: dict[str, float], folder: Path | None) -> None:
        if when == "after":
            os.kill(os.getpid(), signal.SIGTERM)
        done(epoch, metrics, folder)

    def asked_to_stop() -> bool:
        return when == "before" and len(first.losses) == CLIPS

    reporter.epoch_done = epoch_done  # type: ignore[method-assign]
    reporter.asked_to_stop = asked_to_stop  # type: ignore[method-assign]
    feed = LocalFeed(job, Config.from_dict(job.config))
    with pytest.raises(Stopped):
        loop.run_stage(job, SingleProcess(), feed, reporter, torch.device("cpu"))
    assert [path.name for path in (tmp_path / "cut").glob("*/*.pth")] == [
        "checkpoint_0.pth" if when == "before" else f"checkpoint_step_{CLIPS + ACCUMULATE}.pth"
    ]
    assert max(first.losses) == (CLIPS if when == "before" else CLIPS + ACCUMULATE)
    rest = Records()
    _run(job, tmp_path / "cut", rest)
    assert min(rest.losses) == max(first.losses) + 1
    _assert_same_run(tmp_path / "cut", [first, rest], tmp_path / "whole", expected)


def test_a_full_disk_stops_training_and_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import motip.weights.checkpoint as checkpoint

    job = _job(tmp_path, _config())
    expected = Records()
    _run(job, tmp_path / "whole", expected)
    real = os.fsync

    def full(descriptor: int) -> None:
        if os.path.exists(tmp_path / "cut" / "step_00000004" / "checkpoint_step_4.pth"):
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    first = Records()
    with pytest.raises(MotipError, match=r"(?s)step 8 cannot be written.*No space left.*untouched"):
        _run(job, tmp_path / "cut", first)
    monkeypatch.setattr(checkpoint.os, "fsync", real)
    left = [path.name for path in (tmp_path / "cut").glob("step_*/*")]
    assert left == ["checkpoint_step_4.pth"], "the half-written file is gone, the one before is whole"
    rest = Records()
    _run(job, tmp_path / "cut", rest)
    assert min(rest.losses) == 5
    _assert_same_run(tmp_path / "cut", [first, rest], tmp_path / "whole", expected)


def test_minutes_are_rank_0s(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("motip.train.checkpoints.time.monotonic", lambda: now[0])
    cadence = Cadence(small_config(CHECKPOINT_EVERY_MINUTES=2.0), SingleProcess())
    now[0] += 119
    assert cadence.due(1, False).reason == "" and cadence.due(1, True).reason == "notice"
    now[0] += 1
    assert cadence.due(50, False).reason == "interval"
    cadence.saved(50)
    assert cadence.due(51, False).reason == ""


def test_rank_0_looks_every_five_seconds_and_brings_the_others_along(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("motip.train.checkpoints.time.monotonic", lambda: now[0])
    ranks = Ranks()
    first, second = (Cadence(small_config(), ranks.of(rank)) for rank in (0, 1))
    looked = []
    for step in range(8):  # of two seconds each
        looks = [first.looks(), second.looks()]
        assert not looks[1]
        ranks.other = torch.tensor([0.0, 0.0, float(looks[0])])
        assert second.due(step, False, looks[1]).look is looks[0]
        ranks.other = torch.zeros(3)
        assert first.due(step, False, looks[0]) == ("", looks[0])
        looked += [now[0]] * looks[0]
        now[0] += 2
    assert looked == [100, 106, 112], "at once, then after five seconds at the latest step"


class Ranks:
    """Two ranks, of which one asks at a time and the other has said `other`."""

    other = torch.zeros(3)

    def of(self, rank: int) -> Communicator:
        comm = SingleProcess()
        comm.rank = rank
        comm.sum_ = lambda tensor: tensor.add_(self.other)  # type: ignore[method-assign]
        return comm


# ---------------------------------------------------------------------------------------------------- several ranks


def _rank(rank: int, world: int, folder: str, data: str, after: int | None) -> None:
    """One attempt; where it is cut, rank 0 dies as by kill -9, and with it the others."""
    torch.set_num_threads(1)
    loop.validate = lambda run, epoch: {}  # type: ignore[assignment]
    if world > 1:
        name = f"{folder}/rendezvous_{world}_{after}"
        dist.init_process_group("gloo", init_method=f"file://{name}", rank=rank, world_size=world)
    comm: Communicator = current_communicator()
    # Whole frames, so that all clips have one size and the number of ranks does not change the padding.
    config = _config(DETR_DROPOUT=0.0, AUG_RANDOM_CROP_MIN=1000, AUG_RANDOM_CROP_MAX=1000)
    job = _job_again(Path(data), config)
    records = Records(after, lambda: os.kill(os.getpid(), signal.SIGKILL))
    feed = RayFeed(job, config, rank, world, 0, 1.0)
    loop.run_stage(job, comm, feed, FolderReporter(Path(folder), records), torch.device("cpu"))
    if rank == 0:
        torch.save(vars(records)["losses"], f"{folder}/losses_{world}_{after}.pt")
    if world > 1:
        # A rank that left while its peer's gloo threads still ran would bring the peer down with an abort.
        dist.barrier()
        dist.destroy_process_group()


def _job_again(folder: Path, config: Config) -> StageJob:
    values = json.loads((folder / "videos.json").read_text())
    videos = tuple(PlanVideo(**{**v, "frame_numbers": tuple(v["frame_numbers"]), "objects": tuple(v["objects"])})
                   for v in values)  # fmt: skip
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
    _attempt(2, tmp_path / "whole", tmp_path)
    _attempt(2, tmp_path / "cut", tmp_path, after=random.randint(EVERY + 1, CLIPS - 2))
    position = load_checkpoint(FolderReporter(tmp_path / "cut", Records()).latest())["position"]
    assert position["world"] == 2 and position["clips"] > 0
    shutil.copytree(tmp_path / "cut", tmp_path / "alone")
    _attempt(2, tmp_path / "cut", tmp_path)
    _attempt(1, tmp_path / "alone", tmp_path)
    whole = torch.load(tmp_path / "whole" / "losses_2_None.pt", weights_only=True)
    again = torch.load(tmp_path / "cut" / "losses_2_None.pt", weights_only=True)
    alone = torch.load(tmp_path / "alone" / "losses_1_None.pt", weights_only=True)
    assert len(again) < len(whole) and again == {step: whole[step] for step in again}
    expected, found = _weights(tmp_path / "whole"), _weights(tmp_path / "cut")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    # One worker takes the same global batches: what differs is the order of sums.
    assert set(alone) == set(again)
    for step, values in alone.items():
        assert values["step/loss"] == pytest.approx(whole[step]["step/loss"], rel=1e-3), step


def test_three_workers_killed_and_resumed(tmp_path: Path) -> None:
    """From three on the order in which gloo adds is not fixed."""
    job = _job(tmp_path, _config())
    (tmp_path / "videos.json").write_text(json.dumps([asdict(video) for video in job.train]))
    _attempt(3, tmp_path / "whole", tmp_path)
    _attempt(3, tmp_path / "cut", tmp_path, after=random.randint(EVERY + 1, STEPS_OF_THREE - 2))
    _attempt(3, tmp_path / "cut", tmp_path)
    whole = torch.load(tmp_path / "whole" / "losses_3_None.pt", weights_only=True)
    again = torch.load(tmp_path / "cut" / "losses_3_None.pt", weights_only=True)
    assert 0 < len(again) < len(whole)
    for step, values in again.items():
        assert values["step/loss"] == pytest.approx(whole[step]["step/loss"], rel=1e-6), step
    expected, found = _weights(tmp_path / "whole"), _weights(tmp_path / "cut")
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-6)


def test_other_numbers_of_workers_share_the_same_steps(tmp_path: Path) -> None:
    job = _job(tmp_path, _config())
    config = Config.from_dict(job.config)
    first = EpochPlans(job, config, world=4)(0)
    for world in (1, 2, 3, 5):
        plan = EpochPlans(job, config, world, first_world=4)(0)
        assert plan.steps == first.steps and plan.global_batch % world == 0
        for step in range(plan.steps):
            real = [c for c in plan.clips[step * plan.global_batch : (step + 1) * plan.global_batch] if c.weight]
            assert real == [c for c in first.clips[step * 4 : (step + 1) * 4] if c.weight]
