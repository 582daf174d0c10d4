"""Results per machine: one JSON file, in which new measurements replace old ones."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.machine import hardware, machine_name
from benchmarks.records import Claim, Record, as_json, from_json
from motip.errors import MotipError
from motip.storage.atomic import write_json_atomic

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "performance"


@dataclass
class Machine:
    """Measurements of one machine.

    Attributes:
        name: stem of the file.
        hardware: from `benchmarks.machine.hardware`.
        claims: by name.
    """

    name: str
    hardware: dict[str, Any]
    claims: dict[str, Claim]

    def heading(self) -> str:
        found = self.hardware
        gpu = f"{found['gpu']['name']} ({found['gpu']['memory_gb']} GB), " if found["gpu"] else ""
        return f"{gpu}{found['cpu']}, {found['cores']} cores, {found['memory_gb']} GB"


def this_machine(folder: Path = FOLDER) -> Machine:
    """This machine with its previous measurements."""
    found = hardware()
    path = folder / f"{machine_name(found)}.json"
    machine = read(path) if path.is_file() else Machine(path.stem, found, {})
    machine.hardware = found
    return machine


def read(path: Path) -> Machine:
    try:
        found = json.loads(path.read_text())
        claims = {name: from_json(claim) for name, claim in found["claims"].items()}
        return Machine(path.stem, found["machine"], claims)
    except (ValueError, KeyError, TypeError) as error:
        raise MotipError(
            f"not a results file: {type(error).__name__} {error}",
            where=path,
            expected="a file written by python -m benchmarks",
            fix="restore it from the repository, or delete it and measure again",
        ) from error


def read_all(folder: Path = FOLDER) -> list[Machine]:
    """All machines, sorted by name for a deterministic page."""
    return [read(path) for path in sorted(folder.glob("*.json"))]


def write(machine: Machine, folder: Path = FOLDER) -> Path:
    path = folder / f"{machine.name}.json"
    write_json_atomic(path, document(machine))
    return path


def document(machine: Machine) -> dict[str, Any]:
    return {"machine": machine.hardware, "claims": {name: as_json(claim) for name, claim in machine.claims.items()}}


def merge(machine: Machine, claim: Claim) -> None:
    """Add a claim to those of the machine.

    Records of the same script with other arguments and of other work are kept with their date.

    Raises:
        MotipError: the claim is from a quick run.
    """
    if claim.quick:
        raise MotipError(
            "a quick run is a smoke test of the script, not a measurement",
            where=f"claim {claim.name}",
            fix="measure without --quick",
        )
    before = machine.claims.get(claim.name)
    kept = _others(before, claim) if before else []
    works = {record.work for record in kept}
    missing = {work: reason for work, reason in claim.not_measured.items() if work not in works}
    machine.claims[claim.name] = replace(claim, records=[*claim.records, *kept], not_measured=missing)


def _others(before: Claim, claim: Claim) -> list[Record]:
    """Records of another command and of other work, with the versions they were measured with."""
    commands = {record.command for record in claim.records}
    works = {record.work for record in claim.records}
    kept = [record for record in before.records if record.command not in commands and record.work not in works]
    if before.versions == claim.versions:
        return kept
    versions = ", ".join(f"{name} {version}" for name, version in before.versions.items())
    return [replace(record, configuration={"versions": versions, **record.configuration}) for record in kept]
