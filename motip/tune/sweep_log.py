"""Console of a sweep in its driver: starts, ends and notes of the trials, and a progress line every minute."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from motip.curriculum.failure import log_exceptions
from motip.curriculum.stage import Ui
from motip.curriculum.stage_readers import REMOTE_READ_EVERY_S
from motip.events import START, Event, EventLog, Note, StepLogged
from motip.stage_folder import SweepFolder
from motip.tune.decision import setting_text
from motip.tune.trial_records import Trial, read_trial, write_trial

STATUS_INTERVAL_S = 60.0
"""Seconds without a step after which a line says what a trial waits for; also the interval of progress lines."""


class _Tail:
    """What this attempt of a trial adds to its event log."""

    def __init__(self, sweep: SweepFolder, trial: Trial) -> None:
        self.trial = trial
        self.position = ""
        self.started = time.monotonic()
        self.waiting_shown = False
        self._sweep = sweep
        self._log: EventLog | None = None
        self._offset = START
        for _ in self.read():
            pass  # shown by an earlier attempt

    def read(self) -> Iterator[Event]:
        """The new events; none before the trial has its folder."""
        if self._log is None:
            trial = read_trial(self._sweep, self.trial.key)
            self._log = trial.folder(self._sweep).log() if trial.inputs else None
        if self._log is not None:
            for event, offset in self._log.read(self._offset):
                self._offset = offset
                yield event


class SweepLog:
    """Shows the trials of a sweep, which record their events in their own folders.

    Args:
        count: trials in all, of which `ended` ended in an earlier run.
        epochs: of a trial that does not set EPOCHS.
    """

    def __init__(self, ui: Ui, sweep: SweepFolder, count: int, ended: int, epochs: int) -> None:
        self._ui, self._sweep, self._count, self._ended, self._epochs = ui, sweep, count, ended, epochs
        self._tails: dict[str, _Tail] = {}
        self._interval_s = 1.0 if isinstance(sweep.path, Path) else REMOTE_READ_EVERY_S
        self._read_at = self._progress_at = time.monotonic()
        self.note = ui.note

    def trial_started(self, trial: Trial) -> None:
        """Write the record of a trial before its process exists, so that it is repeated after any kill."""
        trial.status, trial.message = "running", ""
        write_trial(self._sweep, trial)
        self._tails[trial.key] = _Tail(self._sweep, trial)
        verb = "resumes" if trial.run_id else "starts"
        seed = "" if trial.seed is None else f", seed {trial.seed}"
        self.note(f"trial {trial.key} {verb}: {setting_text(trial.values)}{seed}")

    def trial_ended(self, key: str) -> Trial:
        """The trial with its result, read from its record; failed if its process died."""
        self._show(self._tails.pop(key))
        self._ended += 1
        trial = read_trial(self._sweep, key)
        if trial.status == "running":
            died = "the trial process exited without a result (killed or out of memory?)"
            trial = replace(trial, status="failed", message=trial.message or died)
        epochs = f"{trial.epochs} epoch{'s' if trial.epochs != 1 else ''}"
        how = {
            "finished": f"finished after {epochs}",
            "pruned": f"pruned after {epochs}: others were better by then",
            "failed": f"failed: {trial.message}",
        }[trial.status]
        value = "" if trial.value is None else f", best {trial.value:.2f}"
        self.note(f"trial {key} {how}{value} ({self._ended} of {self._count} done)")
        return trial

    def poll(self, trials: Iterable[Trial], resources: Callable[[], str]) -> None:
        """Show what is new; call it about every second.

        Args:
            trials: all trials so far.
            resources: gives the resources that a trial needs and those that are free, as text.
        """
        # notes, and trials without workers
        now = time.monotonic()
        if now - self._read_at < self._interval_s:
            return
        self._read_at = now
        for key, tail in self._tails.items():
            self._show(tail)
            if not tail.position and not tail.waiting_shown and now - tail.started >= STATUS_INTERVAL_S:
                tail.waiting_shown = True
                self.note(f"trial {key}: has waited {STATUS_INTERVAL_S:.0f} s for its workers; {resources()}")

        # progress line
        if self._tails and now - self._progress_at >= STATUS_INTERVAL_S:
            self._progress_at = now
            positions = {key: tail.position for key, tail in sorted(self._tails.items()) if tail.position}
            where = "; ".join(f"trial {key} at {position}" for key, position in positions.items())
            scored = [trial for trial in trials if trial.value is not None]
            best = max(scored, key=lambda trial: trial.value or 0, default=None)
            so_far = "" if best is None else f"; best so far trial {best.key}, {best.value:.2f}"
            self.note(f"{self._ended} of {self._count} done; {where or 'workers are starting'}{so_far}")

    def _show(self, tail: _Tail) -> None:
        """Show the new notes of a trial, and keep its position."""
        epochs = tail.trial.values.get("EPOCHS", self._epochs)
        with log_exceptions(f"the events of trial {tail.trial.key} cannot be read yet"):
            for event in tail.read():
                if isinstance(event, Note):
                    self.note(f"trial {tail.trial.key}: {event.text}")
                elif isinstance(event, StepLogged):
                    tail.position = f"epoch {event.epoch + 1}/{epochs}, step {event.index + 1}/{event.of}"
