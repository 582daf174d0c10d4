"""Where the time and the memory of training go, measured without making the device wait for it."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

PARTS = ("forward", "backward", "optimiser")
"""What a step's own time is split into; waiting for batches is measured where the batches come from."""


class StepClock:
    """Seconds spent in each part of the training steps.

    On CUDA the device's own time counts: a pair of events per part is put into the stream, and `take` reads them all
    after the only synchronisation. Elsewhere it is the time on the wall.

    Args:
        device: where the steps run.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time of a block, also of one that fails, to the part ``name`` (one of `PARTS`)."""
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
        """Seconds by part since the last call. On CUDA it waits for the device: call it at the logging interval."""
        if self._events:
            torch.cuda.synchronize(self._device)
            for name, begin, end in self._events:
                self._seconds[name] += begin.elapsed_time(end) / 1000
            self._events.clear()
        taken, self._seconds = self._seconds, dict.fromkeys(PARTS, 0.0)
        return taken


class Interval:
    """How much running sums have grown since they were last looked at."""

    def __init__(self, sums: Mapping[str, float]) -> None:
        self._before = dict(sums)

    def since(self, sums: Mapping[str, float]) -> dict[str, float]:
        """The growth of each sum; the next call counts from here."""
        growth = {name: value - self._before.get(name, 0.0) for name, value in sums.items()}
        self._before = dict(sums)
        return growth


def memory_gib(device: torch.device) -> float:
    """GiB in use by this process: on CUDA the most allocated since the last call, else what is resident now."""
    if device.type != "cuda":
        return resident_bytes() / 2**30
    peak = torch.cuda.max_memory_allocated(device) / 2**30
    torch.cuda.reset_peak_memory_stats(device)
    return peak


def resident_bytes() -> int:
    """Main memory this process holds now; where the system does not say, the most it ever held."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
