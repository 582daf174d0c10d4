"""One training step of the full network: CPU seconds and peak memory of ours against the naive form.

    python -m benchmarks.bench_step                    # the published network at 480x854, a few minutes
    python -m benchmarks.bench_step --sides ours       # ours alone
    python -m benchmarks.bench_step --quick            # a smaller network on small images, seconds

A step is forward, losses, backward, clipping and AdamW on one clip of noise, with
configs/r50_deformable_detr_motip_dancetrack.yaml. Ours is `motip.train.step.TrainStep` as training runs it; what the
naive form does and does not do is said in `naive_step`. Each runs in a process of its own. Both hold the same random
weights, and the learning rate is 0, so that every repeat has the same losses and gradients; they must agree.

"peak MB" is the highest resident memory of the whole process: libraries, weights, gradients and the optimiser's moments
are in it on both sides. A small step goes first, so that kernels are loaded and the moments exist.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_step import made_up_clip
from benchmarks.machine import memory_mb
from benchmarks.records import Recorder, add_flags, quantity
from benchmarks.results import ROOT
from motip.config import Config, load_config
from motip.data.batch import ClipBatch
from motip.model import ModelSpec

CONFIG = "configs/r50_deformable_detr_motip_dancetrack.yaml"
SIDES = ("naive", "ours")
SALT = 11
OBJECTS = 10
NAIVE_GB = 12.0
"""Free memory below which the naive form is not started."""
SMALLER = ("DETR_ENC_LAYERS=1", "DETR_DEC_LAYERS=2", "NUM_ID_DECODER_LAYERS=2", "DETR_NUM_QUERIES=50")
Step = Callable[[ClipBatch], dict[str, float]]


def settings(args: argparse.Namespace) -> Config:
    sets = ["MIXED_PRECISION=no", f"sampler_lengths=[{args.frames}]"]
    return load_config(ROOT / CONFIG, [*sets, *(SMALLER if args.quick else ())])


def our_step(config: Config) -> Step:
    from motip.train.collectives import SingleProcess
    from motip.train.host_memory import keep_freed_memory
    from motip.train.optimizer import build_optimizer
    from motip.train.setup import fresh_model
    from motip.train.step import TrainStep
    from tests.parity.recipe import fill

    keep_freed_memory()
    model = fresh_model(config).train()
    fill(model, SALT)
    optimizer = build_optimizer(model, config)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    step = TrainStep(model, config, SingleProcess())

    def once(clip: ClipBatch) -> dict[str, float]:
        losses = step.accumulate(clip, torch.arange(clip.images.shape[1]))
        norms = step.apply(optimizer)
        if losses.skipped or losses.lowered:
            raise SystemExit(f"the step was left out or made smaller: {losses}")
        return {**losses.values, **norms}

    return once


def naive_step(config: Config) -> Step:
    from benchmarks.naive_step import NaiveStep

    spec = ModelSpec.from_config(config)
    step = NaiveStep(spec, SALT, config.DETR_NUM_TRAIN_FRAMES, config.MAX_CLIP_NORM, config.WEIGHT_DECAY)
    return lambda clip: step(clip, list(range(clip.images.shape[1])))


def run_side(args: argparse.Namespace) -> dict[str, Any]:
    """Figures of each repeat, and the losses of the last."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = settings(args)
    spec = ModelSpec.from_config(config)
    step = our_step(config) if args.side == "ours" else naive_step(config)
    clip = made_up_clip(spec, args.frames, OBJECTS, (args.height, args.width))
    step(made_up_clip(spec, 2, OBJECTS, (64, 96)))
    before = memory_mb("VmRSS")
    wall, cpu = [], []
    told: dict[str, float] = {}
    for _ in range(args.repeats):
        began, cpu_began = time.perf_counter(), time.process_time()
        told = step(clip)
        wall.append(time.perf_counter() - began)
        cpu.append(time.process_time() - cpu_began)
    peak = memory_mb("VmHWM")
    return {"CPU s": cpu, "wall s": wall, "peak MB": peak, "MB that a step adds": peak - before, "told": told}


def measure(args: argparse.Namespace, side: str) -> dict[str, Any]:
    command = [
        sys.executable,
        "-m",
        "benchmarks.bench_step",
        "--side",
        side,
        *(["--quick"] if args.quick else []),
    ]
    for name in ("frames", "height", "width", "threads", "repeats"):
        command += [f"--{name}", str(getattr(args, name))]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{side} failed with status {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    print(f"{side}: " + ", ".join(f"{name} {found[name]}" for name in ("CPU s", "wall s", "peak MB")), flush=True)
    return found


def differences(ours: dict[str, float], naive: dict[str, float]) -> tuple[float, float]:
    """The greatest of the losses, and of the gradients' norms as a share.

    Raises:
        SystemExit: the gradients are not the same.
    """
    losses = [name for name in naive if "loss" in name]
    apart = max(abs(ours[name] - naive[name]) for name in losses)
    norms = max(abs(ours[name] / naive[name] - 1) for name in ("detr_grad_norm", "other_grad_norm"))
    if norms > 1e-3:
        raise SystemExit(f"the gradients differ: {ours} and {naive}")
    return apart, norms


def free_gb() -> float:
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 / 1e9 if found else 0.0


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=5)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=854)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    add_flags(parser, "a smaller network on images of 96x160, once")
    args = parser.parse_args(argv)
    if "ours" not in args.sides:
        parser.error("--sides must name ours")
    if args.quick:
        args.height, args.width, args.repeats = 96, 160, 1
    return args


def main() -> None:
    args = parse_args()
    if args.side:
        print(json.dumps(run_side(args)))
        return
    recorder = Recorder("step", "Training step", args)
    work = f"T={args.frames}, {args.height}x{args.width}, 4 gradient frames, 6 groups, {OBJECTS} objects"
    sides = list(args.sides)
    free = free_gb()
    if "naive" in sides and free < NAIVE_GB and not args.quick:
        recorder.skip(f"{work}, the naive form", f"not enough memory: {NAIVE_GB:g} GB wanted, {free:.1f} free")
        sides.remove("naive")
    found = {side: measure(args, side) for side in sides}
    ours, naive = found["ours"], found.get("naive")
    names = ("CPU s", "peak MB", "MB that a step adds", "wall s")
    quantities = [quantity(name, ours[name], naive[name] if naive else None) for name in names]
    if naive:
        apart, norms = differences(ours["told"], naive["told"])
        quantities += [
            quantity("greatest loss difference", apart),
            quantity("greatest difference of a gradient's norm, share", norms),
        ]
    recorder.add(
        work,
        configuration={
            "configuration": CONFIG,
            "changed": [f"sampler_lengths: [{args.frames}]", *(SMALLER if args.quick else ())],
            "weights": "the same random ones",
            "dtype": "float32",
            "threads": args.threads,
            "clips": 1,
        },
        baseline="the naive form: grid_sample, torchvision's ResNet-50, nn.MultiheadAttention" if naive else None,
        quantities=quantities,
    )
    recorder.finish()


if __name__ == "__main__":
    main()
