"""Time of one deformable attention of the encoder with each implementation; equal results are asserted.

    python -m benchmarks.bench_deformable_attention           # the figures of docs/performance.md
    python -m benchmarks.bench_deformable_attention --quick   # seconds

Full size (8 heads of 32 channels, 4 points), one frame, every pixel of the four levels is a query. With a CUDA device:
device times in float32 and bf16, also of the Triton kernels, and the share of the roofline (`attention_cost.py`).
Without: CPU seconds, without Triton. `--counts` prints operations and bytes only.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.attention_cost import (
    Shape,
    as_dict,
    backward_cost,
    forward_cost,
    kernel_seconds,
    measured_ceilings,
)
from benchmarks.machine import Stopwatch
from benchmarks.records import Recorder, add_flags, quantity
from motip.model import deformable_attention
from motip.model.fast.triton_attention import triton_ready

SIDES = ("grid_sample", "embedding_bag")
HEADS, CHANNELS, POINTS, STRIDES = 8, 32, 4, (8, 16, 32, 64)


def make_case(height: int, width: int) -> tuple[list[tuple[int, int]], list[Tensor]]:
    """Shapes of the levels; value, sampling locations near each pixel, and weights."""
    torch.manual_seed(0)
    shapes = [(-(-height // stride), -(-width // stride)) for stride in STRIDES]
    pixels = sum(h * w for h, w in shapes)
    centres = torch.cat(
        [
            torch.stack(
                torch.meshgrid((torch.arange(w) + 0.5) / w, (torch.arange(h) + 0.5) / h, indexing="xy"), -1
            ).flatten(0, 1)
            for h, w in shapes
        ]
    )
    offsets = torch.randn(1, pixels, HEADS, len(shapes), POINTS, 2) * 0.02
    weights = torch.rand(1, pixels, HEADS, len(shapes) * POINTS).softmax(-1).unflatten(-1, (len(shapes), POINTS))
    return shapes, [torch.randn(1, pixels, HEADS, CHANNELS), centres[None, :, None, None, None] + offsets, weights]


def cpu_seconds(work: Callable[[], object], repeats: int) -> list[float]:
    """CPU seconds of each of `repeats` calls, after a warm-up call."""
    work()
    stopwatch = Stopwatch()
    for _ in range(repeats):
        with stopwatch:
            work()
    return stopwatch.cpu_s


def on_cpu(
    shapes: list[tuple[int, int]], inputs: list[Tensor], repeats: int, settings: dict[str, Any], recorder: Recorder
) -> None:
    """Record CPU seconds of ``embedding_bag`` against ``grid_sample``."""
    forward, backward = _calls(shapes, inputs)
    with torch.no_grad():
        seconds = {"forward": [cpu_seconds(partial(forward, side), repeats) for side in SIDES]}
    seconds["forward and backward"] = [cpu_seconds(partial(backward, side), repeats) for side in SIDES]
    for name, (grid, bag) in seconds.items():
        recorder.add(f"{name}, embedding_bag", settings, "grid_sample", [quantity("CPU s", bag, grid)])
    recorder.skip("the Triton kernels", "no CUDA device")


def on_cuda(shape: Shape, inputs: list[Tensor], repeats: int, settings: dict[str, Any], recorder: Recorder) -> None:
    """Record device milliseconds of every implementation against grid_sample, and the share of the roofline."""
    device = torch.device("cuda")
    ceilings = measured_ceilings(device)
    settings = {
        **settings,
        "GB/s from memory": round(ceilings.memory / 1e9),
        "GB/s in the cache": round(ceilings.cache / 1e9),
        "TFLOP/s float32": round(ceilings.flops / 1e12, 1),
    }
    for dtype in (torch.float32, torch.bfloat16):
        moved = [inputs[0].to(device, dtype), *(tensor.to(device) for tensor in inputs[1:])]
        forward, backward = _calls(shape.sizes, moved)
        bound = {"forward": ceilings.least_seconds(forward_cost(shape, dtype.itemsize))}
        backward_bound = ceilings.least_seconds(backward_cost(shape, dtype.itemsize))
        bound["forward and backward"] = bound["forward"] + backward_bound
        first: dict[str, float] = {}
        for side in (*SIDES, *(("triton",) if triton_ready(device) else ())):
            with torch.no_grad():
                found = {"forward": kernel_seconds(partial(forward, side), device, repeats)}
            found["forward and backward"] = kernel_seconds(partial(backward, side), device, repeats)
            first = first or found
            for name, seconds in found.items():
                recorder.add(
                    f"{name}, {side}, {str(dtype).removeprefix('torch.')}",
                    {**settings, "timed calls": repeats},
                    "grid_sample in the same type",
                    [
                        quantity("ms", 1e3 * seconds, 1e3 * first[name]),
                        quantity("share of the roofline, %", 100 * bound[name] / seconds),
                    ],
                )


def _calls(
    shapes: list[tuple[int, int]], inputs: list[Tensor]
) -> tuple[Callable[[str], Tensor], Callable[[str], tuple[Tensor, ...]]]:
    """Functions of the implementation's name that run forward, and forward with backward."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]

    def forward(side: str) -> Tensor:
        return deformable_attention._implementations[side](leaves[0], shapes, leaves[1], leaves[2])

    def backward(side: str) -> tuple[Tensor, ...]:
        return torch.autograd.grad(forward(side).float().square().mean(), leaves)

    return forward, backward


def check_equal(shapes: list[tuple[int, int]], inputs: list[Tensor], sides: tuple[str, ...]) -> None:
    forward, _ = _calls(shapes, inputs)
    with torch.no_grad():
        first = forward(sides[0])
        for side in sides[1:]:
            if (first - forward(side)).abs().max() > 1e-4:
                raise SystemExit(f"{sides[0]} and {side} differ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, nargs=2, default=[480, 864], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    add_flags(parser, "96x128, once")
    parser.add_argument("--counts", action="store_true", help="operations and bytes only")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    size, repeats = ([96, 128], 1) if args.quick else (args.size, args.repeats)
    shapes, inputs = make_case(*size)
    shape = Shape(shapes, queries=inputs[0].shape[1], heads=HEADS, channels=CHANNELS, points=POINTS)
    for name, cost in (("forward", forward_cost), ("backward", backward_cost)):
        for bytes_each in (4, 2):
            counted = as_dict(cost(shape, bytes_each))
            print(f"{name}, {8 * bytes_each} bit: " + ", ".join(f"{v / 1e9:.3f} G {k}" for k, v in counted.items()))
    if args.counts:
        return
    recorder = Recorder("deformable_attention", "Deformable attention, one layer of the encoder", args)
    settings: dict[str, Any] = {"size": f"{size[0]}x{size[1]}", "queries": shape.queries, "threads": args.threads}
    if torch.cuda.is_available():
        on_device = [tensor.cuda() for tensor in inputs]
        check_equal(shapes, on_device, (*SIDES, "triton") if triton_ready(on_device[0].device) else SIDES)
        on_cuda(shape, inputs, 10 * repeats, settings, recorder)
    else:
        check_equal(shapes, inputs, SIDES)
        on_cpu(shapes, inputs, repeats, settings, recorder)
    recorder.finish()


if __name__ == "__main__":
    main()
