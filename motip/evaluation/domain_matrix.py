"""Stage-by-domain matrix R[stage][domain], forgetting and backward transfer (Lopez-Paz and Ranzato 2017)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from motip.data.manifest import VideoEntry
from motip.data.selection import selection_key
from motip.errors import MotipError
from motip.evaluation.scores import Scores, check_comparable, metric_name

Column = tuple[str, str]
"""A domain and one of its classes; an empty class is the mean over them."""


@dataclass(frozen=True)
class Forgetting:
    """Loss of a metric in a domain, or in one class of it, against an earlier stage.

    Attributes:
        domain: the domain.
        best_stage, best: earlier stage with the highest value, and that value.
        value: the current value.
        class_name: the class; empty for the domain's class average.
    """

    domain: str
    best_stage: str
    best: float
    value: float
    class_name: str = ""

    @property
    def name(self) -> str:
        """Domain and class."""
        return f"{self.domain} {self.class_name}".rstrip()

    @property
    def loss(self) -> float:
        """Points lost, positive."""
        return self.best - self.value

    def describe(self, metric: str) -> str:
        """One line of text."""
        return f"{self.name}: {metric} {self.best:.1f} after {self.best_stage}, {self.value:.1f} now (-{self.loss:.1f})"


@dataclass(frozen=True)
class DomainMatrix:
    """One class-averaged metric after every stage, per domain, in percent.

    Attributes:
        metric: e.g. HOTA.
        stages: in training order; the base weights may be the first.
        domains: in the order of their first score.
        values: stage -> domain -> value; a domain not scored after a stage is absent.
        by_class: stage -> domain -> class -> value, for the classes with ground truth.
        trained_on: stage -> domains its model was trained on; other scored domains are zero-shot values, which do not
            count as gained or lost. None: all scored domains.
        ancestors: stage -> stages it descends from, oldest first. None: all earlier stages.
    """

    metric: str
    stages: tuple[str, ...]
    domains: tuple[str, ...]
    values: dict[str, dict[str, float]]
    by_class: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    trained_on: Mapping[str, Collection[str]] | None = None
    ancestors: Mapping[str, Sequence[str]] | None = None

    @classmethod
    def from_sources(
        cls,
        scores: Mapping[str, Mapping[str, Mapping[str, Scores]]],
        metric: str = "HOTA",
        *,
        trained_on: Mapping[str, Collection[str]] | None = None,
        ancestors: Mapping[str, Sequence[str]] | None = None,
    ) -> DomainMatrix:
        """Build from stage -> domain -> source -> scores; a domain's value is the mean over its sources.

        Raises:
            MotipError: two stages differ in the sources, protocol, classes or sequences of a domain.
        """
        domains = tuple(dict.fromkeys(domain for cells in scores.values() for domain in cells))
        for domain in domains:
            _check_same({stage: cells[domain] for stage, cells in scores.items() if domain in cells}, domain)
        values = {
            stage: {domain: _mean([_headline(cell, metric) for cell in own.values()]) for domain, own in cells.items()}
            for stage, cells in scores.items()
        }
        by_class = {
            stage: {domain: _class_values(own.values(), metric) for domain, own in cells.items()}
            for stage, cells in scores.items()
        }
        return cls(metric, tuple(scores), domains, values, by_class, trained_on, ancestors)

    def backward_transfer(self, learned: Mapping[str, str], stage: str | None = None) -> float | None:
        """Mean over earlier domains of the value after ``stage`` minus that after the stage that learned the domain.

        Args:
            learned: domain -> the last stage that trained on it (Lopez-Paz and Ranzato 2017, equation 3).
            stage: None for the last one.

        Returns:
            Points; negative means forgetting. None if no earlier domain has both values.
        """
        if not self.stages:
            return None
        last = self.stages[-1] if stage is None else stage
        changes = [
            self.values[last][domain] - self.values[learner][domain]
            for domain, learner in learned.items()
            if learner != last and domain in self.values.get(learner, {}) and domain in self.values[last]
        ]
        return sum(changes) / len(changes) if changes else None

    def forgotten(self, stage: str, allowed: float = 5.0, each_class: bool = False) -> list[Forgetting]:
        """Domains in which ``stage`` is more than ``allowed`` points below the best stage before it.

        Args:
            allowed: tolerated loss in points.
            each_class: also report single classes, since a gain in one class can hide a loss in another.

        Raises:
            MotipError: the stage has no scores.
        """
        if stage not in self.stages:
            raise MotipError("there are no scores of this stage", found=stage, expected=", ".join(self.stages))
        columns = [column for column in self.columns(each_class) if column[0] in self.values[stage]]
        found = [self._change(stage, column) for column in columns]
        return [change for change in found if change is not None and change.loss > allowed]

    def columns(self, classes: bool = False) -> list[Column]:
        """The domains; with ``classes`` each is followed by its classes if it has more than one."""
        columns: list[Column] = []
        for domain in self.domains:
            columns.append((domain, ""))
            own = dict.fromkeys(name for cells in self.by_class.values() for name in cells.get(domain, {}))
            if classes and len(own) > 1:
                columns += [(domain, name) for name in own]
        return columns

    def value(self, stage: str, column: Column) -> float | None:
        """Value of a cell, None if not scored."""
        domain, name = column
        return (
            self.by_class.get(stage, {}).get(domain, {}).get(name) if name else self.values.get(stage, {}).get(domain)
        )

    def is_trained_on(self, stage: str, domain: str) -> bool:
        """Whether the stage's model has been trained on the domain."""
        return self.trained_on is None or domain in self.trained_on.get(stage, ())

    def row_dict(self, stage: str, prefix: str = "R") -> dict[str, float]:
        """Flat metrics of one row for MLflow: ``R/<domain>``, and ``R/<domain>/<class>`` for several classes."""
        named = {"/".join(filter(None, column)): self.value(stage, column) for column in self.columns(classes=True)}
        valid = {name: "/".join(metric_name(part) for part in name.split("/")) for name in named}
        return {f"{prefix}/{valid[name]}": value for name, value in named.items() if value is not None}

    def cells(self, stage: str) -> dict[str, float]:
        """The metrics of ``row_dict`` with the stage in their names: ``R/<stage>/<domain>``."""
        return self.row_dict(stage, f"R/{metric_name(stage)}")

    def to_json(self) -> dict[str, Any]:
        """JSON-serialisable values; ``trained_on`` and ``ancestors`` are stored as ``known`` and ``before``."""
        return {
            "metric": self.metric,
            "stages": list(self.stages),
            "domains": list(self.domains),
            "values": self.values,
            "by_class": self.by_class,
            "known": {
                stage: [name for name in self.domains if self.is_trained_on(stage, name)] for stage in self.stages
            },
            "before": {stage: list(self._ancestors(stage)) for stage in self.stages},
        }

    def _ancestors(self, stage: str) -> Sequence[str]:
        return self.stages[: self.stages.index(stage)] if self.ancestors is None else self.ancestors.get(stage, ())

    def _change(self, stage: str, column: Column) -> Forgetting | None:
        domain, name = column
        now = self.value(stage, column)
        earlier = {
            each: value
            for each in self._ancestors(stage)
            if self.is_trained_on(each, domain) and (value := self.value(each, column)) is not None
        }
        if now is None or not earlier:
            return None
        best = max(earlier, key=lambda each: earlier[each])
        return Forgetting(domain, best, earlier[best], now, name)


