"""What deformable attention costs by arithmetic, and what the device at hand could do at best.

Operations and bytes follow from the shapes alone. The least time of a shape is the largest of three: its operations at
the device's rate, the bytes that must come from memory at the rate of a large copy, and the bytes that its samples
gather (each pixel is read many times, from the cache) at the rate of a copy that stays in the cache. A measured time
over the least time says what is left.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import torch


@dataclass(frozen=True)
class Shape:
    """Levels finest first as (h, w); heads of `channels` channels each."""

    sizes: list[tuple[int, int]]
    queries: int
    batch: int = 1
    heads: int = 8
    channels: int = 32
    points: int = 4

    @property
    def pixels(self) -> int:
        return sum(height * width for height, width in self.sizes)

    @property
    def samples(self) -> int:
        return self.batch * self.queries * self.heads * len(self.sizes) * self.points


@dataclass(frozen=True)
class Cost:
    """Of one direction: floating-point operations, bytes in and out of memory once, bytes gathered by samples."""

    flops: int
    bytes: int
    gathered: int


def forward_cost(shape: Shape, value_bytes: int = 4, location_bytes: int = 4) -> Cost:
    """Per sample: four neighbours times `channels` multiply-adds; 24 for place, shares and products of shares."""
    values = shape.batch * shape.pixels * shape.heads * shape.channels
    outputs = shape.batch * shape.queries * shape.heads * shape.channels
    return Cost(
        flops=shape.samples * (8 * shape.channels + 24),
        bytes=(values + outputs) * value_bytes + 3 * shape.samples * location_bytes,
        gathered=shape.samples * 4 * shape.channels * value_bytes,
    )


def backward_cost(shape: Shape, value_bytes: int = 4, location_bytes: int = 4) -> Cost:
    """Per sample: four dot products, four scaled rows that are added to the gradient, 48 for the rest.

    The gradient of the values is cleared, added up and read again in float32 and written in the type of the values; an
    addition to it in the cache is counted as 4 bytes.
    """
    values = shape.batch * shape.pixels * shape.heads * shape.channels
    outputs = shape.batch * shape.queries * shape.heads * shape.channels
    rounded = (4 + value_bytes) if value_bytes < 4 else 0
    return Cost(
        flops=shape.samples * (16 * shape.channels + 48),
        bytes=(values + outputs) * value_bytes + values * (8 + rounded) + 6 * shape.samples * location_bytes,
        gathered=shape.samples * 4 * shape.channels * (value_bytes + 4),
    )


@dataclass(frozen=True)
class Ceilings:
    """What a device was measured to do: bytes/s from memory and in the cache, float32 operations/s."""

    memory: float
    cache: float
    flops: float

    def least_seconds(self, cost: Cost) -> float:
        return max(cost.flops / self.flops, cost.bytes / self.memory, cost.gathered / self.cache)


def measured_ceilings(device: torch.device, small: bool = False) -> Ceilings:
    """Copies of 256 MB and of 4 MB (bytes read and written count), and a float32 matrix product of side 4096."""
    large, cached = (1 << 16, 1 << 12) if small else (1 << 26, 1 << 20)
    rates = []
    for count in (large, cached):
        source = torch.rand(count, device=device)
        target = torch.empty_like(source)
        rates.append(2 * source.nbytes / kernel_seconds(partial(target.copy_, source), device, 20))
    # Without tensor cores a product of large matrices is bound by the units that these kernels calculate with.
    side = 64 if small else 4096
    factor = torch.rand(side, side, device=device)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        product = kernel_seconds(lambda: factor @ factor, device, 5)
    finally:
        torch.set_float32_matmul_precision(before)
    return Ceilings(memory=rates[0], cache=rates[1], flops=2 * side**3 / product)


def kernel_seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median seconds that a device is busy with one call; for work that does not wait for the device itself.

    Ten calls are queued behind a kernel that only waits, so that a card goes from one to the next: launching a short
    kernel takes the host longer than the card needs for it, and would be what is timed.
    """
    if device.type != "cuda":
        return seconds_of(work, device, repeats)
    calls = 10
    work()
    torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    waiting = int(2e9 * (2 * calls * (time.perf_counter() - started) + 1e-3))  # cycles, at most 2e9 of them a second
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(waiting)
        start.record()
        for _ in range(calls):
            work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / calls)
    return sorted(times)[len(times) // 2]


def seconds_of(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median seconds from the beginning to the end of one call, after two that load kernels."""
    for _ in range(2):
        work()
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            work()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            started = time.perf_counter()
            work()
            times.append(time.perf_counter() - started)
    return sorted(times)[len(times) // 2]


def as_dict(cost: Cost, ceilings: Ceilings | None = None, seconds: float | None = None) -> dict[str, float]:
    """The cost in plain numbers, with the least time and the share of it that was reached where they are known."""
    found: dict[str, float] = dict(asdict(cost))
    if ceilings is not None:
        found["least_seconds"] = ceilings.least_seconds(cost)
        if seconds is not None:
            found["seconds"] = seconds
            found["share_of_ceiling"] = found["least_seconds"] / seconds
    return found
