"""Tracks of a stage or an evaluation on its locked videos, with everything needed to match them with the labels.

``load_stored_run`` reads the stored tracks of a finished stage; ``load_tracked_run`` also tracks the videos without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from motip.config import Config, load_curriculum
from motip.data.decode import decode_rgb
from motip.data.manifest import Manifest, VideoEntry, entry_path
from motip.data.sequence import ClassMap
from motip.data.shards import Shard
from motip.errors import MotipError
from motip.evaluation.evaluator import (
    EvalJob,
    ModelUnderTest,
    is_tracked,
    read_tracks,
    track_missing,
    tracks_digest,
)
from motip.evaluation.outcomes import box_outcomes
from motip.evaluation.protocols import protocol_for, scored_sequence
from motip.report.failure_segments import Images, MatchedVideo
from motip.report.failures import write_failures
from motip.report.page_facts import sheets_in, stored_row
from motip.report.stage_list import read_stage_list
from motip.report.tracked_video import check_folder
from motip.stage_folder import StageFolder, evaluation_folder, scores_file
from motip.storage.paths import Location, absolute, local_copy, location, read_json
from motip.tracking.loading import LoadedModel, load, resolve_device
from motip.tracking.settings import TrackerSettings


@dataclass(frozen=True)
class RunOptions:
    """What to show of a stage or an evaluation.

    Attributes:
        sources: sources to include; None: all that it was scored on.
        config: curriculum file with the class maps; None: those stored with the run.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``, to track videos without stored tracks.
        log: receives a line about each tracked video, and about each stage without a failure sheet.
    """

    split: str = "val"
    sources: Sequence[str] | None = None
    config: str | None = None
    device: str = "auto"
    log: Callable[[str], object] = print


@dataclass(frozen=True)
class TrackedRun:
    """Stored tracks of a checkpoint on locked videos, with everything needed to match them with the labels.

    Attributes:
        title: stage or checkpoint and split, in one line.
        folder: of the stage or the evaluation.
        tracks: folder of the evaluation with the tracks.
        entries: the videos.
        class_maps, protocols: by source.
        notes: lines to print with the result.
    """

    title: str
    folder: Location
    storage: Location
    tracks: Location
    entries: list[VideoEntry]
    class_maps: dict[str, ClassMap]
    protocols: dict[str, str]
    notes: list[str] = field(default_factory=list)

    def videos(self) -> Iterator[MatchedVideo]:
        """Match the tracks of every video with its labels.

        Raises:
            MotipError: shards or tracks are missing or damaged.
        """
        for entry in self.entries:
            shard = Shard(entry_path(self.storage, entry))
            labels = shard.read_labels()
            class_map, protocol = self.class_maps[entry.source], self.protocols[entry.source]
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


def draw_missing_sheets(folder: Location, options: RunOptions, *, stored_only: bool = True) -> None:
    """Draw the contact sheet of every finished stage of a curriculum without failure pictures.

    Args:
        folder: of the curriculum.
        stored_only: use only videos with stored tracks; otherwise the others are tracked first, in this process.
    """
    for stage, own in read_stage_list(folder).folders.items():
        if own is None or sheets_in(own):
            continue
        try:
            tracked = load_stored_run(own) if stored_only else load_tracked_run(own, options)
            target = prepared_folder(tracked.folder / "failures_val")
            write_failures(tracked.videos(), target, tracked.title, clips=0)
        except MotipError as error:
            options.log(f"note: {stage}: no failure sheet: {error.what}")


def prepared_folder(target: Location) -> Location:
    """``target``; a local folder is created.

    Raises:
        MotipError: a local folder cannot be created or written.
    """
    if isinstance(target, Path):
        check_folder(target, "--out")
    return target


def load_tracked_run(folder: Location, options: RunOptions) -> TrackedRun:
    """The tracks of a stage or an evaluation; videos without tracks of its checkpoint and settings are tracked first.

    Raises:
        MotipError: invalid options, or missing or damaged data.
    """
    if StageFolder(folder).exists():
        return _from_stage(folder, options)
    return _from_evaluation(folder, options)


def load_stored_run(folder: Location) -> TrackedRun:
    """The stored tracks of a finished stage's val videos, without tracking or reading a checkpoint.

    Raises:
        MotipError: the stage is not finished, none of its videos has stored tracks, or its records are damaged.
    """
    stage = StageFolder(folder)
    record, facts = stage.record(), stage.facts()
    if record is None:
        raise MotipError("the stage is not finished", where=folder)
    storage = _storage_of(folder)
    _, _, classes, settings = stored_row(folder)
    # Of its val videos, those with stored tracks.
    names = _select_sources(None, facts.val, folder)
    every = _entries(storage, names, "val")
    tracks = evaluation_folder(storage, record.sha256)
    entries = [each for each in every if is_tracked(tracks, each, tracks_digest(record.sha256, settings, each))]
    if not entries:
        raise MotipError("no tracks of its val videos are stored", where=tracks)
    share = "" if len(entries) == len(every) else f", {len(entries)} of {len(every)} videos"
    rules = _rules(asdict(facts), dict.fromkeys(names, classes), None, folder)
    return TrackedRun(f"{stage.name}, {stage.best.name}, val{share}", folder, storage, tracks, entries, *rules)


def _from_evaluation(folder: Location, options: RunOptions) -> TrackedRun:
    """The run of an evaluation's folder."""
    stored = read_json(folder / scores_file(options.split))
    # The scored videos.
    scored = {name: tuple(each["classes"]) for name, each in stored["sources"].items()}
    names = _select_sources(options.sources, list(scored), folder)
    storage = _storage_of(folder)
    rules = _rules(stored, {name: scored[name] for name in names}, options.config, folder)
    sequences = {name: set(stored["sources"][name]["sequences"]) for name in names}
    entries = [each for each in _entries(storage, names, options.split) if each.video in sequences[each.source]]
    # Track those without stored tracks, with the checkpoint of the evaluation.
    settings = TrackerSettings(**stored["settings"])
    notes: list[str] = []
    waiting = [
        each for each in entries if not is_tracked(folder, each, tracks_digest(stored["sha256"], settings, each))
    ]
    if waiting:
        loaded = load(str(local_copy(location(stored["checkpoint"]))), device=options.device)
        if loaded.meta["sha256"] != stored["sha256"]:
            raise MotipError(
                f"{len(waiting)} videos have no stored tracks, and the checkpoint has changed since the evaluation",
                where=stored["checkpoint"],
                found=loaded.meta["sha256"],
                expected=stored["sha256"],
                fix="evaluate the checkpoint as it is now: motip evaluate",
            )
        _track(ModelUnderTest(loaded.model, stored["sha256"], settings), entries, storage, folder, options)
        notes.append(f"{len(waiting)} videos were tracked now")
    title = f"{Path(stored['checkpoint']).name} {stored['sha256'][:12]}, {options.split}"
    return TrackedRun(title, folder, storage, folder, entries, *rules, notes)


