"""Measurements on a CUDA GPU, written to one JSON file.

    python benchmarks/gpu_checks.py --out gpu.json                          # on a GPU
    python benchmarks/gpu_checks.py --out gpu.json --only attention memory  # some sections
    python benchmarks/gpu_checks.py --out tiny.json --tiny --device cpu     # smoke test of the script

Requires torch, torchvision, numpy and scipy. A case that runs out of memory is recorded as such; any other error ends
the script, with the finished sections in the file.

* `attention`: implementations of deformable attention per shape and type; time, memory, share of the roofline.
* `training`: clips/s and peak memory, bf16 against float32, Triton against PyTorch.
* `launches`: wall time of a training step, total time and number of its kernels.
* `memory`: peak of the worst aerial clip (1100 pixels, 5 frames, 200 objects) with each out-of-memory fallback.
* `compile`: training step with and without `torch.compile` of the detector.
* `tracking`: frames/s of full 1080p frames, float32 with PyTorch's attention against the default with bf16.
"""

from __future__ import annotations

import argparse
import gc
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.attention_cost import (
    Shape,
    as_dict,
    backward_cost,
    forward_cost,
    kernel_seconds,
    measured_ceilings,
    seconds_of,
)
from benchmarks.gpu_step import AERIAL, FALLBACKS, TINY, Step, noise_clip
from motip.data.batch import ClipBatch
from motip.model import MOTIP, ModelSpec, build_model, deformable_attention
from motip.storage.atomic import write_json_atomic
from motip.tracking.api import track_sequence, track_variants
from motip.tracking.settings import TrackerSettings
from motip.train.oom import OomFallback

Case = dict[str, Any]
GPU_BYTES = 22e9
"""Memory available to a step on a GPU of 24 GB."""


