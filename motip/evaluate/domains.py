"""What each stage can still do in every domain seen so far: the matrix R[stage][domain], and what was forgotten."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from motip.errors import MotipError
from motip.evaluate.scores import Scores, check_comparable


@dataclass(frozen=True)
class Forgetting:
    """A domain that a later stage is worse in.

    Attributes:
        domain: the domain.
        best_stage, best: where the metric was highest before.
        value: the metric now.
    """

    domain: str
    best_stage: str
    best: float
    value: float

    @property
    def loss(self) -> float:
        """Points lost, positive."""
        return self.best - self.value

    def describe(self, metric: str) -> str:
        return (
            f"{self.domain}: {metric} {self.best:.1f} after {self.best_stage}, {self.value:.1f} now (-{self.loss:.1f})"
        )


@dataclass(frozen=True)
class DomainMatrix:
    """One class-averaged metric after every stage, per domain, in percent.

    Attributes:
        metric: e.g. HOTA.
        stages: in the order they were trained.
        domains: in the order they first appear.
        values: stage -> domain -> value; a domain not scored after a stage is absent.
    """

    metric: str
    stages: tuple[str, ...]
    domains: tuple[str, ...]
    values: dict[str, dict[str, float]]

    @classmethod
    def from_scores(cls, scores: Mapping[str, Mapping[str, Scores]], metric: str = "HOTA") -> DomainMatrix:
        """Build from stage -> domain -> scores, stages in training order.

        Raises:
            MotipError: a domain was scored under different rules or sequences in two stages.
        """
        domains = tuple(dict.fromkeys(domain for cells in scores.values() for domain in cells))
        for domain in domains:
            check_comparable([cells[domain] for cells in scores.values() if domain in cells])
        values = {
            stage: {domain: _headline(cell, metric) for domain, cell in cells.items()}
            for stage, cells in scores.items()
        }
        return cls(metric, tuple(scores), domains, values)

    def backward_transfer(self, learned: Mapping[str, str]) -> float | None:
        """Mean over earlier domains of (value after the last stage) - (value after the stage that learned it).

        Args:
            learned: domain -> the last stage that trained on it (Lopez-Paz and Ranzato 2017, equation 3).

        Returns:
            Negative where the curriculum forgot; None if no earlier domain has both values.
        """
        if not self.stages:
            return None
        last = self.stages[-1]
        changes = [
            self.values[last][domain] - self.values[stage][domain]
            for domain, stage in learned.items()
            if stage != last and domain in self.values.get(stage, {}) and domain in self.values[last]
        ]
        return sum(changes) / len(changes) if changes else None

    def forgotten(self, stage: str, allowed: float = 5.0) -> list[Forgetting]:
        """Domains in which `stage` is more than `allowed` points below the best earlier stage."""
        if stage not in self.stages:
            raise MotipError("there are no scores of this stage", found=stage, expected=", ".join(self.stages))
        earlier = self.stages[: self.stages.index(stage)]
        found = []
        for domain, value in self.values[stage].items():
            best_stage = max(
                (name for name in earlier if domain in self.values[name]),
                key=lambda name: self.values[name][domain],
                default=None,
            )
            if best_stage is not None and self.values[best_stage][domain] - value > allowed:
                found.append(Forgetting(domain, best_stage, self.values[best_stage][domain], value))
        return found

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows of text, one row per stage."""
        rows = [
            [
                stage,
                *(f"{self.values[stage][name]:.1f}" if name in self.values[stage] else "-" for name in self.domains),
            ]
            for stage in self.stages
        ]
        return [f"{self.metric} after", *self.domains], rows

    def to_dict(self) -> dict[str, float]:
        """Flat metrics ``R/<stage>/<domain>`` for MLflow."""
        return {f"R/{stage}/{domain}": value for stage, cells in self.values.items() for domain, value in cells.items()}


def _headline(scores: Scores, metric: str) -> float:
    value = scores.class_averaged.get(metric)
    if value is None:
        raise MotipError("the scores have no such metric", found=metric, expected=", ".join(scores.class_averaged))
    return float(value)
