"""Time and memory of scoring one long crowded sequence: our Identity and all three families against TrackEval's own.

    python -m benchmarks.bench_evaluation           # the figures of docs/performance.md: 20 000 tracker ids
    python -m benchmarks.bench_evaluation --quick   # seconds: 500 tracker ids

A tracker that often loses its objects writes thousands of short tracks; TrackEval's Identity then solves an assignment
over (ground-truth ids + tracker ids) squared. HOTA and CLEAR are TrackEval's classes on both sides. Each measurement
runs in a separate process on the same rows, and both sides must give the same results to 1e-9. Times are those of the
metrics without the similarities; peak is the highest resident size of the process.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

import numpy as np
from trackeval.metrics import CLEAR, HOTA, Identity

from benchmarks.machine import Stopwatch, memory_mb
from benchmarks.records import Recorder, add_flags, quantity
from motip.data.sequence import TrackRows
from motip.evaluation.metrics import FAMILIES, prepare_class
from motip.evaluation.protocols import ScoredSequence

TOLERANCE = 1e-9
WIDTH, HEIGHT = 1920.0, 1080.0
BOX = np.array([40.0, 90.0])
QUIET = {"PRINT_CONFIG": False}
SIDES: dict[str, dict[str, Any]] = {
    "ours": FAMILIES,
    "TrackEval": {"HOTA": HOTA(), "CLEAR": CLEAR(QUIET), "Identity": Identity(QUIET)},
}
PARTS = {"Identity": ("Identity",), "all three": ("HOTA", "CLEAR", "Identity")}
Results = dict[str, dict[str, Any]]


def truth_rows(frames: int, objects: int, rng: np.random.Generator) -> TrackRows:
    """Every object in every frame, drifting over a Full HD image; sorted by object, then by frame."""
    start = rng.uniform(0, [WIDTH, HEIGHT], (objects, 1, 2))
    speed = rng.uniform(-1, 1, (objects, 1, 2))
    low = (start + np.arange(frames)[None, :, None] * speed).reshape(-1, 2)
    return make_rows(
        np.tile(np.arange(frames), objects), np.repeat(np.arange(objects), frames), np.concatenate([low, low + BOX], 1)
    )


def tracker_rows(truth: TrackRows, tracker_ids: int, rng: np.random.Generator) -> TrackRows:
    """Output of a poor tracker on `truth`: a tenth missed, noisy boxes, tracks fragmented into exactly `tracker_ids`
    tracks, and in every fifth frame two objects with swapped ids."""
    seen = np.flatnonzero(rng.random(len(truth)) < 0.9)
    frames, owners = truth.frames[seen], truth.track_ids[seen]
    starts = np.concatenate([[True], owners[1:] != owners[:-1]])
    cuts = tracker_ids - int(starts.sum())
    inside = np.flatnonzero(~starts)
    if not 0 <= cuts <= len(inside):
        raise SystemExit(f"{len(seen)} boxes of {starts.sum()} objects cannot be cut into {tracker_ids} tracks")
    starts[rng.choice(inside, cuts, replace=False)] = True
    ids = np.cumsum(starts) - 1
    for frame in range(0, int(frames.max()) + 1, 5):
        here = np.flatnonzero(frames == frame)
        if len(here) > 1:
            one, other = rng.choice(here, 2, replace=False)
            ids[[one, other]] = ids[[other, one]]
    return make_rows(frames, ids, truth.boxes_xyxy[seen] + np.tile(rng.normal(0, 5, (len(seen), 2)), 2))


def make_rows(frames: np.ndarray, ids: np.ndarray, boxes_xyxy: np.ndarray) -> TrackRows:
    return TrackRows(frames, ids, boxes_xyxy, np.ones(len(frames), np.float32), np.zeros(len(frames), np.int64))


def run_side(args: argparse.Namespace) -> dict[str, Any]:
    """One measurement, in this process: the times, peak memory and every field of the results."""
    rng = np.random.default_rng(0)
    truth = truth_rows(args.frames, args.objects, rng)
    sequence = ScoredSequence("crowd", truth, tracker_rows(truth, args.tracker_ids, rng))
    _, _, data = prepare_class(sequence, ("object",), "object")
    if data["num_tracker_ids"] != args.tracker_ids:
        raise SystemExit(f"{data['num_tracker_ids']} tracker ids instead of {args.tracker_ids}")
    before = memory_mb("VmRSS")
    stopwatch = Stopwatch()
    for _ in range(args.repeats):
        with stopwatch:
            results = {family: SIDES[args.side][family].eval_sequence(data) for family in PARTS[args.part]}
    return {
        "wall s": stopwatch.wall_s,
        "CPU s": stopwatch.cpu_s,
        "peak GB": memory_mb("VmHWM") / 1e3,
        "before": before / 1e3,
        "results": {
            family: {name: np.asarray(value).tolist() for name, value in fields.items()}
            for family, fields in results.items()
        },
    }


def measure(args: argparse.Namespace, side: str, part: str) -> dict[str, Any]:
    repeats = args.repeats if side == "ours" else args.baseline_repeats
    command = [sys.executable, "-m", "benchmarks.bench_evaluation", "--side", side, "--part", part]
    command += ["--repeats", str(repeats)]
    for name in ("frames", "objects", "tracker_ids"):
        command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{side}, {part} failed with status {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def check_equal(ours: Results, theirs: Results) -> int:
    """Number of equal values; raises SystemExit for the first field that differs."""
    compared = 0
    if ours.keys() != theirs.keys():
        raise SystemExit(f"the sides scored different families: {sorted(ours)} and {sorted(theirs)}")
    for family, fields in theirs.items():
        if ours[family].keys() != fields.keys():
            raise SystemExit(f"the sides differ in the fields of {family}")
        for name, expected in fields.items():
            if not np.allclose(ours[family][name], expected, rtol=0, atol=TOLERANCE):
                raise SystemExit(f"the sides differ in {family} {name}: {ours[family][name]} and {expected}")
            compared += np.size(expected)
    return compared


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=1000)
    parser.add_argument("--objects", type=int, default=150, help="objects in every frame = number of ground-truth ids")
    parser.add_argument("--tracker-ids", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=3, help="repeats of our side; the median is recorded")
    parser.add_argument("--baseline-repeats", type=int, default=1, help="repeats of TrackEval's side, a minute each")
    add_flags(parser, "100 frames, 500 tracker ids")
    parser.add_argument("--side", choices=list(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.frames, args.tracker_ids = 100, 500
    if min(args.repeats, args.baseline_repeats) < 1:
        parser.error("--repeats and --baseline-repeats must be at least 1")
    return args


def main() -> None:
    args = parse_args()
    if args.side:
        print(json.dumps(run_side(args)))
        return
    recorder = Recorder("evaluation", "Scoring a long crowded sequence", args)
    for part in PARTS:
        ours, theirs = (measure(args, side, part) for side in SIDES)
        compared = check_equal(ours["results"], theirs["results"])
        recorder.add(
            f"{part}, {args.tracker_ids} ids",
            {"frames": args.frames, "objects in each": args.objects, "GB before": round(ours["before"], 2)},
            "TrackEval's own classes",
            [quantity(name, ours[name], theirs[name]) for name in ("CPU s", "wall s", "peak GB")],
            note=f"{compared} numbers are equal to {TOLERANCE:g}.",
        )
    recorder.finish()


if __name__ == "__main__":
    main()