def subsample(
    videos: Sequence[VideoEntry], count: int, classes: Mapping[str, Collection[str]], seed: int
) -> list[VideoEntry]:
    """Deterministic subset of the videos: first one with each class, then in seeded order.

    Args:
        count: largest number of videos.
        classes: class name to raw categories.
    """
    ordered = sorted(videos, key=lambda video: selection_key(video.sequence, video.segment, seed))
    picked: list[VideoEntry] = []
    for raws in classes.values():
        showing = [video for video in ordered if _shows(video, raws)]
        if showing and not any(video in picked for video in showing):
            picked.append(showing[0])
    picked += [video for video in ordered if video not in picked]
    return sorted(picked[:count], key=lambda video: video.identity)


def _shows(video: VideoEntry, raws: Collection[str]) -> bool:
    return any(video.boxes.get(raw, 0) > video.ignored.get(raw, 0) for raw in raws)


def _check_same(by_stage: Mapping[str, Mapping[str, Scores]], domain: str) -> None:
    first = next(iter(by_stage.values()))
    for stage, own in by_stage.items():
        if set(own) != set(first):
            raise MotipError(
                f"domain {domain} was scored on different sources",
                where=stage,
                found=", ".join(sorted(own)),
                expected=", ".join(sorted(first)),
                fix="score both on the same sources",
            )
    for source in first:
        check_comparable([own[source] for own in by_stage.values()])


def _headline(scores: Scores, metric: str) -> float:
    value = scores.class_averaged.get(metric)
    if value is None:
        raise MotipError("the scores have no such metric", found=metric, expected=", ".join(scores.class_averaged))
    return float(value)


def _class_values(scores: Collection[Scores], metric: str) -> dict[str, float]:
    names = dict.fromkeys(name for each in scores for name in each.classes)
    found = {name: [each.per_class[name].get(metric) for each in scores if name in each.per_class] for name in names}
    kept = {name: [float(value) for value in values if value is not None] for name, values in found.items()}
    return {name: _mean(values) for name, values in kept.items() if values}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
