"""Clips per CPU-second: our shards and decoder against files, PIL and a plain torch DataLoader, same frames.

    MOTIP_SAMPLES_DIR=../shared/samples python -m benchmarks.bench_data [--clips 16] [--lengths 5 30] [--no-ray]

The baseline works as the published loader: every frame is opened with PIL at full size, flipped, resized (or resized,
cropped and resized), jittered and converted to a tensor, one clip at a time. CPU time is that of this process and all
its descendants, including loader workers and Ray's own processes.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import functional as tv

from benchmarks.records import Quantity, Recorder, add_flags, quantity
from motip.config import Config
from motip.data.augment import resize_size
from motip.data.clip_loader import ClipLoader, collate, plan_videos
from motip.data.clips import ClipRef, plan_clips
from motip.data.sequence import ClassMap, Frame, Sequence
from motip.data.shards import shard_path, write_shard

CLASSES = {"bdd": ClassMap(("pedestrian", "car"), {"car": ("car",)})}
FRAMES = 60


@dataclass
class BenchData:
    """A video as image files and as a shard, and the planned clips."""

    folder: Path
    files: list[Path]
    loader: ClipLoader
    clips: list[ClipRef]


def build(folder: Path, samples: Path, length: int, clips: int) -> BenchData:
    """A 60-frame video of real 1280x720 frames, as files and as a shard, and a plan over it."""
    images = sorted((samples / "bdd100k/images/track/train").rglob("*.jpg"))
    files = [images[n % len(images)] for n in range(FRAMES)]
    boxes = np.array([[100 + 60 * k, 200, 180 + 60 * k, 300] for k in range(12)], np.float32)
    small = np.zeros(12, np.int8)
    frames = tuple(
        Frame(n, file, boxes, np.arange(12), ("car",) * 12, np.zeros(12, bool), small, small)
        for n, file in enumerate(files)
    )
    write_shard(Sequence("v", "bdd", "train", 5.0, 1280, 720, frames), shard_path(folder, "v.parquet"), source="bdd")
    config = Config(NUM_CLASSES=2, sampler_lengths=(length,), sample_intervals=(1,))
    entry: Any = SimpleNamespace(source="bdd", video="v", shard="v.parquet", fps=5.0)
    plan = plan_clips(plan_videos([entry], CLASSES, folder), config.clip_schedule(0), epoch=0, seed=0, max_clips=clips)
    return BenchData(folder, files, ClipLoader(config, CLASSES, folder), list(plan.clips))


class PilClips(Dataset):
    """Clips read as by the published loader."""

    def __init__(self, data: BenchData) -> None:
        self.data = data
        self.settings = data.loader.augment

    def __len__(self) -> int:
        return len(self.data.clips)

    def __getitem__(self, index: int) -> torch.Tensor:
        clip, rng = self.data.clips[index], np.random.default_rng(self.data.clips[index].seed)
        images = [Image.open(self.data.files[row]).convert("RGB") for row in clip.positions]
        images = self._resized(images, rng)
        factors = rng.uniform(0.6, 1.4, 3)
        hue, order = float(rng.uniform(-0.2, 0.2)), rng.permutation(4)
        return torch.stack([tv.pil_to_tensor(self._jittered(image, factors, hue, order)) for image in images])

    def _resized(self, images: list[Image.Image], rng: np.random.Generator) -> list[Image.Image]:
        if rng.random() < 0.5:
            images = [tv.hflip(image) for image in images]
        short = int(rng.choice(self.settings.scales))
        if rng.random() < 0.5:
            first = int(rng.choice(self.settings.random_resize))
            images = [self._resize(image, first, None) for image in images]
            width, height = images[0].size
            w, h = (int(rng.integers(min(384, side), min(600, side) + 1)) for side in (width, height))
            x, y = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
            images = [image.crop((x, y, x + w, y + h)) for image in images]
        return [self._resize(image, short, self.settings.max_size) for image in images]

    @staticmethod
    def _resize(image: Image.Image, short: int, longest: int | None) -> Image.Image:
        height, width = resize_size(image.height, image.width, short, longest)
        return image.resize((width, height), Image.Resampling.BILINEAR)

    @staticmethod
    def _jittered(image: Image.Image, factors: np.ndarray, hue: float, order: np.ndarray) -> Image.Image:
        operations = (
            lambda one: tv.adjust_brightness(one, factors[0]),
            lambda one: tv.adjust_contrast(one, factors[1]),
            lambda one: tv.adjust_saturation(one, factors[2]),
            lambda one: tv.adjust_hue(one, hue),
        )
        for index in order:
            image = operations[index](image)
        return image


class OurClips(Dataset):
    """Our decoder and shards in a plain DataLoader, to separate the gain of the decoder from that of Ray."""

    def __init__(self, data: BenchData) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data.clips)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(self.data.loader.load(self.data.clips[index]).images)


def pil_dataloader(data: BenchData) -> Iterator[object]:
    return iter(DataLoader(PilClips(data), **WORKERS))


def our_dataloader(data: BenchData) -> Iterator[object]:
    return iter(DataLoader(OurClips(data), **WORKERS))


def in_process(data: BenchData) -> Iterator[object]:
    return (collate([data.loader.load(clip)]) for clip in data.clips)


def through_ray(data: BenchData) -> Iterator[object]:
    import ray

    from motip.data.stream import clip_dataset, iterate

    # Started and stopped here, so that Ray's processes do not affect the other implementations.
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        dataset = clip_dataset(data.clips, data.loader, actors=2, actor_cpus=0.5)
        yield from iterate(dataset, data.clips, batch_size=1)
    finally:
        ray.shutdown()


WORKERS: dict[str, Any] = {
    "batch_size": None,
    "num_workers": 2,
    "multiprocessing_context": "fork",
    "persistent_workers": True,
}
BASELINE = "a torch DataLoader over image files with PIL at full size, 2 workers"
# name -> (iterator over batches, rounds over the clips); Ray prefetches far ahead, so its run must be longer
LOADERS: dict[str, tuple[Callable[[BenchData], Iterator[object]], int]] = {
    "DataLoader, our decoder": (our_dataloader, 1),
    "one process, our decoder": (in_process, 1),
    "Ray Data": (through_ray, 8),
}


Cost = tuple[list[float], list[float]]


def costs(loader: Callable[[BenchData], Iterator[object]], data: BenchData, rounds: int, repeats: int) -> Cost:
    """CPU and wall seconds per clip of each of `repeats` runs."""
    pairs = [cost(loader, data, rounds) for _ in range(repeats)]
    return [cpu for cpu, _ in pairs], [wall for _, wall in pairs]


def cost(loader: Callable[[BenchData], Iterator[object]], data: BenchData, rounds: int) -> tuple[float, float]:
    """CPU and wall seconds per clip over the middle third of a run, where prefetching is stationary and the start of
    processes is excluded."""
    total = len(data.clips) * rounds
    marks = []
    for index, _ in enumerate(loader(replace(data, clips=data.clips * rounds))):
        if index in (total // 3, 2 * total // 3):
            marks.append((index, tree_cpu_seconds(), time.perf_counter()))
    (first, cpu, wall), (last, cpu_after, wall_after) = marks
    spent = sum(seconds - cpu.get(pid, 0.0) for pid, seconds in cpu_after.items())
    return spent / (last - first), (wall_after - wall) / (last - first)


def tree_cpu_seconds() -> dict[int, float]:
    """User and system time of this process and its living descendants, by process id."""
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # the process has ended meanwhile
                continue
            parents[int(entry.name)] = int(fields[1])
            ticks[int(entry.name)] = int(fields[11]) + int(fields[12])
    tree: dict[int, float] = {}
    for pid, own in ticks.items():
        ancestor = pid
        while ancestor and ancestor != os.getpid():
            ancestor = parents.get(ancestor, 0)
        if ancestor:
            tree[pid] = own / os.sysconf("SC_CLK_TCK")
    return tree


def compared(ours: Cost, baseline: Cost) -> list[Quantity]:
    (cpu, wall), (cpu_base, wall_base) = ours, baseline
    return [
        quantity("CPU s per clip", cpu, cpu_base),
        quantity("clips/s", [1 / each for each in wall], [1 / each for each in wall_base]),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=30, help="clips per run at T=5, fewer for longer ones")
    parser.add_argument("--lengths", type=int, nargs="+", default=[5, 30])
    parser.add_argument("--repeats", type=int, default=3, help="runs of each loader")
    parser.add_argument("--no-ray", action="store_true", help="without Ray Data, which starts a local cluster")
    add_flags(parser, "T=5, once, without Ray")
    options = parser.parse_args()
    if options.quick:
        options.lengths, options.repeats, options.no_ray = [5], 1, True
    samples = Path(os.environ.get("MOTIP_SAMPLES_DIR", "../shared/samples")).resolve()
    torch.set_num_threads(1)
    recorder = Recorder("data", "Data: clips per CPU-second", options)
    for length in options.lengths:
        with tempfile.TemporaryDirectory() as folder:
            clips = max(24, options.clips * 5 // length)
            data = build(Path(folder), samples, length, clips)
            baseline = costs(pil_dataloader, data, 1, options.repeats)
            for name, (loader, rounds) in LOADERS.items():
                if name == "Ray Data" and options.no_ray:
                    recorder.skip(f"T={length}, {name}", "disabled by --no-ray")
                    continue
                ours = costs(loader, data, rounds, options.repeats)
                settings = {"images": "1280x720", "augmentation": "published", "clips": clips, "decoders": 2}
                recorder.add(f"T={length}, {name}", settings, BASELINE, compared(ours, baseline))
    recorder.finish()


if __name__ == "__main__":
    main()
