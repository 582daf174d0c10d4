"""Time split and memory of training, measured with one device synchronisation per logging interval."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

PARTS = ("forward", "backward", "optimiser")
"""Parts of a step's time; waiting for batches is measured by the epoch loop."""


class StepClock:
    """Seconds spent in each part of the training steps.

    On CUDA device time is measured: a pair of events per part is recorded in the stream, and `take` reads them all
    after one synchronisation. On a CPU it is wall-clock time.

    Args:
        device: where the steps run.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time of a block, also of one that raises, to the part ``name`` (one of `PARTS`)."""
        if self._device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            stream = torch.cuda.current_stream(self._device)
            begin.record(stream)
            try:
                yield
            finally:
                end.record(stream)
                self._events.append((name, begin, end))
            return
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - started

    def take(self) -> dict[str, float]:
        """Seconds by part since the last call. Synchronises a CUDA device: call it once per logging interval."""
        if self._events:
            torch.cuda.synchronize(self._device)
            for name, begin, end in self._events:
                self._seconds[name] += begin.elapsed_time(end) / 1000
            self._events.clear()
        taken, self._seconds = self._seconds, dict.fromkeys(PARTS, 0.0)
        return taken


class Interval:
    """Growth of running sums since the last call."""

    def __init__(self, sums: Mapping[str, float]) -> None:
        self._before = dict(sums)

    def since(self, sums: Mapping[str, float]) -> dict[str, float]:
        """The growth of each sum; the next call starts from these values."""
        growth = {name: value - self._before.get(name, 0.0) for name, value in sums.items()}
        self._before = dict(sums)
        return growth


def memory_gib(device: torch.device) -> float:
    """GiB in use by this process: on CUDA the peak allocated since the last call, else the resident size."""
    if device.type != "cuda":
        return resident_bytes() / 2**30
    peak = torch.cuda.max_memory_allocated(device) / 2**30
    torch.cuda.reset_peak_memory_stats(device)
    return peak


def resident_bytes() -> int:
    """Resident size of this process; its peak on systems without /proc/self/statm."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
