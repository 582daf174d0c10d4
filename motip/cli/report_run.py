"""What RUN stands for in `motip report`: a stage's folder, and the tracks and rules its failures are shown by."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from motip.cli.console import console
from motip.cli.lineage import recorded
from motip.config import Config, load_curriculum
from motip.curriculum.stage_inputs import protocol_for
from motip.data.decode import decode_rgb
from motip.data.manifest import Manifest, VideoEntry, entry_path
from motip.data.sequence import ClassMap
from motip.data.shards import Shard
from motip.errors import MotipError
from motip.evaluate.evaluation import Subject, Work, is_tracked, read_tracks, track, track_inputs
from motip.evaluate.outcomes import explain
from motip.evaluate.protocols import scored_sequence
from motip.report.failure_segments import Images, JudgedVideo
from motip.report.page_facts import stored_row
from motip.report.tracked_video import check_folder
from motip.storage.paths import Location, local_copy, location, read_json
from motip.track.loading import Loaded, open_checkpoint, pick_device
from motip.track.settings import TrackerSettings
from motip.train.retention import held

BEST = "checkpoint_best.pth"
_RUN_ID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class Rules:
    """By which classes and protocol each source is judged."""

    class_maps: dict[str, ClassMap]
    protocols: dict[str, str]


@dataclass(frozen=True)
class Judged:
    """A model's tracks on locked videos, ready to be judged.

    Attributes:
        title: what was judged, in a line.
        folder: RUN's own.
        tracks: folder of the evaluation that holds the tracks.
    """

    title: str
    folder: Location
    storage: Location
    tracks: Location
    entries: list[VideoEntry]
    rules: Rules
    notes: list[str] = field(default_factory=list)

    def videos(self) -> Iterator[JudgedVideo]:
        """Every video with the fate of its boxes.

        Raises:
            MotipError: shards or tracks are missing or damaged.
        """
        for entry in self.entries:
            shard = Shard(entry_path(self.storage, entry))
            labels = shard.read_labels()
            class_map, protocol = self.rules.class_maps[entry.source], self.rules.protocols[entry.source]
            scored = scored_sequence(labels, class_map, read_tracks(self.tracks, entry), protocol)
            yield JudgedVideo(
                source=entry.source,
                name=entry.video,
                fps=entry.fps,
                frames=np.array([frame.number for frame in labels.frames], np.int64),
                errors=explain(scored, class_map.names, protocol),
                ignore_frames=scored.ignore_frames,
                ignore_xyxy=scored.ignore_xyxy,
                images=_images(entry_path(self.storage, entry), entry),
            )


def judged(
    run: str, split: str, sources: Sequence[str] | None, config: str | None, storage: str, device: str
) -> Judged:
    """The tracks that RUN stands for; videos that were not tracked with its checkpoint and settings are tracked now.

    Args:
        config: curriculum file with the classes of the sources; None: as the run's folder keeps them.

    Raises:
        MotipError: anything the user can put right.
    """
    place = location(run)
    scores = place / f"scores_{split}.json"
    if not _RUN_ID.fullmatch(run) and place.is_dir() and not (place / "stage.json").is_file() and scores.is_file():
        return _of_evaluation(place, read_json(scores), split, sources, config, device)
    return _of_stage(stage_folder_of(run, storage), split, sources, config, device)


def stage_folder_of(run: str, storage: str) -> Location:
    """The folder of a stage that is named by itself, by the folder above it, or by the MLflow id of its run.

    Raises:
        MotipError: there is none, or several.
    """
    place = location(run)
    if place.is_dir():
        if (place / "stage.json").is_file():
            return place
        inner = sorted((each for each in place.iterdir() if (each / "stage.json").is_file()), key=str)
        if len(inner) == 1:
            return inner[0]
        raise MotipError(
            "this folder does not stand for one run",
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
    step = recorded(storage).walk(run)[-1]
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
        "the folder of this run is not to be found",
        where=f"run {step.run_id} ({step.stage})",
        found=", ".join(map(str, folders)) or "no folder under --storage whose stage.json names the run",
        fix="name the folder itself, or the --storage it lies in",
    )


def place_for(out: str | None, folder: Location, name: str) -> Location:
    """The folder for the pictures; of a local one it is sure then that it can be written.

    Raises:
        MotipError: it cannot.
    """
    target = folder / name if out is None else Path(out).expanduser()
    if isinstance(target, Path):
        check_folder(target, "--out")
    return target


def picture_place(out: str | None, folder: Location, name: str) -> Location:
    """Where one picture goes; raises MotipError for a name that does not end in .png, or a folder."""
    if out is None:
        return folder / name
    target = Path(out).expanduser()
    if target.suffix.lower() != ".png" or target.is_dir():
        raise MotipError("the dashboard is a PNG", where="--out", found=out, expected="a path that ends in .png")
    place_for(str(target.parent), folder, name)
    return target


def judged_as_stored(folder: Location) -> Judged:
    """The tracks that are stored of a finished stage's val videos: nothing is tracked and no checkpoint is read.

    Raises:
        MotipError: the stage is not finished, none of its videos has stored tracks, or its records are damaged.
    """
    record, job = read_json(folder / "stage.json"), _optional(folder / "job.json")
    if record.get("status") != "finished":
        raise MotipError("the stage is not finished", where=folder)
    storage = _storage_of(folder)
    _, _, classes, settings = stored_row(folder)
    names = _chosen(None, job.get("val") or [], folder)
    every = _entries(storage, names, "val")
    tracks = storage / "evaluations" / str(record["sha256"])[:12]
    entries = [each for each in every if is_tracked(tracks, each, track_inputs(record["sha256"], settings, each))]
    if not entries:
        raise MotipError("no tracks of its val videos are stored", where=tracks)
    stage = str(job.get("stage") or record.get("stage") or folder.parent.name)
    share = "" if len(entries) == len(every) else f", {len(entries)} of {len(every)} videos"
    rules = _rules(job, {name: classes for name in names}, None, folder)
    return Judged(f"{stage}, {BEST}, val{share}", folder, storage, tracks, entries, rules)


def _of_evaluation(
    folder: Location,
    stored: dict[str, Any],
    split: str,
    sources: Sequence[str] | None,
    config: str | None,
    device: str,
) -> Judged:
    scored = {name: tuple(each["classes"]) for name, each in stored["sources"].items()}
    names = _chosen(sources, list(scored), folder)
    storage = _storage_of(folder)
    rules = _rules(stored, {name: scored[name] for name in names}, config, folder)
    wanted = {name: set(stored["sources"][name]["sequences"]) for name in names}
    entries = _entries(storage, names, split)
    entries = [entry for entry in entries if entry.video in wanted[entry.source]]
    settings = TrackerSettings(**stored["settings"])
    notes: list[str] = []
    waiting = [each for each in entries if not is_tracked(folder, each, track_inputs(stored["sha256"], settings, each))]
    if waiting:
        loaded = open_checkpoint(str(local_copy(location(stored["checkpoint"]))), device=device)
        if loaded.meta["sha256"] != stored["sha256"]:
            raise MotipError(
                f"{len(waiting)} videos are to be tracked again, and the checkpoint has changed since",
                where=stored["checkpoint"],
                found=loaded.meta["sha256"],
                expected=stored["sha256"],
                fix="evaluate the checkpoint as it is now: motip evaluate",
            )
        _track(Subject(loaded.model, stored["sha256"], settings), entries, storage, folder, device)
        notes.append(f"{len(waiting)} videos were tracked now")
    title = f"{Path(stored['checkpoint']).name} {stored['sha256'][:12]}, {split}"
    return Judged(title, folder, storage, folder, entries, rules, notes)


def _of_stage(folder: Location, split: str, sources: Sequence[str] | None, config: str | None, device: str) -> Judged:
    record, job = read_json(folder / "stage.json"), _optional(folder / "job.json")
    storage = _storage_of(folder)
    checkpoint, notes = _checkpoint_of(folder, record)
    loaded = open_checkpoint(str(local_copy(checkpoint)), device=device)
    digest = str(loaded.meta["sha256"])
    if checkpoint.name == BEST and digest != record["sha256"]:
        notes.append(f"{BEST} is not the file that the stage recorded ({digest[:12]}, not {record['sha256'][:12]})")
    _check_classes(loaded, folder)
    stage = str(job.get("stage") or record.get("stage") or folder.parent.name)
    names = _chosen(sources, job.get("val") or ([] if config is None else _judges(config, stage)), folder)
    rules = _rules(job, {name: loaded.classes for name in names}, config, folder)
    entries = _entries(storage, names, split)
    tracks = storage / "evaluations" / digest[:12]
    reused = _track(Subject(loaded.model, digest, loaded.settings), entries, storage, tracks, device)
    if reused < len(entries):
        notes.append(f"{len(entries) - reused} of {len(entries)} videos were tracked now; their tracks are in {tracks}")
    return Judged(f"{stage}, {checkpoint.name}, {split}", folder, storage, tracks, entries, rules, notes)


def _track(subject: Subject, entries: list[VideoEntry], storage: Location, folder: Location, device: str) -> int:
    def say(video: VideoEntry, done: int, total: int) -> None:
        console().print(f"tracked {done} of {total}: {video.source}/{video.split}/{video.video}", highlight=False)

    return track(subject, Work(entries, str(storage), folder, device=str(pick_device(device)), on_video=say))


def _checkpoint_of(folder: Location, record: dict[str, Any]) -> tuple[Location, list[str]]:
    """The best checkpoint, of an unfinished stage the newest; with what must be said."""
    best = folder / BEST
    if record.get("status") == "finished" and best.is_file():
        return best, []
    kept = [each.weights for each in held(folder).epochs if each.weights is not None]
    if not kept:
        raise MotipError(
            "this stage has no checkpoint of a finished epoch",
            where=folder,
            expected="checkpoint_best.pth, or epoch_<n>/checkpoint_<n>.pth",
            fix="wait for its first epoch",
        )
    why = "has lost its best checkpoint" if record.get("status") == "finished" else "is not finished"
    return kept[-1], [f"the stage {why}: its newest epoch is shown, {kept[-1].name}"]


def _check_classes(loaded: Loaded, folder: Location) -> None:
    """The weights and the configuration beside them must be of one stage."""
    if not (folder / "config.json").is_file():
        return
    named = Config.from_dict(read_json(folder / "config.json")).class_names
    if tuple(named) != loaded.classes:
        raise MotipError(
            "the checkpoint's classes are not those of the configuration beside it",
            where=folder,
            found=", ".join(loaded.classes),
            expected=", ".join(named),
            fix="put the stage's own checkpoint back, or evaluate this one on its own: motip evaluate",
        )


def _rules(stored: dict[str, Any], classes: dict[str, tuple[str, ...]], config: str | None, folder: Location) -> Rules:
    """Classes and protocols as the run keeps them; a given curriculum file goes before."""
    maps: dict[str, ClassMap] = {}
    protocols: dict[str, str] = {}
    curriculum = None if config is None else load_curriculum(config)
    for name, own in classes.items():
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
                f"this run does not say which raw categories of source {name!r} are which class",
                where=folder,
                expected="job.json of a stage, or `classes` in the scores file (older versions did not write them)",
                fix="pass the curriculum file of the run with --config",
            )
        if not set(own) & set(raws):
            raise MotipError(
                f"source {name!r} has none of the checkpoint's classes",
                where="--config" if config is not None else folder,
                found="checkpoint: " + ", ".join(own),
                expected="some of " + ", ".join(raws),
                fix="pass the curriculum file that the checkpoint was trained with",
            )
        maps[name] = ClassMap(own, {each: tuple(raws[each]) for each in own if each in raws})
    return Rules(maps, protocols)


def _storage_of(folder: Location) -> Location:
    """The storage a folder lies in: the nearest one above with shards.

    Raises:
        MotipError: none has.
    """
    place = folder.resolve() if isinstance(folder, Path) else folder
    for _ in range(8):
        if (place / "shards" / "manifest.json").is_file():
            return place
        if place.parent == place or not place.parent.name:
            break
        place = place.parent
    raise MotipError(
        "no shards are to be found for this run",
        where=folder,
        expected="shards/manifest.json in the storage above it",
        fix="bring the folder back into its storage, or convert the data there: motip convert",
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


def _judges(config: str, stage: str) -> list[str]:
    """The sources that judge a stage, as its curriculum file says; all where it has no such stage."""
    curriculum = load_curriculum(config)
    for each in curriculum.stages:
        if each.name == stage:
            return list(each.val if each.val is not None else dict.fromkeys(mix.source for mix in each.data))
    return list(curriculum.sources)


def _chosen(sources: Sequence[str] | None, known: Sequence[str], folder: Location) -> list[str]:
    if not known:
        raise MotipError(
            "this run does not say which sources it is judged on",
            where=folder,
            expected="job.json in the stage's folder (older versions did not write it)",
            fix="pass the curriculum file of the run with --config",
        )
    for name in sources or ():
        if name not in known:
            raise MotipError(
                "this run is not judged on such a source",
                where="--sources",
                found=name,
                expected="some of " + ", ".join(known),
            )
    return list(sources) if sources is not None else list(known)


def _optional(path: Location) -> dict[str, Any]:
    values: dict[str, Any] = read_json(path) if path.is_file() else {}
    return values


def _images(path: Location, entry: VideoEntry) -> Images:
    """Reads single frames of a shard as they are drawn."""

    def read(positions: Sequence[int]) -> Iterator[np.ndarray]:
        shard = Shard(path)
        for position in positions:
            (frame,) = shard.read_frames([position])
            where = f"{entry.source}/{entry.video} frame {frame.number}"
            if not isinstance(frame.image, bytes):
                raise MotipError("a frame has no image", where=where, fix="convert the video with its images")
            yield decode_rgb(frame.image, where=where)

    return read
