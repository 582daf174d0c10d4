"""Resolution of the RUN argument of `motip report`.

RUN is the folder of a stage or of an evaluation, or the MLflow id of a stage's run. ``resolve_stage_folder`` finds the
stage's folder; ``load_tracked_run`` and ``load_stored_run`` return a ``TrackedRun``: the videos, their tracks, and the
class maps and protocols to match them by.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from motip.cli.console import console
from motip.cli.lineage import open_lineage
from motip.config import Config, load_curriculum
from motip.curriculum.stage_inputs import protocol_for
from motip.data.decode import decode_rgb
from motip.data.manifest import Manifest, VideoEntry, entry_path
from motip.data.sequence import ClassMap
from motip.data.shards import Shard
from motip.errors import MotipError
from motip.evaluation.evaluator import (
    EvalJob,
    ModelUnderTest,
    evaluation_folder,
    is_tracked,
    read_tracks,
    track_missing,
    tracks_digest,
)
from motip.evaluation.outcomes import box_outcomes
from motip.evaluation.protocols import scored_sequence
from motip.report.failure_segments import Images, MatchedVideo
from motip.report.page_facts import stored_row
from motip.report.tracked_video import check_folder
from motip.storage.paths import Location, absolute, local_copy, location, read_json
from motip.tracking.loading import LoadedModel, load, resolve_device
from motip.tracking.settings import TrackerSettings
from motip.train.retention import list_checkpoints

BEST = "checkpoint_best.pth"
_RUN_ID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class ScoringRules:
    """Class map and protocol of each source."""

    class_maps: dict[str, ClassMap]
    protocols: dict[str, str]


@dataclass(frozen=True)
class TrackedRun:
    """Stored tracks of a checkpoint on locked videos, with everything needed to match them with the labels.

    Attributes:
        title: stage or checkpoint and split, in one line.
        folder: RUN's folder.
        tracks: folder of the evaluation with the tracks.
        entries: the videos.
        notes: lines to print with the result.
    """

    title: str
    folder: Location
    storage: Location
    tracks: Location
    entries: list[VideoEntry]
    rules: ScoringRules
    notes: list[str] = field(default_factory=list)

    def videos(self) -> Iterator[MatchedVideo]:
        """Match the tracks of every video with its labels.

        Raises:
            MotipError: shards or tracks are missing or damaged.
        """
        for entry in self.entries:
            shard = Shard(entry_path(self.storage, entry))
            labels = shard.read_labels()
            class_map, protocol = self.rules.class_maps[entry.source], self.rules.protocols[entry.source]
            scored = scored_sequence(labels, class_map, read_tracks(self.tracks, entry), protocol)
            yield MatchedVideo(
                source=entry.source,
                name=entry.video,
                fps=entry.fps,
                frames=np.array([frame.number for frame in labels.frames], np.int64),
                errors=box_outcomes(scored, class_map.names, protocol),
                ignore_frames=scored.ignore_frames,
                ignore_xyxy=scored.ignore_xyxy,
                images=_images(entry_path(self.storage, entry), entry),
            )


def load_tracked_run(
    run: str, split: str, sources: Sequence[str] | None, config: str | None, storage: str, device: str
) -> TrackedRun:
    """The tracks of RUN; videos without stored tracks of its checkpoint and settings are tracked first.

    Args:
        sources: sources to include; None: all that RUN was scored on.
        config: curriculum file with the class maps; None: those stored with the run.

    Raises:
        MotipError: no such run, invalid arguments, or missing or damaged data.
    """
    path = location(run)
    scores = path / f"scores_{split}.json"
    if not _RUN_ID.fullmatch(run) and path.is_dir() and not (path / "stage.json").is_file() and scores.is_file():
        return _from_evaluation(path, read_json(scores), split, sources, config, device)
    return _from_stage(resolve_stage_folder(run, storage), split, sources, config, device)


def resolve_stage_folder(run: str, storage: str) -> Location:
    """A stage's folder from its path, from its parent folder, or from the MLflow id of its run.

    Raises:
        MotipError: there is none, or several.
    """
    # A folder: the stage's own, or one with a single stage folder in it.
    path = location(run)
    if path.is_dir():
        if (path / "stage.json").is_file():
            return path
        inner = sorted((each for each in path.iterdir() if (each / "stage.json").is_file()), key=str)
        if len(inner) == 1:
            return inner[0]
        raise MotipError(
            "this folder does not identify one run",
            where=run,
            found=", ".join(str(each) for each in inner) or "neither stage.json nor scores",
            expected="a stage's folder (curricula/<name>/<stage>/<inputs>) or that of `motip evaluate` (evaluations/…)",
            fix="name one of them" if inner else None,
        )
    if not _RUN_ID.fullmatch(run):
        raise MotipError(
            "there is no such run",
            where="RUN",
            found=run,
            expected="an existing folder of a stage or an evaluation, or the MLflow id of a stage's run",
        )
    # A run id: the folder of its checkpoint, for an unfinished run the stage record with the id.
    step = open_lineage(storage).chain(run)[-1]
    base = location(storage)
    if step.checkpoint is not None:
        folders = [location(step.checkpoint.path).parent]
        if step.checkpoint.relative:
            folders.append((base / step.checkpoint.relative).parent)
    elif isinstance(base, Path):
        records = base.glob("curricula/*/*/*/stage.json")
        folders = [path.parent for path in sorted(records) if read_json(path).get("run_id") == step.run_id]
    else:
        folders = []
    for folder in folders:
        if (folder / "stage.json").is_file():
            return folder
    raise MotipError(
        "the folder of this run was not found",
        where=f"run {step.run_id} ({step.stage})",
        found=", ".join(map(str, folders)) or "no folder under --storage with a stage.json of this run",
        fix="pass the folder itself, or the --storage that contains it",
    )


def output_folder(out: str | None, folder: Location, name: str) -> Location:
    """The folder for the pictures: ``out``, else ``name`` in ``folder``; a local one is created.

    Raises:
        MotipError: a local folder cannot be created or written.
    """
    target = folder / name if out is None else Path(out).expanduser()
    if isinstance(target, Path):
        check_folder(target, "--out")
    return target


def output_picture(out: str | None, folder: Location, name: str) -> Location:
    """The path for one picture: ``out``, else ``name`` in ``folder``.

    Raises:
        MotipError: ``out`` is a folder, does not end in .png, or cannot be written.
    """
    if out is None:
        return folder / name
    target = Path(out).expanduser()
    if target.suffix.lower() != ".png" or target.is_dir():
        raise MotipError("the dashboard is a PNG", where="--out", found=out, expected="a path that ends in .png")
    output_folder(str(target.parent), folder, name)
    return target


def load_stored_run(folder: Location) -> TrackedRun:
    """The stored tracks of a finished stage's val videos, without tracking or reading a checkpoint.

    Raises:
        MotipError: the stage is not finished, none of its videos has stored tracks, or its records are damaged.
    """
    record, job = read_json(folder / "stage.json"), _optional(folder / "job.json")
    if record.get("status") != "finished":
        raise MotipError("the stage is not finished", where=folder)
    storage = _storage_of(folder)
    _, _, classes, settings = stored_row(folder)
    # Of its val videos, those with stored tracks.
    names = _select_sources(None, job.get("val") or [], folder)
    every = _entries(storage, names, "val")
    tracks = evaluation_folder(storage, str(record["sha256"]))
    entries = [each for each in every if is_tracked(tracks, each, tracks_digest(record["sha256"], settings, each))]
    if not entries:
        raise MotipError("no tracks of its val videos are stored", where=tracks)
    stage = str(job.get("stage") or record.get("stage") or folder.parent.name)
    share = "" if len(entries) == len(every) else f", {len(entries)} of {len(every)} videos"
    rules = _rules(job, {name: classes for name in names}, None, folder)
    return TrackedRun(f"{stage}, {BEST}, val{share}", folder, storage, tracks, entries, rules)


def _from_evaluation(
    folder: Location,
    stored: dict[str, Any],
    split: str,
    sources: Sequence[str] | None,
    config: str | None,
    device: str,
) -> TrackedRun:
    """The run of an evaluation's folder; ``stored`` is its scores file."""
    # The scored videos.
    scored = {name: tuple(each["classes"]) for name, each in stored["sources"].items()}
    names = _select_sources(sources, list(scored), folder)
    storage = _storage_of(folder)
    rules = _rules(stored, {name: scored[name] for name in names}, config, folder)
    sequences = {name: set(stored["sources"][name]["sequences"]) for name in names}
    entries = _entries(storage, names, split)
    entries = [entry for entry in entries if entry.video in sequences[entry.source]]
    # Track those without stored tracks, with the checkpoint of the evaluation.
    settings = TrackerSettings(**stored["settings"])
    notes: list[str] = []
    waiting = [
        each for each in entries if not is_tracked(folder, each, tracks_digest(stored["sha256"], settings, each))
    ]
    if waiting:
        loaded = load(str(local_copy(location(stored["checkpoint"]))), device=device)
        if loaded.meta["sha256"] != stored["sha256"]:
            raise MotipError(
                f"{len(waiting)} videos have no stored tracks, and the checkpoint has changed since the evaluation",
                where=stored["checkpoint"],
                found=loaded.meta["sha256"],
                expected=stored["sha256"],
                fix="evaluate the checkpoint as it is now: motip evaluate",
            )
        _track(ModelUnderTest(loaded.model, stored["sha256"], settings), entries, storage, folder, device)
        notes.append(f"{len(waiting)} videos were tracked now")
    title = f"{Path(stored['checkpoint']).name} {stored['sha256'][:12]}, {split}"
    return TrackedRun(title, folder, storage, folder, entries, rules, notes)


