"""Benchmark records: data classes, JSON form, and the recorder used by the scripts.

    recorder = Recorder("tracker", "Tracker without the detector", args)  # notes date, command, load
    recorder.add("20 objects", {"threads": 1}, "the naive form", [quantity("ms per frame", ours, baseline)])
    recorder.finish()  # prints the table, writes --json

Every `bench_NAME.py` records one claim, NAME. It accepts `--json FILE` and `--quick` (`add_flags`); without flags it
measures the figures of the page. Ratios are ours / baseline, of the medians of the same run.
"""

from __future__ import annotations

import argparse
import datetime
import shlex
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.machine import cores_allowed, load, versions
from benchmarks.targets import target_of
from motip.storage.atomic import write_json_atomic


@dataclass(frozen=True)
class Values:
    """Median and spread of n repeats."""

    median: float
    minimum: float
    maximum: float
    repeats: int

    @classmethod
    def of(cls, numbers: Sequence[float] | float) -> Values:
        listed = [float(numbers)] if isinstance(numbers, (int, float)) else [float(number) for number in numbers]
        return cls(statistics.median(listed), min(listed), max(listed), len(listed))

    def text(self) -> str:
        if self.repeats == 1:
            return shown(self.median)
        return f"{shown(self.median)} ({shown(self.minimum)} to {shown(self.maximum)}, n={self.repeats})"


@dataclass(frozen=True)
class Quantity:
    """One measured quantity of ours and of the baseline, if any; the name includes the unit."""

    name: str
    ours: Values
    baseline: Values | None = None

    @property
    def ratio(self) -> float | None:
        if self.baseline is None or self.baseline.median == 0:
            return None
        return self.ours.median / self.baseline.median


@dataclass(frozen=True)
class Record:
    """Results of one piece of work.

    Attributes:
        work: its name, unique within the claim.
        configuration: everything needed to repeat it.
        load: load average before and after.
        baseline: name of the implementation ours is compared with, or None.
        note: a sentence for the page.
        points: for growing work, quantities by name for each size in order; `points[n]["at"]` is the size.
    """

    work: str
    configuration: dict[str, Any]
    command: str
    date: str
    load: tuple[float, float]
    baseline: str | None
    quantities: tuple[Quantity, ...]
    note: str = ""
    points: tuple[dict[str, float], ...] = ()


@dataclass(frozen=True)
class Claim:
    """Records of one run of a script; `not_measured` maps work to the reason."""

    name: str
    title: str
    versions: dict[str, str]
    quick: bool = False
    records: list[Record] = field(default_factory=list)
    not_measured: dict[str, str] = field(default_factory=dict)


def quantity(name: str, ours: Sequence[float] | float, baseline: Sequence[float] | float | None = None) -> Quantity:
    return Quantity(name, Values.of(ours), None if baseline is None else Values.of(baseline))


def add_flags(parser: argparse.ArgumentParser, quick: str = "smoke test, seconds; meaningless figures") -> None:
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the records to FILE")


class Recorder:
    """Collects the records of one run of a script."""

    def __init__(self, claim: str, title: str, args: argparse.Namespace) -> None:
        self.claim = Claim(claim, title, versions(), args.quick)
        self._file: Path | None = args.json
        self._load = load()

    def add(
        self,
        work: str,
        configuration: dict[str, Any],
        baseline: str | None,
        quantities: Sequence[Quantity],
        note: str = "",
        points: Sequence[dict[str, float]] = (),
    ) -> None:
        """Add a record and print it immediately, so that an interrupted run has printed its results."""
        before, self._load = self._load, load()
        record = Record(
            work=work,
            configuration={**configuration, "cores": cores_allowed()},
            command=command(),
            date=datetime.date.today().isoformat(),
            load=(before, self._load),
            baseline=baseline,
            quantities=tuple(quantities),
            note=note,
            points=tuple(points),
        )
        if not self.claim.records:
            print(f"{self.claim.title}: {command()}")
        self.claim.records.append(record)
        print("\n".join(_lines(self.claim.name, record)), flush=True)

    def skip(self, work: str, reason: str) -> None:
        self.claim.not_measured[work] = reason
        print(f"not measured: {work} ({reason})", flush=True)

    def finish(self) -> None:
        if self._file is not None:
            write_json_atomic(self._file, as_json(self.claim))


