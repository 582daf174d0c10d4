"""The results of one machine: one JSON file, in which a claim that is measured again takes the place of the old one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from motip.errors import MotipError
from motip.files import write_json_atomic
from tests.benchmarks.machine import hardware, machine_name
from tests.benchmarks.records import Claim, as_json, from_json

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs" / "performance"


@dataclass
class Machine:
    """What was measured on one machine.

    Attributes:
        name: stem of the file.
        hardware: as `tests.benchmarks.machine.hardware` gives it.
        claims: by name.
    """

    name: str
    hardware: dict[str, Any]
    claims: dict[str, Claim]

    def heading(self) -> str:
        found = self.hardware
        card = f"{found['gpu']['name']} ({found['gpu']['memory_gb']} GB), " if found["gpu"] else ""
        return f"{card}{found['cpu']}, {found['cores']} cores, {found['memory_gb']} GB"


def this_machine(folder: Path = FOLDER) -> Machine:
    """This machine with what was measured on it before."""
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
            expected="what python -m tests.benchmarks wrote",
            fix="restore it from the repository, or delete it and measure again",
        ) from error


def read_all(folder: Path = FOLDER) -> list[Machine]:
    """By name, so that the page is always the same."""
    return [read(path) for path in sorted(folder.glob("*.json"))]


def write(machine: Machine, folder: Path = FOLDER) -> Path:
    path = folder / f"{machine.name}.json"
    write_json_atomic(path, document(machine))
    return path


def document(machine: Machine) -> dict[str, Any]:
    return {"machine": machine.hardware, "claims": {name: as_json(claim) for name, claim in machine.claims.items()}}


def merge(machine: Machine, claim: Claim) -> None:
    """Put the claim in the place of the one of the same name.

    Raises:
        MotipError: it comes from a quick run, whose figures mean nothing.
    """
    if claim.quick:
        raise MotipError(
            "a quick run is a test of the script, not a measurement",
            where=f"claim {claim.name}",
            fix="measure without --quick",
        )
    machine.claims[claim.name] = claim
