"""One training step of the full network: CPU seconds and peak memory of ours against the naive form.

    python -m benchmarks.bench_step                    # the published network at 480x854, a few minutes
    python -m benchmarks.bench_step --sides ours       # ours only
    python -m benchmarks.bench_step --quick            # a smaller network on small images, seconds

A step is forward, losses, backward, clipping and AdamW on one clip of noise, with
configs/r50_deformable_detr_motip_dancetrack.yaml. Ours is `motip.train.step.TrainStep` as in training; the naive form
is described in `naive_step`. Each runs in a separate process. Both have the same random weights and a learning rate of
0, so that every repeat has the same losses and gradients, which must agree.

"peak MB" is the highest resident memory of the process, including libraries, weights, gradients and optimiser moments.
A small warm-up step loads kernels and creates the moments.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_step import noise_clip
from benchmarks.machine import Stopwatch, memory_mb
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
"""Free memory required by the naive form."""
SMALLER = ("DETR_ENC_LAYERS=1", "DETR_DEC_LAYERS=2", "NUM_ID_DECODER_LAYERS=2", "DETR_NUM_QUERIES=50")
StepFunction = Callable[[ClipBatch], dict[str, float]]


def settings(args: argparse.Namespace) -> Config:
    sets = ["MIXED_PRECISION=no", f"sampler_lengths=[{args.frames}]"]
    return load_config(ROOT / CONFIG, [*sets, *(SMALLER if args.quick else ())])


def our_step(config: Config) -> StepFunction:
    from motip.data.host_memory import keep_freed_memory
    from motip.train.collectives import SingleProcess
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
        if losses.skipped or losses.retries:
            raise SystemExit(f"the step was skipped or used a fallback: {losses}")
        return {**losses.values, **norms}

    return once


def naive_step(config: Config) -> StepFunction:
    from benchmarks.naive_step import NaiveStep

    spec = ModelSpec.from_config(config)
    step = NaiveStep(spec, SALT, config.DETR_NUM_TRAIN_FRAMES, config.MAX_CLIP_NORM, config.WEIGHT_DECAY)
    return lambda clip: step(clip, list(range(clip.images.shape[1])))


def run_side(args: argparse.Namespace) -> dict[str, Any]:
    """Times of each repeat, peak memory, and metrics of the last repeat."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = settings(args)
    spec = ModelSpec.from_config(config)
    step = our_step(config) if args.side == "ours" else naive_step(config)
    clip = noise_clip(spec, args.frames, OBJECTS, (args.height, args.width))
    step(noise_clip(spec, 2, OBJECTS, (64, 96)))
    before = memory_mb("VmRSS")
    stopwatch = Stopwatch()
    metrics: dict[str, float] = {}
    for _ in range(args.repeats):
        with stopwatch:
            metrics = step(clip)
    peak = memory_mb("VmHWM")
    return {
        "CPU s": stopwatch.cpu_s,
        "wall s": stopwatch.wall_s,
        "peak MB": peak,
        "MB that a step adds": peak - before,
        "metrics": metrics,
    }


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
    """Greatest difference of the losses, and greatest relative difference of the gradient norms.

    Raises:
        SystemExit: the gradient norms differ by more than 0.1 %.
    """
    losses = [name for name in naive if "loss" in name]
    loss_difference = max(abs(ours[name] - naive[name]) for name in losses)
    norm_difference = max(abs(ours[name] / naive[name] - 1) for name in ("detr_grad_norm", "other_grad_norm"))
    if norm_difference > 1e-3:
        raise SystemExit(f"the gradients differ: {ours} and {naive}")
    return loss_difference, norm_difference


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
        parser.error("--sides must include ours")
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
    # Measure both sides, or ours only if memory is short.
    sides = list(args.sides)
    free = free_gb()
    if "naive" in sides and free < NAIVE_GB and not args.quick:
        recorder.skip(f"{work}, the naive form", f"not enough memory: {NAIVE_GB:g} GB required, {free:.1f} free")
        sides.remove("naive")
    found = {side: measure(args, side) for side in sides}
    # Compare and record.
    ours, naive = found["ours"], found.get("naive")
    names = ("CPU s", "peak MB", "MB that a step adds", "wall s")
    quantities = [quantity(name, ours[name], naive[name] if naive else None) for name in names]
    if naive:
        loss_difference, norm_difference = differences(ours["metrics"], naive["metrics"])
        quantities += [
            quantity("greatest loss difference", loss_difference),
            quantity("greatest difference of a gradient's norm, share", norm_difference),
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
