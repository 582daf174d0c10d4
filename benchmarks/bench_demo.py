"""The demo as a user starts it: two workers against one, the start of a stage, and all of `make demo`.

    python -m benchmarks.bench_demo                       # all, some twenty minutes
    python -m benchmarks.bench_demo --only workers start  # without `make demo`, half of that
    python -m benchmarks.bench_demo --quick               # two epochs of a few clips, without `make demo`

*Workers.* The demo's Vis-Adaptation stage for two epochs on the drawn aerial world, with `ray_jobs/curriculum.py`: two
workers of one clip on two cores, then one worker of two clips, pinned with its Ray and everything that it starts to
one core. The global batch, the clips and the weights to start from are the same. Clips/s are those that the stage
records of its last epoch, which starts with everything loaded and counts waiting for data. The stage is a curriculum of
its own, so that its weights need no earlier stage, and is validated on one short video. A worker takes as many threads
as it may use cores, so the pinned one takes one.

*Start of a stage.* The same stage through `run_curriculum` in a side process: seconds from the moment that its
`job.json` is written until the driver hears of the first optimiser step. Ray's own start is that of a `TorchTrainer`
whose workers, as many and with the same resources, do nothing but say that they have begun, process group and all; it
is started once before the stage, so that both find warm processes, and once after it, which counts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import cores_allowed
from benchmarks.records import Recorder, add_flags, quantity
from benchmarks.results import ROOT
from benchmarks.targets import STAGE, WORKERS

STAGE_NAME = "Vis-Adaptation"
WHOLE = "whole make demo"
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "MLFLOW_DISABLE_TELEMETRY": "true"}

CURRICULUM = """name: {name}
sources:
  aerial:
    format: visdrone
    root: .
    domain: aerial
    classes: {{pedestrian: [pedestrian, people], car: [car, van]}}
    synthetic:
      {{domain: aerial, seed: 7, sequences: {{train: {videos}, val: 1}}, frames: {{train: 12, val: 4}}, crowd: 0.3}}
domains: {{score: none}}
stages:
  - name: {stage}
    config: {root}/configs/demo/stage3.yaml
    data: [{{source: aerial, videos: {videos}}}]
    weights: {root}/configs/demo/motip_demo_dance.safetensors
"""


def write_curriculum(folder: Path, name: str, quick: bool) -> Path:
    """A file with the demo's third stage alone; with the same storage, all of them share one drawn world."""
    path = folder / f"{name}.yaml"
    videos = 4 if quick else 80
    path.write_text(CURRICULUM.format(name=name, stage=STAGE_NAME, root=ROOT, videos=videos))
    return path


def shorter(quick: bool) -> list[str]:
    """Two epochs, of which the second is measured."""
    return ["EPOCHS=2", "SCHEDULER_MILESTONES=[2]", *(["CLIPS_PER_EPOCH=4"] if quick else [])]


# ------------------------------------------------------------------------------------------------ workers


def train(folder: Path, name: str, workers: int, clips: int, cores: list[int], quick: bool) -> dict[str, float]:
    """Train the stage with the command of the README on these cores; what it records of its last epoch."""
    words = [sys.executable, "ray_jobs/curriculum.py", "--config", str(write_curriculum(folder, name, quick))]
    words += ["--storage", str(folder / "storage"), "--workers", str(workers)]
    for each in (f"BATCH_SIZE={clips}", *shorter(quick)):
        words += ["--set", each]
    log = folder / f"{name}.log"
    with log.open("w") as output:
        done = subprocess.run(
            words,
            cwd=ROOT,
            env={**os.environ, **QUIET},
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),  # and with it everything that it starts
        )
    if done.returncode != 0:
        raise SystemExit(f"{name} failed with status {done.returncode}:\n{log.read_text()[-2000:]}")
    return last_epoch(folder / "storage", name)


