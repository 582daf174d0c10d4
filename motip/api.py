"""Evaluation as a function; :mod:`motip` exports it beside `load`, `track`, `Tracker` and `MOTIP`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from motip.evaluation.checkpoint import EvaluateOptions, evaluate_checkpoint
from motip.evaluation.evaluator import Evaluation


def evaluate(
    checkpoint: str | Path,
    config: str | Path,
    storage: str | Path = "~/motip",
    *,
    data_root: str | Path | None = None,
    split: str = "val",
    sources: Sequence[str] | None = None,
    workers: int | None = 0,
    device: str = "auto",
) -> Evaluation:
    """Track and score the locked videos of a curriculum's sources with one checkpoint.

    Tracks and ``scores_SPLIT.json`` are written below ``STORAGE/evaluations``; videos tracked before are not tracked
    again.

    Args:
        checkpoint: checkpoint of this project or exported weights.
        config: curriculum file, with the class map of every source.
        storage: folder or ``s3://`` address of the shards.
        data_root: raw datasets, to convert missing shards first; None uses existing shards only.
        split: ``val`` or ``test``.
        sources: sources to evaluate; None: all with this split.
        workers: Ray actors; 0 tracks in this process, None starts one per GPU or, without GPUs, per CPU.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Returns:
        Scores by source: ``result.scores["visdrone"].class_averaged["HOTA"]``, in percent.

    Raises:
        MotipError: a file, shard, source or device does not exist, or the files contradict each other.
    """
    options = EvaluateOptions(
        checkpoint=str(checkpoint),
        config=str(config),
        storage=str(storage),
        data_root=None if data_root is None else str(data_root),
        split=split,
        sources=sources,
        workers=workers,
        device=device,
    )
    return evaluate_checkpoint(options).evaluation
