"""A sweep over the first stage of the small curriculum, and a search in this process: everything but Ray."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from motip.config.sweep_file import Prune
from motip.train.preemption import Stopped
from motip.train.ray_train import Placement
from motip.tune.ray_tune import Room, RunTrial, Source, Watch
from motip.tune.searcher import Told
from tests.helpers.small_curriculum import write_files

SWEEP = """trials: 3
startup: 1
space:
  LR: {low: 1.0e-5, high: 1.0e-2, log: true}
  sample_intervals: {choices: [[1], [1, 2]]}
prune: {first: 1, reduction: 2}
confirm: {seeds: 1}
"""

HERE = Room(1, Placement(workers=0), "all in this process")


def write_sweep_files(folder: Path, text: str = SWEEP) -> Path:
    """The small curriculum, its first stage of two epochs and with a sweep; returns the curriculum file."""
    path = write_files(folder, domains=False)
    stage = folder / "one.yaml"
    stage.write_text(stage.read_text().replace("EPOCHS: 1", "EPOCHS: 2"))
    (folder / "sweep.yaml").write_text(text)
    path.write_text(path.read_text().replace("config: one.yaml,", "config: one.yaml, sweep: sweep.yaml,"))
    return path


class HereReport:
    """A trial's report without Ray."""

    def __init__(self, gives_up: Callable[[int, float], bool], said: Callable[[str], None]) -> None:
        self._gives_up = gives_up
        self.say = said
        self.pruned = False

    def value(self, epochs: int, value: float, of: int) -> None:
        if epochs < of and self._gives_up(epochs, value):
            self.pruned = True
            raise Stopped

    def at(self, position: str) -> None:
        assert position.startswith("epoch ")


class SearchHere:
    """Stands in for ``motip.tune.ray_tune.search``: one trial after the other in this process.

    Args:
        prune: keys of the trials that are given up after their first epoch.
        cut: keys of the trials at whose first epoch the whole search is interrupted.
    """

    def __init__(self, prune: Sequence[str] = (), cut: Sequence[str] = ()) -> None:
        self._prune, self._cut = prune, cut
        self.ran: list[str] = []

    def __call__(
        self,
        source: Source,
        run_trial: RunTrial,
        room: Room,
        watch: Watch,
        *,
        known: Sequence[Told] = (),
        prune: Prune | None = None,
        longest: int = 1,
    ) -> list[Told]:
        told = list(known)
        while (ask := source(told)) is not None:
            self.ran.append(ask.key)
            own = Told(ask)
            told.append(own)
            watch.asked(own)

            def gives_up(epochs: int, value: float, key: str = ask.key) -> bool:
                if key in self._cut:
                    raise KeyboardInterrupt
                return prune is not None and key in self._prune

            report: Any = HereReport(gives_up, watch.said)
            ended = run_trial(ask, report)
            own.status, own.history, own.message = ended.status, ended.history, ended.message
            watch.ended(own)
        return told
