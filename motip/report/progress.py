"""Console output of the driver: a live progress line on a terminal, plain lines in a log, and the stage table."""

from __future__ import annotations

import shutil
import textwrap
import time
from collections.abc import Iterable
from typing import Any

from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from motip.data.convert_report import PLAIN_EVERY_S, ConversionUi
from motip.events import EpochDone, Event, Note, StepLogged, WeightsTransferred
from motip.stage_folder import StageRecord


class ProgressLine:
    """Progress of a stage: epoch, step, loss, clips per second, waiting share, memory, skipped clips, time left."""

    def __init__(self, console: Console, stage: str, epochs: int) -> None:
        self._console = console
        self._stage = stage
        self._epochs = epochs
        self._left = _TimeLeft()
        self._printed = 0.0
        self._text = f"{stage}: starting workers"
        self._live = Live(Text(self._text), console=console, transient=True, refresh_per_second=4)
        if console.is_terminal:
            self._live.start()
        else:
            console.print(self._text)

    def step(self, event: StepLogged) -> None:
        metrics = event.metrics
        done = event.epoch + event.done
        step_s = sum(value for name, value in metrics.items() if name.startswith("step/time/"))
        left = self._left(done, self._epochs, step_s * event.of)
        parts = [
            f"{self._stage}: epoch {event.epoch + 1}/{self._epochs}",
            f"step {event.index + 1}/{event.of}",
            f"loss {metrics.get('step/loss', float('nan')):.3f}",
            f"{metrics['step/clips_per_s']:.1f} clips/s",
            f"waiting {100 * metrics['step/wait_share']:.0f} %",
            f"{metrics['step/memory_gib']:.1f} GiB",
            *_skipped(metrics["step/clips_skipped"]),
        ]
        self._show(" · ".join([*parts, f"{duration(left)} left"]))

    def epoch(self, event: EpochDone) -> None:
        metrics = event.metrics
        losses = {name: metrics.get(f"train/{name}", float("nan")) for name in ("loss", "detr_loss", "id_loss")}
        parts = [
            f"{self._stage}: epoch {event.epoch + 1}/{self._epochs} done in {duration(metrics['time/epoch_s'])}",
            f"loss {losses['loss']:.3f} (detection {losses['detr_loss']:.3f}, ID {losses['id_loss']:.3f})",
            f"{metrics['clips_per_s']:.1f} clips/s",
            f"waiting {100 * metrics['time/wait_share']:.0f} %",
            f"{metrics['device/memory_gib']:.1f} GiB",
            *_skipped(metrics["clips_skipped"]),
        ]
        scores = [f"{name} {metrics[name]:.1f}" for name in ("HOTA", "DetA", "AssA", "IDF1", "MOTA") if name in metrics]
        self._console.print(" · ".join([*parts, *(scores or ["not scored"])]), highlight=False, soft_wrap=True)

    def close(self) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def _show(self, text: str) -> None:
        if self._console.is_terminal:
            # Wrapped here: the console may be wider than the terminal and would not clear all of its rows.
            columns = min(self._console.width, shutil.get_terminal_size().columns)
            self._live.update(Text("\n".join(textwrap.wrap(text, max(columns, 20)))))
        elif time.monotonic() - self._printed >= PLAIN_EVERY_S:
            self._printed = time.monotonic()
            self._console.print(text, highlight=False, soft_wrap=True)


class _TimeLeft:
    """Seconds to the end of a stage, from the rate since the first step that this process received.

    Epochs from before an interruption are excluded: they took no time in this process.
    """

    def __init__(self) -> None:
        self._first: tuple[float, float] | None = None
        self._last = 0.0

    def __call__(self, done: float, epochs: int, epoch_s: float) -> float:
        """
        Args:
            done: epochs completed, with the fraction of the running one.
            epochs: total of the stage.
            epoch_s: seconds per epoch estimated from the last few steps, used for the first estimate.
        """
        now = time.monotonic()
        if self._first is None or done <= self._last:  # restarted workers repeat some steps
            self._first = now, done
        self._last = done
        since, begun = self._first
        seconds_per_epoch = (now - since) / (done - begun) if done > begun else epoch_s
        return seconds_per_epoch * (epochs - done)


