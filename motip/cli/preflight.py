"""`motip train preflight`: peak memory of a stage's worst clip, as configured and on each out-of-memory fallback."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from motip.cli import options
from motip.errors import MotipError

if TYPE_CHECKING:
    from motip.config import Config, Curriculum, Stage
    from motip.train.oom import OomFallback
    from motip.train.preflight import ClipShape, FallbackMemory, Preflight

_GIB = 2**30


def preflight(
    config: options.StageFile,
    stage: options.Stage = None,
    storage: options.Storage = "~/motip",
    data_root: options.StageDataRoot = None,
    gpu_mem: Annotated[float, typer.Option(help="GPU memory in GiB; 10 % of it must stay free.")] = 24.0,
    objects: Annotated[
        int | None, typer.Option(help="Use a synthetic clip with this number of objects instead of the worst clip.")
    ] = None,
    frames: Annotated[
        int | None, typer.Option(help="Frames of the synthetic clip (default: the longest clip configured).")
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(metavar="HxW", help="Image size of the synthetic clip (default: the largest of a 16:9 video)."),
    ] = None,
    estimate: Annotated[bool, typer.Option("--estimate", help="Estimate the memory even if there is a GPU.")] = False,
    device: Annotated[
        str, typer.Option(metavar="cuda|cpu", help="Device to estimate the memory for, without a GPU.")
    ] = "cuda",
    overrides: options.Overrides = None,
    json: options.Json = False,
) -> None:
    """Find the worst clip of a stage, or of all stages, and report on which out-of-memory fallbacks it fits the GPU.

    The worst clip has the most objects x frames x pixels, at the largest size that augmentation gives it. With a GPU, a
    step is run as configured and on every fallback and its peak memory is measured; without one the memory is
    estimated, about ten seconds each. The last line is the fastest of them that leaves 10 % of the memory free. Exit
    status 1: none does.

    Example: motip train preflight --config configs/curriculum.yaml --storage ~/motip --gpu-mem 24

    Example: motip train preflight --config configs/visdrone_stage2.yaml --objects 200 --frames 5 --size 672x1100
    """
    from motip.cli.console import as_json

    if device not in ("cuda", "cpu"):
        raise MotipError("no such device", where="--device", found=device, expected="cuda or cpu")
    if gpu_mem <= 0:
        raise MotipError("invalid GPU memory", where="--gpu-mem", found=gpu_mem, expected="GiB, more than 0")
    gpu_bytes = int(gpu_mem * _GIB)
    found: dict[str, Any] = {}
    fits = True
    synthetic = (objects, frames, size) != (None, None, None)
    curriculum, stages = _stages(config, stage, overrides or [], data_root, synthetic)
    for name, settings in stages:
        if synthetic:
            clip = _synthetic_clip(settings, objects, frames, size)
        else:
            clip = _worst_clip(curriculum, name, settings, storage)
        result = _predict_memory(settings, clip, estimate, device, quiet=json)
        best = result.cheapest(gpu_bytes)
        fits &= best is not None
        found[name] = _as_dict(result, best, gpu_bytes)
        if not json:
            _show(name, settings, result, best, gpu_bytes, device)
    if json:
        as_json(found)
    if not fits:
        raise typer.Exit(1)


def _stages(
    path: str, stage: str | None, overrides: list[str], data_root: str | None, synthetic: bool
) -> tuple[Curriculum | None, list[tuple[str, Config]]]:
    """The curriculum (None for a synthetic clip with a stage's configuration) and the stages to check."""
    from motip.config import load_config, load_curriculum
    from motip.config.single_stage import single_stage
    from motip.config.yaml_chain import read_yaml
    from motip.data.formats.motchallenge import CATEGORIES

    if "stages" in read_yaml(Path(path).expanduser()).values:
        curriculum = load_curriculum(path, overrides)
        names = [each.name for each in curriculum.stages]
        if stage is not None:
            options.check_known("there is no such stage", "--stage", stage, names)
        return curriculum, [(each.name, each.config) for each in curriculum.stages if stage in (None, each.name)]
    if stage is not None:
        raise MotipError(
            "only a curriculum file has stages to choose from",
            where="--stage",
            found=f"{stage}, with the configuration of one stage",
            fix="omit --stage, or pass the curriculum file",
        )
    config = load_config(path, overrides)
    if synthetic:
        return None, [(config.name, config)]
    curriculum = single_stage(config, data_root or config.root_path, CATEGORIES)
    return curriculum, [(curriculum.stages[0].name, config)]


def _synthetic_clip(config: Config, objects: int | None, frames: int | None, size: str | None) -> ClipShape:
    from motip.data.augment import AugmentSettings
    from motip.train.preflight import largest_size, schedules, synthetic_clip

    if objects is None:
        raise MotipError(
            "a synthetic clip needs its number of objects",
            where="--objects",
            fix="add --objects N, or omit --frames and --size to use the worst clip of the data",
        )
    longest = max(length for schedule in schedules(config) for length in schedule.lengths)
    size_hw = largest_size(AugmentSettings.from_config(config), 1080, 1920) if size is None else _size(size)
    return synthetic_clip(objects, longest if frames is None else frames, size_hw)


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.lower().partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise MotipError(
            "invalid image size", where="--size", found=text, expected="HEIGHTxWIDTH in pixels, such as 672x1100"
        )
    return int(height), int(width)


def _worst_clip(curriculum: Curriculum | None, name: str, config: Config, storage: str) -> ClipShape:
    from motip.curriculum.stage_inputs import training_videos
    from motip.data.manifest import Manifest, manifest_path
    from motip.data.sequence import ClassMap
    from motip.storage.paths import location
    from motip.train.preflight import worst_clip

    assert curriculum is not None
    stage: Stage = curriculum.stage(name)
    root = location(storage)
    if not manifest_path(root).exists():
        raise MotipError(
            "the data is not converted yet, so there is no worst clip",
            where="--storage",
            found=f"no {manifest_path(root)}",
            fix="convert it (motip convert --config CURRICULUM --data-root DIR --storage DIR; the training jobs do so "
            "too), or use a synthetic clip with --objects, --frames and --size",
        )
    manifest = Manifest.load(root)
    classes = {mix.source: curriculum.sources[mix.source].classes for mix in stage.data}
    class_maps = {source: ClassMap.among(config.class_names, raws) for source, raws in classes.items()}
    return worst_clip(training_videos(stage, manifest), class_maps, root, config)


def _predict_memory(config: Config, clip: ClipShape, estimate: bool, device: str, quiet: bool) -> Preflight:
    """Measure the memory on a GPU, or estimate it."""
    import torch

    from motip.cli.console import console
    from motip.train.preflight import estimate_preflight, measure_preflight

    def run(on_fallback: Callable[[OomFallback], object] | None = None) -> Preflight:
        if device == "cuda" and torch.cuda.is_available() and not estimate:
            return measure_preflight(config, clip, torch.device("cuda"), on_fallback)
        return estimate_preflight(config, clip, device, on_fallback)

    if quiet:
        return run()
    with console().status("memory") as status:
        return run(lambda fallback: status.update(f"memory: {fallback.name}"))


def _show(
    name: str, config: Config, result: Preflight, best: FallbackMemory | None, gpu_bytes: int, device: str
) -> None:
    """Print the table of a stage and its verdict."""
    from motip.cli.console import facts, note, table

    clip = result.clip
    height, width = clip.size_hw
    facts(
        [
            ("stage", name),
            ("worst clip", clip.name),
            ("", f"{clip.objects} objects, {clip.frames} frames of {height}x{width}, BATCH_SIZE {config.BATCH_SIZE}"),
            ("memory", _basis(config, result, device)),
        ]
    )
    header = [
        "fallback",
        "peak allocated",
        *(["peak reserved"] if result.measured else []),
        f"of {_gib(gpu_bytes)}",
        "10 % free",
    ]
    rows = []
    for number, memory in enumerate(result.fallbacks, start=1):
        cells = [_bytes(memory.allocated), *([_bytes(memory.reserved)] if result.measured else [])]
        share = "" if memory.needed is None else f"{memory.needed / gpu_bytes:.0%}"
        rows.append([f"{number}. {memory.fallback.name}", *cells, share, "yes" if memory.fits(gpu_bytes) else "no"])
    table(header, rows)
    if not config.MEMORY_EFFICIENT:
        note("MEMORY_EFFICIENT is False: a clip that does not fit as configured is skipped; the fallbacks need True")
    print(_verdict(config, result, best, gpu_bytes))


def _basis(config: Config, result: Preflight, device: str) -> str:
    import torch

    from motip.model.deformable_attention import log_implementation
    from motip.train.memory_estimate import precision_on
    from motip.train.step import autocast_dtype

    gpu = torch.device("cuda")
    dtype = autocast_dtype(config.MIXED_PRECISION, gpu) if result.measured else precision_on(device, config)
    precision = {torch.bfloat16: "bf16", torch.float16: "fp16", None: "float32"}[dtype]
    if result.measured:
        return f"measured on {torch.cuda.get_device_name()}, {precision}"
    cuda = "the CUDA context, cuDNN's workspace and fragmentation"
    excluded = cuda if device == "cuda" else "scratch memory of kernels"
    by_triton = device == "cuda" and log_implementation() in ("auto", "triton")
    attention = ", with the Triton kernels" if by_triton else ""
    return f"estimated for {device}, {precision}{attention}; {excluded} must fit into the free 10 %"


def _verdict(config: Config, result: Preflight, best: FallbackMemory | None, gpu_bytes: int) -> str:
    from motip.train.preflight import keys_to_start_with

    if best is None:
        return (
            f"no fallback leaves 10 % of {_gib(gpu_bytes)} free: lower AUG_MAX_SIZE and AUG_RESIZE_SCALES, "
            "sampler_lengths, AUG_NUM_GROUPS or BATCH_SIZE"
        )
    keys = keys_to_start_with(best.fallback, config, result.clip)
    set_these = ", ".join(f"{key}: {value}" for key, value in keys.items()) or "nothing"
    number = result.fallbacks.index(best) + 1
    chosen = f"{number}. {best.fallback.name}"
    return f"fastest that leaves 10 % of {_gib(gpu_bytes)} free: {chosen}; to start with it set {set_these}"


def _as_dict(result: Preflight, best: FallbackMemory | None, gpu_bytes: int) -> dict[str, Any]:
    clip = result.clip
    return {
        "clip": {"name": clip.name, "objects": clip.objects, "frames": clip.frames, "size_hw": clip.size_hw},
        "measured": result.measured,
        "card_bytes": gpu_bytes,
        "fallbacks": [
            {"fallback": m.fallback.name, "allocated": m.allocated, "reserved": m.reserved, "fits": m.fits(gpu_bytes)}
            for m in result.fallbacks
        ],
        "cheapest": None if best is None else best.fallback.name,
    }


def _gib(size: int) -> str:
    return f"{size / _GIB:g} GiB"


def _bytes(size: int | None) -> str:
    if size is None:
        return "too little memory"
    return f"{size / _GIB:.2f} GiB" if size >= _GIB else f"{size / 2**20:.0f} MiB"
