"""Evaluate a checkpoint on every domain of a shard set: from arguments to tables and files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from motip.cluster import Cluster, connect, disconnect
from motip.commands.checkpoint import Loaded, open_checkpoint, pick_device
from motip.commands.evaluate_show import show_errors, show_scores, show_sweep
from motip.commands.show import console, note
from motip.config import Config, Curriculum, load_curriculum
from motip.curriculum.inputs import protocol_of
from motip.data.convert import convert, ray_map
from motip.data.manifest import Manifest, VideoEntry, entry_path
from motip.data.sequence import ClassMap
from motip.data.shards import read_labels
from motip.data.storage import Location, location, whole_file, write_json
from motip.errors import MotipError
from motip.evaluate.compare import comparisons_json
from motip.evaluate.protocols import scored_sequence
from motip.evaluate.run import Evaluation, Subject, evaluate
from motip.evaluate.summaries import Summary, summarise
from motip.evaluate.sweep import Sweep, SweepSubject, candidates, check_sweep_split, sweep
from motip.files import write_json_atomic
from motip.launch import checked_data_root, checked_storage
from motip.report.thresholds import sweep_figure


def evaluation(
    checkpoint: str,
    config: str,
    *,
    errors: bool = False,
    sweep_thresholds: bool = False,
    thresholds: str | None = None,
    **others: Any,
) -> None:
    """Evaluate, or sweep the thresholds; the one way in for the verb and the job.

    Raises:
        MotipError: options that do not go together, or as the two.
    """
    if thresholds is not None and not sweep_thresholds:
        raise MotipError("thresholds are those of a sweep", where="--thresholds", fix="add --sweep-thresholds")
    if errors and sweep_thresholds:
        raise MotipError(
            "a sweep has no errors of one setting",
            where="--errors, --sweep-thresholds",
            fix="sweep first, then evaluate with --errors",
        )
    if sweep_thresholds:
        sweep_checkpoint(checkpoint, config, thresholds=thresholds, **others)
    else:
        evaluate_checkpoint(checkpoint, config, errors=errors, **others)


def evaluate_checkpoint(
    checkpoint: str,
    config: str,
    *,
    storage: str,
    data_root: str | None = None,
    split: str = "val",
    sources: Sequence[str] | None = None,
    workers: int | None = None,
    device: str = "auto",
    errors: bool = False,
    json_path: str | None = None,
) -> Evaluation:
    """Track and score the locked videos of every source, print a table each, and write tracks and scores.

    Args:
        config: curriculum file; says which raw categories count as which class, and by which protocol to score.
        data_root: convert what the shards lack from here first.
        sources: only these.
        workers: Ray actors; 0 tracks in this process, None takes every GPU where there are some, else every CPU.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``, of this process or of the actors.
        errors: also sort every box and show which objects are lost (``errors_SPLIT.json``).

    Raises:
        MotipError: anything the user can put right.
    """
    with _prepared(checkpoint, config, storage, data_root, split, sources, workers, device) as job:
        done = evaluate(
            Subject(job.loaded.model, job.sha256, job.loaded.settings),
            job.videos,
            job.storage,
            job.folder,
            job.class_maps,
            job.protocols,
            split,
            cluster=job.cluster,
            workers=workers,
            device=job.device,
            averaged=job.averaged,
            on_video=_say,
        )
    loaded, folder = job.loaded, job.folder
    stored: dict[str, Any] = {
        "checkpoint": str(checkpoint),
        "sha256": job.sha256,
        "split": split,
        "settings": asdict(loaded.settings),
        "averaged": job.averaged,
        "sources": {name: scores.to_json() for name, scores in done.scores.items()},
        "tracked_only": list(done.tracked_only),
        "notes": list(done.notes),
    }
    write_json(folder / f"scores_{split}.json", stored)
    if json_path is not None:
        write_json_atomic(Path(json_path).expanduser(), stored)
    show_scores(done)
    if errors:
        _explain(done, job, split)
    again = f", {done.reused} tracked before" if done.reused else ""
    files = f"tracks, scores_{split}.json and errors_{split}.json" if errors else f"tracks and scores_{split}.json"
    console().print(f"{done.videos} videos{again}; {files} are in {folder}", highlight=False)
    return done


def sweep_checkpoint(
    checkpoint: str,
    config: str,
    *,
    storage: str,
    data_root: str | None = None,
    split: str = "val",
    sources: Sequence[str] | None = None,
    workers: int | None = None,
    device: str = "auto",
    thresholds: str | None = None,
    json_path: str | None = None,
) -> Sweep:
    """Track and score the val videos at many DET_THRESH, and show which is best and where the detector errs.

    Args:
        thresholds: comma-separated; None: the default grid.
        others: as of ``evaluate_checkpoint``.

    Raises:
        MotipError: anything the user can put right; also any split but val.
    """
    check_sweep_split(split)
    with _prepared(checkpoint, config, storage, data_root, split, sources, workers, device) as job:
        tried = candidates(job.loaded.settings, None if thresholds is None else _numbers(thresholds))
        subject = SweepSubject(job.loaded.model, job.sha256, tuple(tried), job.class_maps, job.protocols)
        done = sweep(
            subject,
            job.loaded.settings,
            job.videos,
            job.storage,
            job.folder,
            split,
            cluster=job.cluster,
            workers=workers,
            device=job.device,
            averaged=job.averaged,
            on_video=_say,
        )
    differences = show_sweep(done)
    stored = {
        "checkpoint": str(checkpoint),
        "sha256": job.sha256,
        "split": split,
        "averaged": job.averaged,
        **done.to_json(),
        "best_against_configured": comparisons_json(differences),
    }
    write_json(job.folder / "thresholds_val.json", stored)
    with whole_file(job.folder / "thresholds_val.png") as path:
        sweep_figure(done).savefig(path, dpi=110)
    if json_path is not None:
        write_json_atomic(Path(json_path).expanduser(), stored)
    again = f", {done.reused} tracked before" if done.reused else ""
    console().print(
        f"{done.videos} videos{again}; thresholds_val.json and thresholds_val.png are in {job.folder}", highlight=False
    )
    return done


def device_of_workers(named: str, cluster: Cluster | None) -> str:
    """Where the model runs: this process's device, or that of actors, whatever the machine of this process has.

    Raises:
        MotipError: no such device, or a GPU is asked for and the cluster has none.
    """
    if cluster is None:
        return str(pick_device(named))
    if named == "auto":
        return "cuda" if cluster.gpus >= 1 else "cpu"
    if not named.startswith("cuda"):
        return str(pick_device(named))
    if cluster.gpus < 1:
        raise MotipError(
            "the Ray cluster has no GPU",
            where="--device",
            found=named,
            fix="pass --device cpu, start the nodes with --num-gpus, or track in this process with --workers 0",
        )
    return "cuda"


@dataclass(frozen=True)
class _Job:
    """What an evaluation runs on, checked."""

    loaded: Loaded
    storage: str
    folder: Location
    videos: list[VideoEntry]
    class_maps: dict[str, ClassMap]
    protocols: dict[str, str]
    cluster: Cluster | None
    device: str
    averaged: list[str] | None

    @property
    def sha256(self) -> str:
        return str(self.loaded.meta["sha256"])


@contextmanager
def _prepared(
    checkpoint: str,
    config: str,
    storage: str,
    data_root: str | None,
    split: str,
    sources: Sequence[str] | None,
    workers: int | None,
    device: str,
) -> Iterator[_Job]:
    """Read and check everything, join or start the cluster, convert what is missing; leave the cluster at the end."""
    if workers is not None and workers < 0:
        raise MotipError("the number of workers is negative", where="--workers", found=workers, expected="0 or more")
    curriculum = load_curriculum(config)
    loaded = open_checkpoint(checkpoint)
    averaged = ((loaded.meta["config"] or {}).get("val_config") or {}).get("CLASSES_TO_EVAL")
    storage = checked_storage(storage)
    cluster = None if workers == 0 else connect()
    try:
        target = device_of_workers(device, cluster)
        if data_root is not None:
            _convert(curriculum, data_root, storage, cluster)
        videos = _videos(curriculum, Manifest.load(storage), split, sources)
        named = {video.source for video in videos}
        rules = cast(Config, SimpleNamespace(class_names=loaded.classes))
        yield _Job(
            loaded=loaded,
            storage=storage,
            folder=location(storage) / "evaluations" / loaded.meta["sha256"][:12],
            videos=videos,
            class_maps={name: _class_map(curriculum, name, loaded.classes) for name in named},
            protocols={name: protocol_of(curriculum.sources[name], rules) for name in named},
            cluster=cluster,
            device=target,
            averaged=averaged,
        )
    finally:
        if cluster is not None:
            disconnect()


def _convert(curriculum: Curriculum, data_root: str, storage: str, cluster: Cluster | None) -> None:
    report = convert(
        curriculum, checked_data_root(data_root), storage, map_fn=ray_map() if cluster is not None else None
    )
    console().print(report.summary_line(), highlight=False)


def _videos(curriculum: Curriculum, manifest: Manifest, split: str, sources: Sequence[str] | None) -> list[VideoEntry]:
    there = sorted({video.source for video in manifest.videos if video.split == split})
    wanted = list(sources) if sources is not None else there
    for name in wanted:
        if name not in there:
            raise MotipError(
                f"the shards have no {split} videos of source {name!r}",
                where="--sources, --split",
                expected="some of " + (", ".join(there) or "nothing: no source has this split"),
                fix="pass --data-root to convert them, or name another split",
            )
    if not wanted:
        raise MotipError(f"the shards have no {split} videos", where="--split", fix="pass --data-root to convert them")
    unknown = [name for name in wanted if name not in curriculum.sources]
    if unknown and (sources is not None or unknown == wanted):
        raise MotipError(
            f"the curriculum file does not describe the source {unknown[0]!r}",
            where="--config",
            expected="some of " + ", ".join(curriculum.sources),
            fix="pass the curriculum file that the shards were made with",
        )
    for name in unknown:
        note(f"source {name} is left out: the curriculum file does not say which of its categories are which class")
    return [video for name in wanted if name not in unknown for video in manifest.of(name, split)]


def _class_map(curriculum: Curriculum, source: str, class_names: tuple[str, ...]) -> ClassMap:
    classes = curriculum.sources[source].classes
    return ClassMap(class_names, {name: classes[name] for name in class_names if name in classes})


def _say(video: VideoEntry, done: int, total: int) -> None:
    console().print(f"tracked {done} of {total}: {video.source}/{video.split}/{video.video}", highlight=False)


def _explain(done: Evaluation, job: _Job, split: str) -> None:
    """Print and write which objects are lost, per source."""
    stored = {}
    for source, tracks in done.tracks.items():
        class_map, protocol = job.class_maps[source], job.protocols[source]
        summary = Summary()
        for video in sorted((each for each in job.videos if each.source == source), key=lambda each: each.identity):
            labels = read_labels(entry_path(job.storage, video))
            scored = scored_sequence(labels, class_map, tracks[video.video], protocol)
            summary.add(summarise(labels, scored, class_map, protocol))
        stored[source] = summary.to_json()
        show_errors(source, summary, class_map.names)
    write_json(job.folder / f"errors_{split}.json", stored)


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise MotipError(
            "a threshold is not a number", where="--thresholds", found=text, expected="such as 0.2,0.3,0.4"
        ) from None