def _from_stage(
    folder: Location, split: str, sources: Sequence[str] | None, config: str | None, device: str
) -> TrackedRun:
    """The run of a stage's folder with its best checkpoint; of an unfinished stage, the newest."""
    # Checkpoint.
    record, job = read_json(folder / "stage.json"), _optional(folder / "job.json")
    storage = _storage_of(folder)
    checkpoint, notes = _checkpoint_of(folder, record)
    loaded = load(str(local_copy(checkpoint)), device=device)
    digest = str(loaded.meta["sha256"])
    if checkpoint.name == BEST and digest != record["sha256"]:
        notes.append(f"{BEST} is not the file that the stage recorded ({digest[:12]}, not {record['sha256'][:12]})")
    _check_classes(loaded, folder)
    # Videos, class maps and protocols.
    stage = str(job.get("stage") or record.get("stage") or folder.parent.name)
    validated_on = job.get("val") or ([] if config is None else _validation_sources(config, stage))
    names = _select_sources(sources, validated_on, folder)
    rules = _rules(job, {name: loaded.class_names for name in names}, config, folder)
    entries = _entries(storage, names, split)
    tracks = evaluation_folder(storage, digest)
    reused = _track(ModelUnderTest(loaded.model, digest, loaded.settings), entries, storage, tracks, device)
    if reused < len(entries):
        notes.append(f"{len(entries) - reused} of {len(entries)} videos were tracked now; their tracks are in {tracks}")
    return TrackedRun(f"{stage}, {checkpoint.name}, {split}", folder, storage, tracks, entries, rules, notes)


