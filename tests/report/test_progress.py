"""What the driver shows while data is converted: a bar on a terminal, a few lines in a log."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from motip.data import convert_report
from motip.report.progress import DriverUi


def shown(is_terminal: bool, phases: list[tuple[str, int, int]]) -> str:
    stream = io.StringIO()
    ui = DriverUi(Console(file=stream, force_terminal=is_terminal, width=120))
    for phase in phases:
        ui.converting(*phase)
    ui.converted(SimpleNamespace(summary_line=lambda: "shards: 60 videos"))
    ui.converting("converting", 0, 5)  # a second conversion starts afresh
    ui.close()
    return stream.getvalue()


PHASES = [("reading labels of bdd", 0, 60), *(("converting", done, 60) for done in range(61))]


def test_a_log_file_gets_one_line_per_phase_and_no_control_codes() -> None:
    text = shown(False, PHASES)
    assert text.splitlines() == [
        "reading labels of bdd: 60 sequences",
        "converting: 60 sequences",
        "shards: 60 videos",
        "converting: 5 sequences",
    ]


def test_a_log_file_is_told_every_ten_seconds_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10_000, 4))
    monkeypatch.setattr(convert_report.time, "monotonic", lambda: float(next(clock)))
    lines = shown(False, PHASES).splitlines()
    assert "converting: 3 of 60 sequences" in lines
    assert 15 < len(lines) < 40


def test_a_terminal_gets_a_bar() -> None:
    text = shown(True, PHASES)
    assert "\x1b[" in text and "60/60" in text
    assert "converting: 60 sequences" not in text
