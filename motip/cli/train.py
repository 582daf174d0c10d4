"""`motip train preflight`: will the stage's worst clip fit the card, and how must it be trained if not."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from motip.errors import MotipError

if TYPE_CHECKING:
    from motip.config import Config, Curriculum, Stage
    from motip.train.preflight import ClipShape, Preflight, RungMemory

app = typer.Typer(no_args_is_help=True, help="Before a stage is trained. Training itself: python ray_jobs/train.py")

GIB = 2**30


@app.callback()
def _group() -> None:
    """Keeps `preflight` a verb of its own: a group with one command would swallow its name."""


@app.command("preflight")
def preflight(
    config: Annotated[str, typer.Option(help="Configuration of a stage, or a curriculum file (all its stages).")],
    stage: Annotated[str | None, typer.Option(help="Only this stage of the curriculum file.")] = None,
    storage: Annotated[
        str, typer.Option(help="Folder or s3:// URI with the shards: the worst clip is there.")
    ] = "~/motip",
    data_root: Annotated[
        str | None, typer.Option(help="With a stage's own configuration: folder of the raw datasets it names.")
    ] = None,
    gpu_mem: Annotated[float, typer.Option(help="Memory of the card in GiB, of which 10 % are to stay free.")] = 24.0,
    objects: Annotated[int | None, typer.Option(help="Ask about a made-up clip with so many objects.")] = None,
    frames: Annotated[int | None, typer.Option(help="Its frames (default: the longest clip configured).")] = None,
    size: Annotated[
        str | None, typer.Option(metavar="HxW", help="Its image size (default: the largest of a 16:9 video).")
    ] = None,
    estimate: Annotated[bool, typer.Option("--estimate", help="Estimate even where there is a GPU.")] = False,
    device: Annotated[str, typer.Option(metavar="cuda|cpu", help="What to estimate for, without a GPU.")] = "cuda",
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Find the stage's worst clip, and say on which rungs of the memory ladder it fits the card.

    The worst clip is that with the most objects x frames x pixels, at the largest size that augmentation gives it. With
    a GPU a step is run on every rung and the allocator asked; without one the memory is estimated, about ten seconds a
    rung. The last line names the rung that costs the least time and leaves 10 % of the card. Exit status 1: none does.

    Example: motip train preflight --config configs/curriculum.yaml --storage ~/motip --gpu-mem 24

    Example: motip train preflight --config configs/visdrone_stage2.yaml --objects 200 --frames 5 --size 672x1100
    """
    from motip.cli.console import as_json

    if device not in ("cuda", "cpu"):
        raise MotipError("no such device", where="--device", found=device, expected="cuda or cpu")
    if gpu_mem <= 0:
        raise MotipError("a card has some memory", where="--gpu-mem", found=gpu_mem, expected="GiB, more than 0")
    card = int(gpu_mem * GIB)
    found: dict[str, Any] = {}
    fits = True
    made_up = (objects, frames, size) != (None, None, None)
    curriculum, stages = _stages(config, stage, overrides or [], data_root, made_up)
    for name, settings in stages:
        clip = _made_up(settings, objects, frames, size) if made_up else _worst(curriculum, name, settings, storage)
        result = _weigh(settings, clip, estimate, device, quiet=json)
        best = result.cheapest(card)
        fits &= best is not None
        found[name] = _as_dict(result, best, card)
        if not json:
            _show(name, settings, result, best, card, device)
    if json:
        as_json(found)
    if not fits:
        raise typer.Exit(1)


def _stages(
    path: str, stage: str | None, overrides: list[str], data_root: str | None, made_up: bool
) -> tuple[Curriculum | None, list[tuple[str, Config]]]:
    """The curriculum (None for a made-up clip of one stage) and the stages that are asked about."""
    from motip.config import load_config, load_curriculum
    from motip.config.single_stage import single_stage
    from motip.config.yaml_chain import read_yaml
    from motip.data.formats.motchallenge import CATEGORIES

    if "stages" in read_yaml(Path(path).expanduser()).values:
        curriculum = load_curriculum(path, overrides)
        names = [each.name for each in curriculum.stages]
        if stage is not None and stage not in names:
            raise MotipError(
                "there is no such stage", where="--stage", found=stage, expected=f"one of {', '.join(names)}"
            )
        return curriculum, [(each.name, each.config) for each in curriculum.stages if stage in (None, each.name)]
    if stage is not None:
        raise MotipError(
            "only a curriculum file has stages to choose from",
            where="--stage",
            found=f"{stage}, with the configuration of one stage",
            fix="leave --stage out, or name the curriculum file",
        )
    config = load_config(path, overrides)
    if made_up:
        return None, [(config.name, config)]
    curriculum = single_stage(config, data_root or config.root_path, CATEGORIES)
    return curriculum, [(curriculum.stages[0].name, config)]


def _made_up(config: Config, objects: int | None, frames: int | None, size: str | None) -> ClipShape:
    from motip.data.augment import AugmentSettings
    from motip.train.preflight import largest_size, made_up_clip, schedules

    if objects is None:
        raise MotipError(
            "a made-up clip needs its number of objects",
            where="--objects",
            fix="add --objects N, or leave out --frames and --size to look for the worst clip of the data",
        )
    longest = max(length for schedule in schedules(config) for length in schedule.lengths)
    size_hw = largest_size(AugmentSettings.from_config(config), 1080, 1920) if size is None else _size(size)
    return made_up_clip(objects, longest if frames is None else frames, size_hw)


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.lower().partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise MotipError("no image size", where="--size", found=text, expected="HEIGHTxWIDTH in pixels, as 672x1100")
    return int(height), int(width)


