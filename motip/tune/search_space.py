"""Search space of a sweep: Optuna's distributions, and conversion between its parameters and configuration values."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import BaseSampler, RandomSampler, TPESampler

from motip.config.sweep_file import Choices, Range, SweepFile, as_integer

_DIGITS = 3
"""Significant digits of a sampled float: differences below that are noise, and the result stays readable."""


@dataclass(frozen=True)
class SearchSpace:
    """The searched keys of a sweep.

    Attributes:
        baseline: the configuration's values for these keys; None for a key that it replaces by an equivalent one.
    """

    sweep: SweepFile
    baseline: Mapping[str, Any]

    def sampler(self, attempts: int) -> BaseSampler:
        """The sweep's sampler; a resumed sweep does not repeat the random numbers of its `attempts` earlier trials."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        logging.getLogger("optuna").setLevel(logging.WARNING)
        seed = self.sweep.seed * 100_003 + attempts
        if self.sweep.search == "random":
            return RandomSampler(seed)
        # With constant_liar, settings that are in training are not suggested again.
        return TPESampler(n_startup_trials=self.sweep.startup, seed=seed, constant_liar=True)

    def distributions(self) -> dict[str, BaseDistribution]:
        """Distribution of each key; lists and other choices are JSON texts, since Optuna takes scalars only."""
        return {key: self._distribution(key) for key in self.sweep.space}

    def _distribution(self, key: str) -> BaseDistribution:
        space = self.sweep.space[key]
        if isinstance(space, Choices):
            return CategoricalDistribution([_text(choice) for choice in space.choices])
        if self.sweep.is_integer(key):
            return IntDistribution(int(space.low), int(space.high), log=space.log, step=int(space.step or 1))
        return FloatDistribution(space.low, space.high, log=space.log, step=space.step)

    def parameters(self, values: Mapping[str, Any]) -> dict[str, Any] | None:
        """Optuna's parameters of the baseline with these values; None if they are outside the space."""
        setting = {**self.baseline, **values}
        inside = all(space.contains(setting.get(key)) for key, space in self.sweep.space.items())
        return {key: self._parameter(key, setting[key]) for key in self.sweep.space} if inside else None

    def _parameter(self, key: str, value: Any) -> Any:
        space = self.sweep.space[key]
        if isinstance(space, Range):
            return value
        # 1 and 1.0 are one value, but two texts: the sweep file's counts.
        return next(_text(choice) for choice in space.choices if Choices(choices=(choice,)).contains(value))

    def values(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """Configuration values of Optuna's parameters; continuous ones are rounded to `_DIGITS`, within their range."""
        found = {}
        for key, space in self.sweep.space.items():
            value = parameters[key]
            if isinstance(space, Choices):
                value = json.loads(value)
            elif isinstance(value, float) and space.step is None:
                value = min(space.high, max(space.low, float(f"{value:.{_DIGITS - 1}e}")))
            found[key] = as_integer(self.sweep, key, value)
        return found


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
