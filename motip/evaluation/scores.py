"""Scores of one evaluation, with the protocol, classes, split and sequences they belong to."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from motip.errors import MotipError
from motip.storage.atomic import digest

Values = dict[str, float | int | None]
"""Metric name -> percentage (None where there is no ground truth) or count."""

_HOTA_METRICS = ("HOTA", "DetA", "AssA", "DetRe", "DetPr", "AssRe", "AssPr", "LocA")
PERCENTAGES = (*_HOTA_METRICS, "MOTA", "MOTP", "IDF1", "IDR", "IDP")
COUNTS = ("IDSW", "FP", "FN", "TP", "Frag", "MT", "ML", "GT")
_TABLE_METRICS = ("HOTA", "DetA", "AssA", "DetRe", "DetPr", "LocA", "MOTA", "IDF1", "IDSW", "FP", "FN")


@dataclass(frozen=True)
class Scores:
    """All scores of one evaluation of one source; shares are in percent.

    Attributes:
        protocol, classes, split, sequences: conditions of the evaluation.
        class_averaged: mean over the classes with ground truth (counts are summed over them); the headline.
        detection_averaged: over all boxes of all classes, each matched within its class.
        class_agnostic: all classes as one.
        per_class: class -> values over all sequences.
        per_sequence: sequence -> class -> values.
        classes_without_gt: classes excluded from the mean.
        removed: boxes removed by the protocol, by reason.
        notes: remarks that must be shown with the scores (e.g. long-term memory on).
        counts: sequence -> counts from which any set of sequences can be scored (``SequenceCounts.to_json``); empty in
            files of versions that did not store them.
    """

    protocol: str
    classes: tuple[str, ...]
    split: str
    sequences: tuple[str, ...]
    class_averaged: Values
    detection_averaged: Values
    class_agnostic: Values
    per_class: dict[str, Values]
    per_sequence: dict[str, dict[str, Values]]
    classes_without_gt: tuple[str, ...] = ()
    removed: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    counts: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def sequence_digest(self) -> str:
        """Hex sha256 of the sorted sequence names."""
        return digest(sorted(self.sequences))

    @property
    def identity(self) -> dict[str, str]:
        """Conditions that must be equal for two evaluations to be comparable."""
        return {
            "protocol": self.protocol,
            "classes": ",".join(self.classes),
            "split": self.split,
            "sequences": self.sequence_digest,
        }

    @property
    def hota(self) -> float:
        """Class-averaged HOTA of this source, in percent.

        The best checkpoint of a stage is chosen by its ``best`` metric, by default the mean of this value over the
        validation sources.
        """
        value = self.class_averaged["HOTA"]
        assert value is not None  # `combine` raises without ground truth
        return float(value)

    def to_dict(self) -> dict[str, float]:
        """Flat metrics under valid MLflow names.

        ``HOTA`` is class-averaged, ``HOTA/car`` one class, ``det_avg/HOTA`` and ``agnostic/HOTA`` the other two means.
        """
        flat = _flat(self.class_averaged, "{metric}")
        for name, values in self.per_class.items():
            flat |= _flat(values, "{metric}/" + metric_name(name))
        flat |= _flat(self.detection_averaged, "det_avg/{metric}")
        return flat | _flat(self.class_agnostic, "agnostic/{metric}")

    def table(self, per_sequence: bool = False) -> tuple[list[str], list[list[str]]]:
        """Header and rows of the text table: one row per class, then the three means.

        The row name of the mean gives the number of classes and the excluded ones.
        """
        averaged = len(self.classes) - len(self.classes_without_gt)
        rows: list[tuple[str, Values]] = []
        if per_sequence:
            for sequence, cells in self.per_sequence.items():
                rows += [(f"{sequence} / {name}", values) for name, values in cells.items()]
        rows += list(self.per_class.items())
        excluded = f", without {', '.join(self.classes_without_gt)}" if self.classes_without_gt else ""
        plural = "class" if averaged == 1 else "classes"
        rows.append((f"mean of {averaged} {plural}{excluded}", self.class_averaged))
        rows.append(("all boxes", self.detection_averaged))
        rows.append(("class-agnostic", self.class_agnostic))
        return ["", *_TABLE_METRICS], [
            [name, *(_cell(values, metric) for metric in _TABLE_METRICS)] for name, values in rows
        ]

    def caption(self) -> str:
        """Line with the conditions of the evaluation, to be shown with the table."""
        note = "".join(f"; {note}" for note in self.notes)
        return (
            f"protocol {self.protocol}, split {self.split}, classes {', '.join(self.classes)}, "
            f"{len(self.sequences)} sequences ({self.sequence_digest[:12]}){note}"
        )

    def to_json(self) -> dict[str, Any]:
        """JSON-serialisable values."""
        return asdict(self) | {"sequence_digest": self.sequence_digest}

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Scores:
        """Inverse of ``to_json``.

        Raises:
            MotipError: the digest does not match the sequence list.
        """
        values = {key: value for key, value in stored.items() if key != "sequence_digest"}
        for key in ("classes", "sequences", "classes_without_gt", "notes"):
            values[key] = tuple(values[key])
        scores = cls(**values)
        if scores.sequence_digest != stored["sequence_digest"]:
            raise MotipError(
                "stored scores do not belong to their sequence list",
                found=scores.sequence_digest,
                expected=stored["sequence_digest"],
                fix="evaluate again",
            )
        return scores


def check_comparable(evaluations: Iterable[Scores]) -> None:
    """Raise MotipError if the evaluations differ in protocol, classes, split or sequences."""
    evaluations = list(evaluations)
    for other in evaluations[1:]:
        for what, value in evaluations[0].identity.items():
            if other.identity[what] != value:
                raise MotipError(
                    f"scores of different {what} cannot be compared",
                    found=other.identity[what],
                    expected=value,
                    fix="evaluate both with the same protocol, classes, split and sequences",
                )


def metric_name(text: str) -> str:
    """`text` with every character MLflow refuses in a metric name replaced by an underscore."""
    return re.sub(r"[^\w\-. :]", "_", text, flags=re.ASCII)


def _flat(values: Values, pattern: str) -> dict[str, float]:
    return {pattern.format(metric=name): float(value) for name, value in values.items() if value is not None}


def _cell(values: Values, metric: str) -> str:
    value = values[metric]
    if value is None:
        return "-"
    return f"{value:.1f}" if metric in PERCENTAGES else str(value)
