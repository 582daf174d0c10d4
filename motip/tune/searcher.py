"""Search algorithm of a sweep: Optuna's TPE or random search, as a pure function of the trials so far.

No state is kept between calls: the same seed, trial number and results give the same suggestion, so a sweep that was
killed resumes with the suggestions it would have made.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from motip.config.sweep_file import Choices, Range, SweepFile, as_integer

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

MAX_ATTEMPTS = 50
"""Samples per suggestion; if all of them were tried before, the space counts as exhausted."""
DIGITS = 3
"""Significant digits of a sampled float: differences below that are noise, and the result stays readable."""


@dataclass(frozen=True)
class TrialSpec:
    """A training to be run.

    Attributes:
        key: name within the sweep, such as `003`, or `003-seed30` for a repetition.
        values: configuration keys that differ from the baseline; empty for the baseline itself.
        seed: SEED of the training; None for the configuration's own.
    """

    key: str
    values: dict[str, Any]
    seed: int | None = None


@dataclass
class TrialResult:
    """State and scores of a trial.

    Attributes:
        history: number of epochs trained, to the value that is maximised; of validated epochs.
        status: `running`, `finished`, `pruned` (stopped early by ASHA) or `failed`.
        message: of a failure.
    """

    spec: TrialSpec
    status: str = "running"
    history: dict[int, float] = field(default_factory=dict)
    message: str = ""

    @property
    def value(self) -> float | None:
        """The best epoch's value, as a stage keeps the checkpoint of its best epoch; None without a finite value."""
        found = [value for value in self.history.values() if math.isfinite(value)]
        return max(found, default=None)

    def best_so_far(self) -> dict[int, float]:
        """Epochs trained, to the best value up to then."""
        best, rising = -math.inf, {}
        for epoch, value in sorted(self.history.items()):
            best = max(best, value) if math.isfinite(value) else best
            if math.isfinite(best):
                rising[epoch] = best
        return rising


def suggest(
    sweep: SweepFile, baseline: Mapping[str, Any], trials: Sequence[TrialResult], number: int
) -> dict[str, Any] | None:
    """Values for the trial of this number, different from all earlier ones; None once the space is exhausted.

    Args:
        baseline: values of the baseline trial (the one with empty `values`) for the keys of the search space.
        trials: all trials so far, running ones included.
    """
    tried = {_canonical(_values_of(sweep, trial, baseline)) for trial in trials}
    inside = {_canonical(values) for trial in trials if _inside(sweep, values := _values_of(sweep, trial, baseline))}
    if len(inside) >= sweep.size():
        return None
    for attempt in range(MAX_ATTEMPTS):
        values = _sample(sweep, baseline, trials, number, attempt)
        if _canonical(values) not in tried:
            return values
    return None


def _sample(
    sweep: SweepFile, baseline: Mapping[str, Any], trials: Sequence[TrialResult], number: int, attempt: int
) -> dict[str, Any]:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.getLogger("optuna").setLevel(logging.WARNING)
    seed = (sweep.seed * 100_003 + number) * 101 + attempt
    # After a duplicate, raise the number of start-up trials so that TPE samples at random instead of repeating itself.
    startup = sweep.startup + attempt * len(trials)
    sampler = (
        optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup)
        if sweep.search == "tpe"
        else optuna.samplers.RandomSampler(seed=seed)
    )
    study = optuna.create_study(direction="maximize", sampler=sampler)
    distributions = {key: _distribution(sweep, key) for key in sweep.space}
    for trial in trials:
        values = _values_of(sweep, trial, baseline)
        if _inside(sweep, values):
            params = {key: _to_optuna(sweep, key, values[key]) for key in distributions}
            study.add_trial(_frozen(trial, params, distributions))
    sampled = study.ask(distributions).params
    return {key: _from_optuna(sweep, key, sampled[key]) for key in sweep.space}


def _distribution(sweep: SweepFile, key: str) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    values = sweep.space[key]
    if isinstance(values, Choices):
        return CategoricalDistribution([_text(choice) for choice in values.choices])
    if sweep.is_integer(key):
        step = 1 if values.step is None else int(values.step)
        return IntDistribution(int(values.low), int(values.high), log=values.log, step=step)
    return FloatDistribution(values.low, values.high, log=values.log, step=values.step)


def _frozen(trial: TrialResult, params: dict[str, Any], distributions: dict[str, BaseDistribution]) -> FrozenTrial:
    import optuna
    from optuna.trial import TrialState

    rising = trial.best_so_far()
    state = {"finished": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}.get(
        trial.status, TrialState.RUNNING
    )
    if state in (TrialState.COMPLETE, TrialState.PRUNED) and not rising:
        state = TrialState.FAIL
    return optuna.trial.create_trial(
        state=state,
        params=params,
        distributions=distributions,
        value=max(rising.values()) if state == TrialState.COMPLETE else None,
        intermediate_values=rising,
    )


def _values_of(sweep: SweepFile, trial: TrialResult, baseline: Mapping[str, Any]) -> dict[str, Any]:
    values = {**baseline, **trial.spec.values}
    return {key: _as_listed(sweep.space[key], values.get(key)) for key in sweep.space}


def _as_listed(space: Range | Choices, value: Any) -> Any:
    """A choice as the sweep file writes it: 1 and 1.0 are one value, but two texts."""
    if isinstance(space, Range):
        return value
    return next((each for each in space.choices if Choices(choices=(each,)).contains(value)), value)


def _inside(sweep: SweepFile, values: Mapping[str, Any]) -> bool:
    return all(space.contains(values.get(key)) for key, space in sweep.space.items())


def _to_optuna(sweep: SweepFile, key: str, value: Any) -> Any:
    return _text(value) if isinstance(sweep.space[key], Choices) else value


def _from_optuna(sweep: SweepFile, key: str, value: Any) -> Any:
    values = sweep.space[key]
    if isinstance(values, Choices):
        return json.loads(value)
    return as_integer(sweep, key, _rounded(value, values))


def _rounded(value: float, within: Range) -> float:
    if within.step is not None or isinstance(value, int):
        return value
    return min(within.high, max(within.low, float(f"{value:.{DIGITS - 1}e}")))


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _canonical(values: Mapping[str, Any]) -> str:
    return json.dumps(dict(values), sort_keys=True)
