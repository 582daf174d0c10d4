"""Preflight: the largest clip, its memory compared with the allocator's measurement, and the recommended keys."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import gpu_step
from motip.cli.main import main
from motip.config import Config, load_config, load_curriculum
from motip.data.augment import AugmentSettings, draw_augmentation
from motip.data.manifest import Manifest
from motip.data.sequence import ClassMap
from motip.errors import MotipError
from motip.storage.paths import location
from motip.train import preflight
from motip.train.memory_estimate import LiveStorages, estimate_peak
from motip.train.oom import oom_fallbacks
from motip.train.preflight import (
    FallbackMemory,
    all_fallbacks,
    estimate_preflight,
    keys_to_start_with,
    largest_size,
    measure_preflight,
    synthetic_batch,
    synthetic_clip,
    train_on,
    worst_clip,
)
from tests.helpers.small_dataset import HEIGHT, WIDTH, write_curriculum, write_dance_dataset
from tests.helpers.small_training import small_config

MIB = 2**20
CROWD = range(3, 6)
"""0-based frames of sequence t1 with five additional objects."""


@pytest.fixture(scope="module")
def tiny(repo_root: Path) -> Config:
    return load_config(repo_root / "configs/demo/motip_tiny.yaml")


SHALLOW = {
    "DETR_ENC_LAYERS": 1,
    "DETR_DEC_LAYERS": 1,
    "NUM_ID_DECODER_LAYERS": 1,
    "AUG_NUM_GROUPS": 2,
}
"""Keeps estimates fast: their time grows with the number of operations, not with the size of the tensors."""


def _run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["motip", *map(str, words)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main()
    captured = capsys.readouterr()
    return int(end.value.code or 0), captured.out, captured.err


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    return lambda *words: _run(monkeypatch, capsys, "train", "preflight", *words)


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory, repo_root: Path) -> Path:
    """A converted dataset of two training videos, one of which is crowded in three frames."""
    root = tmp_path_factory.mktemp("preflight")
    base = write_dance_dataset(root / "raw")
    truth = base / "train/t1/gt/gt.txt"
    more = [f"{frame + 1},{10 + n},{20 * n},5,15,20,1,1,1" for frame in CROWD for n in range(5)]
    truth.write_text(truth.read_text() + "\n".join(more) + "\n")
    write_curriculum(root / "curriculum.yaml", repo_root)
    with pytest.MonkeyPatch.context() as patch:
        words = ["convert", "--config", root / "curriculum.yaml", "--data-root", root / "raw", "--storage", root]
        patch.setattr(sys, "argv", ["motip", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            main()
        assert not end.value.code
    return root


def test_worst_clip_of_a_manifest(storage: Path) -> None:
    config = load_curriculum(storage / "curriculum.yaml").stages[0].config
    entries = Manifest.load(location(storage)).select("dance", "train")
    maps = {"dance": ClassMap(("pedestrian", "car"), {"pedestrian": ("pedestrian",), "car": ("car",)})}
    clip = worst_clip(entries, maps, location(storage), config)
    assert clip.name == "dance/t1 frames 3, 4"  # two of the three crowded ones, the first of equals
    assert (clip.objects, clip.frames, [len(frame) for frame in clip.track_ids]) == (7, 2, [7, 7])

    longer = worst_clip(
        entries, maps, location(storage), config.replaced(sampler_lengths=[2, 3], sample_intervals=[1, 2])
    )
    assert longer.name == "dance/t1 frames 3, 4, 5" and longer.frames == 3
    people = {"dance": ClassMap(("car",), {"car": ("car",)})}
    assert worst_clip(entries, people, location(storage), config.replaced(NUM_CLASSES=1, CLASSES=["car"])).objects == 1
    with pytest.raises(MotipError, match=r"(?s)no clip.*--objects"):
        worst_clip(entries, maps, location(storage), config.replaced(sampler_lengths=[7]))


@pytest.mark.parametrize("source_hw", [(1080, 1920), (720, 720), (540, 400), (HEIGHT, WIDTH)])
@pytest.mark.parametrize("single", [False, True])
def test_no_augmentation_is_larger_than_the_largest_size(source_hw: tuple[int, int], single: bool) -> None:
    config = Config.from_dict({"AUG_MAX_SIZE": 1100, "AUG_RESIZE_SCALES": [544, 672]})
    settings = AugmentSettings.from_config(config)
    height, width = largest_size(settings, *source_hw, single_image=single)
    boxes = [np.empty((0, 4))] * 3
    drawn = [
        draw_augmentation(settings, *source_hw, boxes, np.random.default_rng(seed), single_image=single).size_hw
        for seed in range(400)
    ]
    most = max(h * w for h, w in drawn)
    assert 0.8 * height * width <= most <= height * width


def test_largest_size_without_crops() -> None:
    settings = AugmentSettings.from_config(Config.from_dict({"AUG_MAX_SIZE": 1536}))
    assert largest_size(replace(settings, random_resize=()), 1080, 1920) == (800, 1422)


def test_synthetic_batch_has_the_shapes_of_the_clip(tiny: Config) -> None:
    clip = synthetic_clip(20, 3, (64, 96))
    batch = synthetic_batch(clip, tiny.replaced(BATCH_SIZE=2))
    assert batch.images.shape == (2, 3, 3, 64, 96) and batch.slots is not None
    assert batch.slots.unknown_ann.shape == (2, tiny.AUG_NUM_GROUPS, 3, 20)
    assert [len(frame) for frame in batch.boxes_cxcywh[1]] == [20, 20, 20]
    dropped = synthetic_batch(clip, tiny.replaced(SUBSET_OVERFLOW="drop"))
    assert dropped.slots is not None and dropped.slots.unknown_ann.shape[-1] == tiny.NUM_ID_VOCABULARY
    assert synthetic_batch(clip, tiny.replaced(ONLY_DETR=True)).slots is None


def test_storages_are_counted_until_they_are_freed() -> None:
    tracker = LiveStorages()
    with tracker:
        first = torch.zeros(MIB)
        view = first.view(2, -1)[0]
        assert tracker.live == 4 * MIB
        del first
        assert tracker.live == 4 * MIB  # the view holds it
        leaf = torch.ones(MIB, requires_grad=True)
        product = (leaf * 2).sin()  # keeps the doubled value for the backward pass
        assert tracker.live == 16 * MIB
        product.sum().backward()
        del product, view
        assert tracker.live == 8 * MIB  # the leaf and its gradient
    assert tracker.peak >= 20 * MIB


def _allocator_peak(function: Callable[[], object]) -> int:
    """Peak bytes in the allocator's records, including workspaces of kernels."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return int(np.cumsum(sizes).max())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_estimate_agrees_with_the_allocator(tiny: Config, accumulate: int) -> None:
    config = tiny.replaced(ACCUMULATE_STEPS=accumulate)
    batch = synthetic_batch(synthetic_clip(40, 3, (224, 384)), config)
    fallbacks = all_fallbacks(config)
    cpu = torch.device("cpu")
    estimates = [estimate_peak(config, batch, fallback, "cpu") for fallback in fallbacks]
    assert estimates == sorted(estimates, reverse=True) and estimates[0] > 2 * estimates[-1]
    for index in (0, 1, len(fallbacks) - 1) if accumulate == 1 else (0,):
        found = _allocator_peak(lambda fallback=fallbacks[index]: train_on(config, batch, fallback, cpu))  # type: ignore[misc]
        assert abs(estimates[index] - found) < 0.15 * found, fallbacks[index].name


