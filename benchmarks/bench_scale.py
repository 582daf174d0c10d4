"""Unit costs of quantities that grow with the number of videos, the basis of docs/scale.md.

    python -m benchmarks.bench_scale

CPU time and memory of planning one clip, requests to an object store per shard and clip, bytes and CPU time of a
metric in MLflow's SQLite database, and the size of a checkpoint.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.machine import memory_mb
from benchmarks.records import Quantity, Recorder, add_flags, quantity

VIDEO_FRAMES, FRAME_BYTES, OBJECTS = 200, 155_182, 10
"""A BDD100K video, and the mean of twelve of its real frames."""


def planning(videos: int) -> list[Quantity]:
    from motip.config import load_curriculum
    from motip.data.clips import PlanVideo, plan_clips

    config = load_curriculum("configs/curriculum.yaml").stages[0].config
    names = [f"{number:06d}" for number in range(videos)]
    listed = [
        PlanVideo("bdd100k", name, f"bdd100k/train/{name}.parquet", tuple(range(VIDEO_FRAMES)), (10,) * VIDEO_FRAMES, 5)
        for name in names
    ]
    before, begin = memory_mb("VmHWM"), time.process_time()
    plan = plan_clips(listed, config.clip_schedule(0), epoch=0, seed=1, global_batch=64)
    seconds = time.process_time() - begin
    grown = (memory_mb("VmHWM") - before) * 1e6
    return [
        quantity("clips", len(plan)),
        quantity("CPU us per clip", 1e6 * seconds / len(plan)),
        quantity("bytes per clip", grown / len(plan)),
    ]


def requests() -> list[Quantity]:
    from motip.data.sequence import Frame, Sequence
    from motip.data.shards import Shard, read_labels, write_shard
    from motip.storage.paths import location, size_and_time
    from tests.helpers.object_store import object_store

    random = np.random.default_rng(0)

    def frame(number: int) -> Frame:
        boxes = random.random((OBJECTS, 4)).astype(np.float32) * 500
        zeros = np.zeros(OBJECTS, np.float32)
        ignored = np.zeros(OBJECTS, bool)
        image, names = random.bytes(FRAME_BYTES), ("car",) * OBJECTS
        return Frame(number, image, boxes, np.arange(OBJECTS), names, ignored, zeros, zeros)

    with object_store() as store:
        # A shard, and the requests to read its labels and to open it.
        path = location(f"{store.uri}/shards/video.parquet")
        frames = tuple(frame(number) for number in range(VIDEO_FRAMES))
        write_shard(Sequence("video", "bdd100k", "train", 5.0, 1280, 720, frames), path)
        store.requests.clear()
        read_labels(path)
        labels = len(store.requests)
        store.requests.clear()
        shard = Shard(path)
        opened = len(store.requests)
        # Requests per clip.
        groups, read = [], []
        for interval in (2, 3):
            for start in range(8):
                positions = [start + interval * step for step in range(5)]
                store.requests.clear()
                shard.read_frames(positions)
                read.append(len(store.requests))
                groups.append(len({position // shard.header.rows_per_group for position in positions}))
        return [
            quantity("bytes of the shard", size_and_time(path)[0]),
            quantity("requests to open it", opened),
            quantity("requests per clip", [float(each) for each in read]),
            quantity("row groups per clip, mean", float(np.mean(groups))),
            quantity("requests for all its labels", labels),
        ]


def metrics(points: int = 300, names: int = 30) -> list[Quantity]:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    with tempfile.TemporaryDirectory() as folder:
        client = MlflowClient(f"sqlite:///{folder}/m.db")
        run = client.create_run(client.create_experiment("scale")).info.run_id

        def size() -> int:
            return sum(path.stat().st_size for path in Path(folder).iterdir())

        def write(first: int, last: int) -> None:
            for step in range(first, last):
                client.log_batch(
                    run, [Metric(f"step/name_of_{n}", 0.1 + step, 10**12 + step, step) for n in range(names)]
                )

        write(0, 10)
        before, begin = size(), time.process_time()
        write(10, 10 + points)
        return [
            quantity("bytes per metric", (size() - before) / points / names),
            quantity(f"CPU ms per point of {names}", 1e3 * (time.process_time() - begin) / points),
        ]


def checkpoint() -> list[Quantity]:
    import torch

    from motip.config import load_curriculum
    from motip.model import ModelSpec, build_model

    config = load_curriculum("configs/curriculum.yaml").stages[0].config
    with torch.device("meta"):
        model = build_model(ModelSpec.from_config(config))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    stored_numbers = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    stored = 4 * (stored_numbers + 2 * trained)  # AdamW stores two moments per trained parameter
    return [quantity("MB of gradients", 4 * trained / 1e6), quantity("MB of a checkpoint", stored / 1e6)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser, "20 videos, 5 points")
    args = parser.parse_args()
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    recorder = Recorder("scale", "Unit costs of a growing number of videos", args)
    videos, points = (20, 5) if args.quick else (1000, 300)
    frames = {"frames per video": VIDEO_FRAMES, "objects per frame": OBJECTS}
    recorder.add(f"planning the clips of {videos} videos", frames, None, planning(videos))
    recorder.add("checkpoint of the full network", {"configuration": "configs/curriculum.yaml"}, None, checkpoint())
    recorder.add("metrics in MLflow's SQLite", {"points": points}, None, metrics(points))
    recorder.add("a shard in an object store on loopback", {**frames, "bytes per frame": FRAME_BYTES}, None, requests())
    recorder.finish()


if __name__ == "__main__":
    main()