def last_epoch(storage: Path, name: str) -> dict[str, float]:
    """The metrics that the stage recorded of its last epoch."""
    (history,) = (storage / "curricula" / name / STAGE_NAME).glob("*/history.json")
    epochs: dict[str, dict[str, float]] = json.loads(history.read_text())["epochs"]
    return epochs[max(epochs, key=int)]


def compare_workers(args: argparse.Namespace, folder: Path, recorder: Recorder) -> None:
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < 2:
        recorder.skip(WORKERS, f"two cores are needed, this process may use {len(allowed)}")
        return
    found: dict[str, list[dict[str, float]]] = {"two": [], "one": []}
    for turn in range(args.repeats):
        for name, workers, clips, cores in (("two", 2, 1, allowed[:2]), ("one", 1, 2, allowed[:1])):
            metrics = train(folder, f"{name}_{turn}", workers, clips, cores, args.quick)
            print(f"{name}, turn {turn}: {metrics['clips_per_s']:.3f} clips/s", flush=True)
            found[name].append(metrics)
    both = found["two"], found["one"]
    names = {
        "clips/s": "clips_per_s",
        "waiting for data, share of the time": "time/wait_share",
        "s of an epoch": "time/epoch_s",
    }
    recorder.add(
        WORKERS,
        configuration={
            "stage": f"{STAGE_NAME} of the demo, epoch 2 of 2",
            "clips per step": 2,
            "set": shorter(args.quick),
            "ours": "2 workers, 2 cores",
            "baseline": "1 worker, 1 core",
        },
        baseline="one worker, pinned with its data and Ray processes to one core",
        quantities=[quantity(name, *([m[key] for m in side] for side in both)) for name, key in names.items()],
    )


# ------------------------------------------------------------------------------------------------ start of a stage


class Stamps:
    """What the driver shows, as the times when it would be shown."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.first: dict[str, float] = {}

    def note(self, text: str) -> None:
        return

    def converting(self, phase: str, done: int, total: int) -> None:
        return

    def converted(self, report: Any) -> None:
        return

    def stage_begins(self, stage: Any, job: Any, folder: str) -> None:
        self.seconds["begin"] = (Path(folder) / "job.json").stat().st_mtime

    def record(self, kind: str, values: dict[str, Any]) -> None:
        """`transfer` comes when a worker has its model, `step` after a step (each of them is recorded)."""
        if kind == "step" and "step" not in self.seconds:
            self.first = values["metrics"]
        self.seconds.setdefault(kind, time.time())

    def stage_ends(self, record: Any) -> None:
        return


def empty_start(workers: int, cpus: float, folder: Path) -> float:
    """Seconds until all workers of a trainer that trains nothing have begun."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    def begin(settings: dict[str, str]) -> None:
        import ray.train

        rank = ray.train.get_context().get_world_rank()
        (Path(settings["folder"]) / f"begun_{rank}").write_text(repr(time.time()))

    place = Path(tempfile.mkdtemp(dir=folder))
    began = time.time()
    TorchTrainer(
        begin,
        train_loop_config={"folder": str(place)},
        scaling_config=ScalingConfig(num_workers=workers, resources_per_worker={"CPU": cpus}),
        run_config=RunConfig(name="empty", storage_path=str(place)),
    ).fit()
    return max(float(file.read_text()) for file in place.glob("begun_*")) - began