@pytest.mark.parametrize("index", [0, 3], ids=["as configured", "last fallback"])
def test_estimate_for_a_gpu_agrees_with_a_measurement(repo_root: Path, index: int) -> None:
    """The worst aerial clip, as measured by `benchmarks/bench_gpu.py` on an H100."""
    records = json.loads((repo_root / "docs/performance/nvidia-h100-80gb-hbm3.json").read_text())["claims"]["gpu"]
    config = load_config(repo_root / "configs/visdrone_stage2.yaml", ["sampler_lengths=[5]"])
    fallback = oom_fallbacks(config)[index]
    (record,) = (r for r in records["records"] if r["work"] == f"worst aerial clip, {fallback.name}, triton")
    (peak,) = (each["ours"]["median"] for each in record["quantities"] if each["name"] == "peak GB")
    batch = gpu_step.noise_clip(gpu_step.AERIAL, 5, 200, (672, 1100))
    assert 0.98 < estimate_peak(config, batch, fallback) / 1e9 / peak < 1.1


def test_memory_grows_with_size_objects_and_precision(tiny: Config) -> None:
    tiny = tiny.replaced(**SHALLOW)
    first = all_fallbacks(tiny)[0]

    def peak(config: Config, objects: int = 20, device: str = "cuda", size: tuple[int, int] = (128, 224)) -> int:
        return estimate_peak(config, synthetic_batch(synthetic_clip(objects, 2, size), config), first, device)

    base = peak(tiny)
    assert peak(tiny, size=(256, 448)) > 1.5 * base
    assert peak(tiny, objects=400) > 1.1 * base
    half = tiny.replaced(MIXED_PRECISION="bf16")
    assert peak(half) == base != peak(tiny.replaced(MIXED_PRECISION="no"))
    # In half precision CUDA autocast keeps the residual stream and norms in float32; CPU autocast does not.
    assert base > peak(half, device="cpu")


