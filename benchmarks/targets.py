"""Performance targets: one per quantity, matched to records by claim, work and quantity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Target:
    """A bound on the median of ours, or on its ratio to the baseline of the same run.

    Args:
        claim: name of the script without `bench_`.
        label: description of the work for the table.
        work, quantity: names in the record of the script.
        of: the value the limit applies to.
        way: direction of the limit.
        limit: bound.
        gpu: applies to machines with a CUDA GPU only; otherwise to machines without.
    """

    claim: str
    label: str
    work: str
    quantity: str
    of: Literal["ratio", "ours"]
    way: Literal["at most", "at least"]
    limit: float
    gpu: bool = False

    def text(self) -> str:
        sign = "≤" if self.way == "at most" else "≥"
        return f"{sign} {self.limit:g}" + (" x baseline" if self.of == "ratio" else "")

    def verdict(self, ours: float, ratio: float | None) -> str:
        """`met`, `missed`, or `no baseline` for a ratio without a measured baseline."""
        value = ours if self.of == "ours" else ratio
        if value is None:
            return "no baseline"
        return "met" if (value <= self.limit if self.way == "at most" else value >= self.limit) else "missed"


STEP = "T=5, 480x854, 4 gradient frames, 6 groups, 10 objects"
ID_DECODER = "T=30, N=40, G=6"
AERIAL = "worst aerial clip, one image at a time, triton"
WORKERS = "two workers on two cores against one on one"
STAGE = "start of a stage, tiny preset"

TARGETS = (
    Target("detector", "Detector, 480x854", "480x854, batch 1", "CPU s", "ratio", "at most", 0.6),
    Target("detector", "Detector, 800x1333", "800x1333, batch 1", "CPU s", "ratio", "at most", 0.6),
    Target("detector", "Detector, 480x854", "480x854, batch 1", "greatest difference", "ours", "at most", 1e-4),
    Target("detector", "Detector, 800x1333", "800x1333, batch 1", "greatest difference", "ours", "at most", 1e-4),
    Target("step", "Training step, T=5, 480x854", STEP, "CPU s", "ratio", "at most", 0.5),
    Target("step", "Training step, memory", STEP, "peak MB", "ratio", "at most", 0.5),
    Target("step", "Training step, losses", STEP, "greatest loss difference", "ours", "at most", 1e-4),
    Target("id_decoder", "ID decoder, forward and backward", ID_DECODER, "wall s", "ratio", "at most", 0.5),
    Target("id_decoder", "ID decoder, memory", ID_DECODER, "peak MB", "ratio", "at most", 0.25),
    Target("id_decoder", "ID decoder, 100 objects", "T=30, N=100, G=6", "peak MB", "ours", "at most", 24_000),
    Target("tracker", "Tracker besides the detector, 20 objects", "20 objects", "ms per frame", "ours", "at most", 11),
    Target("tracker", "Tracker, 50 objects", "50 objects", "ms per frame", "ours", "at most", 24),
    Target("tracker", "Tracker, 200 objects", "200 objects", "ms per frame", "ours", "at most", 300),
    Target("data", "Data, clips of 5 frames", "T=5, Ray Data", "CPU s per clip", "ours", "at most", 0.07),
    Target("data", "Data, clips of 30 frames", "T=30, Ray Data", "CPU s per clip", "ours", "at most", 0.27),
    Target("stream_memory", "Waiting for data, T=5", "T=5", "waiting, % of the time", "ours", "at most", 5),
    Target("stream_memory", "Waiting for data, T=30", "T=30", "waiting, % of the time", "ours", "at most", 5),
    Target("evaluation", "Identity, 20 000 ids", "Identity, 20000 ids", "wall s", "ours", "at most", 5),
    Target("evaluation", "Identity, memory", "Identity, 20000 ids", "peak GB", "ours", "at most", 1),
    Target("evaluation", "All metrics, 20 000 ids", "all three, 20000 ids", "wall s", "ours", "at most", 15),
    Target("evaluation", "All metrics, memory", "all three, 20000 ids", "peak GB", "ours", "at most", 3),
    Target("demo", "Two workers on two cores against one on one", WORKERS, "clips/s", "ratio", "at least", 1.5),
    Target("demo", "Start of a stage", STAGE, "s beyond Ray's own start", "ours", "at most", 20),
    Target("demo", "`make demo`, from start to end", "make demo", "minutes", "ours", "at most", 10),
    Target("gpu", "Training on a GPU", "training step, bf16, triton", "clips/s", "ratio", "at least", 2, gpu=True),
    Target("gpu", "Tracking on a GPU", "tracking, bf16, auto", "frames/s", "ratio", "at least", 3, gpu=True),
    Target("gpu", "Worst clip of Vis-Specialist on a GPU", AERIAL, "reserved GB", "ours", "at most", 22, gpu=True),
)


def target_of(claim: str, work: str, quantity: str) -> Target | None:
    key = (claim, work, quantity)
    return next((each for each in TARGETS if (each.claim, each.work, each.quantity) == key), None)
