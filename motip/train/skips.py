"""Skipped batches: counts over the run, and a report of each on every rank."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from motip.data.batch import ClipBatch
from motip.train.collectives import ProcessGroup
from motip.train.oom import OomRetry, Outcome, RankState, describe_clips, max_objects_per_frame, object_bucket

_log = logging.getLogger(__name__)


@dataclass
class StepCounters:
    """Counts of a run so far; the same on every rank. The field names are keys of a checkpoint."""

    nonfinite_losses: int = 0
    nonfinite_gradients: int = 0
    gradient_jumps: int = 0
    """Gradient norms far above their running median."""
    out_of_memory: int = 0
    """Batches skipped because a rank ran out of memory with the last fallback."""
    lowered: int = 0
    """Out-of-memory failures of ranks (`StepLosses.retries`)."""
    skipped_objects: dict[str, int] = field(default_factory=dict)
    """Clips skipped for lack of memory, by objects in their most crowded frame."""
    clips_left_out: int = 0
    """Clips skipped for lack of memory or because a loss was not finite."""
    names: list[str] = field(default_factory=list)
    """Clips of the skipped batches, the last hundred."""


def skip_reason(outcome: Outcome, retry: OomRetry, metrics: Mapping[str, float]) -> str:
    """Why this rank skips its clips, from the batch's outcome and the rank's own logged values."""
    if outcome is Outcome.NOT_FINITE:
        bad = ", ".join(name for name, value in metrics.items() if not math.isfinite(value))
        return f"not finite: {bad}" if bad else "skipped because another rank's loss is not finite"
    if retry.state is not RankState.FAILED:
        return "skipped because another rank's was"
    return "out of memory with the last fallback" if retry.exhausted else "out of memory"


def report_skip(
    batch: ClipBatch, outcome: Outcome, reason: str, comm: ProcessGroup, counters: StepCounters
) -> list[str]:
    """Count and log a batch of which no rank adds a gradient; every rank calls it and gets the same lines.

    Args:
        batch: this rank's clips.
        outcome: OUT_OF_MEMORY or NOT_FINITE.
        reason: of this rank.
    """
    own_line = f"rank {comm.rank}: {reason}; {describe_clips(batch)}" if batch.names else ""
    lines: list[str] = []
    for line, names, crowds in comm.all_gather((own_line, batch.names, max_objects_per_frame(batch))):
        lines += [line] if line else []
        counters.clips_left_out += len(names)
        counters.names = [*counters.names, *names][-100:]
        for objects in crowds if outcome is Outcome.OUT_OF_MEMORY else ():
            bucket = object_bucket(objects)
            counters.skipped_objects[bucket] = counters.skipped_objects.get(bucket, 0) + 1
    if outcome is Outcome.OUT_OF_MEMORY:
        counters.out_of_memory += 1
    else:
        counters.nonfinite_losses += 1
    _log.warning("batch skipped: %s", " | ".join(lines))
    return lines