def test_recomputing_the_id_decoder_saves_memory_with_many_objects() -> None:
    config = small_config(AUG_NUM_GROUPS=6, NUM_ID_VOCABULARY=200, NUM_ID_DECODER_LAYERS=4, DETR_DEC_LAYERS=1)
    result = estimate_preflight(config, synthetic_clip(150, 3, (64, 64)), "cpu")
    names = [memory.fallback.name for memory in result.fallbacks]
    sizes = [memory.allocated or 0 for memory in result.fallbacks]
    assert names == ["as configured", "detector recomputed", "ID decoder recomputed", "image at 75%"]
    assert sizes[2] < 0.8 * sizes[1] and sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("fallback", range(5))
def test_keys_start_training_with_the_fallback(fallback: int) -> None:
    config = small_config(
        DETR_NUM_TRAIN_FRAMES=4,
        DETR_NUM_CHECKPOINT_FRAMES=5,
        AUG_MAX_SIZE=1000,
        AUG_RESIZE_SCALES=[400, 600],
        SAMPLE_LENGTHS=[5],
    )
    target = all_fallbacks(config)[fallback]
    keys = keys_to_start_with(target, config, synthetic_clip(5, 5, (64, 64)))
    assert ("MEMORY_EFFICIENT" in keys) == (fallback > 0)
    changed = config.replaced(**keys)
    start = oom_fallbacks(changed)[0]
    assert (start.plan.chunk, start.recompute_decoder) == (target.plan.chunk, target.recompute_decoder)
    sizes = [changed.AUG_MAX_SIZE, *changed.AUG_RESIZE_SCALES]
    assert sizes == [side * target.scale for side in (1000, 400, 600)]
    # Images that fit one chunk would not be recomputed.
    two = keys_to_start_with(all_fallbacks(config)[1], config, synthetic_clip(5, 2, (64, 64)))
    assert two["DETR_NUM_CHECKPOINT_FRAMES"] == 1


def test_each_fallback_is_measured_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(MEMORY_EFFICIENT=True, ACCUMULATE_STEPS=2)
    peaks = iter([700, 500, 400])
    resets: list[str] = []

    real = preflight.train_on

    def train(config: Config, batch: Any, fallback: Any, device: torch.device) -> bool:
        if fallback.name == "as configured":
            raise torch.OutOfMemoryError("injected")
        return real(config, batch, fallback, device)

    monkeypatch.setattr(preflight, "train_on", train)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _device: resets.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _device: next(peaks) * MIB)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda _device: 1000 * MIB)
    result = measure_preflight(config, synthetic_clip(4, 3, (48, 64)), torch.device("cpu"))
    assert result.measured and [memory.allocated for memory in result.fallbacks] == [
        None,
        700 * MIB,
        500 * MIB,
        400 * MIB,
    ]
    assert resets == ["reset"] * 4
    assert result.cheapest(1200 * MIB) is result.fallbacks[1]  # 1000 reserved leave a tenth of 1200
    assert result.cheapest(1100 * MIB) is None


MADE_UP = ("--objects", 30, "--frames", 3, "--size", "128x224")


def _shallow(repo_root: Path) -> list[object]:
    sets = [word for key, value in SHALLOW.items() for word in ("--set", f"{key}={value}")]
    return ["--config", repo_root / "configs/demo/motip_tiny.yaml", *MADE_UP, *sets]


