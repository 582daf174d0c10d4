"""The stage graph: what is done, what is stale, what runs next, and the hand-over between stages."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from motip.cluster import Cluster
from motip.config import Config, Curriculum, Source, Stage, without_effect_message
from motip.data.clip_loader import plan_videos
from motip.data.convert import ConvertReport, convert, ray_map
from motip.data.manifest import Manifest, VideoEntry, entries_digest
from motip.data.storage import Location, fetch, location, read_json, sha256, write_json
from motip.data.synthetic import write_world
from motip.errors import MotipError
from motip.files import digest
from motip.lineage import Lineage
from motip.model import ModelSpec
from motip.model.weights import plan_transfer, read_weights, save_checkpoint
from motip.train.build import fresh_model
from motip.train.fit import FitResult, Placement, fit, place
from motip.train.job import EpochPlans, Parent, StageJob

FORMAT = 1
"""Part of every stage's identity; raised when the meaning of a stage's inputs or outputs changes."""

SPEED_ONLY = frozenset(
    {"_name", "NUM_WORKERS", "PREFETCH_FACTOR", "LOG_EVERY_STEPS", "root_path", "OUTPUT_DIR", "OUTPUTS_DIR"}
)
"""Keys that change how fast or where a stage runs, not what comes out: they do not make it stale."""

PROTOCOLS = {"bdd100k": "bdd100k", "visdrone": "visdrone", "motchallenge": "motchallenge"}
PROTOCOL_CLASSES = {"pedestrian", "car"}


class Ui(Protocol):
    """Where the driver shows what happens."""

    def note(self, text: str) -> None: ...
    def converted(self, report: ConvertReport) -> None: ...
    def stage_begins(self, stage: Stage, job: StageJob, folder: str) -> None: ...
    def record(self, kind: str, values: dict[str, Any]) -> None: ...
    def stage_ends(self, record: StageRecord) -> None: ...


@dataclass(frozen=True)
class Options:
    """How and where a curriculum runs.

    Attributes:
        data_root: folder or URI that source roots and relative weights are found under.
        storage: folder or URI for shards, checkpoints and the MLflow database.
        workers: training workers; 0 trains in this process without Ray.
        strict: undecodable images end the conversion.
        config_path: for messages.
        until: name of the last stage to run, None for all.
    """

    data_root: str
    storage: str
    workers: int = 1
    strict: bool = False
    config_path: str = ""
    until: str | None = None


@dataclass(frozen=True)
class StageRecord:
    """A finished stage, as written to ``stage.json``; it is what the next stage starts from."""

    stage: str
    inputs: str
    checkpoint: str
    sha256: str
    best_epoch: int
    metrics: dict[str, float]
    run_id: str | None
    parent_sha256: str | None
    data_digest: str
    videos: int
    frames: int
    epochs: int
    seconds: float
    skipped: bool = False
    status: str = "finished"
    format: int = FORMAT
    transfer: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CurriculumResult:
    """What a run of a curriculum produced or found done."""

    name: str
    records: tuple[StageRecord, ...]
    run_id: str | None
    lineage: Lineage


def run_curriculum(
    curriculum: Curriculum, options: Options, cluster: Cluster | None, lineage: Lineage, ui: Ui
) -> CurriculumResult:
    """Convert what is missing, then run every stage whose inputs are new or changed, in order.

    Args:
        cluster: what Ray has to give; None with ``options.workers`` 0.

    Raises:
        MotipError: input that is wrong, naming place and remedy. Finished stages stay finished.
    """
    _announce(curriculum, ui)
    curriculum = _with_worlds(curriculum, options, ui)
    _check_given_weights(curriculum, options)
    report = convert(
        curriculum,
        options.data_root,
        options.storage,
        strict=options.strict,
        map_fn=ray_map() if cluster is not None else None,
    )
    ui.converted(report)
    manifest = Manifest.load(options.storage)
    inputs = {"name": curriculum.name, "stages": [stage.name for stage in curriculum.stages]}
    run_id = lineage.start_curriculum(curriculum.name, inputs, {"motip.config": options.config_path})
    records: list[StageRecord] = []
    try:
        for stage in curriculum.stages:
            parent = _parent(curriculum, stage, records, options)
            record = _run_stage(curriculum, stage, parent, manifest, options, cluster, lineage, run_id, ui)
            records.append(record)
            ui.stage_ends(record)
            if stage.name == options.until:
                break
    except BaseException:
        lineage.finish(run_id, "FAILED")
        raise
    lineage.finish(run_id, "FINISHED")
    return CurriculumResult(curriculum.name, tuple(records), run_id, lineage)


# ------------------------------------------------------------------------------------------------ before the stages


def _announce(curriculum: Curriculum, ui: Ui) -> None:
    for stage in curriculum.stages:
        message = without_effect_message(stage.config)
        if message:
            ui.note(f"warning: {stage.name}: {message}")


def _with_worlds(curriculum: Curriculum, options: Options, ui: Ui) -> Curriculum:
    """Draw the synthetic sources, if any, under the storage; their roots then point there."""
    sources: dict[str, Source] = {}
    for name, source in curriculum.sources.items():
        if source.synthetic is None:
            sources[name] = source
            continue
        root = Path(options.storage).expanduser().resolve() / "worlds" / name
        world = source.synthetic
        splits = {split: {"sequences": count, "crowd": world.crowd} for split, count in world.sequences.items()}
        report = write_world(
            root, seed=world.seed, domains={world.domain: splits}, frames=world.frames, size=world.size
        )
        ui.note(f"world {name}: {report.frames} frames {'drawn' if report.written else 'drawn before'}, {report.root}")
        drawn = report.source(world.domain)
        sources[name] = source.model_copy(update={"root": drawn["root"], "fps": drawn["fps"]})
    return curriculum.model_copy(update={"sources": sources})


def _check_given_weights(curriculum: Curriculum, options: Options) -> None:
    """Read weights that are given as a file now, not after an hour of conversion."""
    for stage in curriculum.stages:
        if curriculum.parent_of(stage) is None and not stage.initialise:
            named = stage.weights or stage.config.DETR_PRETRAIN
            if named:
                path = find_weights(named, stage, options)
                weights = read_weights(path, classes=stage.config.PRETRAIN_CLASSES)
                plan_transfer(
                    weights,
                    ModelSpec.from_config(stage.config),
                    stage.config.class_names,
                    new_class_from=stage.config.CLASS_INIT,
                )


def find_weights(named: str, stage: Stage, options: Options) -> Path:
    """A weights file: absolute, under the data root, or under the working directory.

    Raises:
        MotipError: it is nowhere.
    """
    path = Path(named).expanduser()
    root = location(options.data_root)
    candidates = [path] if path.is_absolute() else [Path.cwd() / path]
    if isinstance(root, Path) and not path.is_absolute():
        candidates.insert(0, root / path)
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise MotipError(
        f"the weights that stage {stage.name} starts from are not there",
        where=f"DETR_PRETRAIN of {stage.config.name} ({stage.config.origin('DETR_PRETRAIN')})"
        if stage.weights is None
        else f"weights of stage {stage.name} in {options.config_path or 'the curriculum file'}",
        found=named,
        expected=" or ".join(str(candidate) for candidate in candidates),
        fix="put the file there (motip_dancetrack.pth is in the MOTIP model zoo), or name another one in `weights:`",
    )


def _parent(curriculum: Curriculum, stage: Stage, records: list[StageRecord], options: Options) -> Parent | None:
    """What the stage starts from: an earlier stage's best checkpoint, a given file, or fresh weights."""
    earlier = curriculum.parent_of(stage)
    if earlier is not None:
        record = next(record for record in records if record.stage == earlier.name)
        return Parent(record.checkpoint, record.sha256, record.run_id, record.stage)
    if stage.initialise:
        path = _fresh_weights(stage, options)
    elif stage.weights or stage.config.DETR_PRETRAIN:
        path = find_weights(str(stage.weights or stage.config.DETR_PRETRAIN), stage, options)
    else:
        return None
    return Parent(str(path), sha256(path))


