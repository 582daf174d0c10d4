"""Records of the measurements of `gpu_checks.py` on a CUDA GPU.

    python -m benchmarks.bench_gpu           # minutes, on a GPU
    python -m benchmarks.bench_gpu --quick   # smoke test with tiny sizes

Without a GPU it records that nothing was measured. Baseline of training and tracking is float32 with PyTorch's own
deformable attention, that of attention is `grid_sample` in the same type.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from benchmarks.gpu_checks import SECTIONS, Case, Checks
from benchmarks.records import Quantity, Recorder, add_flags, quantity

GB = 1e9
PLAIN = "float32 with PyTorch's own attention"


def add_section(recorder: Recorder, section: str, cases: list[Case], settings: dict[str, Any]) -> None:
    """Add the cases of one section of `gpu_checks.Checks`."""
    ADD[section](recorder, cases, settings)


def _attention(recorder: Recorder, cases: list[Case], settings: dict[str, Any]) -> None:
    ceilings, *cases = cases
    settings = {**settings, **{f"{name} per s": f"{rate:.3g}" for name, rate in ceilings["ceilings"].items()}}
    first: dict[tuple[str, str], Case] = {}
    for case in cases:
        base = first.setdefault((case["shape"], case["dtype"]), case)
        quantities = []
        for way in ("forward", "backward"):
            if way in case and way in base:
                quantities += [
                    quantity(f"{way} ms", 1e3 * case[way]["seconds"], 1e3 * base[way]["seconds"]),
                    quantity(f"{way}, % of the roofline", 100 * case[way]["share_of_ceiling"]),
                ]
        work = f"attention, {case['shape']}, {_type(case['dtype'])}, {case['side']}"
        _add(recorder, work, case, settings, "grid_sample", quantities)


def _training(recorder: Recorder, cases: list[Case], settings: dict[str, Any]) -> None:
    for case in cases:
        work = f"training step, {_type(case['half'])}, {case['attention']}"
        shape = {**settings, "size": list(case["size"]), "frames": 5, "objects": case["objects"]}
        _add(recorder, work, case, shape, PLAIN, _rates(case, cases[0], "clips_per_second", "clips/s"))


def _launches(recorder: Recorder, cases: list[Case], settings: dict[str, Any]) -> None:
    for case in cases:
        work = f"launches of a training step, {_type(case['half'])}, {case['attention']}"
        shape = {**settings, "size": list(case["size"]), "frames": 5, "objects": case["objects"]}
        milliseconds = [quantity(f"{name} ms", 1e3 * case[f"{name}_seconds"]) for name in ("wall", "kernel")]
        _add(recorder, work, case, shape, None, [*milliseconds, quantity("launches", case["launches"])])


def _memory(recorder: Recorder, cases: list[Case], settings: dict[str, Any]) -> None:
    for case in cases:
        work = f"worst aerial clip, {case['fallback']}, {case['attention']}"
        shape = {**settings, "size": list(case["size"]), "frames": 5, "objects": case["objects"], "type": "bf16"}
        _add(recorder, work, case, shape, None, _rates(case, {}, "clips_per_second", "clips/s"))


def _compile(recorder: Recorder, cases: list[Case], settings: dict[str, Any]) -> None:
    for case in cases:
        work = f"training step, bf16, torch.compile {case['compiled'] or 'off'}"
        found = _rates(case, cases[0], "clips_per_second", "clips/s")
        if "first_step_seconds" in case:
            first = cases[0].get("first_step_seconds")
            found.append(quantity("s of the first step", case["first_step_seconds"], first))
        _add(recorder, work, case, settings, "without torch.compile", found)


def _tracking(recorder: Recorder, cases: list[Case], settings: dict[str, Any]) -> None:
    for case in cases:
        work = f"tracking, {_type(case['dtype'])}, {case['attention']}"
        shape = {**settings, "size": list(case["size"])}
        _add(recorder, work, case, shape, PLAIN, _rates(case, cases[0], "frames_per_second", "frames/s"))


ADD = {
    "attention": _attention,
    "training": _training,
    "launches": _launches,
    "memory": _memory,
    "compile": _compile,
    "tracking": _tracking,
}


def _rates(case: Case, base: Case, key: str, name: str) -> list[Quantity]:
    """Rate, and peak memory if measured."""
    named = {key: (name, 1.0), "peak_bytes": ("peak GB", GB), "peak_reserved": ("reserved GB", GB)}
    return [
        quantity(label, case[each] / unit, base[each] / unit if each in base else None)
        for each, (label, unit) in named.items()
        if each in case
    ]


def _add(
    recorder: Recorder,
    work: str,
    case: Case,
    settings: dict[str, Any],
    baseline: str | None,
    quantities: list[Quantity],
) -> None:
    if "out_of_memory" in case:
        recorder.skip(work, f"out of memory: {case['out_of_memory']}")
    else:
        recorder.add(work, settings, baseline, quantities)


def _type(name: str) -> str:
    return {"None": "float32", "torch.float32": "float32", "FP32": "float32"}.get(name, "bf16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    add_flags(parser, "smoke test with tiny sizes")
    args = parser.parse_args()
    recorder = Recorder("gpu", "On a CUDA GPU", args)
    if torch.cuda.is_available():
        checks = Checks(torch.device("cuda"), args.quick)
        for section in args.only:
            add_section(recorder, section, getattr(checks, section)(), {"median of calls": checks.repeats})
            recorder.finish()  # an interrupted run keeps finished sections
    else:
        recorder.skip("all sections", "no CUDA device")
    recorder.finish()


if __name__ == "__main__":
    main()