def _track(subject: ModelUnderTest, entries: list[VideoEntry], storage: Location, folder: Location, device: str) -> int:
    """Track the videos without stored tracks; returns how many had some."""

    def print_progress(video: VideoEntry, done: int, total: int) -> None:
        console().print(f"tracked {done} of {total}: {video.source}/{video.split}/{video.video}", highlight=False)

    return track_missing(
        subject, EvalJob(entries, str(storage), folder, device=str(resolve_device(device)), on_video=print_progress)
    )


def _checkpoint_of(folder: Location, record: dict[str, Any]) -> tuple[Location, list[str]]:
    """The best checkpoint, of an unfinished stage the newest, and notes about the choice."""
    best = folder / BEST
    if record.get("status") == "finished" and best.is_file():
        return best, []
    kept = [each.weights for each in list_checkpoints(folder).epochs if each.weights is not None]
    if not kept:
        raise MotipError(
            "this stage has no checkpoint of a finished epoch",
            where=folder,
            expected="checkpoint_best.pth, or epoch_<n>/checkpoint_<n>.pth",
            fix="wait for its first epoch",
        )
    why = "has no best checkpoint any more" if record.get("status") == "finished" else "is not finished"
    return kept[-1], [f"the stage {why}: its newest epoch is shown, {kept[-1].name}"]


def _check_classes(loaded: LoadedModel, folder: Location) -> None:
    """Raise MotipError if the checkpoint's classes differ from those of the stage's configuration."""
    if not (folder / "config.json").is_file():
        return
    named = Config.from_dict(read_json(folder / "config.json")).class_names
    if tuple(named) != loaded.class_names:
        raise MotipError(
            "the checkpoint's classes differ from those of config.json in its folder",
            where=folder,
            found=", ".join(loaded.class_names),
            expected=", ".join(named),
            fix="restore the stage's own checkpoint, or evaluate this one separately: motip evaluate",
        )