class Checks:
    """The measurements; each public method is one section of the file.

    Args:
        device: CUDA device, or a CPU for a smoke test.
        tiny: sizes of a smoke test; the figures are meaningless.
    """

    def __init__(self, device: torch.device, tiny: bool) -> None:
        self.device = device
        self.tiny = tiny
        self.repeats = 1 if tiny else 10
        self.spec: ModelSpec = TINY if tiny else AERIAL
        # On a CPU two implementations of PyTorch stand in for the baseline and ours.
        self.plain = "grid_sample"
        self.ours = "triton" if device.type == "cuda" else "embedding_bag"

    def attention(self) -> list[Case]:
        """Forward and backward time per shape, type and implementation."""
        ceilings = measured_ceilings(self.device, small=self.tiny)
        found: list[Case] = [{"ceilings": vars(ceilings)}]
        for name, shape in self._shapes().items():
            for dtype in (torch.float32, torch.bfloat16):
                forward, backward = forward_cost(shape, dtype.itemsize), backward_cost(shape, dtype.itemsize)
                inputs = self._attention_inputs(shape, dtype)
                plain = deformable_attention._implementations[self.plain]
                first = plain(inputs[0], shape.sizes, inputs[1], inputs[2]).detach()
                for side in (self.plain, "embedding_bag", *(("triton",) if self.ours == "triton" else ())):
                    case = self._measured(partial(self._attention_case, side, inputs, first, shape))
                    case |= {"shape": name, "dtype": str(dtype), "side": side}
                    if "forward_seconds" in case:
                        case["forward"] = as_dict(forward, ceilings, case.pop("forward_seconds"))
                        case["backward"] = as_dict(backward, ceilings, case.pop("backward_seconds"))
                    found.append(case)
        return found

    def _shapes(self) -> dict[str, Shape]:
        if self.tiny:
            return {"tiny": Shape([(6, 8), (3, 4)], queries=5, heads=2, channels=8, points=2)}

        def encoder(height: int, width: int, batch: int) -> Shape:
            sizes = [(-(-height // stride), -(-width // stride)) for stride in (8, 16, 32, 64)]
            return Shape(sizes, sum(h * w for h, w in sizes), batch)

        street, aerial = encoder(800, 1440, 1), encoder(672, 1100, 4)
        return {
            "encoder, 480x864": encoder(480, 864, 1),
            "encoder, 800x1440": street,
            "encoder, 672x1100, 4 frames": aerial,
            "decoder, 800x1440": Shape(street.sizes, 300),
            "decoder, 672x1100, 4 frames": Shape(aerial.sizes, 300, 4),
        }

    def _attention_inputs(self, shape: Shape, dtype: torch.dtype) -> list[Tensor]:
        torch.manual_seed(0)
        samples = (shape.batch, shape.queries, shape.heads, len(shape.sizes), shape.points)
        # Around one point per query, in pixel order, as in the encoder.
        centres = torch.linspace(0.02, 0.98, shape.queries, device=self.device).view(1, -1, 1, 1, 1, 1)
        value = torch.randn(shape.batch, shape.pixels, shape.heads, shape.channels, device=self.device, dtype=dtype)
        locations = centres + torch.randn(*samples, 2, device=self.device) * 0.02
        weights = torch.rand(*samples, device=self.device).flatten(3).softmax(-1).view(samples)
        return [tensor.detach().requires_grad_() for tensor in (value, locations, weights)]

    def _attention_case(self, side: str, inputs: list[Tensor], first: Tensor, shape: Shape) -> Case:
        run = deformable_attention._implementations[side]

        def forward() -> Tensor:
            return run(inputs[0], shape.sizes, inputs[1], inputs[2])

        out = forward()
        with torch.no_grad():
            ahead = kernel_seconds(forward, self.device, self.repeats)
        seed = torch.randn_like(out)
        behind = partial(torch.autograd.grad, out, inputs, seed, retain_graph=True)
        back = kernel_seconds(behind, self.device, self.repeats)
        difference = float((out - first).detach().abs().max())
        return {"forward_seconds": ahead, "backward_seconds": back, "greatest_difference": difference}

    def training(self) -> list[Case]:
        """Clips/s with one clip per step; ratios are to the first case."""
        size, objects = ((48, 64), 3) if self.tiny else ((480, 864), 20)
        batch = noise_clip(self.spec, 5, objects, size)
        cases = []
        for half in (None, torch.bfloat16):
            for side in (self.plain, self.ours):
                case = self._measured(partial(self._step_case, half, side, batch))
                cases.append({"half": str(half), "attention": side, "size": size, "objects": objects, **case})
        return _compared(cases, "clips_per_second")

    def memory(self) -> list[Case]:
        """Peak memory of the worst aerial clip with each fallback; `fits`: whether 22 GB suffice."""
        size, objects = ((64, 96), 5) if self.tiny else ((672, 1100), 200)
        cases = []
        for side in (self.plain, self.ours):
            for fallback in FALLBACKS:
                scaled = (round(size[0] * fallback.scale), round(size[1] * fallback.scale))
                batch = noise_clip(self.spec, 5, objects, scaled)
                case = self._measured(partial(self._step_case, torch.bfloat16, side, batch, fallback, 1))
                if "peak_reserved" in case:
                    case["fits"] = case["peak_reserved"] <= GPU_BYTES
                cases.append({"fallback": fallback.name, "attention": side, "size": scaled, "objects": objects, **case})
        return cases

    def compile(self) -> list[Case]:
        """The step in bf16 with and without a compiled detector (only traced in a smoke test)."""
        size, objects = ((48, 64), 3) if self.tiny else ((480, 864), 20)
        batch = noise_clip(self.spec, 5, objects, size)
        backend = "eager" if self.tiny else "inductor"
        cases = []
        for options in (None, {"backend": backend}):
            case = self._measured(partial(self._step_case, torch.bfloat16, self.ours, batch, compiled=options))
            cases.append({"compiled": options and options["backend"], **case})
        torch.compiler.reset()
        return _compared(cases, "clips_per_second")

    def launches(self) -> list[Case]:
        """Wall time of one training step, total time and number of its kernels."""
        size, objects = ((48, 64), 3) if self.tiny else ((480, 864), 20)
        batch = noise_clip(self.spec, 5, objects, size)
        cases = []
        for half, side in ((None, self.plain), (None, self.ours), (torch.bfloat16, self.ours)):
            deformable_attention.use_implementation(side)
            step = Step(self.spec, self.device, half)
            work = partial(step, batch, FALLBACKS[0])
            case = {"wall_seconds": seconds_of(work, self.device, self.repeats), **self._kernels(work)}
            cases.append({"half": str(half), "attention": side, "size": size, "objects": objects, **case})
        return cases

    def _kernels(self, work: Callable[[], object]) -> Case:
        """Time and number of CUDA kernels in a profile of `work`; zero without a GPU."""
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.device.type == "cuda" else [])]
        with profile(activities=activities) as profiled:
            work()
            self._wait()
        # Named ranges around kernels are CUDA events too.
        kernels = [
            event
            for event in profiled.events() or ()
            if event.device_type == DeviceType.CUDA and not event.name.startswith("Optimizer.")
        ]
        return {"kernel_seconds": sum(each.time_range.elapsed_us() for each in kernels) / 1e6, "launches": len(kernels)}

    def _step_case(
        self,
        half: torch.dtype | None,
        side: str,
        batch: ClipBatch,
        fallback: OomFallback = FALLBACKS[0],
        repeats: int = 0,
        compiled: dict[str, Any] | None = None,
    ) -> Case:
        deformable_attention.use_implementation(side)
        step = Step(self.spec, self.device, half, compiled)
        started = time.perf_counter()
        losses = [step(batch, fallback)]
        self._wait()
        first = time.perf_counter() - started
        seconds = seconds_of(lambda: losses.append(step(batch, fallback)), self.device, repeats or self.repeats)
        return {"clips_per_second": 1 / seconds, "first_step_seconds": first, "first_loss": losses[0]}

    def tracking(self) -> list[Case]:
        """`track_sequence` on noise, with a detection threshold for about 50 objects per frame."""
        shape, frames = ((60, 100), 3) if self.tiny else ((1080, 1920), 60)
        # Video and model.
        rng = np.random.default_rng(0)
        images = [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for _ in range(min(frames, 8))]
        video = [(number, images[number % len(images)]) for number in range(frames)]
        torch.manual_seed(0)
        model = build_model(self.spec).to(self.device).eval()
        short, longest = (48, 96) if self.tiny else (800, 1440)
        memory = min(30, self.spec.rel_pe_length - 2)
        common = TrackerSettings(miss_tolerance=memory, short_side=short, max_longer=longest)
        # Detection threshold.
        scores: list[float] = []
        deformable_attention.use_implementation(self.plain)
        track_variants(
            model,
            video[:1],
            [common],
            on_detections=lambda number, size, logits, boxes: scores.extend(logits.sigmoid().amax(-1).tolist()),
        )
        threshold = sorted(scores, reverse=True)[min(50, len(scores) - 1)]
        cases = []
        # With `auto` the tracker uses FrameDetector, and the Triton kernels on a GPU.
        variants: list[tuple[Literal["FP32", "BF16"], str]] = [
            ("FP32", self.plain),
            ("FP32", "auto"),
            ("BF16", self.plain),
            ("BF16", "auto"),
        ]
        for dtype, side in variants:
            deformable_attention.use_implementation(side)
            settings = replace(common, det_thresh=threshold, newborn_thresh=threshold, dtype=dtype)
            track_sequence(model, video[:2], settings)  # loads kernels
            case = self._measured(partial(self._tracked, model, video, settings))
            cases.append({"dtype": dtype, "attention": side, "size": shape, **case})
        return _compared(cases, "frames_per_second")

    def _tracked(self, model: MOTIP, video: list[tuple[int, np.ndarray]], settings: TrackerSettings) -> Case:
        result = track_sequence(model, video, settings)
        return {"frames_per_second": result.fps, "boxes_per_frame": len(result.rows.track_ids) / result.num_frames}

    def _measured(self, work: Callable[[], Case]) -> Case:
        """Result of `work` with peak memory, or `out_of_memory`."""
        gc.collect()
        if self.device.type != "cuda":
            return work()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        try:
            case = work()
        except torch.OutOfMemoryError as error:
            return {"out_of_memory": str(error).splitlines()[0]}
        return {
            **case,
            "peak_bytes": torch.cuda.max_memory_allocated(),
            "peak_reserved": torch.cuda.max_memory_reserved(),
        }

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


SECTIONS = ("attention", "training", "launches", "memory", "tracking", "compile")
"""In the order of execution; the compiler, which may take minutes, is last."""


def _compared(cases: list[Case], rate: str) -> list[Case]:
    base = cases[0].get(rate)
    return [{**case, "ratio": case[rate] / base} if base and rate in case else case for case in cases]


def machine(device: torch.device) -> Case:
    found: Case = {"device": str(device), "torch": torch.__version__, "python": platform.python_version()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"gpu": properties.name, "gpu_bytes": properties.total_memory, "cuda": torch.version.cuda}
        found |= {"auto": deformable_attention.best_implementation(device)}
        found |= {"tf32_convolutions": torch.backends.cudnn.allow_tf32}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--tiny", action="store_true", help="smoke test of this script; meaningless figures")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device; --tiny --device cpu tests the script itself")
    checks = Checks(device, args.tiny)
    report: Case = {"machine": machine(device), "tiny": args.tiny}
    for name in args.only:
        started = time.perf_counter()
        report[name] = getattr(checks, name)()
        write_json_atomic(args.out, report)
        print(f"{name}: {time.perf_counter() - started:.1f} s", flush=True)
        for case in report[name]:
            print("   ", ", ".join(f"{key} {value}" for key, value in case.items()), flush=True)


if __name__ == "__main__":
    main()
