"""Memory and waiting of the data path over a large shard set: Ray Data actors, object store, a simulated training step.

    python -m tests.benchmarks.bench_stream_memory [--gigabytes 0.5] [--step 0.5] [--steps 200] [--actors 1]

Shards are written first: 200-frame videos of 1280x720 JPEGs (noise on smooth ground, as large as real frames), as many
as the size asks for. Then --steps clips of --length frames are taken in steps that sleep for --step seconds, like a
worker that waits for its device. Reported: latency of the first batch, share of the time spent waiting, RSS of the
decoding actors in the first quarter and in the last (growth means a leak), object store use and spilled bytes.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np

from motip.config import Config
from motip.data.clip_loader import ClipLoader, plan_videos
from motip.data.clips import ClipRef, plan_clips
from motip.data.sequence import ClassMap, Frame, Sequence
from motip.data.shards import shard_path, write_shard
from motip.data.stream import clip_dataset, iterate

CLASSES = {"bdd": ClassMap(("pedestrian", "car"), {"car": ("car",)})}
FRAMES = 200
PICTURES = 32


def pictures() -> list[bytes]:
    """JPEGs of 1280x720 with about 190 kB each."""
    rng = np.random.default_rng(0)
    encoded = []
    for _ in range(PICTURES):
        ground = cv2.resize(
            rng.integers(0, 256, (9, 16, 3), dtype=np.uint8), (1280, 720), interpolation=cv2.INTER_CUBIC
        )
        noisy = np.clip(ground.astype(np.int16) + rng.normal(0, 9, ground.shape), 0, 255).astype(np.uint8)
        encoded.append(cv2.imencode(".jpg", noisy, [cv2.IMWRITE_JPEG_QUALITY, 82])[1].tobytes())
    return encoded


def write_world(folder: Path, gigabytes: float) -> list[SimpleNamespace]:
    encoded = pictures()
    per_video = FRAMES * sum(map(len, encoded)) / len(encoded)
    boxes = np.array([[100 + 60 * k, 200, 180 + 60 * k, 300] for k in range(12)], np.float32)
    flags = np.zeros(12, np.int8)
    entries = []
    for number in range(max(1, round(gigabytes * 2**30 / per_video))):
        frames = tuple(
            Frame(n, encoded[(n + 7 * number) % PICTURES], boxes, np.arange(12), ("car",) * 12, flags > 0, flags, flags)
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


class Watch:
    """Resident memory of the decoding actors and use of the object store, every half second.

    RssAnon and RssFile are the actors' own; pages of the object store that they map count as RssShmem and are bounded
    and reported apart.
    """

    def __init__(self) -> None:
        self.actors_mb: list[float] = []
        self.shared_mb: list[float] = []
        self.store_mb: list[float] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Watch:
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
            except OSError:  # ended while we were looking
                continue
            if b"MapWorker" in title or b"_DecodeActor" in title:
                yield entry.name


def spilled_bytes() -> int:
    """What the object store has written to disk since it started."""
    import ray
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address

    reply = get_memory_info_reply(get_state_from_address(ray.get_runtime_context().gcs_address))
    return int(reply.store_stats.spilled_bytes_total)


def run(options: argparse.Namespace, folder: Path) -> None:
    import ray

    began = time.perf_counter()
    entries = write_world(folder, options.gigabytes)
    size = sum(path.stat().st_size for path in folder.rglob("*.parquet"))
    print(f"{len(entries)} shards, {size / 2**30:.2f} GiB, written in {time.perf_counter() - began:.0f} s", flush=True)
    config = Config(NUM_CLASSES=2, sampler_lengths=(options.length,), sample_intervals=(1, 2, 3, 4))
    loader = ClipLoader(config, CLASSES, folder)
    plan = plan_clips(
        plan_videos(entries, CLASSES, folder), config.clip_schedule(0), epoch=0, seed=0, max_clips=options.steps
    )
    rows: list[ClipRef] = list(plan.clips)
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        measure(options, loader, rows)
    finally:
        ray.shutdown()


def measure(options: argparse.Namespace, loader: ClipLoader, rows: list[ClipRef]) -> None:
    waited: list[float] = []
    with Watch() as watch:
        begin = mark = time.perf_counter()
        dataset = clip_dataset(rows, loader, actors=options.actors, actor_cpus=0.5)
        for _ in iterate(dataset, rows, batch_size=1):
            waited.append(time.perf_counter() - mark)
            time.sleep(options.step)
            mark = time.perf_counter()
        total = time.perf_counter() - begin
        spilled = spilled_bytes()
    first, later = waited[0], sum(waited[1:])
    quarter = len(watch.actors_mb) // 4
    print(f"{len(waited)} clips of {options.length} frames, {options.actors} actors, steps of {options.step} s")
    print(f"first batch        {first:.2f} s after the dataset was asked for")
    print(f"waiting            {100 * later / (total - first):.1f} % of the time after it")
    print(
        f"actors' memory     {max(watch.actors_mb[: quarter + 1]):.0f} MB in the first quarter, "
        f"{max(watch.actors_mb[-quarter - 1 :]):.0f} MB in the last, {max(watch.actors_mb):.0f} MB at most (all actors)"
    )
    print(
        f"object store       {max(watch.store_mb):.0f} MB at most; one actor maps {max(watch.shared_mb):.0f} MB of it"
    )
    print(f"spilled            {spilled / 2**20:.0f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=0.5, help="size of the shard set (default: %(default)s)")
    parser.add_argument("--length", type=int, default=5, help="frames per clip (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=120, help="clips to take (default: %(default)s)")
    parser.add_argument("--step", type=float, default=0.5, help="seconds a step takes (default: %(default)s)")
    parser.add_argument("--actors", type=int, default=1, help="decoding actors (default: %(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run(options, Path(folder))


if __name__ == "__main__":
    main()
