"""Evaluation of a checkpoint on the locked videos of the shards, and its files below ``evaluations``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from motip.cluster import Cluster, joined_cluster
from motip.config import Curriculum, load_curriculum
from motip.data.convert import convert, ray_map
from motip.data.manifest import Manifest, VideoEntry, entry_path
from motip.data.sequence import ClassMap
from motip.data.shards import read_labels
from motip.errors import MotipError
from motip.evaluation.evaluator import EvalJob, Evaluation, ModelUnderTest, evaluate_videos
from motip.evaluation.outcome_summary import OutcomeSummary, summarise_outcomes
from motip.evaluation.protocols import protocol_for, scored_sequence
from motip.stage_folder import evaluation_folder
from motip.storage.atomic import write_json_atomic
from motip.storage.named_folders import checked_data_root, checked_storage
from motip.storage.paths import Location, write_json
from motip.tracking.loading import LoadedModel, load, resolve_device

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluateOptions:
    """Options of `motip evaluate`.

    Attributes:
        config: curriculum file with the class map and protocol of every source.
        data_root: raw datasets, to convert missing shards first; None: existing shards only.
        sources: sources to evaluate; None: all with this split.
        workers: number of Ray actors; 0 tracks in this process, None takes one per GPU or, without GPUs, per CPU.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``, of this process or of the actors.
        json_path: additional file for the result.
        errors: also compute and write the outcomes of the labelled boxes (``errors_SPLIT.json``).
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
    errors: bool = False


@dataclass(frozen=True)
class CheckpointEvaluation:
    """Result of `evaluate_checkpoint`.

    Attributes:
        outcomes: source -> outcomes of the labelled boxes; empty unless they were requested.
        folder: where the tracks and ``scores_SPLIT.json`` are.
    """

    evaluation: Evaluation
    outcomes: dict[str, OutcomeSummary]
    class_names: dict[str, tuple[str, ...]]
    folder: Location


