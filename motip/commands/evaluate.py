"""Evaluate a checkpoint on every domain of a shard set: from arguments to tables and files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from motip.cluster import Cluster, connect, disconnect
from motip.commands.checkpoint import open_checkpoint, pick_device
from motip.commands.show import console, note, table
from motip.config import Config, Curriculum, load_curriculum
from motip.curriculum.inputs import protocol_of
from motip.data.convert import convert, ray_map
from motip.data.manifest import Manifest, VideoEntry
from motip.data.sequence import ClassMap
from motip.data.storage import location, write_json
from motip.errors import MotipError
from motip.evaluate.run import Evaluation, Subject, evaluate
from motip.files import write_json_atomic
from motip.launch import checked_data_root, checked_storage


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
    json_path: str | None = None,
) -> Evaluation:
    """Track and score the locked videos of every source, print a table each, and write tracks and scores.

    Args:
        config: curriculum file; says which raw categories count as which class, and by which protocol to score.
        data_root: convert what the shards lack from here first.
        sources: only these.
        workers: Ray actors; 0 tracks in this process, None takes every GPU where there are some, else every CPU.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``, of this process or of the actors.

    Raises:
        MotipError: anything the user can put right.
    """
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
        folder = location(storage) / "evaluations" / loaded.meta["sha256"][:12]
        done = evaluate(
            Subject(loaded.model, loaded.meta["sha256"], loaded.settings),
            videos,
            storage,
            folder,
            {name: _class_map(curriculum, name, loaded.classes) for name in named},
            {name: protocol_of(curriculum.sources[name], rules) for name in named},
            split,
            cluster=cluster,
            workers=workers,
            device=target,
            averaged=averaged,
            on_video=_say,
        )
    finally:
        if cluster is not None:
            disconnect()
    stored: dict[str, Any] = {
        "checkpoint": str(checkpoint),
        "sha256": loaded.meta["sha256"],
        "split": split,
        "settings": asdict(loaded.settings),
        "averaged": averaged,
        "sources": {name: scores.to_json() for name, scores in done.scores.items()},
        "tracked_only": list(done.tracked_only),
        "notes": list(done.notes),
    }
    write_json(folder / f"scores_{split}.json", stored)
    if json_path is not None:
        write_json_atomic(Path(json_path).expanduser(), stored)
    _show(done)
    again = f", {done.reused} tracked before" if done.reused else ""
    console().print(f"{done.videos} videos{again}; tracks and scores_{split}.json are in {folder}", highlight=False)
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


def _show(done: Evaluation) -> None:
    for source, scores in done.scores.items():
        header, rows = scores.table()
        table(header, rows, title=source)
        console().print(scores.caption(), highlight=False)
    for source in done.tracked_only:
        note(f"{source} has no label of the classes that are averaged: tracked, not scored")
    for text in done.notes:
        note(text)