def _skipped(clips: float) -> list[str]:
    return [f"{clips:.0f} {'clip' if clips == 1 else 'clips'} skipped"] if clips else []


def duration(seconds: float) -> str:
    """`1 h 05 min`, `4 min 09 s` or `12 s`."""
    total = max(0, round(seconds))
    if total >= 3600:
        return f"{total // 3600} h {total % 3600 // 60:02d} min"
    return f"{total // 60} min {total % 60:02d} s" if total >= 60 else f"{total} s"


def stage_table(records: Iterable[StageRecord], class_names: Iterable[str]) -> Table:
    """One row per finished stage: data, time, and its best epoch's scores on the stage's own validation videos.

    Args:
        records: of the stages.
        class_names: classes with their own HOTA column.
    """
    names = list(class_names)
    table = Table(
        title="Stages: class-averaged scores in percent on each stage's own validation videos",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("stage", no_wrap=True)
    headings = ("videos", "best epoch", "HOTA", *names, "DetRe", "DetPr", "AssA", "MOTA", "IDF1", "ID sw.", "time")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for record in records:
        metrics = record.metrics
        cells = [_percent(metrics.get("HOTA")), *(_percent(metrics.get(f"HOTA/{name}")) for name in names)]
        cells += [_percent(metrics.get(name)) for name in ("DetRe", "DetPr", "AssA", "MOTA", "IDF1")]
        switches = metrics.get("IDSW")
        table.add_row(
            record.stage,
            str(record.videos),
            f"{record.best_epoch + 1}/{record.epochs}",
            *cells,
            "-" if switches is None else f"{switches:.0f}",
            "done before" if record.skipped else duration(record.seconds),
        )
    return table


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def wide_console() -> Console:
    """A console of at least 140 columns, so that tables stay readable in a job's log file.

    Markup in brackets and emoji codes between colons are not interpreted: paths and error messages contain both.
    """
    console = Console(soft_wrap=True, markup=False, emoji=False)
    if console.width < 140:
        console = Console(soft_wrap=True, width=140, markup=False, emoji=False)
    return console


class DriverUi:
    """Console output of a curriculum run."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or wide_console()
        self._line: ProgressLine | None = None
        self._conversion: ConversionUi | None = None
        self._stage = ""

    def note(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, emoji=False)

    def converting(self, phase: str, done: int, total: int) -> None:
        """Show the conversion: a bar on a terminal, a line every ten seconds in a log."""
        if self._conversion is None:
            self._conversion = ConversionUi(self.console).__enter__()
        self._conversion.progress(phase, done, total)

    def converted(self, report: Any) -> None:
        self.close()
        self.note(report.summary_line())

    def stage_begins(self, stage: Any, job: Any, folder: str) -> None:
        self._stage = stage.name
        parent = "fresh weights" if job.parent is None else f"{job.parent.stage or job.parent.path}"
        self.note(f"{stage.name}: {len(job.train)} videos, {len(job.val)} for validation, from {parent}, into {folder}")
        self._line = ProgressLine(self.console, stage.name, stage.config.EPOCHS)

    def event(self, event: Event) -> None:
        """Show an event of the stage that `stage_begins` announced."""
        match event:
            case Note():
                self.note(f"{self._stage}: {event.text}")
            case WeightsTransferred():
                self.note(f"{self._stage}: weights: {event.report.get('summary', 'transferred')}")
            case StepLogged() if self._line is not None:
                self._line.step(event)
            case EpochDone() if self._line is not None:
                self._line.epoch(event)

    def stage_ends(self, record: StageRecord) -> None:
        self.close()
        if record.skipped:
            self.note(f"{record.stage}: finished before with the same inputs, not run again ({record.checkpoint})")
        else:
            self.note(f"{record.stage}: best epoch {record.best_epoch + 1}, {record.checkpoint}")

    def close(self) -> None:
        if self._conversion is not None:
            self._conversion.__exit__()
            self._conversion = None
        if self._line is not None:
            self._line.close()
            self._line = None
