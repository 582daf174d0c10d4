"""Decision of a sweep: whether its best trial replaces the baseline, and the report above the tuned values."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from scipy.special import stdtrit

from motip.config.sweep_file import SweepFile
from motip.errors import MotipError
from motip.tune.trial_records import BASELINE, Trial

_CONFIDENCE = 0.95
"""One-sided confidence with which the best trial must be better than the baseline."""


@dataclass(frozen=True)
class SettingScores:
    """Scores in percent of one setting, trained with several seeds.

    Attributes:
        seed: of the trial in the search.
        search_value: value of that trial. The setting was selected by it, so it is biased upwards.
        repeat_values: values with further seeds, by seed; not used for selection.
    """

    key: str
    values: dict[str, Any]
    seed: int
    search_value: float
    repeat_values: dict[int, float]

    @property
    def all_values(self) -> list[float]:
        return [self.search_value, *self.repeat_values.values()]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.all_values)

    @property
    def unbiased_values(self) -> list[float]:
        """Values with the further seeds; the search's value if there are none."""
        return list(self.repeat_values.values()) or [self.search_value]

    @property
    def repeat_mean(self) -> float:
        return statistics.fmean(self.unbiased_values)

    def text(self) -> str:
        """`46.2 (seed 29), 45.1 (seed 30), 46.9 (seed 31): 46.1 ± 0.9`; the last number is the standard deviation."""
        seeds = {self.seed: self.search_value, **self.repeat_values}
        parts = [f"{value:.2f} (seed {seed})" for seed, value in seeds.items()]
        deviation = f" ± {statistics.stdev(self.all_values):.2f}" if self.repeat_values else ""
        return f"{', '.join(parts)}: {self.mean:.2f}{deviation}"


@dataclass(frozen=True)
class SweepDecision:
    """Outcome of a sweep.

    Attributes:
        best: the setting of the best trial.
        baseline: the configuration's own values, trained the same way.
        margin: difference of the means over the further seeds that `best` must exceed.
    """

    best: SettingScores
    baseline: SettingScores
    margin: float

    @property
    def difference(self) -> float:
        return self.best.repeat_mean - self.baseline.repeat_mean

    @property
    def better(self) -> bool:
        return self.best.key != self.baseline.key and self.difference > self.margin

    @property
    def values(self) -> dict[str, Any]:
        """Values for the overlay; empty if the baseline is kept."""
        return self.best.values if self.better else {}


def best_trial(trials: Sequence[Trial]) -> Trial:
    """The finished trial with the highest value, the earliest of equals.

    Raises:
        MotipError: no trial finished.
    """
    finished = [trial for trial in trials if trial.status == "finished" and trial.value is not None]
    if not finished:
        failures = [f"{trial.key}: {trial.message}" for trial in trials if trial.status == "failed"]
        raise MotipError(
            "no trial of the sweep was finished",
            found="; ".join(failures[:3]) or "no trial",
            fix="read the messages of the trials; the same command resumes those that were interrupted",
        )
    return min(finished, key=lambda trial: (-(trial.value or 0.0), trial.key))


def decide(trials: Sequence[Trial], repeats: Sequence[Trial], seed: int) -> SweepDecision:
    """Compare the best trial with the baseline on seeds that were not used for selection.

    The best trial replaces the baseline if the difference of their means over the further seeds exceeds what the
    spread of the seeds explains: Student's t quantile (one-sided, `_CONFIDENCE`) times the standard error of the
    difference, with the variance pooled over the further seeds of both. A single further seed is too few for that; the
    difference must then exceed the largest one between two values of the same setting, the search's included.

    Args:
        repeats: trainings with further seeds, of the best trial and, if configured, of the baseline.
        seed: SEED of the trials of the search.

    Raises:
        MotipError: the baseline trial, or all repetitions of the best trial, failed.
    """
    by_key = {trial.key: trial for trial in trials}
    best = _setting_scores(best_trial(trials), repeats, seed)
    baseline = _setting_scores(by_key[BASELINE], repeats, seed)
    if best.key != BASELINE and not best.repeat_values:
        failures = [trial.message for trial in repeats if trial.status == "failed"]
        raise MotipError(
            f"trial {best.key} could not be confirmed: no training with another seed finished",
            found="; ".join(failures) or None,
            fix="run the same command again",
        )
    return SweepDecision(best, baseline, _margin(best, baseline))


