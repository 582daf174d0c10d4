"""Time of one deformable attention of the encoder: `grid_sample` against `embedding_bag`, same results asserted.

    python tests/benchmarks/bench_deformable_attention.py           # the figures of docs/performance.md
    python tests/benchmarks/bench_deformable_attention.py --quick   # seconds

Full size (8 heads of 32 channels, 4 points), one frame, every pixel of the four levels asks.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from motip.model import deformable_attention as room

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


def least_cpu_seconds(work: Callable[[], object], repeats: int) -> float:
    work()  # loads kernels
    seconds = []
    for _ in range(repeats):
        started = time.process_time()
        work()
        seconds.append(time.process_time() - started)
    return min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, nargs=2, default=[480, 864], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="96x128, once")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    size, repeats = ([96, 128], 1) if args.quick else (args.size, args.repeats)
    shapes, inputs = make_case(*size)

    def forward(side: str) -> Tensor:
        return room._implementations[side](inputs[0], shapes, inputs[1], inputs[2])

    def backward(side: str) -> tuple[Tensor, ...]:
        leaves = [tensor.requires_grad_() for tensor in inputs]
        return torch.autograd.grad(forward(side).square().mean(), leaves)

    with torch.no_grad():
        if (forward(SIDES[0]) - forward(SIDES[1])).abs().max() > 1e-4:
            raise SystemExit("the two implementations disagree")
        seconds = {"forward": [least_cpu_seconds(lambda side=side: forward(side), repeats) for side in SIDES]}
    seconds["forward and backward"] = [least_cpu_seconds(lambda side=side: backward(side), repeats) for side in SIDES]
    print(f"{size[0]}x{size[1]}, {inputs[0].shape[1]} queries, {args.threads} threads, torch {torch.__version__}")
    print(f"{'CPU seconds':<22}{SIDES[0]:>14}{SIDES[1]:>15}{'ratio':>7}")
    for name, (grid, bag) in seconds.items():
        print(f"{name:<22}{grid:>14.3f}{bag:>15.3f}{bag / grid:>7.2f}")


if __name__ == "__main__":
    main()