def _fresh_weights(stage: Stage, options: Options) -> Path:
    """Saved, freshly initialised weights of the configuration that `initialise` names; made once."""
    from motip.config import load_config

    config = load_config(str(stage.initialise))
    spec = ModelSpec.from_config(config)
    identity = digest({"spec": spec.to_dict(), "seed": config.SEED, "classes": config.class_names})
    folder = Path(options.storage).expanduser().resolve() / "weights"
    path = folder / f"{config.name}_{identity[:12]}.pth"
    if not path.is_file():
        save_checkpoint(
            path, model=fresh_model(config), classes=config.class_names, config=config.to_dict(), epoch=-1, step=0
        )
    return path


# ------------------------------------------------------------------------------------------------ one stage


def _run_stage(
    curriculum: Curriculum,
    stage: Stage,
    parent: Parent | None,
    manifest: Manifest,
    options: Options,
    cluster: Cluster | None,
    lineage: Lineage,
    curriculum_run: str | None,
    ui: Ui,
) -> StageRecord:
    job, train = _job(curriculum, stage, parent, manifest, options)
    folder = stage_folder(curriculum, stage, job.inputs, options)
    done = finished_record(folder, job.inputs)
    if done is not None:
        return done
    EpochPlans(job, stage.config, max(1, options.workers))(0)  # no trainable clip is said now, not by the workers
    begin = time.monotonic()
    data_digest = entries_digest([*train, *job.val])
    run_id = lineage.start_stage(
        curriculum_run,
        stage.name,
        stage.config.to_dict(),
        data_digest,
        None if parent is None else asdict(parent),
        tags={"motip.inputs": job.inputs},
        resume_run_id=_unfinished_run(folder),
    )
    job = StageJob(**{**vars(job), "run_id": run_id})
    write_json(folder / "stage.json", {"status": "running", "inputs": job.inputs, "run_id": run_id})
    write_json(folder / "config.json", stage.config.to_dict())
    ui.stage_begins(stage, job, str(folder))
    keeper = _Keeper(lineage, run_id, ui, folder)
    try:
        placement = _placement(stage.config, options, cluster)
        result = fit(job, placement, str(folder), keeper)
        best = best_epoch(result, stage)
        record = _conclude(
            stage, job, folder, result, best, train, data_digest, keeper.transfer, time.monotonic() - begin
        )
    except KeyboardInterrupt:
        lineage.mark_interrupted(run_id)
        raise
    except BaseException:
        lineage.finish(run_id, "FAILED")
        raise
    lineage.log_stage_result(run_id, record.checkpoint, record.sha256, record.metrics, stage.name)
    lineage.finish(run_id, "FINISHED")
    return record


