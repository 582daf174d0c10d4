"""What was to be reached: one row per quantity, found in the records by claim, work and quantity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Target:
    """A bound on the median of ours, or on its ratio to the baseline of the same run.

    Args:
        claim: name of the script without `bench_`.
        label: the work in words, for the table.
        work, quantity: as the script's record calls them.
        card: asked of machines with a CUDA card, and of no other; without it the other way round.
    """

    claim: str
    label: str
    work: str
    quantity: str
    of: Literal["ratio", "ours"]
    way: Literal["at most", "at least"]
    limit: float
    card: bool = False

    def text(self) -> str:
        sign = "≤" if self.way == "at most" else "≥"
        return f"{sign} {self.limit:g}" + (" x baseline" if self.of == "ratio" else "")

    def verdict(self, ours: float, ratio: float | None) -> str:
        """`met`, `missed`, or `no baseline` where a ratio is asked for and only our side was measured."""
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
    Target("demo", "Whole `make demo`", "whole make demo", "minutes", "ours", "at most", 10),
    Target("gpu", "Training on a card", "training step, bf16, triton", "clips/s", "ratio", "at least", 2, card=True),
    Target("gpu", "Tracking on a card", "tracking, bf16, auto", "frames/s", "ratio", "at least", 3, card=True),
    Target("gpu", "Vis-Specialist's worst clip on a card", AERIAL, "reserved GB", "ours", "at most", 22, card=True),
)


def target_of(claim: str, work: str, quantity: str) -> Target | None:
    wanted = (claim, work, quantity)
    return next((each for each in TARGETS if (each.claim, each.work, each.quantity) == wanted), None)