def test_command_prints_the_estimate(command: Callable[..., Any], repo_root: Path) -> None:
    status, out, _ = command(*_shallow(repo_root), "--device", "cpu", "--json")
    figures = json.loads(out)["motip_tiny"]
    assert status == 0 and figures["cheapest"] == "as configured" and not figures["measured"]
    assert figures["clip"] == {"name": "synthetic", "objects": 30, "frames": 3, "size_hw": [128, 224]}
    config = load_config(repo_root / "configs/demo/motip_tiny.yaml", [f"{k}={v}" for k, v in SHALLOW.items()])
    clip = synthetic_clip(30, 3, (128, 224))
    expected = [memory.allocated for memory in estimate_preflight(config, clip, "cpu").fallbacks]
    assert [fallback["allocated"] for fallback in figures["fallbacks"]] == expected


@pytest.mark.parametrize(
    ("gpu_gib", "status", "message"),
    [
        (20, 0, "1. as configured; to start with it set nothing"),
        (4.5, 0, "3. one image at a time; to start with it set MEMORY_EFFICIENT: True, DETR_NUM_CHECKPOINT_FRAMES: 1"),
        (1.1, 1, "no fallback leaves 10 % of 1.1 GiB free: lower AUG_MAX_SIZE"),
    ],
)
def test_command_names_the_fastest_fallback_that_fits(
    command: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    repo_root: Path,
    gpu_gib: float,
    status: int,
    message: str,
) -> None:
    sizes = iter([8, 6, 4, 3, 1])
    monkeypatch.setattr(preflight, "estimate_peak", lambda *_: next(sizes) * 2**30)
    ran, out, _ = command(*_shallow(repo_root), "--estimate", "--gpu-mem", gpu_gib)
    lines = out.strip().splitlines()
    assert ran == status and message in lines[-1]
    assert "30 objects, 3 frames of 128x224" in out and "estimated for cuda, bf16" in out
    assert "8.00 GiB" in out and "MEMORY_EFFICIENT is False" in lines[-2]


def test_command_finds_the_worst_clip_in_the_manifest(
    command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, storage: Path
) -> None:
    monkeypatch.setattr(preflight, "estimate_peak", lambda *_: 2**30)
    status, out, _ = command(
        "--config", storage / "curriculum.yaml", "--storage", storage, "--stage", "only", "--estimate"
    )
    assert status == 0 and "dance/t1 frames 3, 4" in out and "7 objects, 2 frames" in out


def test_single_stage_configuration_names_its_data_by_its_keys(command: Callable[..., Any], storage: Path) -> None:
    """The shards of `ray_jobs/train.py` are named after DATASETS."""
    missing = ("--config", storage / "stage.yaml", "--data-root", storage / "raw", "--storage", storage / "nowhere")
    status, _, err = command(*missing)
    assert status == 2 and "not converted yet" in err and "--objects" in err
    status, _, err = command("--config", storage / "stage.yaml", "--data-root", storage / "raw", "--storage", storage)
    assert status == 2 and "no train videos of source 'dancetrack'" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--frames", 3), "needs its number of objects"),
        (("--objects", -1), "--objects"),
        (("--objects", 3, "--size", "1100"), "HEIGHTxWIDTH"),
        (("--objects", 3, "--size", "8x1100"), "32 or more"),
        (("--objects", 3, "--frames", 0), "1 or more"),
        (("--objects", 3, "--gpu-mem", 0), "--gpu-mem"),
        (("--objects", 3, "--device", "tpu"), "cuda or cpu"),
        (("--objects", 3, "--stage", "one"), "only a curriculum file has stages"),
        (("--objects", 3, "--set", "NO_SUCH=1"), "NO_SUCH"),
    ],
)
def test_bad_input_is_an_error(command: Callable[..., Any], repo_root: Path, words: Any, message: str) -> None:
    status, out, err = command("--config", repo_root / "configs/demo/motip_tiny.yaml", *words)
    assert status == 2 and message in err and "Traceback" not in err and not out


def test_unknown_stage_is_an_error(command: Callable[..., Any], storage: Path) -> None:
    status, _, err = command("--config", storage / "curriculum.yaml", "--storage", storage, "--stage", "other")
    assert status == 2 and "one of only" in err


def test_fallback_without_a_measurement_does_not_fit() -> None:
    fallback = all_fallbacks(small_config())[0]
    assert not FallbackMemory(fallback, None).fits(2**40)
    assert FallbackMemory(fallback, 900).fits(1000) and not FallbackMemory(fallback, 901).fits(1000)
    assert not FallbackMemory(replace(fallback, name="measured"), 800, 901).fits(1000)
