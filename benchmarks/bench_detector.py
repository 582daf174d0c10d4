"""CPU seconds of the detector per frame: ours as in tracking against the Deformable-DETR R50 of `transformers`.

    python -m benchmarks.bench_detector                            # both sizes of docs/performance.md
    python -m benchmarks.bench_detector --size 480 854 --repeats 3
    python -m benchmarks.bench_detector --quick                    # a small network, seconds

Both have the same random weights (ResNet-50, 6 + 6 layers, 300 queries) and process the same frame in turn; logits,
boxes and hidden states are compared in every turn. Ours is `FrameDetector`, created once before; the module used in
training is timed as well. Operations are counted from the module on PyTorch's `meta` device (convolutions
and products, two for each multiplication and addition); the ceiling they are compared with is the rate of one packed
product of 2048 x 1024 x 1024 in the same process.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.machine import Stopwatch
from benchmarks.records import Recorder, add_flags, quantity
from motip.model import build_model
from motip.model.detector import DeformableDetr
from motip.model.fast.frame_detector import FrameDetector
from motip.model.fast.packed import PackedLinear, can_pack
from motip.model.preprocess import normalise
from motip.model.spec import ModelSpec
from tests.helpers.transformers_twin import twin_of
from tests.parity.recipe import fill, image

FULL = ModelSpec(only_detr=True)
SMALL = ModelSpec(only_detr=True, enc_layers=1, dec_layers=2, num_queries=20, dim_feedforward=64)
OURS = {"ours": torch.float32, "ours in bf16": torch.bfloat16}
Outputs = tuple[Tensor, Tensor, Tensor]
Detect = Callable[[Tensor, Tensor], Outputs]


def of_module(detector: DeformableDetr | FrameDetector) -> Detect:
    def detect(images: Tensor, mask: Tensor) -> Outputs:
        return detector(images, mask)[:3]

    return detect


def of_twin(detector: DeformableDetr, spec: ModelSpec) -> Detect:
    twin = twin_of(detector, spec)

    def detect(images: Tensor, mask: Tensor) -> Outputs:
        found = twin(pixel_values=images, pixel_mask=(~mask).long())
        return found.logits, found.pred_boxes, found.last_hidden_state

    return detect


def billions_of_operations(spec: ModelSpec, size: tuple[int, int]) -> float:
    """GFLOP of products and convolutions, without the samples of deformable attention."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        build_model(spec).eval().requires_grad_(False).detr(
            torch.zeros(1, 3, *size), torch.zeros(1, *size, dtype=torch.bool)
        )
    return float(counter.get_total_flops()) / 1e9


def ceiling(dtype: torch.dtype) -> float:
    """GFLOP/s of a large packed product."""
    rows, width = 2048, 1024
    product = PackedLinear(torch.randn(width, width), dtype=dtype)
    x = torch.randn(rows, width, dtype=dtype)
    seconds = [cpu_seconds(lambda: product(x)) for _ in range(5)]
    return 2e-9 * rows * width * width / min(seconds)


def cpu_seconds(work: Callable[[], object]) -> float:
    stopwatch = Stopwatch()
    with stopwatch:
        work()
    return stopwatch.cpu_s[0]


def measure(size: tuple[int, int], spec: ModelSpec, repeats: int, recorder: Recorder) -> None:
    """Time the implementations in turn at one size and record the results."""
    model = build_model(spec).eval()
    fill(model, salt=11)
    detector = model.detr
    sides = {"transformers": of_twin(detector, spec), "module": of_module(detector)}
    once = {}
    for name, dtype in OURS.items():
        if can_pack(torch.zeros(1), dtype):
            stopwatch = Stopwatch()
            with stopwatch:
                sides[name] = of_module(FrameDetector(detector, dtype))
            once[name] = stopwatch.cpu_s[0]
    # Turns; the first one loads kernels, packs weights and computes constants.
    mask = torch.zeros(1, *size, dtype=torch.bool)
    images = normalise(torch.from_numpy(image(3, *size)).permute(2, 0, 1)[None], mask)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    difference = dict.fromkeys(sides, 0.0)
    for turn in range(repeats + 1):
        outputs: dict[str, Outputs] = {}
        for name, detect in sides.items():
            taken = cpu_seconds(lambda: outputs.update({name: detect(images, mask)}))  # noqa: B023
            seconds[name].append(taken)
            pairs = zip(outputs[name], outputs["transformers"], strict=True)
            print(f"{size[0]}x{size[1]}, turn {turn}, {name}: {taken:.3f} CPU s", flush=True)
            difference[name] = max(difference[name], *(float((a.float() - b).abs().max()) for a, b in pairs))
    for name, each in seconds.items():
        first = each.pop(0)
        if name in once:
            once[name] += first - statistics.median(each)
    _record(size, spec, seconds, once, difference, recorder)


def _record(
    size: tuple[int, int],
    spec: ModelSpec,
    seconds: dict[str, list[float]],
    once: dict[str, float],
    difference: dict[str, float],
    recorder: Recorder,
) -> None:
    threads = torch.get_num_threads()
    operations = billions_of_operations(spec, size)
    work = f"{size[0]}x{size[1]}, batch 1"
    for name, dtype in OURS.items():
        label = work if dtype == torch.float32 else f"{work}, {name}"
        if name not in seconds:
            recorder.skip(label, "no packed bf16 products on this processor or in this build of PyTorch")
            continue
        # Achieved share of the peak rate.
        most, median = ceiling(dtype), statistics.median(seconds[name])
        recorder.add(
            label,
            configuration={
                "model": "ResNet-50, 6 + 6 layers, 300 queries" if spec is FULL else "small, for a smoke test",
                "weights": "the same random ones",
                "dtype": str(dtype).removeprefix("torch."),
                "threads": threads,
                "repeats": len(seconds[name]),
            },
            baseline="transformers' Deformable-DETR R50, float32",
            quantities=[
                quantity("CPU s", ours=seconds[name], baseline=seconds["transformers"]),
                quantity("greatest difference", ours=difference[name]),
                quantity("CPU s more, once per sequence", ours=once[name]),
            ],
            note=(
                f"{operations:.0f} GFLOP in products and convolutions: {operations / median:.0f} GFLOP/s, "
                f"{operations / median / most:.0%} of the {most:.0f} of a large packed product on this machine. "
                f"The module without preparation: {statistics.median(seconds['module']):.2f} CPU s, "
                f"greatest difference {difference['module']:.1e}."
            ),
        )


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, nargs=2, action="append", metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    add_flags(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    recorder = Recorder("detector", "Detector forward", args)
    sizes = [(64, 96)] if args.quick else [tuple(size) for size in args.size or [(480, 854), (800, 1333)]]
    for size in sizes:
        measure(size, SMALL if args.quick else FULL, 1 if args.quick else args.repeats, recorder)
    recorder.finish()


if __name__ == "__main__":
    main()
