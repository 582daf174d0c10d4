"""Console output of the driver: conversion and training progress, on a terminal and in a log file."""

from __future__ import annotations

import io
import re
from types import SimpleNamespace

import pytest
from rich.console import Console

from motip.cli.console import console, note
from motip.data import convert_report
from motip.events import EpochDone, Event, StepLogged
from motip.report import progress
from motip.report.progress import DriverUi, wide_console


def shown(is_terminal: bool, phases: list[tuple[str, int, int]]) -> str:
    stream = io.StringIO()
    ui = DriverUi(Console(file=stream, force_terminal=is_terminal, width=120))
    for phase in phases:
        ui.converting(*phase)
    ui.converted(SimpleNamespace(summary_line=lambda: "shards: 60 videos"))
    ui.converting("converting", 0, 5)  # a second conversion starts a new bar
    ui.close()
    return stream.getvalue()


PHASES = [("reading labels of bdd", 0, 60), *(("converting", done, 60) for done in range(61))]


def test_log_file_has_one_line_per_phase_and_no_control_codes() -> None:
    text = shown(False, PHASES)
    assert text.splitlines() == [
        "reading labels of bdd: 60 sequences",
        "converting: 60 sequences",
        "shards: 60 videos",
        "converting: 5 sequences",
    ]


def test_log_file_has_progress_every_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10_000, 4))
    monkeypatch.setattr(convert_report.time, "monotonic", lambda: float(next(clock)))
    lines = shown(False, PHASES).splitlines()
    assert "converting: 3 of 60 sequences" in lines
    assert 15 < len(lines) < 40


def test_terminal_has_a_progress_bar() -> None:
    text = shown(True, PHASES)
    assert "\x1b[" in text and "60/60" in text
    assert "converting: 60 sequences" not in text


@pytest.mark.parametrize("text", ["lost: [/usr/src/pair.cc:545] closed by peer", "[red]s3://a:car:b[/]"])
def test_brackets_and_colons_are_printed_literally(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    DriverUi(Console(file=stream)).note(text)
    wide_console().print(text)
    console().print(text)
    note(text)
    assert stream.getvalue() == f"{text}\n"
    assert capsys.readouterr().out == f"{text}\n{text}\nnote: {text}\n"


# ---- a stage in training --------------------------------------------------------------------------------------------


def step(epoch: int, index: int, of: int = 100, step_s: float = 2.0, skipped: float = 0.0) -> StepLogged:
    metrics = {
        "step/loss": 12.3456,
        "step/clips_per_s": 3.21,
        "step/wait_share": 0.04,
        "step/memory_gib": 1.25,
        "step/clips_skipped": skipped,
        "step/time/forward_s": 0.75 * step_s,
        "step/time/other_s": 0.25 * step_s,
    }
    return StepLogged(epoch, index, of, epoch * of + index + 1, metrics)


def epoch(number: int, **more: float) -> EpochDone:
    metrics = {
        "train/loss": 12.0,
        "train/detr_loss": 10.0,
        "train/id_loss": 2.0,
        "clips_per_s": 3.21,
        "time/wait_share": 0.04,
        "time/epoch_s": 65.0,
        "device/memory_gib": 1.25,
        "clips_skipped": 0.0,
    }
    return EpochDone(number, 100 * (number + 1), metrics | more)


class Screen:
    """Console output of a stage of ten epochs with a fake clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, is_terminal: bool = False, width: int = 140) -> None:
        self.now = 1000.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)
        self.stream = io.StringIO()
        self.ui = DriverUi(Console(file=self.stream, force_terminal=is_terminal, width=width))
        job = SimpleNamespace(parent=None, train=(), val=())
        stage = SimpleNamespace(name="Vis", config=SimpleNamespace(EPOCHS=10))
        self.ui.stage_begins(stage, job, "there")

    def line(self, event: Event, after: float = 20.0) -> str:
        """Output of an event that arrives ``after`` seconds after the previous one."""
        self.now += after
        before = len(self.stream.getvalue())
        self.ui.event(event)
        return self.stream.getvalue()[before:]


def test_step_is_one_plain_line_in_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen(monkeypatch)
    assert screen.line(step(0, 49)) == (
        "Vis: epoch 1/10 · step 50/100 · loss 12.346 · 3.2 clips/s · waiting 4 % · 1.2 GiB · 31 min 40 s left\n"
    )
    assert screen.line(step(0, 59), after=1.0) == "", "a log is not flooded"
    assert " · 1.2 GiB · 1 clip skipped · " in screen.line(step(0, 69, skipped=1.0))
    assert " · 1.2 GiB · 7 clips skipped · " in screen.line(step(0, 79, skipped=7.0))
    assert "\x1b" not in screen.stream.getvalue()


def test_time_left_is_extrapolated_from_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen(monkeypatch)
    # The start of the workers does not count; the first line uses the step time: 950 steps of 2 s.
    assert screen.line(step(0, 49), after=3000.0).endswith("31 min 40 s left\n")
    # Then the clock, with validation and checkpoints: one epoch in 600 s, eight and a half left.
    assert screen.line(step(1, 49), after=600.0).endswith("1 h 25 min left\n")


def test_resumed_stage_does_not_count_earlier_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen(monkeypatch)
    assert screen.line(step(8, 49)).endswith("5 min 00 s left\n")
    assert screen.line(step(8, 99), after=300.0).endswith("10 min 00 s left\n")
    # Restarted workers begin at an earlier step: the rate is measured again.
    assert screen.line(step(8, 49), after=50.0).endswith("5 min 00 s left\n")
    assert screen.line(step(8, 99), after=100.0).endswith("3 min 20 s left\n")


def test_epoch_has_a_summary_line(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen(monkeypatch)
    assert screen.line(epoch(0)) == (
        "Vis: epoch 1/10 done in 1 min 05 s · loss 12.000 (detection 10.000, ID 2.000) · 3.2 clips/s · waiting 4 % · "
        "1.2 GiB · not scored\n"
    )
    line = screen.line(epoch(1, HOTA=51.26, IDF1=60.0, clips_skipped=3.0))
    assert line.endswith("1.2 GiB · 3 clips skipped · HOTA 51.3 · IDF1 60.0\n")


def test_narrow_terminal_wraps_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "50")
    screen = Screen(monkeypatch, is_terminal=True, width=140)
    before = len(screen.stream.getvalue())
    screen.line(step(0, 49))
    screen.ui.close()  # draws once more
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.stream.getvalue()[before:])
    rows = [row.strip() for row in shown.splitlines() if "Vis:" in row or "left" in row or "clips/s" in row]
    assert rows and all(len(row) <= 50 for row in rows)
    assert "31 min 40 s left" in rows[-1]
