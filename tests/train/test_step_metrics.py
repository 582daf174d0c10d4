"""Step records at the logging interval: speed, learning rates, time split, memory, skipped clips."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

import motip.train.loop as loop
import motip.train.step as train_step
import motip.train.timing as timing
from motip.config import Config
from motip.events import EpochDone, Event, Note, StepLogged
from motip.train.collectives import SingleProcess
from motip.train.optimizer import GROUP_NAMES, parameter_groups
from motip.train.state import Meter
from motip.train.step import TrainStep
from motip.train.timing import PARTS, Interval, StepClock
from motip.weights import load_checkpoint
from tests.helpers.small_training import clip, small_config, small_model
from tests.helpers.training_run import train_in_process
from tests.train.test_loop import SETTINGS, job_of, write_video

CLIPS, EVERY, ACCUMULATE = 7, 3, 2
TIMES = {f"{name}_s" for name in ("wait", *PARTS, "other")}

E = TypeVar("E", bound=Event)


def _config(**changes: Any) -> Config:
    settings = {**SETTINGS, "EPOCHS": 1, "CLIPS_PER_EPOCH": CLIPS, "LOG_EVERY_STEPS": EVERY, **changes}
    return small_config(**{"ACCUMULATE_STEPS": ACCUMULATE, **settings})


def _run(config: Config, folder: Path, inspect_event: Callable[[Event], None] = lambda event: None) -> list[Event]:
    events: list[Event] = []

    def on_event(event: Event) -> None:
        events.append(event)
        inspect_event(event)

    job = job_of(config, folder, [write_video(folder, "long", frames=12)])
    train_in_process(job, folder / "stage", on_event)
    return events


@pytest.fixture(autouse=True)
def _without_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "validate", lambda run, epoch: {})


def of(kind: type[E], events: list[Event]) -> list[E]:
    return [event for event in events if isinstance(event, kind)]


def test_step_record_has_learning_rates_and_time_split(tmp_path: Path) -> None:
    config = _config(LR=1e-3, LR_WARMUP_EPOCHS=0, LR_LINEAR_PROJ_SCALE=0.5, LR_DICTIONARY_SCALE=0.25)
    records = _run(config, tmp_path)
    steps = of(StepLogged, records)
    assert [event.index + 1 for event in steps] == [3, 6, 7]
    for event in steps:
        metrics = event.metrics
        rates = {name.removeprefix("step/lr/"): rate for name, rate in metrics.items() if name.startswith("step/lr")}
        scales = {"backbone": config.backbone_lr_scale, "linear_proj": 0.5, "dictionary": 0.25, "rest": 1.0}
        assert rates == pytest.approx({name: 1e-3 * scale for name, scale in scales.items()})
        assert {name.removeprefix("step/time/") for name in metrics if name.startswith("step/time/")} == TIMES
        assert all(metrics[f"step/time/{part}_s"] > 0 for part in PARTS)
        assert metrics["step/objects_per_clip"] == 9, "three frames with three cars"
        assert 0.05 < metrics["step/memory_gib"] < 64
        assert metrics["step/clips_skipped"] == 0
        # The optimiser steps every second batch: the norms are those of its latest step.
        assert metrics["step/detr_grad_norm"] > 0 and metrics["step/loss"] > 0
    epoch = of(EpochDone, records)[0].metrics
    assert {name for name in TIMES if epoch[f"time/{name}"] >= 0} == TIMES
    assert epoch["device/memory_gib"] == max(event.metrics["step/memory_gib"] for event in steps)
    total = sum(epoch[f"time/{name}"] for name in TIMES) * CLIPS
    assert total == pytest.approx(epoch["time/epoch_s"], rel=0.05), "the parts add up"


def test_group_names_match_the_groups() -> None:
    config = small_config()
    model = small_model(config)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = dict(zip(GROUP_NAMES, parameter_groups(model, config), strict=True))
    members = {group: {names[id(each)] for each in groups[group]["params"]} for group in groups}
    assert all("backbone" in name for name in members["backbone"]) and members["backbone"]
    assert members["linear_proj"] and members["dictionary"]
    assert all(any(part in name for part in config.LR_LINEAR_PROJ_NAMES) for name in members["linear_proj"])
    assert all(any(part in name for part in config.LR_DICTIONARY_NAMES) for name in members["dictionary"])


def test_skipped_clips_are_counted_and_reported_by_objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = _config()
    real, calls = train_step.clip_losses, []

    def out_of_memory_at_the_second(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("injected")
        return real(*arguments)

    monkeypatch.setattr(train_step, "clip_losses", out_of_memory_at_the_second)
    records = _run(config, tmp_path)
    assert [event.metrics["step/clips_skipped"] for event in of(StepLogged, records)] == [1, 1, 1]
    epoch = of(EpochDone, records)[0].metrics
    assert epoch["clips_skipped"] == 1 and epoch["memory/clips_skipped_objects_0_to_9"] == 1
    (note,) = of(Note, records)
    assert note.step == 2
    assert "long" in note.text and "3 frames, 9 objects, at most 3 in a frame" in note.text


def test_time_split_of_an_epoch_is_resumed() -> None:
    meter = Meter(steps=4, clips=4, waited=1.0)
    meter.seconds["forward"] = 8.0
    meter.memory_gib = 3.0
    state = json.loads(json.dumps(meter.state_dict(SingleProcess())))
    again = Meter.resumed(state, is_main=True)
    assert again.seconds == {"forward": 8.0, "backward": 0.0, "optimiser": 0.0}
    assert again.means()["time/forward_s"] == 2.0 and again.means()["time/wait_s"] == 0.25
    assert again.means()["device/memory_gib"] == 3.0
    # A checkpoint of a version without the time split.
    old = {name: value for name, value in state.items() if name not in ("seconds", "memory_gib")}
    assert Meter.resumed(old, is_main=True).means()["time/forward_s"] == 0.0


def test_checkpoint_between_two_records_has_the_times_so_far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading the clock for the checkpoint after step 4 takes no time from the record after step 7."""
    monkeypatch.setattr(StepClock, "take", lambda clock: dict.fromkeys(PARTS, 7.0))
    config = _config(CHECKPOINT_EVERY_STEPS=4, LOG_EVERY_STEPS=100)
    saved: list[dict[str, float]] = []

    def inspect_event(event: Event) -> None:
        if isinstance(event, StepLogged):
            (path,) = (tmp_path / "stage").glob("step_*/*.pth")
            saved.append(load_checkpoint(path)["position"]["meter"]["seconds"])

    records = _run(config, tmp_path, inspect_event)
    assert saved == [dict.fromkeys(PARTS, 7.0)]
    (record,) = of(StepLogged, records)
    assert record.metrics["step/time/forward_s"] == 2.0


