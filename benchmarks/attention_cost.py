"""Roofline model of deformable attention: operations, bytes, and lower bound of the time on a device.

Operations and bytes follow from the shapes. The lower bound is the largest of three times: the operations at the peak
rate of the device, the bytes from memory at the rate of a large copy, and the bytes read by samples (each pixel many
times, from the cache) at the rate of a copy within the cache.
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
    """Of one direction: floating-point operations, bytes from and to memory, bytes read by samples from the cache."""

    flops: int
    bytes: int
    sampled: int


def forward_cost(shape: Shape, value_bytes: int = 4, location_bytes: int = 4) -> Cost:
    """Per sample: four neighbours times `channels` multiply-adds; 24 for location, shares and their products."""
    values = shape.batch * shape.pixels * shape.heads * shape.channels
    outputs = shape.batch * shape.queries * shape.heads * shape.channels
    return Cost(
        flops=shape.samples * (8 * shape.channels + 24),
        bytes=(values + outputs) * value_bytes + 3 * shape.samples * location_bytes,
        sampled=shape.samples * 4 * shape.channels * value_bytes,
    )


def backward_cost(shape: Shape, value_bytes: int = 4, location_bytes: int = 4) -> Cost:
    """Per sample: four dot products, four scaled rows that are added to the gradient, 48 for the rest.

    The gradient of the values is cleared, accumulated and read in float32, and written in the type of the values; an
    accumulation in the cache counts as 4 bytes.
    """
    values = shape.batch * shape.pixels * shape.heads * shape.channels
    outputs = shape.batch * shape.queries * shape.heads * shape.channels
    rounded = (4 + value_bytes) if value_bytes < 4 else 0
    return Cost(
        flops=shape.samples * (16 * shape.channels + 48),
        bytes=(values + outputs) * value_bytes + values * (8 + rounded) + 6 * shape.samples * location_bytes,
        sampled=shape.samples * 4 * shape.channels * (value_bytes + 4),
    )


@dataclass(frozen=True)
class Ceilings:
    """Measured peak rates of a device: bytes/s from memory and in the cache, float32 operations/s."""

    memory: float
    cache: float
    flops: float

    def least_seconds(self, cost: Cost) -> float:
        """Lower bound of the time of `cost`."""
        return max(cost.flops / self.flops, cost.bytes / self.memory, cost.sampled / self.cache)


def measured_ceilings(device: torch.device, small: bool = False) -> Ceilings:
    """Copies of 256 MB and of 4 MB (bytes read and written count), and a float32 matrix product of side 4096."""
    large, cached = (1 << 16, 1 << 12) if small else (1 << 26, 1 << 20)
    rates = []
    for count in (large, cached):
        source = torch.rand(count, device=device)
        target = torch.empty_like(source)
        rates.append(2 * source.nbytes / kernel_seconds(partial(target.copy_, source), device, 20))
    # A large matrix product without tensor cores is bound by the same arithmetic units as these kernels.
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
    """Median device seconds of one call of `work`, which must not synchronise.

    Ten calls are queued behind a sleeping kernel and then run back to back: the launch of a short kernel takes longer
    than the kernel itself and would otherwise set the time.
    """
    if device.type != "cuda":
        return seconds_of(work, device, repeats)
    calls = 10
    work()
    torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    waiting = int(2e9 * (2 * calls * (time.perf_counter() - started) + 1e-3))  # cycles, at most 2e9 per second
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
    """Median seconds of one call, after two warm-up calls."""
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
    """The cost as plain numbers, with lower bound and achieved share where known."""
    found: dict[str, float] = dict(asdict(cost))
    if ceilings is not None:
        found["least_seconds"] = ceilings.least_seconds(cost)
        if seconds is not None:
            found["seconds"] = seconds
            found["share_of_ceiling"] = found["least_seconds"] / seconds
    return found
