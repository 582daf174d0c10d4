"""Evaluate a checkpoint on every domain of a shard set: from arguments to tables and files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from motip.cli.console import console, note
from motip.cli.evaluation_tables import show_errors, show_scores, show_sweep
from motip.cli.launch import checked_data_root, checked_storage
from motip.cluster import Cluster, connect, disconnect
from motip.config import Config, Curriculum, load_curriculum
from motip.curriculum.stage_inputs import protocol_of
from motip.data.convert import convert, ray_map
from motip.data.manifest import Manifest, VideoEntry, entry_path
from motip.data.sequence import ClassMap
from motip.data.shards import read_labels
from motip.errors import MotipError
from motip.evaluate.comparison import comparisons_json
from motip.evaluate.evaluation import Evaluation, Subject, Work, evaluate
from motip.evaluate.outcome_summary import Summary, summarise
from motip.evaluate.protocols import scored_sequence
from motip.evaluate.threshold_search import Sweep, SweepSubject, candidates, check_sweep_split, sweep
from motip.report.threshold_plot import sweep_figure
from motip.storage.atomic import write_json_atomic
from motip.storage.paths import location, whole_file, write_json
from motip.track.loading import Loaded, open_checkpoint, pick_device


@dataclass(frozen=True)
class Asked:
    """What is to be evaluated, as the command line says it.

    Attributes:
        config: curriculum file; says which raw categories count as which class, and by which protocol to score.
        data_root: convert what the shards lack from here first.
        sources: only these.
        workers: Ray actors; 0 tracks in this process, None takes every GPU where there are some, else every CPU.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``, of this process or of the actors.
        json_path: where the result is written too.
    """

    checkpoint: str
    config: str
    storage: str
    data_root: str | None = None
    split: str = "val"
    sources: Sequence[str] | None = None
    workers: int | None = None
    device: str = "auto"
    json_path: str | None = None


def evaluation(
    asked: Asked,
    *,
    errors: bool = False,
    sweep_thresholds: bool = False,
    thresholds: str | None = None,
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
        sweep_checkpoint(asked, thresholds)
    else:
        evaluate_checkpoint(asked, errors)


def evaluate_checkpoint(asked: Asked, errors: bool = False) -> Evaluation:
    """Track and score the locked videos of every source, print a table each, and write tracks and scores.

    Args:
        errors: also sort every box and show which objects are lost (``errors_SPLIT.json``).

    Raises:
        MotipError: anything the user can put right.
    """
    with _prepared(asked) as job:
        subject = Subject(job.loaded.model, job.sha256, job.loaded.settings)
        done = evaluate(subject, job.work, job.class_maps, job.protocols)
    split, folder = asked.split, job.work.folder
    stored: dict[str, Any] = {
        "checkpoint": str(asked.checkpoint),
        "sha256": job.sha256,
        "split": split,
        "settings": asdict(job.loaded.settings),
        "averaged": job.work.averaged,
        "classes": {
            name: {each: list(raws) for each, raws in class_map.mapping.items()}
            for name, class_map in job.class_maps.items()
        },
        "protocols": job.protocols,
        "sources": {name: scores.to_json() for name, scores in done.scores.items()},
        "tracked_only": list(done.tracked_only),
        "notes": list(done.notes),
    }
    write_json(folder / f"scores_{split}.json", stored)
    if asked.json_path is not None:
        write_json_atomic(Path(asked.json_path).expanduser(), stored)
    show_scores(done)
    if errors:
        _explain(done, job, split)
    again = f", {done.reused} tracked before" if done.reused else ""
    files = f"tracks, scores_{split}.json and errors_{split}.json" if errors else f"tracks and scores_{split}.json"
    console().print(f"{done.videos} videos{again}; {files} are in {folder}", highlight=False)
    return done


def sweep_checkpoint(asked: Asked, thresholds: str | None = None) -> Sweep:
    """Track and score the val videos at many DET_THRESH, and show which is best and where the detector errs.

    Args:
        thresholds: comma-separated; None: the default grid.

    Raises:
        MotipError: anything the user can put right; also any split but val.
    """
    check_sweep_split(asked.split)
    with _prepared(asked) as job:
        tried = candidates(job.loaded.settings, None if thresholds is None else _numbers(thresholds))
        subject = SweepSubject(job.loaded.model, job.sha256, tuple(tried), job.class_maps, job.protocols)
        done = sweep(subject, job.loaded.settings, job.work)
    folder = job.work.folder
    differences = show_sweep(done)
    stored = {
        "checkpoint": str(asked.checkpoint),
        "sha256": job.sha256,
        "split": asked.split,
        "averaged": job.work.averaged,
        **done.to_json(),
        "best_against_configured": comparisons_json(differences),
    }
    write_json(folder / "thresholds_val.json", stored)
    with whole_file(folder / "thresholds_val.png") as path:
        sweep_figure(done).savefig(path, dpi=110)
    if asked.json_path is not None:
        write_json_atomic(Path(asked.json_path).expanduser(), stored)
    again = f", {done.reused} tracked before" if done.reused else ""
    console().print(
        f"{done.videos} videos{again}; thresholds_val.json and thresholds_val.png are in {folder}", highlight=False
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
    work: Work
    class_maps: dict[str, ClassMap]
    protocols: dict[str, str]

    @property
    def sha256(self) -> str:
        return str(self.loaded.meta["sha256"])


@contextmanager
def _prepared(asked: Asked) -> Iterator[_Job]:
    """Read and check everything, join or start the cluster, convert what is missing; leave the cluster at the end."""
    if asked.workers is not None and asked.workers < 0:
        raise MotipError(
            "the number of workers is negative", where="--workers", found=asked.workers, expected="0 or more"
        )
    curriculum = load_curriculum(asked.config)
    loaded = open_checkpoint(asked.checkpoint)
    averaged = ((loaded.meta["config"] or {}).get("val_config") or {}).get("CLASSES_TO_EVAL")
    storage = checked_storage(asked.storage)
    cluster = None if asked.workers == 0 else connect()
    try:
        device = device_of_workers(asked.device, cluster)
        if asked.data_root is not None:
            _convert(curriculum, asked.data_root, storage, cluster)
        videos = _videos(curriculum, Manifest.load(storage), asked.split, asked.sources)
        named = {video.source for video in videos}
        rules = cast(Config, SimpleNamespace(class_names=loaded.classes))
        yield _Job(
            loaded=loaded,
            work=Work(
                videos=videos,
                storage=storage,
                folder=location(storage) / "evaluations" / loaded.meta["sha256"][:12],
                split=asked.split,
                averaged=averaged,
                cluster=cluster,
                workers=asked.workers,
                device=device,
                on_video=_say,
            ),
            class_maps={name: ClassMap.among(loaded.classes, curriculum.sources[name].classes) for name in named},
            protocols={name: protocol_of(curriculum.sources[name], rules) for name in named},
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


def _say(video: VideoEntry, done: int, total: int) -> None:
    console().print(f"tracked {done} of {total}: {video.source}/{video.split}/{video.video}", highlight=False)


def _explain(done: Evaluation, job: _Job, split: str) -> None:
    """Print and write which objects are lost, per source."""
    stored = {}
    for source, tracks in done.tracks.items():
        class_map, protocol = job.class_maps[source], job.protocols[source]
        summary = Summary()
        for video in sorted(
            (each for each in job.work.videos if each.source == source), key=lambda each: each.identity
        ):
            labels = read_labels(entry_path(job.work.storage, video))
            scored = scored_sequence(labels, class_map, tracks[video.video], protocol)
            summary.add(summarise(labels, scored, class_map, protocol))
        stored[source] = summary.to_json()
        show_errors(source, summary, class_map.names)
    write_json(job.work.folder / f"errors_{split}.json", stored)


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise MotipError(
            "a threshold is not a number", where="--thresholds", found=text, expected="such as 0.2,0.3,0.4"
        ) from None
