"""Everything that is measured on a CUDA card, in one go, into one JSON file.

    python benchmarks/gpu_checks.py --out gpu.json                          # on a card
    python benchmarks/gpu_checks.py --out gpu.json --only attention memory  # some of it
    python benchmarks/gpu_checks.py --out tiny.json --tiny --device cpu     # does the script itself work?

It needs torch, torchvision, numpy and scipy. A case that runs out of memory is noted as such and the next one follows;
any other error ends the script, with what was measured until then in the file.

* `attention`: each way of deformable attention per shape and type; time, memory, share of what arithmetic allows.
* `training`: clips/s and peak memory, bf16 against float32, Triton against PyTorch.
* `launches`: a training step by the clock, the time of its kernels and how many there are.
* `memory`: peak of the worst aerial clip (1100 pixels, 5 frames, 200 objects) on each rung of the memory ladder.
* `compile`: the training step with and without `torch.compile` of the detector.
* `tracking`: frames/s of whole 1080p frames, float32 with PyTorch's attention against the default with bf16.
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
from benchmarks.gpu_step import AERIAL, RUNGS, TINY, Step, made_up_clip
from motip.model import ModelSpec, build_model
from motip.model import deformable_attention as room
from motip.storage.atomic import write_json_atomic
from motip.track.api import track_sequence, track_variants
from motip.track.settings import TrackerSettings

Case = dict[str, Any]
CARD_BYTES = 22e9
"""What a step may take of a card of 24 GB."""


class Checks:
    """The measurements; each method is one section of the file.

    Args:
        tiny: sizes for a test of this script; its figures mean nothing.
    """

    def __init__(self, device: torch.device, tiny: bool) -> None:
        self.device = device
        self.tiny = tiny
        self.repeats = 1 if tiny else 10
        self.spec: ModelSpec = TINY if tiny else AERIAL
        # On a CPU two ways of PyTorch stand for "PyTorch's" and "ours".
        self.plain = "grid_sample"
        self.ours = "triton" if device.type == "cuda" else "embedding_bag"

    def attention(self) -> list[Case]:
        """Per shape, type and implementation."""
        ceilings = measured_ceilings(self.device, small=self.tiny)
        found: list[Case] = [{"ceilings": vars(ceilings)}]
        for name, shape in self._shapes().items():
            for dtype in (torch.float32, torch.bfloat16):
                ahead = forward_cost(shape, dtype.itemsize)
                back = backward_cost(shape, dtype.itemsize)
                inputs = self._attention_inputs(shape, dtype)
                first = room._implementations[self.plain](inputs[0], shape.sizes, inputs[1], inputs[2]).detach()
                for side in (self.plain, "embedding_bag", *(("triton",) if self.ours == "triton" else ())):
                    case = self._measured(partial(self._attention_case, side, inputs, first, shape))
                    case |= {"shape": name, "dtype": str(dtype), "side": side}
                    if "forward_seconds" in case:
                        case["forward"] = as_dict(ahead, ceilings, case.pop("forward_seconds"))
                        case["backward"] = as_dict(back, ceilings, case.pop("backward_seconds"))
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
        # Around one place per query, as the model looks; in the order of the pixels, as the encoder's queries are.
        places = torch.linspace(0.02, 0.98, shape.queries, device=self.device).view(1, -1, 1, 1, 1, 1)
        value = torch.randn(shape.batch, shape.pixels, shape.heads, shape.channels, device=self.device, dtype=dtype)
        locations = places + torch.randn(*samples, 2, device=self.device) * 0.02
        weights = torch.rand(*samples, device=self.device).flatten(3).softmax(-1).view(samples)
        return [tensor.detach().requires_grad_() for tensor in (value, locations, weights)]

    def _attention_case(self, side: str, inputs: list[Tensor], first: Tensor, shape: Shape) -> Case:
        run = room._implementations[side]

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
        """Clips/s of one clip per step; the first case is what the others are compared with."""
        size, objects = ((48, 64), 3) if self.tiny else ((480, 864), 20)
        batch = made_up_clip(self.spec, 5, objects, size)
        cases = []
        for half in (None, torch.bfloat16):
            for side in (self.plain, self.ours):
                case = self._measured(partial(self._step_case, half, side, batch))
                cases.append({"half": str(half), "attention": side, "size": size, "objects": objects, **case})
        return _compared(cases, "clips_per_second")

    def memory(self) -> list[Case]:
        """The worst aerial clip on each rung; `fits` says whether 22 GB are enough."""
        size, objects = ((64, 96), 5) if self.tiny else ((672, 1100), 200)
        cases = []
        for side in (self.plain, self.ours):
            for rung in RUNGS:
                scaled = (round(size[0] * rung.scale), round(size[1] * rung.scale))
                batch = made_up_clip(self.spec, 5, objects, scaled)
                case = self._measured(partial(self._step_case, torch.bfloat16, side, batch, rung, 1))
                if "peak_reserved" in case:
                    case["fits"] = case["peak_reserved"] <= CARD_BYTES
                cases.append({"rung": rung.name, "attention": side, "size": scaled, "objects": objects, **case})
        return cases

    def compile(self) -> list[Case]:
        """The step in bf16 as it is, and with the detector compiled (traced alone in a test of this script)."""
        size, objects = ((48, 64), 3) if self.tiny else ((480, 864), 20)
        batch = made_up_clip(self.spec, 5, objects, size)
        backend = "eager" if self.tiny else "inductor"
        cases = []
        for options in (None, {"backend": backend}):
            case = self._measured(partial(self._step_case, torch.bfloat16, self.ours, batch, compiled=options))
            cases.append({"compiled": options and options["backend"], **case})
        torch.compiler.reset()
        return _compared(cases, "clips_per_second")

    def launches(self) -> list[Case]:
        """Of one training step: the time by the clock, that of its kernels, and how many there are."""
        size, objects = ((48, 64), 3) if self.tiny else ((480, 864), 20)
        batch = made_up_clip(self.spec, 5, objects, size)
        cases = []
        for half, side in ((None, self.plain), (None, self.ours), (torch.bfloat16, self.ours)):
            room.use_implementation(side)
            step = Step(self.spec, self.device, half)
            work = partial(step, batch, RUNGS[0])
            case = {"wall_seconds": seconds_of(work, self.device, self.repeats), **self._kernels(work)}
            cases.append({"half": str(half), "attention": side, "size": size, "objects": objects, **case})
        return cases

    def _kernels(self, work: Callable[[], object]) -> Case:
        """What the profiler has seen on the card; nothing without one."""
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.device.type == "cuda" else [])]
        with profile(activities=activities) as seen:
            work()
            self._wait()
        # Ranges that somebody named lie on the card's time line too, around kernels.
        kernels = [
            event
            for event in seen.events() or ()
            if event.device_type == DeviceType.CUDA and not event.name.startswith("Optimizer.")
        ]
        return {"kernel_seconds": sum(each.time_range.elapsed_us() for each in kernels) / 1e6, "launches": len(kernels)}

    def _step_case(self, half: Any, side: str, batch: Any, rung: Any = RUNGS[0], repeats: int = 0, **more: Any) -> Case:
        room.use_implementation(side)
        step = Step(self.spec, self.device, half, **more)
        started = time.perf_counter()
        losses = [step(batch, rung)]
        self._wait()
        first = time.perf_counter() - started
        seconds = seconds_of(lambda: losses.append(step(batch, rung)), self.device, repeats or self.repeats)
        return {"clips_per_second": 1 / seconds, "first_step_seconds": first, "first_loss": losses[0]}

    def tracking(self) -> list[Case]:
        """`track_sequence` over noise; the detection threshold lets about 50 objects through."""
        shape, frames = ((60, 100), 3) if self.tiny else ((1080, 1920), 60)
        rng = np.random.default_rng(0)
        images = [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for _ in range(min(frames, 8))]
        video = [(number, images[number % len(images)]) for number in range(frames)]
        torch.manual_seed(0)
        model = build_model(self.spec).to(self.device).eval()
        short, longest = (48, 96) if self.tiny else (800, 1440)
        memory = min(30, self.spec.rel_pe_length - 2)
        common = TrackerSettings(miss_tolerance=memory, short_side=short, max_longer=longest)
        scores: list[float] = []
        room.use_implementation(self.plain)
        track_variants(
            model,
            video[:1],
            [common],
            on_detections=lambda number, size, logits, boxes: scores.extend(logits.sigmoid().amax(-1).tolist()),
        )
        threshold = sorted(scores, reverse=True)[min(50, len(scores) - 1)]
        cases = []
        # With `auto` the tracker makes the detector ready for its frames, and takes the Triton kernels on a card.
        wanted: list[tuple[Literal["FP32", "BF16"], str]] = [
            ("FP32", self.plain),
            ("FP32", "auto"),
            ("BF16", self.plain),
            ("BF16", "auto"),
        ]
        for dtype, side in wanted:
            room.use_implementation(side)
            settings = replace(common, det_thresh=threshold, newborn_thresh=threshold, dtype=dtype)
            track_sequence(model, video[:2], settings)  # loads kernels
            case = self._measured(partial(self._tracked, model, video, settings))
            cases.append({"dtype": dtype, "attention": side, "size": shape, **case})
        return _compared(cases, "frames_per_second")

    def _tracked(self, model: Any, video: list[tuple[int, np.ndarray]], settings: TrackerSettings) -> Case:
        result = track_sequence(model, video, settings)
        return {"frames_per_second": result.fps, "boxes_per_frame": len(result.rows.track_ids) / result.num_frames}

    def _measured(self, work: Callable[[], Case]) -> Case:
        """What `work` returns, with the peak of memory; or a note that there was not enough."""
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
"""In the order in which they run: the compiler, which may take minutes, is the last."""


def _compared(cases: list[Case], rate: str) -> list[Case]:
    base = cases[0].get(rate)
    return [{**case, "ratio": case[rate] / base} if base and rate in case else case for case in cases]


def machine(device: torch.device) -> Case:
    found: Case = {"device": str(device), "torch": torch.__version__, "python": platform.python_version()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"card": properties.name, "card_bytes": properties.total_memory, "cuda": torch.version.cuda}
        found |= {"auto": room.best_implementation(device), "tf32_convolutions": torch.backends.cudnn.allow_tf32}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--tiny", action="store_true", help="a test of this script; the figures mean nothing")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device here; --tiny --device cpu tests the script itself")
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