def _margin(best: SettingScores, baseline: SettingScores) -> float:
    """The largest difference of two settings that the spread of their seeds explains; see :func:`decide`."""
    if len(best.repeat_values) < 2:
        return max(max(each.all_values) - min(each.all_values) for each in (best, baseline))
    samples = [best.unbiased_values, baseline.unbiased_values]
    freedom = sum(len(sample) - 1 for sample in samples)
    squares = sum((value - statistics.fmean(sample)) ** 2 for sample in samples for value in sample)
    error = math.sqrt(squares / freedom * sum(1 / len(sample) for sample in samples))
    return float(stdtrit(freedom, _CONFIDENCE)) * error


def report_lines(
    decision: SweepDecision,
    trials: Sequence[Trial],
    sweep: SweepFile,
    *,
    stage: str,
    metric: str,
    videos: int,
    baseline: Mapping[str, Any],
    digests: Mapping[str, str],
    date: datetime | None = None,
) -> list[str]:
    """The lines above the values in the overlay.

    Args:
        videos: number of locked validation videos that the metric was measured on.
        baseline: the configuration's values for the searched keys; None if it uses an equivalent key instead.
        digests: name to hex digest of what the result depends on.
        date: of the report; default now.
    """
    # search: number of trials by status, algorithm, pruning
    day = (date or datetime.now(UTC)).date().isoformat()
    counts = Counter(trial.status for trial in trials)
    ended = ", ".join(f"{counts[status]} {status}" for status in ("finished", "pruned", "failed") if counts[status])
    pruning = "no pruning"
    if sweep.prune is not None:
        pruning = f"ASHA from epoch {sweep.prune.first}, reduction {sweep.prune.reduction:g}"
    method = f"{'TPE' if sweep.search == 'tpe' else 'random search'}, seed {sweep.seed}, {pruning}"
    fixed = "".join(f", {key} {json.dumps(value)}" for key, value in sweep.set.items())

    # scores
    best, own = decision.best, decision.baseline
    lines = [
        f"Values for stage {stage}, found by a sweep on {day}. In a curriculum file: `tuned: THIS FILE`.",
        f"Measured: {metric} in percent on {videos} locked validation videos, best epoch of a training.",
        "",
        f"trials    {len(trials)}: {ended}; {method}{fixed}",
        f"best      trial {best.key}: {best.text()}",
        f"baseline  trial {own.key}: {own.text()}",
        "          " + ", ".join(f"{key} {_value_text(value)}" for key, value in baseline.items()),
    ]

    # decision
    if best.key == own.key:
        lines.append("result    the baseline is kept: no trial was better")
    else:
        outcome = f"{decision.difference:+.2f} over the baseline"
        if decision.better:
            outcome += ", on seeds not used for selection"
        else:
            outcome = f"the baseline is kept: trial {best.key} was not better with further seeds ({outcome})"
        spread = f"{_CONFIDENCE:.0%} quantile of t times the standard error from the spread of the seeds"
        if len(best.repeat_values) < 2:
            spread = "largest difference between two seeds of one setting"
        lines += [f"result    {outcome}", f"margin    {decision.margin:.2f} had to be exceeded: {spread}"]
    lines += [f"{name:<9} {digest}" for name, digest in digests.items()]
    if decision.better:
        flags = " ".join(f"--set '{key}={json.dumps(value)}'" for key, value in decision.values.items())
        lines += ["", f"The same as flags: {flags}"]
    return lines


def setting_text(values: Mapping[str, Any]) -> str:
    """`LR 0.001, LR_DROP 4`, or `baseline` without values."""
    return ", ".join(f"{key} {_value_text(value)}" for key, value in values.items()) or "baseline"


def _setting_scores(trial: Trial, repeats: Sequence[Trial], seed: int) -> SettingScores:
    if trial.value is None:
        raise MotipError(
            f"trial {trial.key} has no value",
            found=trial.message or trial.status,
            fix="run the same command again",
        )
    finished = [each for each in repeats if each.setting == trial.key and each.status == "finished"]
    values = {int(each.seed or 0): each.value for each in finished if each.value is not None}
    return SettingScores(trial.key, trial.values, seed, trial.value, dict(sorted(values.items())))


def _value_text(value: Any) -> str:
    if value is None:
        return "(set by another key)"
    return f"{value:g}" if isinstance(value, float) else json.dumps(value)
