"""The curriculum file: raw sources, and the stages with their data, weights and configuration."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from motip.config.keys import Config, describe
from motip.config.sweep_file import SweepFile, check_sweep, find_sweep
from motip.config.tuned import with_overlay
from motip.config.yaml_chain import find_beside, load_config, read_yaml
from motip.errors import MotipError

DEFAULT_CLASSES: dict[str, dict[str, tuple[str, ...]]] = {
    "bdd100k": {"pedestrian": ("pedestrian",), "car": ("car",)},
    "visdrone": {"pedestrian": ("pedestrian", "people"), "car": ("car", "van")},
    "motchallenge": {"pedestrian": ("pedestrian",)},
}
"""Raw categories that count as the plan's two classes; everything else is kept as ignore regions."""

BEST_METRICS = (
    *("HOTA", "DetA", "AssA", "DetRe", "DetPr", "AssRe", "AssPr", "LocA"),
    *("MOTA", "IDF1", "IDR", "IDP"),
)
"""Percentages that grow as tracking improves. MOTP is not among them: papers give it as an overlap or a distance."""
BEST_MEANS = ("det_avg", "agnostic")
"""Means other than that over classes; `det_avg/HOTA`."""

BASE = "base"
"""Row of the base weights in the table of domains; no stage may have this name."""

DEFAULT_SPLITS = {"train": "train", "val": "val"}
DEFAULT_FPS = {"bdd100k": 5.0, "visdrone": 30.0}
"""BDD100K box-track labels are at 5 frames per second; VisDrone does not say, its videos are about 30."""


class Synthetic(BaseModel):
    """A drawn world written in the raw format of its source (the demo's input)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    domain: Literal["dance", "ground", "aerial"]
    seed: int = 7
    sequences: dict[str, int] = {"train": 8, "val": 4}
    frames: int | dict[str, int] = 24
    "Frames of each sequence, at least 2; for all splits, or split by split."
    size: tuple[int, int] = (128, 224)
    "(height, width) in pixels."
    crowd: float = Field(0.0, ge=0, le=1)
    "Share of the sequences that are crowds, well beyond the base ID vocabulary."

    @field_validator("frames")
    @classmethod
    def _enough_frames(cls, value: int | dict[str, int]) -> int | dict[str, int]:
        if any(count < 2 for count in (value.values() if isinstance(value, dict) else [value])):
            raise ValueError("a sequence needs at least 2 frames")
        return value

    @model_validator(mode="after")
    def _frames_of_every_split(self) -> Synthetic:
        if isinstance(self.frames, dict) and set(self.frames) != set(self.sequences):
            raise ValueError("frames and sequences do not name the same splits")
        return self

    def frames_of(self, split: str) -> int:
        return self.frames[split] if isinstance(self.frames, dict) else self.frames


class Source(BaseModel):
    """One raw dataset on disk."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    format: Literal["bdd100k", "visdrone", "motchallenge"]
    root: str
    "Folder of the raw dataset, relative to the data root."
    domain: Literal["dance", "ground", "aerial"]
    splits: dict[str, str] = DEFAULT_SPLITS
    "Our split (train, val, test) to the folder name on disk."
    sequences: dict[str, tuple[str, ...]] = {}
    "Our split to the only sequences of it that are taken; a split without an entry is taken whole."
    classes: dict[str, tuple[str, ...]] = {}
    fps: float | None = Field(None, gt=0)
    max_frames_per_video: int = Field(200, ge=2)
    synthetic: Synthetic | None = None


class Mix(BaseModel):
    """A share of a stage's training clips."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str
    videos: int | None = Field(None, ge=1)
    frame_budget: int | None = Field(None, ge=1)
    weight: float = Field(1.0, gt=0)
    "Clips drawn from this source relative to the others'."
    allow_fewer: bool = False
    "Take what there is when the source has fewer videos than asked for."


class Stage(BaseModel):
    """One step of the curriculum."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    config: Config
    data: tuple[Mix, ...] = Field(min_length=1)
    val: tuple[str, ...] | None = None
    "Sources whose val split the stage is judged on; null = those it trains on."
    weights: str | None = None
    "`previous`, a stage's name, a path, or null for DETR_PRETRAIN of the stage's configuration."
    initialise: str | None = None
    "Configuration file whose freshly initialised weights stand in for a base checkpoint."
    best: str = "HOTA"
    "Metric (class-averaged, on the stage's own validation videos) that chooses the best checkpoint."
    allow_unlabelled: tuple[str, ...] = ()
    "Classes that the stage may train although none of its training videos has a label of them."
    sweep: SweepFile | None = None
    "Sweep file that finds values for this stage before it is trained, with --tune."
    tuned: str | None = None
    "Values that a sweep has found, on top of `config`; --set is on top of both."


