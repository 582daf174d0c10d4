"""`python -m benchmarks`: discovery of scripts, one process each, handling of failures."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.records import Claim
from benchmarks.results import Machine
from benchmarks.targets import TARGETS
from motip.errors import MotipError

runner = importlib.import_module("benchmarks.__main__")

SCRIPT = """
import argparse
from benchmarks.records import Recorder, add_flags, quantity

parser = argparse.ArgumentParser()
add_flags(parser)
args = parser.parse_args()
recorder = Recorder("good", "A good one", args)
recorder.add("work", {"size": 1 if args.quick else 100}, None, [quantity("s", 1.0)])
recorder.finish()
"""


@pytest.fixture
def scripts(tmp_path: Path, repo_root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "fake"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "bench_good.py").write_text(SCRIPT)
    (folder / "bench_bad.py").write_text("raise SystemExit('the two sides disagree')")
    (folder / "bench_silent.py").write_text("")
    (folder / "other.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(repo_root))
    return folder


def test_scripts_are_found_by_name(scripts: Path) -> None:
    assert runner.names(scripts) == ["bad", "good", "silent"]
    assert {"data", "tracker", "growth", "evaluation"} <= set(runner.names())
    assert {target.claim for target in TARGETS if target.claim not in runner.names()} == set()


def test_selection_by_name() -> None:
    known = ["data", "growth", "tracker"]
    assert runner.chosen([], known) == known
    assert runner.chosen(["tracker", "data"], known) == ["data", "tracker"]
    with pytest.raises(MotipError, match=r"no such benchmark(.|\n)*trakcer"):
        runner.chosen(["trakcer"], known)


def test_each_script_runs_in_a_separate_process(scripts: Path, capfd: pytest.CaptureFixture[str]) -> None:
    claim = runner.measured("good", False, package="fake", root=scripts.parent)
    assert claim.records[0].configuration["size"] == 100 and not claim.quick
    assert runner.measured("good", True, package="fake", root=scripts.parent).quick
    assert runner.measured("bad", False, package="fake", root=scripts.parent) is None
    assert "the two sides disagree" in capfd.readouterr().err
    # A script that writes no records has failed, even with exit status 0.
    assert runner.measured("silent", False, package="fake", root=scripts.parent) is None


def test_failed_script_does_not_stop_the_others() -> None:
    claims = {name: Claim(name, name, {}) for name in ("first", "last")}
    kept: list[Claim] = []
    assert runner.run(["first", "broken", "last"], claims.get, kept.append) == ["broken"]
    assert kept == list(claims.values())


def test_list_marks_scripts_that_were_not_measured() -> None:
    machine = Machine("box", {"cpu": "C", "cores": 2, "memory_gb": 4, "gpu": None}, {})
    assert runner.listing(["data"], machine).splitlines()[1].split() == ["data", "not", "measured", "here"]


def test_unknown_name_is_an_error(repo_root: Path) -> None:
    words = [sys.executable, "-m", "benchmarks", "--only", "nothing"]
    done = subprocess.run(words, cwd=repo_root, capture_output=True, text=True)
    assert done.returncode == 2 and "no such benchmark" in done.stderr and "Traceback" not in done.stderr
