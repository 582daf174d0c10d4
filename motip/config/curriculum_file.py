"""Curriculum file: raw sources, and the stages with their data, weights and configuration."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from motip.config.block import Block, Name, check_keys
from motip.config.keys import Config
from motip.config.sweep_file import SweepFile, check_sweep, find_sweep
from motip.config.tuned import with_overlay
from motip.config.yaml_chain import find_relative, load_config, read_yaml
from motip.errors import MotipError, check_known

DatasetFormat = Literal["bdd100k", "visdrone", "motchallenge"]
"""Raw dataset formats; each has a reader in `motip.data.formats.registry`."""

Domain = Literal["dance", "ground", "aerial"]

DEFAULT_CLASSES: dict[str, dict[str, tuple[str, ...]]] = {
    "bdd100k": {"pedestrian": ("pedestrian",), "car": ("car",)},
    "visdrone": {"pedestrian": ("pedestrian", "people"), "car": ("car", "van")},
    "motchallenge": {"pedestrian": ("pedestrian",)},
}
"""Raw categories of the default classes, pedestrian and car; all other categories become ignore regions."""

BEST_METRICS = ("HOTA", "DetA", "AssA", "DetRe", "DetPr", "AssRe", "AssPr", "LocA", "MOTA", "IDF1", "IDR", "IDP")
"""Percentages that increase as tracking improves. MOTP is excluded: papers define it as an overlap or a distance."""
_BEST_MEANS = ("det_avg", "agnostic")
"""Means other than that over classes; `det_avg/HOTA`."""

BASE = "base"
"""Row of the base weights in the domain matrix; no stage may have this name."""

_DEFAULT_SPLITS = {"train": "train", "val": "val"}
DEFAULT_FPS = {"bdd100k": 5.0, "visdrone": 30.0}
"""BDD100K box-track labels are at 5 frames per second; VisDrone does not state a rate, its videos have about 30."""


class Synthetic(Block):
    """A synthetic dataset, rendered in the raw format of its source (the demo's input)."""

    domain: Domain
    "Type of the scenes."
    seed: int = 7
    "Seed of the scenes."
    sequences: dict[str, int] = Field({"train": 8, "val": 4})
    "Sequences per split."
    frames: int | dict[str, int] = 24
    "Frames of each sequence, at least 2; one number for all splits, or one per split."
    size: tuple[int, int] = (128, 224)
    "(height, width) in pixels."
    crowd: float = Field(0.0, ge=0, le=1)
    "Fraction of the sequences that are crowds, with more objects than the base ID vocabulary has labels."

    @field_validator("frames")
    @classmethod
    def _enough_frames(cls, value: int | dict[str, int]) -> int | dict[str, int]:
        if any(count < 2 for count in (value.values() if isinstance(value, dict) else [value])):
            raise ValueError("a sequence must have at least 2 frames")
        return value

    @model_validator(mode="after")
    def _frames_of_every_split(self) -> Synthetic:
        if isinstance(self.frames, dict) and set(self.frames) != set(self.sequences):
            raise ValueError("frames and sequences have different splits")
        return self

    def frames_of(self, split: str) -> int:
        return self.frames[split] if isinstance(self.frames, dict) else self.frames


class Source(Block):
    """One raw dataset on disk."""

    name: str
    format: DatasetFormat
    "Reader of the raw dataset; DanceTrack and MOT17 are `motchallenge`."
    root: str
    "Folder of the raw dataset, relative to the data root."
    domain: Domain
    "Domain of its sequences."
    splits: dict[str, str] = _DEFAULT_SPLITS
    "Split (train, val, test) to the folder name on disk."
    sequences: dict[str, tuple[str, ...]] = Field({})
    "Split to the subset of its sequences to use; a split without an entry is used completely."
    classes: dict[str, tuple[str, ...]] = Field({})
    """Class name to the raw categories that count as it; all others are ignore regions. Default for bdd100k and
    visdrone: pedestrian and car."""
    fps: float | None = Field(None, gt=0)
    "Frame rate; null = the format's or dataset's."
    max_frames_per_video: int = Field(200, ge=2)
    "Longer training sequences are cut into segments of at most this many frames."
    synthetic: Synthetic | None = None
    "Generate a synthetic dataset instead of reading data from disk."


class Mix(Block):
    """A share of a stage's training clips."""

    source: str
    "Name of a source."
    videos: int | None = Field(None, ge=1)
    "Number of training videos; set either this or frame_budget."
    frame_budget: int | None = Field(None, ge=1)
    "As many training videos as fit this many frames, at least one."
    weight: float = Field(1.0, gt=0)
    "Clips per start frame of this source, relative to the other sources."
    allow_fewer: bool = False
    "Use all videos, instead of an error, if the source has fewer than configured."


class Stage(Block):
    """One stage of the curriculum."""

    name: Name
    "Name of the MLflow run and of the stage's folder."
    config: Config
    "YAML file of the stage's configuration; the path is resolved like SUPER_CONFIG_PATH."
    data: tuple[Mix, ...] = Field(min_length=1)
    "Sources of the training clips."
    val: tuple[str, ...] | None = None
    "Sources whose val split the stage is validated on; null = those it trains on."
    weights: str | None = None
    "`previous`, a stage's name, a path, or null for DETR_PRETRAIN of the stage's configuration."
    initialise: str | None = None
    "Configuration file whose freshly initialised weights replace a base checkpoint."
    best: str = "HOTA"
    "Metric (class-averaged, on the stage's validation videos) that selects the best checkpoint."
    allow_unlabelled: tuple[str, ...] = ()
    "Classes that the stage may train although its training videos have no label of them."
    sweep: SweepFile | None = None
    "Sweep file for this stage, run before it is trained, with --tune."
    tuned: str | None = None
    "File of tuned values, which override `config`; --set overrides both."

    @property
    def validation_sources(self) -> tuple[str, ...]:
        """Sources whose val split scores the stage's epochs: `val`, else those it trains on."""
        return tuple(dict.fromkeys(mix.source for mix in self.data)) if self.val is None else self.val


class Domains(Block):
    """Scoring of the domains after every stage, to measure forgetting, and the reaction to a loss."""

    score: Literal["seen", "all", "none"] = "seen"
    "Domains scored after each stage: those its model was trained on, all of the file (zero-shot included), or none."
    videos: int | None = Field(None, ge=1)
    "Maximum number of val videos of each source, always the same ones; null = all."
    metric: str = "HOTA"
    "Class-averaged metric of the domain matrix; one that increases as tracking improves."
    allowed_loss: float = Field(5.0, ge=0)
    "Points that a domain trained on earlier may be below its best earlier value."
    each_class: bool = True
    "Apply the limit to every class of such a domain too, since the mean over classes can hide the loss of one."
    on_loss: Literal["warn", "stop"] = "warn"
    "On a larger loss: warn, or stop the curriculum; the stage counts as finished."
    base: tuple[Domain, ...] | None = None
    "Domains the base weights were trained on; null = those that no stage has as the first entry of its data."


class Curriculum(Block):
    """Stages in order, over named sources."""

    name: Name
    "Name of the curriculum's MLflow run and of the folder under the storage."
    sources: dict[str, Source]
    "Name to raw dataset."
    stages: tuple[Stage, ...] = Field(min_length=1)
    "Stages in order."
    domains: Domains = Domains()
    "Scoring of the domains after every stage, to measure forgetting."

    def stage(self, name: str) -> Stage:
        return next(stage for stage in self.stages if stage.name == name)

    def parent_of(self, stage: Stage) -> Stage | None:
        """The stage whose best checkpoint ``stage`` starts from, or None if it starts from a file."""
        names = [each.name for each in self.stages]
        if stage.weights == "previous":
            return self.stages[names.index(stage.name) - 1]
        return self.stage(stage.weights) if stage.weights in names else None


def load_curriculum(path: str | Path, overrides: Sequence[str] = (), *, tune: bool | str = False) -> Curriculum:
    """Read a curriculum file and the configuration of every stage.

    Args:
        path: the YAML file; stage configurations are relative to it.
        overrides: `KEY=VALUE` applied to every stage's configuration, or `STAGE:KEY=VALUE` to one stage's.
        tune: True, or the name of a stage: all stages with a `sweep:`, or this stage, will be tuned from their
            baseline, so their `tuned:` is ignored.

    Raises:
        MotipError: naming file, line or key.
    """
    # sources and stages
    file = read_yaml(Path(path).expanduser())
    raw = check_keys(file.values, Curriculum.model_fields, file.path)
    named, listed = raw.get("sources") or {}, raw.get("stages") or []
    if not isinstance(named, dict):
        raise MotipError(
            "sources: must be a block that maps the name of each source to its settings", where=file.path, found=named
        )
    if not isinstance(listed, list):
        raise MotipError("stages: must be a list, one `- name: …` for each stage", where=file.path, found=listed)
    sources = {str(key): _source(str(key), value, file.path) for key, value in named.items()}
    common, by_stage = _split_overrides(overrides)
    stages = [_stage(number, each, file.path, common, by_stage, tune) for number, each in enumerate(listed)]
    for name in sorted(by_stage):
        what = "--set names a stage that does not exist: {name}"
        check_known(name, [stage.name for stage in stages], what, where="--set")

    # domains and the curriculum
    domains = _domains({} if raw.get("domains") is None else raw["domains"], f"{file.path}, domains")
    values = {"name": file.path.stem, **raw, "sources": sources, "stages": stages, "domains": domains}
    curriculum = Curriculum.checked(values, file.path)
    _check(curriculum, file.path)
    return curriculum


def _source(name: str, raw: Any, path: Path) -> Source:
    where = f"{path}, sources.{name}"
    given = check_keys(raw, Source.model_fields.keys() - {"name"}, where)
    kind = str(given.get("format"))
    values = {"classes": DEFAULT_CLASSES.get(kind, {}), "fps": DEFAULT_FPS.get(kind), **given, "name": name}
    return Source.checked(values, where)


def _domains(raw: Any, where: str) -> Domains:
    domains = Domains.checked(check_keys(raw, Domains.model_fields, where), where)
    check_known(domains.metric, BEST_METRICS, "unknown metric for the domains", where=f"{where}, metric")
    return domains


def _stage(
    number: int, raw: Any, path: Path, common: list[str], by_stage: dict[str, list[str]], tune: bool | str
) -> Stage:
    where = f"{path}, stage {number + 1}"
    values = check_keys(raw, Stage.model_fields, where)
    if "config" not in values or "name" not in values:
        raise MotipError("a stage must have a name and a config", where=where, found=sorted(values))

    # configuration, sweep and tuned values
    overrides = [*common, *by_stage.get(str(values["name"]), [])]
    values["config"] = load_config(find_relative(str(values["config"]), path), overrides)
    if values.get("sweep"):
        values["sweep"] = find_sweep(str(values["sweep"]), path)
        if tune is True or tune == values["name"]:  # --set may conflict with a sweep, which matters only if it runs
            check_sweep(values["sweep"], values["config"], f"{where}, sweep: {raw['sweep']}")
    if values.get("tuned") and not (tune == values["name"] or (tune is True and values.get("sweep"))):
        overlay = tuned_file(str(values["tuned"]), path)
        values["config"] = with_overlay(values["config"], overlay, overrides)

    # weights
    if values.get("initialise"):
        values["initialise"] = str(find_relative(str(values["initialise"]), path))
    if number > 0 and "weights" not in values and "initialise" not in values:
        values["weights"] = "previous"
    return Stage.checked(values, where)


def tuned_file(named: str, path: Path) -> Path:
    """Path of a stage's tuned values; relative to the curriculum file's folder if the file does not exist yet."""
    try:
        return find_relative(named, path)
    except MotipError:
        return path.parent / named


def _split_overrides(overrides: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    common: list[str] = []
    by_stage: dict[str, list[str]] = {}
    for text in overrides:
        key = text.partition("=")[0]
        if ":" in key:
            stage, _, rest = text.partition(":")
            by_stage.setdefault(stage, []).append(rest)
        else:
            common.append(text)
    return common, by_stage


def _check(curriculum: Curriculum, path: Path) -> None:
    # names and domains
    names = [stage.name for stage in curriculum.stages]
    if len(set(names)) != len(names):
        raise MotipError("two stages have the same name", where=path, found=", ".join(names))
    _check_domains(curriculum, path)
    for number, stage in enumerate(curriculum.stages):
        where = f"{path}, stage {stage.name}"

        # weights
        if stage.weights == "previous" and number == 0:
            raise MotipError("the first stage has no previous one", where=where, fix="set `weights:` to a path")
        if stage.weights in names and names.index(stage.weights) >= number:
            raise MotipError("a stage can only start from an earlier one", where=where, found=stage.weights)

        # data
        for mix in stage.data:
            check_known(mix.source, curriculum.sources, "unknown source {name}", where=where)
            if (mix.videos is None) == (mix.frame_budget is None):
                raise MotipError("set either videos or frame_budget", where=f"{where}, source {mix.source}")
        for name in stage.val or ():
            if name not in curriculum.sources or "val" not in curriculum.sources[name].splits:
                raise MotipError(f"source {name} has no val split to validate the stage on", where=f"{where}, val")
        _check_best(stage, curriculum, where)

        # classes
        classes = stage.config.class_names
        what = "{name} is not a class of this stage"
        check_known(stage.allow_unlabelled, classes, what, where=f"{where}, allow_unlabelled")
        trained = {name for mix in stage.data for name in curriculum.sources[mix.source].classes}
        missing = [name for name in classes if name not in trained]
        if missing:
            raise MotipError(
                f"no source of this stage has labels for: {', '.join(missing)}",
                where=where,
                fix="map raw categories to the class under the source's `classes:`, or drop the class",
            )


def _check_domains(curriculum: Curriculum, path: Path) -> None:
    if curriculum.domains.score != "none" and BASE in [stage.name for stage in curriculum.stages]:
        raise MotipError(
            f"{BASE} is the name of the base weights in the domain matrix", where=path, fix="rename the stage"
        )
    known = {source.domain for source in curriculum.sources.values() if "val" in source.splits}
    check_known(
        curriculum.domains.base or (),
        sorted(known),
        "no source of the domain {name} has a val split",
        where=f"{path}, domains.base",
        fix="add a source of this domain with a val split; it need not be trained on",
    )


def _check_best(stage: Stage, curriculum: Curriculum, where: str) -> None:
    """Check that `best` is a metric of a stage's scores (`Scores.to_dict`, `StageScores.flat`)."""
    sources = stage.validation_sources
    prefixes = ["", *(f"{name}/" for name in sources if len(sources) > 1)]
    classes = [re.sub(r"[^\w\-. :]", "_", name, flags=re.ASCII) for name in stage.config.class_names]
    known = {
        f"{prefix}{name}"
        for prefix in prefixes
        for metric in BEST_METRICS
        for name in (
            metric,
            *(f"{metric}/{label}" for label in classes),
            *(f"{mean}/{metric}" for mean in _BEST_MEANS),
        )
    }
    if stage.best not in known:
        raise MotipError(
            "unknown metric for the best checkpoint",
            where=f"{where}, best",
            found=stage.best,
            expected=f"one of {', '.join(BEST_METRICS)}; also as HOTA/{stage.config.class_names[0]}, det_avg/HOTA, …",
            fix="use the exact spelling, case included",
        )