class Domains(BaseModel):
    """What is scored after every stage to see what it forgot, and what follows from a loss."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    score: Literal["seen", "all", "none"] = "seen"
    "Domains scored after each stage: those its model has seen, all of the file (the others as zero-shot), or none."
    videos: int | None = Field(None, ge=1)
    "At most this many val videos of each source, always the same ones; null = all."
    metric: str = "HOTA"
    "Class-averaged metric of the matrix; one that grows as tracking improves."
    allowed_loss: float = Field(5.0, ge=0)
    "Points that a domain seen before may be below its best earlier value."
    each_class: bool = True
    "The same for every class of such a domain, since a mean hides a lost class behind a won one."
    on_loss: Literal["warn", "stop"] = "warn"
    "A larger loss is said, or ends the curriculum; the stage stays finished."
    base: tuple[Literal["dance", "ground", "aerial"], ...] | None = None
    "Domains the base weights have seen; null = those that no stage has as the first entry of its data."


class Curriculum(BaseModel):
    """Stages in order, over named sources."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    sources: dict[str, Source]
    stages: tuple[Stage, ...] = Field(min_length=1)
    domains: Domains = Domains()

    def stage(self, name: str) -> Stage:
        return next(stage for stage in self.stages if stage.name == name)

    def parent_of(self, stage: Stage) -> Stage | None:
        """The stage whose best checkpoint ``stage`` starts from, or None where it starts from a file."""
        names = [each.name for each in self.stages]
        if stage.weights == "previous":
            return self.stages[names.index(stage.name) - 1]
        return self.stage(stage.weights) if stage.weights in names else None


def load_curriculum(path: str | Path, overrides: Sequence[str] = (), *, tune: bool | str = False) -> Curriculum:
    """Read a curriculum file and every stage configuration it names.

    Args:
        path: the YAML file; stage configurations are found relative to it.
        overrides: `KEY=VALUE` applied to every stage's configuration, or `STAGE:KEY=VALUE` to one stage's.
        tune: stages with a `sweep:`, or the stage of this name, will be tuned now from their hand-set values: their
            `tuned:` does not count.

    Raises:
        MotipError: naming file, line or key.
    """
    file = read_yaml(Path(path).expanduser())
    _refuse_unknown(file.values, {"name", "sources", "stages", "domains"}, file.path)
    common, by_stage = _split_overrides(overrides)
    named, listed = file.values.get("sources") or {}, file.values.get("stages") or []
    if not isinstance(named, dict):
        raise MotipError(
            "sources: holds a block, one name with its settings below it for each source", where=file.path, found=named
        )
    if not isinstance(listed, list):
        raise MotipError("stages: holds a list, one `- name: …` for each stage", where=file.path, found=listed)
    sources = {str(key): _source(str(key), value, file.path) for key, value in named.items()}
    stages = [_stage(number, raw, file.path, common, by_stage, tune) for number, raw in enumerate(listed)]
    strangers = sorted(set(by_stage) - {stage.name for stage in stages})
    if strangers:
        raise MotipError(
            f"--set names a stage that does not exist: {strangers[0]}",
            where="--set",
            expected="one of " + ", ".join(stage.name for stage in stages),
        )
    named_domains = file.values.get("domains")
    domains = _domains({} if named_domains is None else named_domains, file.path)
    try:
        curriculum = Curriculum(
            name=file.values.get("name", file.path.stem), sources=sources, stages=tuple(stages), domains=domains
        )
    except ValidationError as error:
        raise MotipError(describe(error), where=file.path) from None
    _check(curriculum, file.path)
    return curriculum


def _refuse_unknown(raw: Any, known: set[str], where: object) -> None:
    if not isinstance(raw, dict):
        raise MotipError("a block of `key: value` lines is needed here", where=where, found=raw)
    strangers = sorted(set(map(str, raw)) - known)
    if strangers:
        raise MotipError(f"unknown key {strangers[0]}", where=where, expected="some of " + ", ".join(sorted(known)))


def _source(name: str, raw: Any, path: Path) -> Source:
    where = f"{path}, sources.{name}"
    _refuse_unknown(raw, set(Source.model_fields) - {"name"}, where)
    values = dict(raw)
    values.setdefault("classes", DEFAULT_CLASSES.get(str(values.get("format")), {}))
    values.setdefault("fps", DEFAULT_FPS.get(str(values.get("format"))))
    try:
        return Source(name=name, **values)
    except ValidationError as error:
        raise MotipError(describe(error), where=where) from None


def _domains(raw: Any, path: Path) -> Domains:
    where = f"{path}, domains"
    _refuse_unknown(raw, set(Domains.model_fields), where)
    try:
        domains = Domains(**raw)
    except ValidationError as error:
        raise MotipError(describe(error), where=where) from None
    if domains.metric not in BEST_METRICS:
        raise MotipError(
            "no metric that the domains can be judged by",
            where=f"{where}, metric",
            found=domains.metric,
            expected="one of " + ", ".join(BEST_METRICS),
        )
    return domains