def _worst(curriculum: Curriculum | None, name: str, config: Config, storage: str) -> ClipShape:
    from motip.curriculum.stage_inputs import training_videos
    from motip.data.manifest import Manifest, manifest_path
    from motip.data.sequence import ClassMap
    from motip.storage.paths import location
    from motip.train.preflight import worst_clip

    assert curriculum is not None
    stage: Stage = curriculum.stage(name)
    place = location(storage)
    if not manifest_path(place).exists():
        raise MotipError(
            "the data is not converted yet, so its worst clip is not known",
            where="--storage",
            found=f"no {manifest_path(place)}",
            fix="convert it (motip convert --config CURRICULUM --data-root DIR --storage DIR; the training jobs do so "
            "too), or ask about a made-up clip with --objects, --frames and --size",
        )
    manifest = Manifest.load(place)
    classes = {mix.source: curriculum.sources[mix.source].classes for mix in stage.data}
    class_maps = {source: ClassMap.among(config.class_names, raws) for source, raws in classes.items()}
    return worst_clip(training_videos(stage, manifest), class_maps, place, config)


def _weigh(config: Config, clip: ClipShape, estimate: bool, device: str, quiet: bool) -> Preflight:
    import torch

    from motip.cli.console import console
    from motip.train.preflight import estimated, measured

    def run(said: Any = None) -> Preflight:
        if device == "cuda" and torch.cuda.is_available() and not estimate:
            return measured(config, clip, torch.device("cuda"), said)
        return estimated(config, clip, device, said)

    if quiet:
        return run()
    with console().status("memory ladder") as status:
        return run(lambda rung: status.update(f"memory ladder: {rung.name}"))


def _show(name: str, config: Config, result: Preflight, best: RungMemory | None, card: int, device: str) -> None:
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
        "rung",
        "peak allocated",
        *(["peak reserved"] if result.measured else []),
        f"of {_card(card)}",
        "10 % free",
    ]
    rows = []
    for number, memory in enumerate(result.rungs, start=1):
        cells = [_bytes(memory.allocated), *([_bytes(memory.reserved)] if result.measured else [])]
        share = "" if memory.needed is None else f"{memory.needed / card:.0%}"
        rows.append([f"{number}. {memory.rung.name}", *cells, share, "yes" if memory.fits(card) else "no"])
    table(header, rows)
    if not config.MEMORY_EFFICIENT:
        note("MEMORY_EFFICIENT is False: a clip that does not fit as configured is left out; the other rungs need True")
    print(_verdict(config, result, best, card))


def _basis(config: Config, result: Preflight, device: str) -> str:
    import torch

    from motip.model.deformable_attention import log_implementation
    from motip.train.memory_estimate import precision_on
    from motip.train.step import autocast_dtype

    on_card = torch.device("cuda")
    dtype = autocast_dtype(config.MIXED_PRECISION, on_card) if result.measured else precision_on(device, config)
    precision = {torch.bfloat16: "bf16", torch.float16: "fp16", None: "float32"}[dtype]
    if result.measured:
        return f"measured on {torch.cuda.get_device_name()}, {precision}"
    left = "the CUDA context, cuDNN's workspace and fragments" if device == "cuda" else "kernels' scratch memory"
    by_triton = device == "cuda" and log_implementation() in ("auto", "triton")
    attention = ", where the Triton kernels can run" if by_triton else ""
    return f"estimated for {device}, {precision}{attention}; {left} must fit the 10 % that stay free"


def _verdict(config: Config, result: Preflight, best: RungMemory | None, card: int) -> str:
    from motip.train.preflight import keys_to_start_on

    if best is None:
        return (
            f"no rung leaves 10 % of {_card(card)} free: lower AUG_MAX_SIZE and AUG_RESIZE_SCALES, sampler_lengths, "
            "AUG_NUM_GROUPS or BATCH_SIZE"
        )
    keys = keys_to_start_on(best.rung, config, result.clip)
    set_these = ", ".join(f"{key}: {value}" for key, value in keys.items()) or "nothing"
    number = result.rungs.index(best) + 1
    chosen = f"{number}. {best.rung.name}"
    return f"cheapest rung that leaves 10 % of {_card(card)} free: {chosen}; to start on it set {set_these}"


def _as_dict(result: Preflight, best: RungMemory | None, card: int) -> dict[str, Any]:
    clip = result.clip
    return {
        "clip": {"name": clip.name, "objects": clip.objects, "frames": clip.frames, "size_hw": clip.size_hw},
        "measured": result.measured,
        "card_bytes": card,
        "rungs": [
            {"rung": m.rung.name, "allocated": m.allocated, "reserved": m.reserved, "fits": m.fits(card)}
            for m in result.rungs
        ],
        "cheapest": None if best is None else best.rung.name,
    }


def _card(size: int) -> str:
    return f"{size / GIB:g} GiB"


def _bytes(size: int | None) -> str:
    if size is None:
        return "too little memory"
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / 2**20:.0f} MiB"
