"""Records: median and spread, ratio and verdict, JSON round trip, merging, and the recorder."""

from __future__ import annotations

import argparse
import json
import mmap
import sys
import time
from pathlib import Path

import pytest

from benchmarks import records
from benchmarks.machine import Stopwatch, hardware, machine_name, memory_mb
from benchmarks.plots import exponent
from benchmarks.records import Claim, Quantity, Record, Recorder, Values, as_json, from_json, quantity, shown
from benchmarks.results import Machine, document, merge, read, write
from benchmarks.targets import Target
from motip.errors import MotipError


def recorded(tmp_path: Path, quick: bool = False) -> Path:
    """File written by a script with two records and one skipped work."""
    file = tmp_path / "tracker.json"
    recorder = Recorder("tracker", "Tracker", argparse.Namespace(quick=quick, json=file))
    recorder.add(
        "20 objects",
        {"threads": 1},
        "the naive form",
        [quantity("ms per frame", [9.0, 8.0, 10.0], [40.0, 36.0]), quantity("ids", 20)],
        note="A note.",
    )
    recorder.add("50 objects", {"threads": 1}, None, [quantity("ms per frame", 30.0)])
    recorder.skip("200 objects", "no time")
    recorder.finish()
    return file


def test_median_spread_and_repeats() -> None:
    assert Values.of([3.0, 1.0, 2.0, 10.0]) == Values(2.5, 1.0, 10.0, 4)
    assert Values.of(2) == Values(2.0, 2.0, 2.0, 1)
    assert Values.of([3.0, 1.0, 2.0]).text() == "2 (1 to 3, n=3)"
    assert Values.of(0.0123).text() == "0.0123"
    assert [shown(value) for value in (0, 3e-6, 14.26, 6796.4)] == ["0", "3e-06", "14.3", "6796"]


def test_ratio_is_that_of_the_medians() -> None:
    assert quantity("s", [1.0, 2.0, 9.0], [4.0, 4.0, 40.0]).ratio == 0.5
    assert quantity("s", 1.0).ratio is None and quantity("s", 1.0, 0.0).ratio is None


@pytest.mark.parametrize(
    ("of", "way", "limit", "ours", "baseline", "expected"),
    [
        ("ours", "at most", 11, 11.0, None, "met"),
        ("ours", "at most", 11, 11.1, 1.0, "missed"),
        ("ratio", "at most", 0.5, 5.0, 10.0, "met"),
        ("ratio", "at most", 0.5, 5.1, 10.0, "missed"),
        ("ratio", "at least", 1.5, 3.0, 2.0, "met"),
        ("ratio", "at least", 1.5, 2.9, 2.0, "missed"),
        ("ratio", "at least", 1.5, 2.9, None, "no baseline"),
    ],
)
def test_verdicts(of: str, way: str, limit: float, ours: float, baseline: float | None, expected: str) -> None:
    target = Target("claim", "label", "work", "s", of, way, limit)  # type: ignore[arg-type]
    assert target.verdict(ours, quantity("s", ours, baseline).ratio) == expected


def test_recorder_writes_and_prints_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(recorded(tmp_path).read_text())
    assert (found["claim"], found["quick"], found["not_measured"]) == ("tracker", False, {"200 objects": "no time"})
    assert "torch" in found["versions"]
    first, second = found["records"]
    assert first["configuration"]["threads"] == 1 and first["configuration"]["cores"] >= 1
    assert len(first["date"]) == 10 and len(first["load"]) == 2
    milliseconds, ids = first["quantities"]
    assert milliseconds["ours"] == {"median": 9.0, "min": 8.0, "max": 10.0, "n": 3}
    assert milliseconds["ratio"] == pytest.approx(9 / 38)
    assert (milliseconds["target"], milliseconds["verdict"]) == ("≤ 11", "met")
    assert (ids["target"], ids["verdict"], ids["baseline"], ids["ratio"]) == (None, None, None, None)
    assert (second["baseline"], second["quantities"][0]["verdict"]) == (None, "missed")
    printed = capsys.readouterr().out
    assert "20 objects, against the naive form" in printed and "not measured: 200 objects (no time)" in printed


def test_json_round_trip(tmp_path: Path) -> None:
    found = json.loads(recorded(tmp_path).read_text())
    claim = from_json(found)
    assert as_json(claim) == found
    assert claim.records[0].quantities[0] == Quantity("ms per frame", Values(9, 8, 10, 3), Values(38, 36, 40, 2))


