"""Growth of time and memory with frames, objects, image size, ID labels, shards and workers.

    python -m benchmarks.bench_growth                      # a few minutes
    python -m benchmarks.bench_growth --only objects       # one kind
    python -m benchmarks.bench_growth --quick              # two sizes of each

Training steps are those of the tiny preset (configs/demo/motip_tiny.yaml) with `motip.train.step.TrainStep` and the
optimiser, on clips of noise: CPU time of a step with one clip, and peak resident memory above that of the process with
its model. Every size runs in a separate process. The exponent is the slope of the least-squares line through the
logarithms, per repeat: 1 is proportional, 2 quadratic.

Simulated: shards are entries of a manifest with the figures of real ones, without images. The manifest is written, read
back, checked against its digest, and one epoch of clips is planned. Workers are processes on this machine that reduce
gradients over loopback (gloo) and share its cores.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.spawn import start_processes

from benchmarks.gpu_step import noise_clip
from benchmarks.machine import Stopwatch, memory_mb
from benchmarks.plots import exponent
from benchmarks.records import Quantity, Recorder, Values, add_flags, quantity
from benchmarks.results import ROOT
from motip.config import load_config, load_curriculum
from motip.data.clips import PlanVideo, plan_clips
from motip.data.manifest import Manifest, VideoEntry
from motip.model import ModelSpec
from motip.train.collectives import ProcessGroup, SingleProcess, current_process_group
from motip.train.optimizer import build_optimizer
from motip.train.setup import fresh_model
from motip.train.step import TrainStep

Figures = dict[str, list[float]]
"""Measurements at one size by name: one value per repeat, or a single one."""
SHARD_BYTES, VIDEO_FRAMES, OBJECTS = 31_166_837, 200, 10
"""A shard of 200 real BDD100K frames, measured by `bench_scale`."""


@dataclass(frozen=True)
class StepSizes:
    """Sizes of a training step of the tiny preset with one clip."""

    frames: int = 5
    objects: int = 20
    height: int = 192
    width: int = 256
    labels: int = 50
    queries: int = 100


def train(size: StepSizes, steps: int) -> Figures:
    """CPU seconds of each of `steps` steps after a warm-up step, and the memory they add."""
    step, once = prepared(size, SingleProcess())
    before = memory_mb("VmRSS")
    once()
    stopwatch = Stopwatch()
    for _ in range(steps):
        with stopwatch:
            once()
    check(step)
    return {"CPU s per clip": stopwatch.cpu_s, "peak MB": [memory_mb("VmHWM") - before]}


def prepared(size: StepSizes, ranks: ProcessGroup) -> tuple[TrainStep, Callable[[], None]]:
    """The step, and a function that trains on the same clip with every call."""
    sets = {
        "NUM_ID_VOCABULARY": size.labels,
        "DETR_NUM_QUERIES": size.queries,
        "sampler_lengths": [size.frames],
        "MIXED_PRECISION": "no",
        # An out-of-memory fallback would change the slope.
        "MEMORY_EFFICIENT": False,
    }
    config = load_config(ROOT / "configs/demo/motip_tiny.yaml", [f"{key}={value}" for key, value in sets.items()])
    clip = noise_clip(ModelSpec.from_config(config), size.frames, size.objects, (size.height, size.width))
    step = TrainStep(fresh_model(config).train(), config, ranks)
    optimizer = build_optimizer(step.model, config)

    def once() -> None:
        step.accumulate(clip, torch.arange(size.frames))
        step.apply(optimizer)

    return step, once


def check(step: TrainStep) -> None:
    counters = step.counters
    if counters.nonfinite_losses or counters.nonfinite_gradients or counters.out_of_memory or counters.lowered:
        raise SystemExit(f"a step was skipped, so the figures are not those of training: {counters}")


def plan(gigabytes: float) -> Figures:
    """CPU seconds and memory of writing and reading the manifest of `gigabytes` of shards, and of planning an epoch."""
    config = load_curriculum(str(ROOT / "configs/curriculum.yaml")).stages[0].config
    before, began = memory_mb("VmRSS"), time.process_time()
    entries = tuple(map(entry, range(round(gigabytes * 1e9 / SHARD_BYTES))))
    with tempfile.TemporaryDirectory() as folder:
        Manifest(entries).save(folder)
        read = Manifest.load(folder)
    videos = [
        PlanVideo(e.source, e.video, e.shard, tuple(range(e.frames)), (OBJECTS,) * e.frames, e.fps) for e in read.videos
    ]
    plan_clips(videos, config.clip_schedule(0), epoch=0, seed=1)
    return {"CPU s to plan": [time.process_time() - began], "peak MB": [memory_mb("VmHWM") - before]}


def entry(number: int) -> VideoEntry:
    name, boxes = f"{number:06d}", {"car": VIDEO_FRAMES * OBJECTS}
    return VideoEntry(
        source="bdd100k",
        dataset="bdd100k",
        split="train",
        sequence=name,
        video=name,
        segment=0,
        first_frame=0,
        last_frame=VIDEO_FRAMES - 1,
        frames=VIDEO_FRAMES,
        fps=5.0,
        width=1280,
        height=720,
        labels_sha256=f"{number:064x}",
        images_sha256=f"{number:064x}",
        shard=f"bdd100k/train/{name}.parquet",
        shard_sha256=f"{number:064x}",
        shard_bytes=SHARD_BYTES,
        rows_per_group=8,
        boxes=boxes,
        ignored={},
        tracks={"car": OBJECTS},
        track_count=OBJECTS,
        objects=VIDEO_FRAMES * OBJECTS,
        max_objects=OBJECTS,
        max_window_ids=OBJECTS,
        empty_frames=0,
        image_hashes=(f"{number:080x}",) * 3,
    )


def train_in_parallel(workers: int, steps: int) -> Figures:
    """Total clips/s in wall time, CPU seconds per clip, and peak memory of the largest worker."""
    # Loopback instead of the interface of the host name.
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    with tempfile.TemporaryDirectory() as folder:
        start_processes(worker, args=(workers, steps, folder), nprocs=workers, start_method="fork")
        found = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(workers)]
    return {
        "clips/s, all workers": [workers * steps / max(each["wall"] for each in found)],
        "CPU s per clip": [sum(each["cpu"] for each in found) / workers / steps],
        "peak MB per worker": [max(each["memory"] for each in found)],
    }


def worker(rank: int, workers: int, steps: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=workers
    )
    step, once = prepared(StepSizes(), current_process_group())
    before = memory_mb("VmRSS")
    once()
    torch.distributed.barrier()
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(steps):
        once()
    found = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    check(step)
    found["memory"] = memory_mb("VmHWM") - before
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@dataclass(frozen=True)
class Kind:
    """One kind of growth: name, sizes, measurement of one size, fixed configuration, and note."""

    work: str
    sizes: tuple[float, ...]
    measure: Callable[[float, int], Figures]
    fixed: dict[str, Any]
    note: str = ""


STEP = {"preset": "configs/demo/motip_tiny.yaml", "clips per step": 1, "label groups": 6}
SIDES = {w * h / 1000: (h, w) for h, w in ((96, 128), (192, 256), (384, 512), (768, 1024))}
KINDS = {
    "frames": Kind(
        "frames per clip",
        (2, 5, 10, 20, 30),
        lambda size, steps: train(StepSizes(frames=int(size)), steps),
        {**STEP, "objects": 20, "image": "192x256", "ID labels": 50},
        "Four frames have a gradient at every clip length; the others pass the detector without one.",
    ),
    "objects": Kind(
        "objects per frame",
        (10, 30, 100, 300),
        lambda size, steps: train(StepSizes(objects=int(size), labels=300, queries=300), steps),
        {**STEP, "frames": 5, "image": "192x256", "ID labels": 300, "queries": 300},
    ),
    "image": Kind(
        "thousand pixels per image",
        tuple(SIDES),
        lambda size, steps: train(StepSizes(height=SIDES[size][0], width=SIDES[size][1]), steps),
        {**STEP, "frames": 5, "objects": 20, "images": [f"{h}x{w}" for h, w in SIDES.values()]},
    ),
    "labels": Kind(
        "ID labels",
        (50, 100, 200, 500),
        lambda size, steps: train(StepSizes(labels=int(size)), steps),
        {**STEP, "frames": 5, "objects": 20, "image": "192x256"},
    ),
    "shards": Kind(
        "GB of shards",
        (1, 4, 16, 64),
        lambda size, steps: plan(size),
        {"frames per video": VIDEO_FRAMES, "bytes per shard": SHARD_BYTES, "stage": "1 of configs/curriculum.yaml"},
        "Simulated: a manifest with the figures of real shards, written, read and checked, and one epoch of clips "
        "planned; no image is read.",
    ),
    "workers": Kind(
        "workers on loopback",
        (1, 2, 4),
        lambda size, steps: train_in_parallel(int(size), steps),
        {**STEP, "frames": 5, "objects": 20, "image": "192x256", "exchange": "gloo"},
        "All workers share the cores of the configuration, so clips/s can grow up to that number only (or further "
        "while other programs compete: more processes get more core time). The cost of workers shows in the CPU "
        "seconds. [scale.md](scale.md) extrapolates to 64.",
    ),
}


def at_each(name: str, sizes: tuple[float, ...], steps: int) -> list[Figures]:
    """Measure each size in a forked process, whose peak memory is counted from the fork."""
    found = []
    for size in sizes:
        with ProcessPoolExecutor(1, get_context("fork")) as process:
            figures = process.submit(_measured, name, size, steps).result()
        texts = [f"{key} {Values.of(values).text()}" for key, values in figures.items()]
        print(f"    {size:g}: {', '.join(texts)}", flush=True)
        found.append(figures)
    return found


def _measured(name: str, size: float, steps: int) -> Figures:
    return KINDS[name].measure(size, steps)


def slopes(figure: str, sizes: tuple[float, ...], found: list[Figures]) -> list[Quantity]:
    """Exponent over all sizes, and over the last two, where constant costs weigh least."""
    both = [(f"exponent of {figure}", sizes, found)]
    if len(sizes) > 2:
        both.append((f"exponent of {figure}, last two", sizes[-2:], found[-2:]))
    return [quantity(name, exponents(at, each, figure)) for name, at, each in both]


def exponents(sizes: tuple[float, ...], found: list[Figures], figure: str) -> list[float]:
    """Exponent of each repeat."""
    return [exponent(list(sizes), list(values))[0] for values in zip(*(each[figure] for each in found), strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--steps", type=int, default=3, help="timed steps per size; the median counts")
    parser.add_argument("--threads", type=int, default=1)
    add_flags(parser, "the two smallest sizes of each kind, one step")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    recorder = Recorder("growth", "Cost as the work grows", args)
    steps = 1 if args.quick else args.steps
    for name in args.only:
        kind = KINDS[name]
        sizes = kind.sizes[:2] if args.quick else kind.sizes
        found = at_each(name, sizes, steps)
        recorder.add(
            kind.work,
            {**kind.fixed, "threads": args.threads, "steps timed": steps},
            None,
            [each for figure in found[0] for each in slopes(figure, sizes, found)],
            kind.note,
            [
                {"at": float(size), **{figure: statistics.median(values) for figure, values in each.items()}}
                for size, each in zip(sizes, found, strict=True)
            ],
        )
    recorder.finish()


if __name__ == "__main__":
    main()
