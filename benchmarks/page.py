"""Renderer of docs/performance.md (targets), docs/performance-details.md (every table) and their plots.

    python -m benchmarks.page

Both are rendered from docs/performance/*.json. Hand-written notes are in docs/performance_notes/CLAIM.md and follow the
tables of their claim; `head.md` opens the first page, `cuda.md` closes the second.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import plots
from benchmarks.records import Claim, Quantity, Record, Values, shown
from benchmarks.results import FOLDER, ROOT, Machine, read_all
from benchmarks.targets import TARGETS, Target
from motip.storage.atomic import atomic_write

PAGE = ROOT / "docs" / "performance.md"
DETAILS = ROOT / "docs" / "performance-details.md"
NOTES = ROOT / "docs" / "performance_notes"
PICTURES = ROOT / "docs" / "pictures"
ORDER = (
    "detector",
    "step",
    "id_decoder",
    "tracker",
    "deformable_attention",
    "data",
    "stream_memory",
    "evaluation",
    "video",
    "demo",
    "gpu",
    "growth",
    "scale",
)
"""Order of the sections; others follow by name."""

HEAD = """\
# Performance

*Written by `python -m benchmarks.page` from the results in [performance](performance); do not edit by hand.
`make bench` runs all benchmarks on this machine, `python -m benchmarks --only tracker` one of them.*
"""

DETAILS_HEAD = """\
# Performance: every measurement

*Written by `python -m benchmarks.page` from the results in [performance](performance); do not edit by hand. The targets
and the missing measurements are in [performance.md](performance.md).*
"""


def render(machines: list[Machine], notes: Path = NOTES) -> str:
    """The page of targets: per machine one row per target and the missing measurements; links to the details."""
    parts = [HEAD, _note(notes, "head")]
    for machine in machines:
        parts += [f"## Targets: {machine.heading()}", _target_table(machine), *_not_measured(machine)]
    titles = [_with_records(name, machines)[0][1].title for name in _claims(machines)]
    links = [f"* [{title}]({DETAILS.name}#{_anchor(title)})" for title in titles]
    parts += ["## Measurements", "\n".join(links)]
    return _joined(parts)


def render_details(machines: list[Machine], notes: Path = NOTES) -> str:
    """The page of measurements: per claim its tables, plots and notes."""
    parts = [DETAILS_HEAD]
    for name in _claims(machines):
        parts += _section(name, machines, _note(notes, name))
    parts += [_note(notes, "cuda")]
    return _joined(parts)


def write() -> None:
    """Render both pages and their plots."""
    machines = read_all(FOLDER)
    plots.draw(machines, PICTURES)
    for page, text in ((PAGE, render(machines)), (DETAILS, render_details(machines))):
        with atomic_write(page) as temporary:
            temporary.write_text(text)


def _claims(machines: list[Machine]) -> list[str]:
    """Names of the claims with records, in the order of the page."""
    names = {name for machine in machines for name, claim in machine.claims.items() if claim.records}
    return [*(each for each in ORDER if each in names), *sorted(names - set(ORDER))]


def _joined(parts: list[str]) -> str:
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def _anchor(title: str) -> str:
    """The fragment that GitHub and MkDocs give a heading."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


def _note(notes: Path, name: str) -> str:
    path = notes / f"{name}.md"
    return path.read_text() if path.is_file() else ""


def _target_table(machine: Machine) -> str:
    heads = ["work", "quantity", "ours", "baseline", "ratio", "target", "verdict", "measured on"]
    return _table(heads, [_target_row(target, machine) for target in _targets_of(machine)])


def _targets_of(machine: Machine) -> list[Target]:
    """Targets of this kind of machine, and others that were measured on it."""
    has_gpu = machine.hardware["gpu"] is not None
    return [target for target in TARGETS if target.gpu == has_gpu or _found(target, machine)]


def _target_row(target: Target, machine: Machine) -> list[str]:
    found = _found(target, machine)
    if found is None:
        return [target.label, target.quantity, "", "", "", target.text(), "not measured", ""]
    record, one = found
    verdict = target.verdict(one.ours.median, one.ratio)
    base = shown(one.baseline.median) if one.baseline else ""
    marked = verdict if verdict == "met" else f"**{verdict}**"
    figures = [shown(one.ours.median), base, _ratio(one.ratio)]
    return [target.label, target.quantity, *figures, target.text(), marked, record.date]


def _found(target: Target, machine: Machine) -> tuple[Record, Quantity] | None:
    claim = machine.claims.get(target.claim)
    for record in claim.records if claim else []:
        for one in record.quantities:
            if (record.work, one.name) == (target.work, target.quantity):
                return record, one
    return None


