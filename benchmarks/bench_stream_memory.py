"""Memory and waiting time of the data path on a large shard set: Ray Data actors, object store, simulated steps.

    python -m benchmarks.bench_stream_memory [--gigabytes 2] [--lengths 5 30] [--step 0.5] [--steps 120]

Shards are written first: 200-frame videos of 1280x720 JPEGs (noise on a smooth background, as large as real frames), up
to --gigabytes. Then --steps clips of each length are consumed in steps that sleep for --step seconds, like a worker
waiting for its device. Recorded: latency of the first batch, share of the time spent waiting, RSS of the decoding
actors in the first and the last quarter (growth indicates a leak), object store use and spilled bytes.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np

from benchmarks.records import Recorder, add_flags, quantity
from motip.config import Config
from motip.data.clip_loader import ClipLoader, plan_videos
from motip.data.clips import ClipRef, plan_clips
from motip.data.sequence import ClassMap, Frame, Sequence
from motip.data.shards import shard_path, write_shard
from motip.data.stream import clip_dataset, iterate

CLASSES = {"bdd": ClassMap(("pedestrian", "car"), {"car": ("car",)})}
FRAMES = 200
IMAGES = 32


def jpeg_images() -> list[bytes]:
    """JPEGs of 1280x720 with about 190 kB each."""
    rng = np.random.default_rng(0)
    encoded = []
    for _ in range(IMAGES):
        ground = cv2.resize(
            rng.integers(0, 256, (9, 16, 3), dtype=np.uint8), (1280, 720), interpolation=cv2.INTER_CUBIC
        )
        noisy = np.clip(ground.astype(np.int16) + rng.normal(0, 9, ground.shape), 0, 255).astype(np.uint8)
        encoded.append(cv2.imencode(".jpg", noisy, [cv2.IMWRITE_JPEG_QUALITY, 82])[1].tobytes())
    return encoded


def write_shards(folder: Path, gigabytes: float) -> list[Any]:
    """Write shards of about `gigabytes`; returns their manifest entries."""
    encoded = jpeg_images()
    per_video = FRAMES * sum(map(len, encoded)) / len(encoded)
    boxes = np.array([[100 + 60 * k, 200, 180 + 60 * k, 300] for k in range(12)], np.float32)
    flags = np.zeros(12, np.int8)
    entries = []
    for number in range(max(1, round(gigabytes * 2**30 / per_video))):
        frames = tuple(
            Frame(n, encoded[(n + 7 * number) % IMAGES], boxes, np.arange(12), ("car",) * 12, flags > 0, flags, flags)
            for n in range(FRAMES)
        )
        name = f"v{number:03d}"
        sequence = Sequence(name, "bdd", "train", 5.0, 1280, 720, frames)
        write_shard(sequence, shard_path(folder, f"bdd/train/{name}.parquet"), source="bdd")
        entries.append(SimpleNamespace(source="bdd", video=name, shard=f"bdd/train/{name}.parquet", fps=5.0))
    return entries


def status_kb(pid: str, field: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    return 0


class MemorySampler:
    """Resident memory of the decoding actors and use of the object store, sampled every half second.

    RssAnon and RssFile are private to the actors; mapped pages of the object store count as RssShmem and are reported
    separately.
    """

    def __init__(self) -> None:
        self.actors_mb: list[float] = []
        self.shared_mb: list[float] = []
        self.store_mb: list[float] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> MemorySampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        import ray

        while not self._stop.wait(0.5):
            pids = list(_actor_processes())
            if pids:
                own = [status_kb(pid, "RssAnon") + status_kb(pid, "RssFile") for pid in pids]
                self.actors_mb.append(sum(own) / 1024)
                self.shared_mb.append(max(status_kb(pid, "RssShmem") for pid in pids) / 1024)
            total = ray.cluster_resources().get("object_store_memory", 0.0)
            free = ray.available_resources().get("object_store_memory", total)
            self.store_mb.append((total - free) / 2**20)


def _actor_processes() -> Iterator[str]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                title = (entry / "cmdline").read_bytes()
            except OSError:  # the process has ended meanwhile
                continue
            if b"MapWorker" in title or b"_DecodeActor" in title:
                yield entry.name


def spilled_bytes() -> int:
    """Bytes that the object store has spilled to disk since its start."""
    import ray
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address

    reply = get_memory_info_reply(get_state_from_address(ray.get_runtime_context().gcs_address))
    return int(reply.store_stats.spilled_bytes_total)


def run(options: argparse.Namespace, folder: Path, recorder: Recorder) -> None:
    import ray

    entries = write_shards(folder, options.gigabytes)
    gigabytes = sum(path.stat().st_size for path in folder.rglob("*.parquet")) / 2**30
    print(f"{len(entries)} shards, {gigabytes:.2f} GiB", flush=True)
    for length in options.lengths:
        config = Config(NUM_CLASSES=2, sampler_lengths=(length,), sample_intervals=(1, 2, 3, 4))
        loader = ClipLoader(config, CLASSES, folder)
        plan = plan_clips(
            plan_videos(entries, CLASSES, folder), config.clip_schedule(0), epoch=0, seed=0, max_clips=options.steps
        )
        settings = {
            "GiB of shards": round(gigabytes, 2),
            "clips": len(plan.clips),
            "s per step": options.step,
            "decoding actors": options.actors,
        }
        # One cluster per length: the counters of the store start with it.
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        try:
            figures = measure(options, loader, list(plan.clips))
        finally:
            ray.shutdown()
        recorder.add(f"T={length}", settings, None, [quantity(name, value) for name, value in figures.items()])


def measure(options: argparse.Namespace, loader: ClipLoader, rows: list[ClipRef]) -> dict[str, float]:
    """Measurements of one run by name; memory is the sum over decoding actors without pages of the store."""
    waited: list[float] = []
    with MemorySampler() as memory:
        begin = mark = time.perf_counter()
        dataset = clip_dataset(rows, loader, actors=options.actors, actor_cpus=0.5)
        for _ in iterate(dataset, rows, batch_size=1):
            waited.append(time.perf_counter() - mark)
            time.sleep(options.step)
            mark = time.perf_counter()
        total = time.perf_counter() - begin
        spilled = spilled_bytes()
    first, later = waited[0], sum(waited[1:])
    quarter = len(memory.actors_mb) // 4
    return {
        "waiting, % of the time": 100 * later / (total - first),
        "actors' MB, first quarter": max(memory.actors_mb[: quarter + 1]),
        "actors' MB, last quarter": max(memory.actors_mb[-quarter - 1 :]),
        "object store, most MB": max(memory.store_mb),
        "spilled MB": spilled / 2**20,
        "s to the first batch": first,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the shard set (default: %(default)s)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[5, 30], help="frames per clip")
    parser.add_argument("--steps", type=int, default=120, help="clips to consume (default: %(default)s)")
    parser.add_argument("--step", type=float, default=0.5, help="seconds a step takes (default: %(default)s)")
    parser.add_argument("--actors", type=int, default=2, help="decoding actors (default: %(default)s)")
    add_flags(parser, "T=5, 0.05 GiB, 12 clips")
    options = parser.parse_args()
    if options.quick:
        options.gigabytes, options.lengths, options.steps, options.step = 0.05, [5], 12, 0.1
    recorder = Recorder("stream_memory", "Data: waiting and memory over a large shard set", options)
    with tempfile.TemporaryDirectory() as folder:
        run(options, Path(folder), recorder)
    recorder.finish()


if __name__ == "__main__":
    main()
