"""A sweep over the first stage of the small curriculum, and a search that runs its trials in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from motip.config.sweep_file import Prune
from motip.train.preemption import Stopped
from motip.train.ray_train import ResourcePlan
from motip.tune.concurrency import ConcurrencyPlan
from motip.tune.ray_tune import TrialSearch
from motip.tune.trial import Report
from motip.tune.trial_records import Trial
from tests.helpers.small_curriculum import write_files

SWEEP = """trials: 3
startup: 1
space:
  LR: {low: 1.0e-5, high: 1.0e-2, log: true}
  sample_intervals: {choices: [[1], [1, 2]]}
prune: {first: 1, reduction: 2}
confirm: {seeds: 1}
"""

IN_PROCESS = ConcurrencyPlan(1, ResourcePlan(workers=0), "all in this process")


def write_sweep_files(folder: Path, text: str = SWEEP) -> Path:
    """Write the small curriculum, its first stage with two epochs and a sweep; returns the curriculum file."""
    path = write_files(folder, domains=False)
    stage = folder / "one.yaml"
    stage.write_text(stage.read_text().replace("EPOCHS: 1", "EPOCHS: 2"))
    (folder / "sweep.yaml").write_text(text)
    path.write_text(path.read_text().replace("config: one.yaml,", "config: one.yaml, sweep: sweep.yaml,"))
    return path


class InProcessSearch:
    """Replaces ``motip.tune.ray_tune.search``: runs the trials sequentially in this process.

    Args:
        prune: keys of the trials that are pruned after their first epoch.
        interrupt: keys of the trials at whose first epoch the search is interrupted.

    Attributes:
        ran: keys of the trials that were run, in order.
    """

    def __init__(self, prune: Sequence[str] = (), interrupt: Sequence[str] = ()) -> None:
        self._prune, self._interrupt = prune, interrupt
        self.ran: list[str] = []

    def __call__(
        self,
        searcher: TrialSearch,
        run_trial: Callable[[str, Report], None],
        concurrency: ConcurrencyPlan,
        prune: Prune | None = None,
    ) -> list[Trial]:
        while searcher.suggest(str(len(self.ran))) != "FINISHED":
            (tune_id, trial), *_ = searcher.running.items()
            key = trial.key
            self.ran.append(key)

            def report(epochs: int, value: float, of: int, key: str = key) -> None:
                if key in self._interrupt:
                    raise KeyboardInterrupt
                if prune is not None and key in self._prune and epochs < of:
                    raise Stopped

            run_trial(key, report)
            searcher.on_trial_complete(tune_id)
        return list(searcher.trials.values())