class FakeEvent:
    """A CUDA event on a device whose clock ticks once per event, each tick 10 ms; readable after a synchronisation."""

    ticks = 0
    synchronised = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.at = -1

    def record(self, stream: object) -> None:
        FakeEvent.ticks += 1
        self.at = FakeEvent.ticks

    def elapsed_time(self, end: FakeEvent) -> float:
        assert FakeEvent.synchronised >= end.at, "read before the synchronisation"
        return 10.0 * (end.at - self.at)


def test_cuda_is_synchronised_only_when_the_clock_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = []

    def synchronize(device: torch.device) -> None:
        waits.append(device)
        FakeEvent.synchronised = FakeEvent.ticks

    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    clock = StepClock(torch.device("cuda"))
    for _ in range(5):
        with clock.part("forward"), clock.part("backward"):
            assert not waits
    with pytest.raises(RuntimeError), clock.part("optimiser"):
        raise RuntimeError("a failed block is measured too")
    assert not waits
    assert clock.take() == pytest.approx({"forward": 0.15, "backward": 0.05, "optimiser": 0.01})
    assert len(waits) == 1
    assert clock.take() == dict.fromkeys(PARTS, 0.0) and len(waits) == 1


def test_clock_measures_each_part_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a wall clock that advances by one second per reading."""
    now = iter(range(1000))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(now)))
    config = small_config()
    step = TrainStep(small_model(config), config, SingleProcess())
    optimizer = torch.optim.SGD(step.model.parameters(), lr=0.0)
    for number in range(3):
        step.accumulate(clip(number), seed=number)
    step.apply(optimizer)
    assert step.clock.take() == {"forward": 3.0, "backward": 3.0, "optimiser": 1.0}


def test_interval_returns_the_growth_since_the_last_call() -> None:
    interval = Interval({"steps": 10.0, "wait": 1.0})
    assert interval.since({"steps": 14.0, "wait": 1.5, "new": 2.0}) == {"steps": 4.0, "wait": 0.5, "new": 2.0}
    assert interval.since({"steps": 15.0, "wait": 1.5, "new": 2.0}) == {"steps": 1.0, "wait": 0.0, "new": 0.0}