def _from_stage(folder: Location, options: RunOptions) -> TrackedRun:
    """The run of a stage's folder with its best checkpoint; of an unfinished stage, the newest."""
    # Checkpoint.
    stage = StageFolder(folder)
    facts = stage.facts()
    storage = _storage_of(folder)
    checkpoint, notes = _checkpoint_of(stage)
    loaded = load(str(local_copy(checkpoint)), device=options.device)
    digest = str(loaded.meta["sha256"])
    recorded = str(stage.state().get("sha256", digest))
    if checkpoint == stage.best and digest != recorded:
        notes.append(f"{checkpoint.name} is not the file that the stage recorded ({digest[:12]}, not {recorded[:12]})")
    _check_classes(loaded, stage)
    # Videos, class maps and protocols.
    config = options.config
    validated_on = facts.val or ([] if config is None else _validation_sources(config, stage.name))
    names = _select_sources(options.sources, validated_on, folder)
    rules = _rules(asdict(facts), dict.fromkeys(names, loaded.class_names), config, folder)
    entries = _entries(storage, names, options.split)
    tracks = evaluation_folder(storage, digest)
    reused = _track(ModelUnderTest(loaded.model, digest, loaded.settings), entries, storage, tracks, options)
    if reused < len(entries):
        notes.append(f"{len(entries) - reused} of {len(entries)} videos were tracked now; their tracks are in {tracks}")
    title = f"{stage.name}, {checkpoint.name}, {options.split}"
    return TrackedRun(title, folder, storage, tracks, entries, *rules, notes)


def _track(
    model: ModelUnderTest, entries: list[VideoEntry], storage: Location, folder: Location, options: RunOptions
) -> int:
    """Track the videos without stored tracks; returns how many had some."""

    def report(video: VideoEntry, done: int, total: int) -> None:
        options.log(f"tracked {done} of {total}: {video.source}/{video.split}/{video.video}")

    device = str(resolve_device(options.device))
    return track_missing(model, EvalJob(entries, str(storage), folder, device=device, on_video=report))


def _checkpoint_of(stage: StageFolder) -> tuple[Location, list[str]]:
    """The best checkpoint, of an unfinished stage the newest, and notes about the choice."""
    finished = stage.state().get("status") == "finished"
    if finished and stage.best.is_file():
        return stage.best, []
    kept = [each.weights for each in stage.checkpoints().epochs if each.weights is not None]
    if not kept:
        raise MotipError(
            "this stage has no checkpoint of a finished epoch",
            where=stage.path,
            expected=f"{stage.best.name}, or epoch_<n>/checkpoint_<n>.pth",
            fix="wait for its first epoch",
        )
    why = "has no best checkpoint any more" if finished else "is not finished"
    return kept[-1], [f"the stage {why}: its newest epoch is shown, {kept[-1].name}"]


def _check_classes(loaded: LoadedModel, stage: StageFolder) -> None:
    """Raise MotipError if the checkpoint's classes differ from those of the stage's configuration."""
    config = stage.config()
    if not config:
        return
    named = Config.from_dict(config).class_names
    if tuple(named) != loaded.class_names:
        raise MotipError(
            "the checkpoint's classes differ from those of config.json in its folder",
            where=stage.path,
            found=", ".join(loaded.class_names),
            expected=", ".join(named),
            fix="restore the stage's own checkpoint, or evaluate this one separately: motip evaluate",
        )


def _rules(
    stored: dict[str, Any], classes: dict[str, tuple[str, ...]], config: str | None, folder: Location
) -> tuple[dict[str, ClassMap], dict[str, str]]:
    """Class maps and protocols by source, from the curriculum file ``config``, else as stored with the run."""
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
    return maps, protocols


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