def _not_measured(machine: Machine) -> list[str]:
    missing: dict[str, list[str]] = {}
    for target in _targets_of(machine):
        if _found(target, machine) is None:
            missing.setdefault(target.claim, []).append(f"{target.label} ({target.quantity})")
    lines = [
        f"* {'; '.join(labels)}: `python -m benchmarks --only {claim}` has not run on this machine."
        for claim, labels in missing.items()
    ]
    for measured in machine.claims.values():
        lines += [f"* {measured.title}, {work}: {reason}." for work, reason in measured.not_measured.items()]
    if machine.hardware["gpu"] is None:
        labels = [f"{each.label} {each.text()} ({each.quantity})" for each in TARGETS if each.gpu]
        lines.append(f"* CUDA, as this machine has no GPU. Targets on one: {'; '.join(labels)}.")
    return ["**Not measured on this machine:**", "\n".join(lines)] if lines else []


def _section(name: str, machines: list[Machine], note: str) -> list[str]:
    having = _with_records(name, machines)
    parts = [f"## {having[0][1].title}"]
    for machine, claim in having:
        if len(machines) > 1:
            parts.append(f"**{machine.heading()}**")
        parts += _claim(claim)
    return [*parts, note]


def _with_records(name: str, machines: list[Machine]) -> list[tuple[Machine, Claim]]:
    """The claim on each machine that has records of it."""
    found = [(machine, machine.claims.get(name)) for machine in machines]
    return [(machine, claim) for machine, claim in found if claim is not None and claim.records]


def _claim(claim: Claim) -> Iterator[str]:
    """Tables of a claim; consecutive records of one command share a table."""
    groups: list[list[Record]] = []
    for record in claim.records:
        if groups and _key(groups[-1][0]) == _key(record):
            groups[-1].append(record)
        else:
            groups.append([record])
    for group in groups:
        yield _origin(claim, group)
        yield _quantity_table(group)
        for record in group:
            if record.points:
                yield f"![Cost against {record.work}](pictures/{plots.file_name(record.work)})"
                yield _point_table(record)
            own = {name: value for name, value in record.configuration.items() if name not in _shared(group)}
            text = " ".join([*([_settings(own) + "."] if own else []), record.note]).strip()
            if text:
                yield f"*{record.work}*: {text}" if len(group) > 1 else text


def _key(record: Record) -> tuple[str, str, str | None]:
    return record.command, record.date, record.baseline


def _origin(claim: Claim, group: list[Record]) -> str:
    """Command, date, load, baseline, and the shared configuration of the group."""
    loads = [value for record in group for value in record.load]
    load = f"load {min(loads):g}" + (f" to {max(loads):g}" if max(loads) > min(loads) else "")
    parts = [f"`{group[0].command}`", group[0].date, load]
    parts += [_settings(_shared(group))] if _shared(group) else []
    parts += [f"PyTorch {claim.versions['torch']}"] if "torch" in claim.versions else []
    against = f" Baseline: {group[0].baseline}." if group[0].baseline else ""
    return "; ".join(parts) + "." + against


def _shared(group: list[Record]) -> dict[str, Any]:
    """Configuration entries common to all records of the group."""
    return {
        name: value
        for name, value in group[0].configuration.items()
        if all(name in record.configuration and record.configuration[name] == value for record in group)
    }


def _settings(configuration: dict[str, Any]) -> str:
    def plain(value: Any) -> str:
        return ", ".join(map(str, value)) if isinstance(value, list) else str(value)

    return "; ".join(f"{name.replace('_', ' ')} {plain(value)}" for name, value in configuration.items())


def _quantity_table(group: list[Record]) -> str:
    with_baseline = any(one.baseline for record in group for one in record.quantities)
    rows = []
    for record in group:
        for number, one in enumerate(record.quantities):
            row = [record.work if number == 0 else "", one.name, one.ours.text()]
            rows.append([*row, _text(one.baseline), _ratio(one.ratio)] if with_baseline else row)
    heads = ["work", "quantity", "ours"]
    return _table([*heads, "baseline", "ours / baseline"] if with_baseline else heads, rows)


def _point_table(record: Record) -> str:
    names = [name for name in record.points[0] if name != "at"]
    return _table([record.work, *names], [[shown(p["at"]), *(shown(p[name]) for name in names)] for p in record.points])


def _text(values: Values | None) -> str:
    return "" if values is None else values.text()


def _ratio(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2g}" if ratio < 0.1 else f"{ratio:.2f}"


def _table(heads: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [heads, ["---"] * len(heads), *rows])


if __name__ == "__main__":
    write()
