"""The demo as started by a user: two workers against one, the start of a stage, and the complete `make demo`.

    python -m benchmarks.bench_demo                       # all, about twenty minutes
    python -m benchmarks.bench_demo --only workers start  # without `make demo`, half of that
    python -m benchmarks.bench_demo --quick               # two epochs of a few clips, without `make demo`

*Workers.* The demo's Vis-Adaptation stage for two epochs on synthetic aerial scenes, with `ray_jobs/curriculum.py`: two
workers with one clip each on two cores, then one worker with two clips, pinned to one core with all its processes. The
global batch, the clips and the initial weights are the same. Clips/s are recorded by the stage for its last epoch,
which starts warm and includes waiting for data. The stage is a separate curriculum, so that its weights need no earlier
stage, and is validated on one short video. A worker uses as many threads as cores it may use.

*Start of a stage.* The same stage through `run_curriculum` in a separate process: seconds from writing `job.json` to
the event of the first optimiser step in the driver. Ray's own start is that of a `TorchTrainer` with the same number of
workers and resources that write a timestamp and return; it runs once before the stage, as a warm-up of Ray's processes,
and once after it, which is recorded.
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
from motip.events import EpochDone, Event, StepLogged
from motip.stage_folder import stage_folders

STAGE_NAME = "Vis-Adaptation"
DEMO = "make demo"
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
    """A curriculum file with the demo's third stage only; files of one storage share the synthetic scenes."""
    path = folder / f"{name}.yaml"
    videos = 4 if quick else 80
    path.write_text(CURRICULUM.format(name=name, stage=STAGE_NAME, root=ROOT, videos=videos))
    return path


def shorter(quick: bool) -> list[str]:
    """Overrides for two epochs, of which the second is measured."""
    return ["EPOCHS=2", "SCHEDULER_MILESTONES=[2]", *(["CLIPS_PER_EPOCH=4"] if quick else [])]


# ------------------------------------------------------------------------------------------------ workers


def train(folder: Path, name: str, workers: int, clips: int, cores: list[int], quick: bool) -> dict[str, float]:
    """Train the stage on these cores; returns the recorded metrics of its last epoch."""
    command = [sys.executable, "ray_jobs/curriculum.py", "--config", str(write_curriculum(folder, name, quick))]
    command += ["--storage", str(folder / "storage"), "--workers", str(workers)]
    for each in (f"BATCH_SIZE={clips}", *shorter(quick)):
        command += ["--set", each]
    log = folder / f"{name}.log"
    with log.open("w") as output:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, **QUIET},
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),  # inherited by its child processes
        )
    if done.returncode != 0:
        raise SystemExit(f"{name} failed with status {done.returncode}:\n{log.read_text()[-2000:]}")
    return last_epoch(folder / "storage", name)


def last_epoch(storage: Path, name: str) -> dict[str, float]:
    """Recorded metrics of the last epoch of the stage."""
    (stage,) = stage_folders(storage / "curricula" / name / STAGE_NAME)
    return [event.metrics for event in stage.events() if isinstance(event, EpochDone)][-1]


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
    """User interface of the driver that records timestamps of its calls."""

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

    def event(self, event: Event) -> None:
        """Timestamp of the first `transfer` (a worker has its model) and of the first `step`."""
        if isinstance(event, StepLogged) and "step" not in self.seconds:
            self.first = event.metrics
        self.seconds.setdefault(event.kind, event.time)

    def stage_ends(self, record: Any) -> None:
        return


def empty_start(workers: int, cpus: float, folder: Path) -> float:
    """Seconds until all workers of an empty trainer have started."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    def begin(settings: dict[str, str]) -> None:
        import ray.train

        rank = ray.train.get_context().get_world_rank()
        (Path(settings["folder"]) / f"begun_{rank}").write_text(repr(time.time()))

    own = Path(tempfile.mkdtemp(dir=folder))
    began = time.time()
    TorchTrainer(
        begin,
        train_loop_config={"folder": str(own)},
        scaling_config=ScalingConfig(num_workers=workers, resources_per_worker={"CPU": cpus}),
        run_config=RunConfig(name="empty", storage_path=str(own)),
    ).fit()
    return max(float(file.read_text()) for file in own.glob("begun_*")) - began


def start_side(args: argparse.Namespace) -> dict[str, Any]:
    """Process with a local Ray cluster: an empty trainer, the stage, an empty trainer again."""
    from motip.cluster import connect, disconnect
    from motip.config import load_curriculum
    from motip.curriculum import Options, run_curriculum
    from motip.lineage import Lineage
    from motip.train.ray_train import plan_resources

    folder = Path(args.folder)
    path = write_curriculum(folder, "start", args.quick)
    sets = ["BATCH_SIZE=1", "LOG_EVERY_STEPS=1", *shorter(args.quick), "EPOCHS=1", "SCHEDULER_MILESTONES=[1]"]
    curriculum = load_curriculum(path, [*sets, "CLIPS_PER_EPOCH=4"])
    # Ray, an empty trainer as warm-up, the stage, and the empty trainer that is recorded.
    began = time.time()
    cluster = connect()
    ray_s = time.time() - began
    try:
        cpus = plan_resources(args.workers, curriculum.stages[0].config, cluster).cpus
        cold = empty_start(args.workers, cpus, folder)
        stamps = Stamps()
        options = Options(str(ROOT), str(folder / "storage"), args.workers, config_path=str(path))
        run_curriculum(curriculum, options, cluster, Lineage(storage=options.storage), stamps)
        warm = empty_start(args.workers, cpus, folder)
    finally:
        disconnect()
    # Seconds since job.json.
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
            f"Breakdown: {own:.1f} s until workers start (an empty trainer), {found['to model'] - own:.1f} s more "
            f"until they have the model with its initial weights, {total - found['to model']:.1f} s until the event "
            f"of the first step in the driver, of which in seconds: {parts}. Before the stage: ray.init "
            f"{found['ray.init']:.1f} s; the first trainer of that Ray took {found['empty trainer, cold']:.1f} s."
        ),
    )


# ------------------------------------------------------------------------------------------------ make demo


def complete_demo(folder: Path, recorder: Recorder) -> None:
    began = time.perf_counter()
    done = subprocess.run(["make", "demo", f"STORAGE={folder / 'demo'}"], cwd=ROOT, check=False)
    if done.returncode != 0:
        raise SystemExit(f"make demo failed with status {done.returncode}")
    minutes = (time.perf_counter() - began) / 60
    recorder.add(DEMO, {"command": "make demo, set-up done"}, None, [quantity("minutes", minutes)])


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ["workers", "start", "whole"]
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, help="parts to run")
    parser.add_argument("--repeats", type=int, default=1, help="repeats of the comparison of workers")
    parser.add_argument(
        "--workers", type=int, default=min(2, cores_allowed()), help="workers of the stage whose start is timed"
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
            complete_demo(folder, recorder)
    recorder.finish()


if __name__ == "__main__":
    main()