def test_command_is_reproducible(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["any/folder/bench_data.py", "--json", "any/folder/out.json", "--lengths", "5", "--json=x", "--quick"]
    monkeypatch.setattr(sys, "argv", words)
    assert records.command() == "python -m benchmarks.bench_data --lengths 5 --quick"


def test_merging_replaces_one_claim(tmp_path: Path) -> None:
    claim = from_json(json.loads(recorded(tmp_path).read_text()))
    machine = Machine("box", {"cpu": "C", "cores": 2, "memory_gb": 4, "gpu": None}, {})
    merge(machine, claim)
    other = from_json({**as_json(claim), "claim": "data", "title": "Data"})
    merge(machine, other)
    renewed = from_json({**as_json(claim), "records": as_json(claim)["records"][:1]})
    merge(machine, renewed)
    write(machine, tmp_path)
    again = read(tmp_path / "box.json")
    assert document(again) == document(machine)
    assert [len(again.claims[name].records) for name in ("tracker", "data")] == [1, 2]


def test_records_of_other_arguments_are_kept() -> None:
    def claim(torch: str, command: str, **seconds: float) -> Claim:
        records = [
            Record(work, {}, command, "2026-01-01", (0, 0), None, (quantity("s", value),))
            for work, value in seconds.items()
        ]
        return Claim("data", "Data", {"torch": torch}, records=records, not_measured={"more": "no time"})

    machine = Machine("box", {}, {})
    merge(machine, claim("2.9", "bench", small=1.0, gone=1.0))
    merge(machine, claim("2.9", "bench --more", more=2.0))
    merge(machine, claim("3.0", "bench", small=3.0))
    found = machine.claims["data"]
    assert [(each.work, each.quantities[0].ours.median) for each in found.records] == [("small", 3.0), ("more", 2.0)]
    assert found.versions == {"torch": "3.0"} and found.records[1].configuration == {"versions": "torch 2.9"}
    assert found.not_measured == {}
    # The same work by another command replaces the record.
    merge(machine, claim("3.0", "bench --fast", small=0.5))
    assert [each.quantities[0].ours.median for each in machine.claims["data"].records] == [0.5, 2.0]


def test_merging_a_quick_run_is_an_error(tmp_path: Path) -> None:
    claim = from_json(json.loads(recorded(tmp_path, quick=True).read_text()))
    machine = Machine("box", {}, {})
    with pytest.raises(MotipError, match="quick run"):
        merge(machine, claim)
    assert machine.claims == {}


@pytest.mark.parametrize("text", ["{", "{}", '{"machine": {}, "claims": {"a": {}}}', "[]"])
def test_damaged_results_file_is_an_error(tmp_path: Path, text: str) -> None:
    file = tmp_path / "box.json"
    file.write_text(text)
    with pytest.raises(MotipError, match=r"not a results file(.|\n)*box\.json"):
        read(file)


def test_machine_is_named_by_gpu_or_processor() -> None:
    gpu = {"name": "NVIDIA H100 80GB HBM3", "memory_gb": 85, "cuda": "12.8"}
    assert machine_name({"cpu": "AMD EPYC", "cores": 2, "gpu": None}) == "amd-epyc-2-cores"
    assert machine_name({"cpu": "AMD EPYC", "cores": 2, "gpu": gpu}) == "nvidia-h100-80gb-hbm3"
    assert set(hardware()) == {"cpu", "cores", "memory_gb", "gpu", "system"}


def test_memory_is_that_of_this_process() -> None:
    before = memory_mb("VmRSS")
    with mmap.mmap(-1, 50_000_000) as mapping:  # new pages, independent of malloc
        mapping.write(b"1" * 50_000_000)
        assert memory_mb("VmRSS") > before + 40 and memory_mb("VmHWM") >= memory_mb("VmRSS") - 1


def test_stopwatch_measures_each_block() -> None:
    stopwatch = Stopwatch()
    with stopwatch:
        sum(range(200_000))
    with stopwatch:
        time.sleep(0.05)
    assert len(stopwatch.wall_s) == len(stopwatch.cpu_s) == 2
    assert stopwatch.cpu_s[0] > 0 and stopwatch.wall_s[1] >= 0.05 > stopwatch.cpu_s[1]


def test_exponent_of_a_power_law() -> None:
    sizes = [2.0, 5.0, 10.0, 30.0]
    assert exponent(sizes, [3 * size**1.7 for size in sizes]) == pytest.approx((1.7, 3.0))
