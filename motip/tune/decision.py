"""Which setting of a sweep is called best, on what evidence, and the file that says so."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from motip.config.sweep_file import SweepFile
from motip.errors import MotipError
from motip.tune.searcher import Told
from motip.tune.sweep_records import HAND_SET


@dataclass(frozen=True)
class Candidate:
    """A setting that was trained with several seeds.

    Attributes:
        found: value of the search's own training, by whose seed the setting was chosen.
        repeated: values with further seeds, by seed; nobody chose the setting by them.
    """

    key: str
    values: dict[str, Any]
    seed: int
    found: float
    repeated: dict[int, float]

    @property
    def all(self) -> list[float]:
        return [self.found, *self.repeated.values()]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.all)

    @property
    def unchosen(self) -> float:
        """Mean over the further seeds; the search's own value where there are none."""
        return statistics.fmean(self.repeated.values() or [self.found])

    def text(self) -> str:
        """`46.2 (seed 29), 45.1 (seed 30), 46.9 (seed 31): 46.1 ± 0.9`."""
        parts = [f"{self.found:.2f} (seed {self.seed})", *(f"{v:.2f} (seed {s})" for s, v in self.repeated.items())]
        spread = f" ± {statistics.stdev(self.all):.2f}" if self.repeated else ""
        return f"{', '.join(parts)}: {self.mean:.2f}{spread}"


@dataclass(frozen=True)
class Verdict:
    """What a sweep found.

    Attributes:
        best: the setting that its trials favour.
        hand_set: the configuration's own values, trained the same way.
        better: `best` is another setting and held up with the further seeds.
    """

    best: Candidate
    hand_set: Candidate
    better: bool

    @property
    def chosen(self) -> dict[str, Any]:
        """What goes into the overlay; nothing where the hand-set values stay."""
        return self.best.values if self.better else {}


def favourite(trials: Sequence[Told]) -> Told:
    """The finished trial with the highest value, the earliest of equals.

    Raises:
        MotipError: none finished.
    """
    finished = [told for told in trials if told.status == "finished" and told.value is not None]
    if not finished:
        failures = [f"{told.ask.key}: {told.message}" for told in trials if told.status == "failed"]
        raise MotipError(
            "no trial of the sweep was finished",
            found="; ".join(failures[:3]) or "no trial",
            fix="read what the trials say; the same command tries those again that were cut off",
        )
    return min(finished, key=lambda told: (-(told.value or 0.0), told.ask.key))


def judge(trials: Sequence[Told], repeats: Sequence[Told], seed: int) -> Verdict:
    """The favourite against the hand-set setting, by seeds that neither was chosen by.

    Args:
        repeats: trainings with further seeds, of the favourite and where wanted of the hand-set setting.
        seed: of the search's own trainings.

    Raises:
        MotipError: the hand-set trial, or all repetitions of the favourite, failed.
    """
    by_key = {told.ask.key: told for told in trials}
    best = _candidate(favourite(trials), repeats, seed)
    hand_set = _candidate(by_key[HAND_SET], repeats, seed)
    if best.key == HAND_SET:
        return Verdict(best, hand_set, better=False)
    if not best.repeated:
        failures = [told.message for told in repeats if told.status == "failed"]
        raise MotipError(
            f"trial {best.key} could not be confirmed: no training with another seed came to its end",
            found="; ".join(failures) or None,
            fix="run the same command again",
        )
    return Verdict(best, hand_set, better=best.unchosen >= hand_set.unchosen)


def evidence(
    verdict: Verdict,
    trials: Sequence[Told],
    sweep: SweepFile,
    *,
    stage: str,
    metric: str,
    videos: int,
    hand_set: Mapping[str, Any],
    digests: Mapping[str, str],
    date: datetime | None = None,
) -> list[str]:
    """The lines above the values in the overlay.

    Args:
        videos: locked validation videos that the metric was taken on.
        hand_set: what the configuration has for the searched keys; None where it says it another way.
        digests: name to hex digest of what the result depends on.
    """
    day = (date or datetime.now(UTC)).date().isoformat()
    counts = Counter(told.status for told in trials)
    ended = ", ".join(f"{counts[status]} {status}" for status in ("finished", "pruned", "failed") if counts[status])
    pruning = "no pruning"
    if sweep.prune is not None:
        pruning = f"ASHA from epoch {sweep.prune.first}, reduction {sweep.prune.reduction:g}"
    method = f"{'TPE' if sweep.search == 'tpe' else 'random search'}, seed {sweep.seed}, {pruning}"
    fixed = "".join(f", {key} {json.dumps(value)}" for key, value in sweep.set.items())
    best, own = verdict.best, verdict.hand_set
    lines = [
        f"Values for stage {stage}, found by a sweep on {day}. In a curriculum file: `tuned: THIS FILE`.",
        f"Measured: {metric} in percent on {videos} locked validation videos, best epoch of a training.",
        "",
        f"trials    {len(trials)}: {ended}; {method}{fixed}",
        f"best      trial {best.key}: {best.text()}",
        f"hand-set  trial {own.key}: {own.text()}",
        "          " + ", ".join(f"{key} {_shown(value)}" for key, value in hand_set.items()),
    ]
    if best.key == own.key:
        lines.append("result    the hand-set values stay: no trial was better")
    elif verdict.better:
        difference = best.unchosen - own.unchosen
        lines.append(f"result    {difference:+.2f} over hand-set, on seeds that the setting was not chosen by")
    else:
        lines.append(f"result    the hand-set values stay: trial {best.key} did not hold up with further seeds")
    lines += [f"{name:<9} {digest}" for name, digest in digests.items()]
    if verdict.better:
        flags = " ".join(f"--set '{key}={json.dumps(value)}'" for key, value in verdict.chosen.items())
        lines += ["", f"The same by hand: {flags}"]
    return lines


def setting_text(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {_shown(value)}" for key, value in values.items()) or "hand-set values"


def _candidate(told: Told, repeats: Sequence[Told], seed: int) -> Candidate:
    if told.value is None:
        raise MotipError(
            f"trial {told.ask.key} has no value", found=told.message or told.status, fix="run the same command again"
        )
    own = [each for each in repeats if each.ask.key.partition("-seed")[0] == told.ask.key]
    repeated = {int(each.ask.seed or 0): each.value for each in own if each.value is not None}
    return Candidate(told.ask.key, told.ask.values, seed, told.value, dict(sorted(repeated.items())))


def _shown(value: Any) -> str:
    if value is None:
        return "(set another way)"
    return f"{value:g}" if isinstance(value, float) else json.dumps(value)