def start_side(args: argparse.Namespace) -> dict[str, Any]:
    """One process with a Ray of its own: an empty trainer, the stage, an empty trainer again."""
    from motip.cluster import connect, disconnect
    from motip.config import load_curriculum
    from motip.curriculum import Options, run_curriculum
    from motip.lineage import Lineage
    from motip.train.ray_train import place

    folder = Path(args.folder)
    path = write_curriculum(folder, "start", args.quick)
    sets = ["BATCH_SIZE=1", "LOG_EVERY_STEPS=1", *shorter(args.quick), "EPOCHS=1", "SCHEDULER_MILESTONES=[1]"]
    curriculum = load_curriculum(path, [*sets, "CLIPS_PER_EPOCH=4"])
    began = time.time()
    cluster = connect()
    ray_s = time.time() - began
    try:
        cpus = place(args.workers, curriculum.stages[0].config, cluster).cpus
        cold = empty_start(args.workers, cpus, folder)
        stamps = Stamps()
        options = Options(str(ROOT), str(folder / "storage"), args.workers, config_path=str(path))
        run_curriculum(curriculum, options, cluster, Lineage(storage=options.storage), stamps)
        warm = empty_start(args.workers, cpus, folder)
    finally:
        disconnect()
    begin = stamps.seconds["begin"]
    first = {name.removeprefix("step/time/"): value for name, value in stamps.first.items() if "step/time/" in name}
    return {
        "to first step": stamps.seconds["step"] - begin,
        "to model": stamps.seconds["transfer"] - begin,
        "first step": first,
        "empty trainer": warm,
        "empty trainer, cold": cold,
        "ray.init": ray_s,
    }


def start_of_a_stage(args: argparse.Namespace, folder: Path, recorder: Recorder) -> None:
    command = [sys.executable, "-m", "benchmarks.bench_demo", "--side", "start", "--folder", str(folder)]
    command += ["--workers", str(args.workers), *(["--quick"] if args.quick else [])]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **QUIET}, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode != 0:
        raise SystemExit(f"the start of a stage failed with status {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    total, own, first = found["to first step"], found["empty trainer"], found["first step"]
    parts = ", ".join(f"{name.removesuffix('_s')} {seconds:.1f}" for name, seconds in first.items())
    recorder.add(
        STAGE,
        configuration={"stage": f"{STAGE_NAME} of the demo", "workers": args.workers, "clips per worker": 1},
        baseline=None,
        quantities=[
            quantity("s beyond Ray's own start", total - own),
            quantity("s from job.json to the first step", total),
            quantity("s of Ray's own start, an empty trainer", own),
        ],
        note=(
            f"Where it goes: {own:.1f} s until workers begin (an empty trainer), {found['to model'] - own:.1f} s more "
            f"until they have the model with its parent's weights, {total - found['to model']:.1f} s until the driver "
            f"hears of the first step, of which in seconds: {parts}. Before the stage: ray.init "
            f"{found['ray.init']:.1f} s; the first trainer of that Ray took {found['empty trainer, cold']:.1f} s."
        ),
    )


# ------------------------------------------------------------------------------------------------ the whole demo


def whole(folder: Path, recorder: Recorder) -> None:
    began = time.perf_counter()
    done = subprocess.run(["make", "demo", f"STORAGE={folder / 'whole'}"], cwd=ROOT, check=False)
    if done.returncode != 0:
        raise SystemExit(f"make demo failed with status {done.returncode}")
    minutes = (time.perf_counter() - began) / 60
    recorder.add(WHOLE, {"command": "make demo, set-up done"}, None, [quantity("minutes", minutes)])


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ["workers", "start", "whole"]
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, help="some of them")
    parser.add_argument("--repeats", type=int, default=1, help="of the comparison of workers")
    parser.add_argument(
        "--workers", type=int, default=min(2, cores_allowed()), help="of the stage whose start is timed"
    )
    parser.add_argument("--side", choices=["start"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    add_flags(parser, "two epochs of a few clips")
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    if args.side:
        print(json.dumps(start_side(args)))
        return
    recorder = Recorder("demo", "The demo", args)
    with tempfile.TemporaryDirectory(prefix="motip_bench_") as name:
        folder = Path(name)
        if "workers" in args.only:
            compare_workers(args, folder, recorder)
        if "start" in args.only:
            start_of_a_stage(args, folder, recorder)
        if "whole" in args.only and not args.quick:
            whole(folder, recorder)
    recorder.finish()


if __name__ == "__main__":
    main()
