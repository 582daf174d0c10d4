"""Which settings a sweep tries next: Optuna's TPE or random search, as a function of what is known so far.

Nothing is remembered between calls: the same seed, number and results give the same suggestion, so a sweep that was
killed goes on as it would have.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from motip.config.sweep_file import Choices, Range, SweepFile, whole

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

TRIES = 50
"""Draws after which a setting that was not tried before is no longer looked for."""
DIGITS = 3
"""Significant digits of a searched rate: more could not be told apart, and the result stays readable."""


@dataclass(frozen=True)
class Ask:
    """A training to be run.

    Attributes:
        key: its name within the sweep, such as `003`, or `003-seed30` for a repetition.
        values: configuration keys that differ from the hand-set ones; empty for the hand-set setting itself.
        seed: SEED of the training; None for the configuration's own.
    """

    key: str
    values: dict[str, Any]
    seed: int | None = None


@dataclass
class Told:
    """What came of a training.

    Attributes:
        history: number of epochs trained, to the value that is maximised; of validated epochs.
        status: `running`, `finished`, `pruned` (ended early, others were better by then) or `failed`.
        message: of a failure.
    """

    ask: Ask
    status: str = "running"
    history: dict[int, float] = field(default_factory=dict)
    message: str = ""

    @property
    def value(self) -> float | None:
        """The best of its epochs, as a stage keeps the checkpoint of its best epoch; None without any."""
        found = [value for value in self.history.values() if math.isfinite(value)]
        return max(found, default=None)

    def best_so_far(self) -> dict[int, float]:
        """Epochs trained to the best value by then."""
        best, rising = -math.inf, {}
        for epoch, value in sorted(self.history.items()):
            best = max(best, value) if math.isfinite(value) else best
            if math.isfinite(best):
                rising[epoch] = best
        return rising


def suggest(sweep: SweepFile, hand_set: Mapping[str, Any], known: Sequence[Told], number: int) -> dict[str, Any] | None:
    """Values for the trial of this number, other than those tried before; None where all settings were tried.

    Args:
        hand_set: what the hand-set setting (the one with empty values) has for the keys of the space.
        known: all trials so far, also those that still run.
    """
    tried = {_name(_values_of(sweep, told, hand_set)) for told in known}
    inside = {_name(values) for told in known if _inside(sweep, values := _values_of(sweep, told, hand_set))}
    if len(inside) >= sweep.size():
        return None
    for attempt in range(TRIES):
        values = _draw(sweep, hand_set, known, number, attempt)
        if _name(values) not in tried:
            return values
    return None


def _draw(
    sweep: SweepFile, hand_set: Mapping[str, Any], known: Sequence[Told], number: int, attempt: int
) -> dict[str, Any]:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.getLogger("optuna").setLevel(logging.WARNING)
    seed = (sweep.seed * 100_003 + number) * 101 + attempt
    startup = sweep.startup + attempt * len(known)  # what TPE wants again and again is left to chance the next time
    sampler = (
        optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup)
        if sweep.search == "tpe"
        else optuna.samplers.RandomSampler(seed=seed)
    )
    study = optuna.create_study(direction="maximize", sampler=sampler)
    kinds = {key: _distribution(sweep, key) for key in sweep.space}
    for told in known:
        values = _values_of(sweep, told, hand_set)
        if _inside(sweep, values):
            study.add_trial(_frozen(told, {key: _to_optuna(sweep, key, values[key]) for key in kinds}, kinds))
    drawn = study.ask(kinds).params
    return {key: _from_optuna(sweep, key, drawn[key]) for key in sweep.space}


def _distribution(sweep: SweepFile, key: str) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    values = sweep.space[key]
    if isinstance(values, Choices):
        return CategoricalDistribution([_text(choice) for choice in values.choices])
    if sweep.is_whole(key):
        step = 1 if values.step is None else int(values.step)
        return IntDistribution(int(values.low), int(values.high), log=values.log, step=step)
    return FloatDistribution(values.low, values.high, log=values.log, step=values.step)


def _frozen(told: Told, params: dict[str, Any], kinds: dict[str, BaseDistribution]) -> FrozenTrial:
    import optuna
    from optuna.trial import TrialState

    rising = told.best_so_far()
    state = {"finished": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}.get(
        told.status, TrialState.RUNNING
    )
    if state in (TrialState.COMPLETE, TrialState.PRUNED) and not rising:
        state = TrialState.FAIL
    return optuna.trial.create_trial(
        state=state,
        params=params,
        distributions=kinds,
        value=max(rising.values()) if state == TrialState.COMPLETE else None,
        intermediate_values=rising,
    )


def _values_of(sweep: SweepFile, told: Told, hand_set: Mapping[str, Any]) -> dict[str, Any]:
    values = {**hand_set, **told.ask.values}
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
    return whole(sweep, key, _rounded(value, values))


def _rounded(value: float, within: Range) -> float:
    if within.step is not None or isinstance(value, int):
        return value
    return min(within.high, max(within.low, float(f"{value:.{DIGITS - 1}e}")))


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _name(values: Mapping[str, Any]) -> str:
    return json.dumps(dict(values), sort_keys=True)
