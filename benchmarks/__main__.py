"""Benchmark runner: results of this machine into docs/performance/, rendered to docs/performance.md.

    python -m benchmarks                       # all (make bench)
    python -m benchmarks --only tracker data   # some; the others keep their results with their date
    python -m benchmarks --list                # names, and when each was measured on this machine
    python -m benchmarks --quick               # smoke test of every script, seconds each; no results are kept
    python -m benchmarks --only gpu --out DIR  # results into another folder, to be copied to docs/performance/

A claim is a file `bench_NAME.py`; each runs in a separate process. A failed one is reported at the end and keeps its
previous results. The pages are written after each claim, so that an interrupted run keeps its results.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import page
from benchmarks.records import Claim, from_json
from benchmarks.results import FOLDER, ROOT, Machine, merge, this_machine, write
from motip.errors import MotipError, exit_on_error

HERE = Path(__file__).resolve().parent
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "MLFLOW_DISABLE_TELEMETRY": "true"}


def names(folder: Path = HERE) -> list[str]:
    return sorted(path.stem.removeprefix("bench_") for path in folder.glob("bench_*.py"))


def chosen(only: list[str], known: list[str]) -> list[str]:
    unknown = [name for name in only if name not in known]
    if unknown:
        raise MotipError(
            "no such benchmark", where="--only", found=", ".join(unknown), expected=f"some of {', '.join(known)}"
        )
    return [name for name in known if not only or name in only]


def measured(name: str, quick: bool, package: str = "benchmarks", root: Path = ROOT) -> Claim | None:
    """Run one script in a separate process; None if it failed (the script prints the reason)."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{name}.json"
        command = [sys.executable, "-m", f"{package}.bench_{name}", "--json", str(file)]
        command += ["--quick"] if quick else []
        done = subprocess.run(command, cwd=root, env={**os.environ, **QUIET}, check=False)
        if done.returncode != 0 or not file.is_file():
            print(f"{name}: failed with status {done.returncode}", file=sys.stderr, flush=True)
            return None
        return from_json(json.loads(file.read_text()))


def run(selected: list[str], measure: Callable[[str], Claim | None], keep: Callable[[Claim], None]) -> list[str]:
    """Measure the claims in turn and pass each to `keep`; returns the names of those that failed."""
    failed = []
    for name in selected:
        print(f"== {name}", flush=True)
        began = time.perf_counter()
        claim = measure(name)
        if claim is None:
            failed.append(name)
            continue
        keep(claim)
        print(f"== {name}: {time.perf_counter() - began:.0f} s", flush=True)
    return failed


def listing(known: list[str], machine: Machine) -> str:
    lines = [f"{machine.name}: {machine.heading()}"]
    for name in known:
        claim = machine.claims.get(name)
        dates = sorted({record.date for record in claim.records}) if claim else []
        lines.append(f"  {name:<22} {', '.join(dates) or 'not measured here'}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="only these benchmarks")
    parser.add_argument("--list", action="store_true", help="list benchmarks and when each was measured here")
    parser.add_argument("--quick", action="store_true", help="smoke test of the scripts; no results are kept")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the results; the pages are not rendered")
    args = parser.parse_args()
    known, folder = names(), args.out or FOLDER
    if args.list:
        print(listing(known, this_machine(folder)))
        return

    def keep(claim: Claim) -> None:
        # Read again each time: a concurrent run may have written another claim.
        machine = this_machine(folder)
        merge(machine, claim)
        print(f"written to {write(machine, folder).name}", flush=True)
        if args.out is None:
            page.write()

    failed = run(
        chosen(args.only, known),
        lambda name: measured(name, args.quick),
        (lambda claim: None) if args.quick else keep,
    )
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    with exit_on_error():
        main()
