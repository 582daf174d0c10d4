"""gpu_checks without a GPU: smoke test on the CPU; its copies of configuration and fallbacks equal the originals."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.attention_cost import Ceilings, Shape, as_dict, backward_cost, forward_cost
from benchmarks.bench_gpu import add_section
from benchmarks.gpu_step import AERIAL, FALLBACKS
from benchmarks.records import Recorder
from benchmarks.targets import TARGETS
from motip.config import load_config
from motip.model import ModelSpec
from motip.train.oom import oom_fallbacks

_BARE = """
import runpy, sys
for name in ("ray", "mlflow", "pydantic", "yaml", "cv2", "pyarrow", "av", "typer", "triton"):
    sys.modules[name] = None  # cannot be imported
script, sys.argv = sys.argv[1], sys.argv[1:]
runpy.run_path(script, run_name="__main__")
"""


def test_spec_and_fallbacks_equal_those_of_the_aerial_stage(repo_root: Path) -> None:
    config = load_config(repo_root / "configs/visdrone_stage2.yaml", ["sampler_lengths=[5]"])
    assert ModelSpec.from_config(config) == AERIAL
    assert oom_fallbacks(config) == FALLBACKS


@pytest.mark.timeout(900)
def test_script_runs_with_torch_only(repo_root: Path, tmp_path: Path) -> None:
    out = tmp_path / "tiny.json"
    script = repo_root / "benchmarks/gpu_checks.py"
    sections = ["attention", "training", "launches", "memory", "tracking"]
    result = subprocess.run(
        [sys.executable, "-c", _BARE, script, "--out", out, "--tiny", "--device", "cpu", "--only", *sections],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-4000:]
    report = json.loads(out.read_text())
    assert set(report) == {"machine", "tiny", *sections} and report["tiny"] is True
    attention = report["attention"][1:]
    assert all(case["forward"]["seconds"] > 0 and case["greatest_difference"] < 0.05 for case in attention)
    losses = [case["first_loss"] for case in report["training"]]
    assert max(losses) - min(losses) < 0.05 * losses[0]
    assert [case["fallback"] for case in report["memory"]] == [each.name for each in FALLBACKS] * 2
    # All fallbacks but the last give the same gradients, hence the same loss.
    assert len({round(case["first_loss"], 3) for case in report["memory"][: len(FALLBACKS) - 1]}) == 1
    assert all(case["boxes_per_frame"] > 0 for case in report["tracking"])
    assert all(case["wall_seconds"] > 0 == case["launches"] for case in report["launches"]), "no GPU here"
    recorder = as_records(report)
    assert len(recorder.claim.records) == sum(len(report[section]) for section in sections) - 1  # ceilings
    assert all(record.quantities for record in recorder.claim.records)


def as_records(report: dict) -> Recorder:
    recorder = Recorder("gpu", "On a GPU", argparse.Namespace(quick=True, json=None))
    for section, cases in report.items():
        if section not in ("machine", "tiny"):
            add_section(recorder, section, cases, {})
    return recorder


def test_cases_become_records() -> None:
    """Ratios are to the first case, memory is in GB, and out-of-memory cases are recorded as not measured."""
    step = {"size": (480, 864), "objects": 20, "clips_per_second": 2.0, "peak_bytes": 10e9, "peak_reserved": 12e9}
    clip = {"size": (672, 1100), "objects": 200, "attention": "triton"}
    frames = {"size": (1080, 1920), "attention": "grid_sample", "frames_per_second": 4.0}
    report = {
        "training": [
            {**step, "half": "None", "attention": "grid_sample"},
            {**step, "half": "torch.bfloat16", "attention": "triton", "clips_per_second": 5.0, "peak_bytes": 5e9},
        ],
        "memory": [
            {**clip, "fallback": "as configured", "out_of_memory": "tried 4 GB"},
            {**clip, "fallback": "one image at a time", "clips_per_second": 1.0, "peak_reserved": 21e9},
        ],
        "tracking": [
            {**frames, "dtype": "FP32"},
            {**frames, "dtype": "BF16", "attention": "auto", "frames_per_second": 10.0},
        ],
        "compile": [
            {"compiled": None, "clips_per_second": 5.0, "first_step_seconds": 1.0},
            {"compiled": "inductor", "clips_per_second": 6.0, "first_step_seconds": 60.0},
        ],
    }
    claim = as_records(report).claim
    found = {(record.work, each.name): each for record in claim.records for each in record.quantities}
    assert found["training step, bf16, triton", "clips/s"].ratio == 2.5
    assert found["training step, bf16, triton", "peak GB"].ratio == 0.5
    assert found["tracking, bf16, auto", "frames/s"].ratio == 2.5
    assert found["training step, bf16, torch.compile inductor", "s of the first step"].ratio == 60
    assert claim.not_measured == {"worst aerial clip, as configured, triton": "out of memory: tried 4 GB"}
    # The names of the GPU targets match those of the records.
    names = [(target.work, target.quantity) for target in TARGETS if target.claim == "gpu"]
    assert len(names) == 3 and [each for each in names if each not in found] == []


def test_costs_against_a_count_by_hand() -> None:
    """Two samples of two channels on a map of six pixels, for one query of one head."""
    shape = Shape([(2, 3)], queries=1, heads=1, channels=2, points=2)
    assert shape.samples == 2
    forward = forward_cost(shape)
    assert forward.flops == 2 * (4 * 2 * 2 + 24)
    assert forward.bytes == 4 * (6 * 2 + 2 + 2 * 2 + 2)  # map, output, locations, weights
    assert forward.sampled == 2 * 4 * 2 * 4
    backward = backward_cost(shape)
    # map and incoming gradient read, the map's gradient cleared and written, locations and weights read and written
    assert backward.bytes == 4 * (6 * 2 + 2 + 2 * 6 * 2 + 2 * (2 * 2 + 2))
    assert backward_cost(shape, 2).bytes == 2 * (6 * 2 + 2) + 6 * 2 * (8 + 4 + 2) + 4 * 2 * (2 * 2 + 2)
    assert backward.sampled == 2 * forward.sampled
    least = Ceilings(memory=1e3, cache=1e9, flops=1e9).least_seconds(forward)
    assert least == forward.bytes / 1e3
    assert as_dict(forward, Ceilings(1e3, 1e9, 1e9), 2 * least)["share_of_ceiling"] == 0.5