def _job(
    curriculum: Curriculum, stage: Stage, parent: Parent | None, manifest: Manifest, options: Options
) -> tuple[StageJob, list[VideoEntry]]:
    """The stage with its data chosen and its inputs named by one digest."""
    config = stage.config
    train: list[VideoEntry] = []
    val: list[VideoEntry] = []
    for mix in stage.data:
        train += manifest.select(
            mix.source, "train", videos=mix.videos, frame_budget=mix.frame_budget, allow_fewer=mix.allow_fewer
        )
        val += manifest.of(mix.source, "val")
    if not val:
        raise MotipError(
            f"stage {stage.name} has no validation videos",
            where="sources: " + ", ".join(mix.source for mix in stage.data),
            expected="at least one labelled sequence in the val split",
            fix="give the source a `val` split; the best checkpoint is chosen on it",
        )
    classes = {mix.source: dict(curriculum.sources[mix.source].classes) for mix in stage.data}
    weights = {mix.source: mix.weight for mix in stage.data}
    identity = {
        "format": FORMAT,
        "stage": stage.name,
        "best": stage.best,
        "config": {key: value for key, value in config.to_dict().items() if key not in SPEED_ONLY},
        "train": entries_digest(train),
        "val": entries_digest(val),
        "classes": classes,
        "weights": weights,
        "parent": None if parent is None else parent.sha256,
    }
    job = StageJob(
        stage=stage.name,
        config=config.to_dict(),
        train=(),
        weights=weights,
        val=tuple(val),
        protocols={mix.source: protocol_of(curriculum.sources[mix.source], config) for mix in stage.data},
        classes=classes,
        storage=options.storage,
        parent=parent,
        inputs=digest(identity),
    )
    videos = plan_videos(train, job.class_maps(config), options.storage)
    return StageJob(**{**vars(job), "train": tuple(videos)}), train


def protocol_of(source: Source, config: Config) -> str:
    """The benchmark's own rules where they are defined for the trained classes, else `plain`."""
    names = set(config.class_names)
    if source.format == "motchallenge":
        return "motchallenge" if names == {"pedestrian"} else "plain"
    return PROTOCOLS[source.format] if names == PROTOCOL_CLASSES else "plain"


def stage_folder(curriculum: Curriculum, stage: Stage, inputs: str, options: Options) -> Location:
    """Checkpoints and records of a stage with these inputs; other inputs, other folder.

    OUTPUTS_DIR (or OUTPUT_DIR) of the stage's configuration moves it elsewhere under the storage.
    """
    chosen = stage.config.OUTPUTS_DIR or stage.config.OUTPUT_DIR
    storage = location(options.storage)
    if isinstance(storage, Path):
        storage = storage.resolve()
    base = storage / "curricula" / curriculum.name / stage.name if chosen is None else storage / chosen
    return base / inputs[:12]