def command() -> str:
    """Command line of this program without `--json`."""
    words = iter(sys.argv[1:])
    kept = []
    for word in words:
        if word == "--json":
            next(words, None)
        elif not word.startswith("--json="):
            kept.append(word)
    return shlex.join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *kept])


def as_json(claim: Claim) -> dict[str, Any]:
    """The claim as JSON values, including derived ones (ratio, target, verdict)."""
    return {
        "claim": claim.name,
        "title": claim.title,
        "quick": claim.quick,
        "versions": claim.versions,
        "not_measured": claim.not_measured,
        "records": [_record_as_json(claim.name, record) for record in claim.records],
    }


def from_json(found: dict[str, Any]) -> Claim:
    """Inverse of `as_json`; ratio, target and verdict are derived again."""
    return Claim(
        name=found["claim"],
        title=found["title"],
        versions=found["versions"],
        quick=found["quick"],
        records=[_record_from_json(each) for each in found["records"]],
        not_measured=found["not_measured"],
    )


def shown(value: float) -> str:
    """Three significant digits; integers from 1000 on."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _record_as_json(claim: str, record: Record) -> dict[str, Any]:
    return {
        "work": record.work,
        "configuration": record.configuration,
        "command": record.command,
        "date": record.date,
        "load": list(record.load),
        "baseline": record.baseline,
        "quantities": [_quantity_as_json(claim, record.work, each) for each in record.quantities],
        "note": record.note,
        "points": list(record.points),
    }


def _quantity_as_json(claim: str, work: str, one: Quantity) -> dict[str, Any]:
    target = target_of(claim, work, one.name)
    return {
        "name": one.name,
        "ours": _values_as_json(one.ours),
        "baseline": None if one.baseline is None else _values_as_json(one.baseline),
        "ratio": one.ratio,
        "target": None if target is None else target.text(),
        "verdict": None if target is None else target.verdict(one.ours.median, one.ratio),
    }


def _values_as_json(values: Values) -> dict[str, float]:
    return {"median": values.median, "min": values.minimum, "max": values.maximum, "n": values.repeats}


def _record_from_json(found: dict[str, Any]) -> Record:
    def values(each: dict[str, Any]) -> Values:
        return Values(each["median"], each["min"], each["max"], each["n"])

    return Record(
        work=found["work"],
        configuration=found["configuration"],
        command=found["command"],
        date=found["date"],
        load=(found["load"][0], found["load"][1]),
        baseline=found["baseline"],
        quantities=tuple(
            Quantity(each["name"], values(each["ours"]), each["baseline"] and values(each["baseline"]))
            for each in found["quantities"]
        ),
        note=found["note"],
        points=tuple(found["points"]),
    )


def _lines(claim: str, record: Record) -> list[str]:
    """Lines of a record for the terminal."""
    before, after = record.load
    against = f", against {record.baseline}" if record.baseline else ""
    lines = [f"  {record.work}{against} (load {before:g} to {after:g})"]
    for one in record.quantities:
        target = target_of(claim, record.work, one.name)
        parts = [f"    {one.name:<28} {one.ours.text():<34}"]
        if one.baseline is not None:
            parts.append(f"baseline {one.baseline.text():<34}")
        if one.ratio is not None:
            parts.append(f"ratio {one.ratio:.2f}")
        if target is not None:
            parts.append(f"[{target.text()}: {target.verdict(one.ours.median, one.ratio)}]")
        lines.append(" ".join(parts).rstrip())
    return lines