def _rules(
    stored: dict[str, Any], classes: dict[str, tuple[str, ...]], config: str | None, folder: Location
) -> ScoringRules:
    """Class maps and protocols from the curriculum file ``config``, else as stored with the run."""
    maps: dict[str, ClassMap] = {}
    protocols: dict[str, str] = {}
    curriculum = None if config is None else load_curriculum(config)
    for name, own in classes.items():
        # Raw categories and protocol of the source.
        if curriculum is not None:
            if name not in curriculum.sources:
                raise MotipError(
                    f"the curriculum file does not describe the source {name!r}",
                    where="--config",
                    expected="some of " + ", ".join(curriculum.sources),
                    fix="pass the curriculum file of this run",
                )
            raws: dict[str, Any] = dict(curriculum.sources[name].classes)
            protocols[name] = protocol_for(curriculum.sources[name], own)
        elif name in stored.get("classes", {}) and name in stored.get("protocols", {}):
            raws, protocols[name] = stored["classes"][name], stored["protocols"][name]
        else:
            raise MotipError(
                f"this run has no class map of source {name!r}",
                where=folder,
                expected="job.json of a stage, or `classes` in the scores file (older versions did not write them)",
                fix="pass the curriculum file of the run with --config",
            )
        # Restricted to the classes of the checkpoint.
        if not set(own) & set(raws):
            raise MotipError(
                f"source {name!r} has none of the checkpoint's classes",
                where="--config" if config is not None else folder,
                found="checkpoint: " + ", ".join(own),
                expected="some of " + ", ".join(raws),
                fix="pass the curriculum file that the checkpoint was trained with",
            )
        maps[name] = ClassMap(own, {each: tuple(raws[each]) for each in own if each in raws})
    return ScoringRules(maps, protocols)


def _storage_of(folder: Location) -> Location:
    """The storage that contains a folder: the nearest parent with shards.

    Raises:
        MotipError: no parent has shards.
    """
    path = absolute(folder)
    for _ in range(8):
        if (path / "shards" / "manifest.json").is_file():
            return path
        if path.parent == path or not path.parent.name:
            break
        path = path.parent
    raise MotipError(
        "no shards found for this run",
        where=folder,
        expected="shards/manifest.json in the storage that contains the folder",
        fix="move the folder back into its storage, or convert the data there: motip convert",
    )


def _entries(storage: Location, names: Sequence[str], split: str) -> list[VideoEntry]:
    manifest = Manifest.load(storage)
    entries = [entry for name in names for entry in manifest.of(name, split)]
    if not entries:
        raise MotipError(
            f"the shards have no {split} videos of these sources",
            where=storage,
            found=", ".join(names),
            fix="name another --split or --sources",
        )
    return entries


def _validation_sources(config: str, stage: str) -> list[str]:
    """Validation sources of a stage in the curriculum file; all sources if the file has no such stage."""
    curriculum = load_curriculum(config)
    for each in curriculum.stages:
        if each.name == stage:
            return list(each.validation_sources)
    return list(curriculum.sources)


def _select_sources(sources: Sequence[str] | None, valid: Sequence[str], folder: Location) -> list[str]:
    """``sources``, or all of ``valid`` for None; raises MotipError for a source that is not valid."""
    if not valid:
        raise MotipError(
            "this run has no list of its validation sources",
            where=folder,
            expected="job.json in the stage's folder (older versions did not write it)",
            fix="pass the curriculum file of the run with --config",
        )
    for name in sources or ():
        if name not in valid:
            raise MotipError(
                "this run was not scored on this source",
                where="--sources",
                found=name,
                expected="some of " + ", ".join(valid),
            )
    return list(sources) if sources is not None else list(valid)


def _optional(path: Location) -> dict[str, Any]:
    """Content of a JSON file; empty if there is no such file."""
    values: dict[str, Any] = read_json(path) if path.is_file() else {}
    return values


def _images(path: Location, entry: VideoEntry) -> Images:
    """A reader of single frames of a shard."""

    def read(positions: Sequence[int]) -> Iterator[np.ndarray]:
        shard = Shard(path)
        for position in positions:
            (frame,) = shard.read_frames([position])
            where = f"{entry.source}/{entry.video} frame {frame.number}"
            if not isinstance(frame.image, bytes):
                raise MotipError("a frame has no image", where=where, fix="convert the video with its images")
            yield decode_rgb(frame.image, where=where)

    return read