def finished_record(folder: Location, inputs: str) -> StageRecord | None:
    """The record of a stage that is finished, of these inputs, and whose checkpoint is still what it was."""
    path = folder / "stage.json"
    if not path.is_file():
        return None
    stored = read_json(path)
    if stored.get("status") != "finished" or stored.get("inputs") != inputs or stored.get("format") != FORMAT:
        return None
    record = StageRecord(**{**stored, "skipped": True})
    checkpoint = location(record.checkpoint)
    if not checkpoint.is_file() or sha256(checkpoint) != record.sha256:
        return None
    return record


def best_epoch(result: FitResult, stage: Stage) -> int:
    """The epoch with the highest value of the stage's metric; the earliest of equals.

    Raises:
        MotipError: no epoch has that metric.
    """
    scored = {epoch: metrics[stage.best] for epoch, metrics in result.epochs.items() if stage.best in metrics}
    if not scored:
        known = sorted({name for metrics in result.epochs.values() for name in metrics})
        raise MotipError(
            f"no epoch of stage {stage.name} has the metric that chooses the best checkpoint",
            where="best",
            found=stage.best,
            expected="one of " + ", ".join(name for name in known if "/" not in name),
        )
    return max(sorted(scored), key=lambda epoch: scored[epoch])


def _conclude(
    stage: Stage,
    job: StageJob,
    folder: Location,
    result: FitResult,
    best: int,
    train: list[VideoEntry],
    data_digest: str,
    transfer: dict[str, Any],
    seconds: float,
) -> StageRecord:
    """Copy the best epoch's checkpoint and write the record last: a stage is finished when its record says so."""
    source = location(result.checkpoints[best])
    target = folder / "checkpoint_best.pth"
    if isinstance(target, Path):
        fetch(source, target)
    else:
        target.write_bytes(source.read_bytes())
    record = StageRecord(
        stage=stage.name,
        inputs=job.inputs,
        checkpoint=str(target),
        sha256=sha256(target),
        best_epoch=best,
        metrics=result.epochs[best],
        run_id=job.run_id,
        parent_sha256=None if job.parent is None else job.parent.sha256,
        data_digest=data_digest,
        videos=len(train),
        frames=sum(entry.frames for entry in train),
        epochs=stage.config.EPOCHS,
        seconds=seconds,
        transfer=transfer,
    )
    write_json(folder / "stage.json", asdict(record))
    return record


def _placement(config: Config, options: Options, cluster: Cluster | None) -> Placement:
    if options.workers == 0 or cluster is None:
        return Placement(workers=0)
    return place(options.workers, config, cluster)


def _unfinished_run(folder: Location) -> str | None:
    """The MLflow run of an attempt that was cut off, so that one stage has one run."""
    path = folder / "stage.json"
    if not path.is_file():
        return None
    run_id = read_json(path).get("run_id")
    return None if run_id is None else str(run_id)


class _Keeper:
    """Pass a training's records on to MLflow, the folder and the screen."""

    def __init__(self, lineage: Lineage, run_id: str | None, ui: Ui, folder: Location) -> None:
        self._lineage = lineage
        self._run_id = run_id
        self._ui = ui
        self._folder = folder
        self.transfer: dict[str, Any] = {}
        self._handlers: dict[str, Callable[[dict[str, Any]], None]] = {
            "step": self._metrics,
            "epoch": self._metrics,
            "scores": self._scores,
            "transfer": self._transferred,
        }

    def __call__(self, kind: str, values: dict[str, Any]) -> None:
        handler = self._handlers.get(kind)
        if handler is not None:
            handler(values)
        self._ui.record(kind, values)

    def _metrics(self, values: dict[str, Any]) -> None:
        self._lineage.log_metrics(self._run_id, values["metrics"], int(values["step"]))

    def _scores(self, values: dict[str, Any]) -> None:
        name = f"scores/epoch_{values['epoch']:03d}.json"
        self._lineage.log_dict(self._run_id, values["scores"], name)
        write_json(self._folder / "scores" / f"epoch_{values['epoch']:03d}.json", values["scores"])

    def _transferred(self, values: dict[str, Any]) -> None:
        self.transfer = {key: value for key, value in values.items() if key != "tensors"}
        self._lineage.log_dict(self._run_id, values, "transfer.json")
        write_json(self._folder / "transfer.json", values)