def _stage(
    number: int, raw: Any, path: Path, common: list[str], by_stage: dict[str, list[str]], tune: bool | str
) -> Stage:
    where = f"{path}, stage {number + 1}"
    _refuse_unknown(raw, set(Stage.model_fields), where)
    values = dict(raw)
    if "config" not in values or "name" not in values:
        raise MotipError("a stage needs a name and a config", where=where, found=sorted(values))
    overrides = [*common, *by_stage.get(str(values["name"]), [])]
    values["config"] = load_config(find_beside(str(values["config"]), path), overrides)
    if values.get("sweep"):
        values["sweep"] = find_sweep(str(values["sweep"]), path)
        if tune is True or tune == values["name"]:  # an override may not fit a sweep that is not asked for
            check_sweep(values["sweep"], values["config"], f"{where}, sweep: {raw['sweep']}")
    if values.get("tuned") and not (tune == values["name"] or (tune is True and values.get("sweep"))):
        overlay = tuned_file(str(values["tuned"]), path)
        values["config"] = with_overlay(values["config"], overlay, overrides)
    if values.get("initialise"):
        values["initialise"] = str(find_beside(str(values["initialise"]), path))
    if number > 0 and "weights" not in values and "initialise" not in values:
        values["weights"] = "previous"
    try:
        return Stage(**values)
    except ValidationError as error:
        raise MotipError(describe(error), where=where) from None


def tuned_file(named: str, path: Path) -> Path:
    """Where a stage's tuned values are read from; beside the curriculum file where there are none yet."""
    try:
        return find_beside(named, path)
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
    names = [stage.name for stage in curriculum.stages]
    if len(set(names)) != len(names):
        raise MotipError("two stages have the same name", where=path, found=", ".join(names))
    _check_domains(curriculum, path)
    for number, stage in enumerate(curriculum.stages):
        where = f"{path}, stage {stage.name}"
        if stage.weights == "previous" and number == 0:
            raise MotipError("the first stage has no previous one", where=where, fix="give `weights:` a path")
        if stage.weights in names and names.index(stage.weights) >= number:
            raise MotipError("a stage can only start from an earlier one", where=where, found=stage.weights)
        for mix in stage.data:
            if mix.source not in curriculum.sources:
                raise MotipError(
                    f"unknown source {mix.source}",
                    where=where,
                    expected="one of " + ", ".join(curriculum.sources),
                )
            if (mix.videos is None) == (mix.frame_budget is None):
                raise MotipError("give either videos or frame_budget", where=f"{where}, source {mix.source}")
        for name in stage.val or ():
            if name not in curriculum.sources or "val" not in curriculum.sources[name].splits:
                raise MotipError(f"source {name} has no val split to judge the stage on", where=f"{where}, val")
        _check_best(stage, curriculum, where)
        strangers = [name for name in stage.allow_unlabelled if name not in stage.config.class_names]
        if strangers:
            raise MotipError(
                f"{strangers[0]} is no class of this stage",
                where=f"{where}, allow_unlabelled",
                expected="some of " + ", ".join(stage.config.class_names),
            )
        trained = {name for mix in stage.data for name in curriculum.sources[mix.source].classes}
        missing = [name for name in stage.config.class_names if name not in trained]
        if missing:
            raise MotipError(
                f"no source of this stage has labels for: {', '.join(missing)}",
                where=where,
                fix="map raw categories to the class under the source's `classes:`, or drop the class",
            )


def _check_domains(curriculum: Curriculum, path: Path) -> None:
    if curriculum.domains.score != "none" and BASE in [stage.name for stage in curriculum.stages]:
        raise MotipError(
            f"{BASE} is the name of the base weights in the table of domains", where=path, fix="rename the stage"
        )
    shown = {source.domain for source in curriculum.sources.values() if "val" in source.splits}
    strangers = [name for name in curriculum.domains.base or () if name not in shown]
    if strangers:
        raise MotipError(
            f"no source shows the domain {strangers[0]} in a val split",
            where=f"{path}, domains.base",
            expected="some of " + (", ".join(sorted(shown)) or "none"),
            fix="add a source of this domain with a val split; no stage has to train on it",
        )


def _check_best(stage: Stage, curriculum: Curriculum, where: str) -> None:
    """Before hours are trained: the metric is one that a stage's scores have (`Scores.to_dict`, `StageScores.flat`)."""
    judges = stage.val if stage.val is not None else tuple(dict.fromkeys(mix.source for mix in stage.data))
    prefixes = ["", *(f"{name}/" for name in judges if len(judges) > 1)]
    classes = [re.sub(r"[^\w\-. :]", "_", name, flags=re.ASCII) for name in stage.config.class_names]
    known = {
        f"{prefix}{name}"
        for prefix in prefixes
        for metric in BEST_METRICS
        for name in (
            metric,
            *(f"{metric}/{label}" for label in classes),
            *(f"{mean}/{metric}" for mean in BEST_MEANS),
        )
    }
    if stage.best not in known:
        raise MotipError(
            "no metric that can choose the best checkpoint",
            where=f"{where}, best",
            found=stage.best,
            expected=f"one of {', '.join(BEST_METRICS)}; also as HOTA/{stage.config.class_names[0]}, det_avg/HOTA, …",
            fix="write it as shown, capitals included",
        )