def evaluate_checkpoint(options: EvaluateOptions, log: Callable[[str], None] = _log.info) -> CheckpointEvaluation:
    """Track and score the locked videos of every source, and write tracks and scores.

    Args:
        log: receives a line about converted shards, each skipped source and each tracked video.

    Raises:
        MotipError: invalid options or data.
    """
    with prepared_job(options, log) as job:
        model = ModelUnderTest(job.loaded.model, job.sha256, job.loaded.settings)
        done = evaluate_videos(model, job.work, job.class_maps, job.protocols)
    split, folder = options.split, job.work.folder
    stored: dict[str, Any] = {
        "checkpoint": str(options.checkpoint),
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
    write_result(stored, folder / f"scores_{split}.json", options)
    outcomes = _outcomes(done, job) if options.errors else {}
    if options.errors:
        write_json(folder / f"errors_{split}.json", {name: summary.to_json() for name, summary in outcomes.items()})
    names = {name: class_map.names for name, class_map in job.class_maps.items()}
    return CheckpointEvaluation(done, outcomes, names, folder)


def write_result(stored: dict[str, Any], path: Location, options: EvaluateOptions) -> None:
    """Write a result to its path and to the additional file of the options."""
    write_json(path, stored)
    if options.json_path is not None:
        write_json_atomic(Path(options.json_path).expanduser(), stored)


def device_of_workers(named: str, cluster: Cluster | None) -> str:
    """Device of the model: of this process, or of the actors, which may differ from this machine's.

    Raises:
        MotipError: no such device, or ``cuda`` on a cluster without GPUs.
    """
    if cluster is None:
        return str(resolve_device(named))
    if named == "auto":
        return "cuda" if cluster.gpus >= 1 else "cpu"
    if not named.startswith("cuda"):
        return str(resolve_device(named))
    if cluster.gpus < 1:
        raise MotipError(
            "the Ray cluster has no GPU",
            where="--device",
            found=named,
            fix="pass --device cpu, start the nodes with --num-gpus, or track in this process with --workers 0",
        )
    return "cuda"


@dataclass(frozen=True)
class PreparedJob:
    """Checked inputs of an evaluation; class maps and protocols are by source."""

    loaded: LoadedModel
    work: EvalJob
    class_maps: dict[str, ClassMap]
    protocols: dict[str, str]

    @property
    def sha256(self) -> str:
        return str(self.loaded.meta["sha256"])


@contextmanager
def prepared_job(options: EvaluateOptions, log: Callable[[str], None]) -> Iterator[PreparedJob]:
    """Read and check the inputs, connect to a cluster, convert missing shards; disconnect at the end."""
    if options.workers is not None and options.workers < 0:
        raise MotipError(
            "the number of workers is negative", where="--workers", found=options.workers, expected="0 or more"
        )
    curriculum = load_curriculum(options.config)
    loaded = load(options.checkpoint)
    averaged = ((loaded.meta["config"] or {}).get("val_config") or {}).get("CLASSES_TO_EVAL")
    # Cluster, shards and videos.
    storage = checked_storage(options.storage)
    with joined_cluster(options.workers != 0) as cluster:
        device = device_of_workers(options.device, cluster)
        if options.data_root is not None:
            root, map_fn = checked_data_root(options.data_root), None if cluster is None else ray_map()
            log(convert(curriculum, root, storage, map_fn=map_fn).summary_line())
        videos = _videos(curriculum, Manifest.load(storage), options.split, options.sources, log)
        named = {video.source for video in videos}
        yield PreparedJob(
            loaded=loaded,
            work=EvalJob(
                videos=videos,
                storage=storage,
                folder=evaluation_folder(storage, loaded.sha256),
                split=options.split,
                averaged=averaged,
                cluster=cluster,
                workers=options.workers,
                device=device,
                on_video=lambda video, done, total: log(
                    f"tracked {done} of {total}: {video.source}/{video.split}/{video.video}"
                ),
            ),
            class_maps={name: ClassMap.among(loaded.class_names, curriculum.sources[name].classes) for name in named},
            protocols={name: protocol_for(curriculum.sources[name], loaded.class_names) for name in named},
        )


def _videos(
    curriculum: Curriculum,
    manifest: Manifest,
    split: str,
    sources: Sequence[str] | None,
    log: Callable[[str], None],
) -> list[VideoEntry]:
    """The videos to evaluate; raises MotipError for a source without shards or not in the curriculum file."""
    available = sorted({video.source for video in manifest.videos if video.split == split})
    selected = list(sources) if sources is not None else available
    for name in selected:
        if name not in available:
            raise MotipError(
                f"the shards have no {split} videos of source {name!r}",
                where="--sources, --split",
                expected="some of " + (", ".join(available) or "nothing: no source has this split"),
                fix="pass --data-root to convert them, or name another split",
            )
    if not selected:
        raise MotipError(f"the shards have no {split} videos", where="--split", fix="pass --data-root to convert them")
    unknown = [name for name in selected if name not in curriculum.sources]
    if unknown and (sources is not None or unknown == selected):
        raise MotipError(
            f"the curriculum file does not describe the source {unknown[0]!r}",
            where="--config",
            expected="some of " + ", ".join(curriculum.sources),
            fix="pass the curriculum file that the shards were made with",
        )
    for name in unknown:
        log(f"note: source {name} is skipped: the curriculum file does not describe it")
    return [video for name in selected if name not in unknown for video in manifest.of(name, split)]


def _outcomes(done: Evaluation, job: PreparedJob) -> dict[str, OutcomeSummary]:
    """Source -> outcomes of the labelled boxes."""
    found = {}
    for source, tracks in done.tracks.items():
        class_map, protocol = job.class_maps[source], job.protocols[source]
        summary = found[source] = OutcomeSummary()
        for video in sorted(
            (each for each in job.work.videos if each.source == source), key=lambda each: each.identity
        ):
            labels = read_labels(entry_path(job.work.storage, video))
            scored = scored_sequence(labels, class_map, tracks[video.video], protocol)
            summary.add(summarise_outcomes(labels, scored, class_map, protocol))
    return found
