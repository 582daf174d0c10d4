"""Reads the scores of a stage back from its MLflow run."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from motip.errors import MotipError
from motip.lineage.chain import stage_run
from motip.lineage.tags import Tag

if TYPE_CHECKING:
    from motip.lineage.store import Store


@dataclass(frozen=True)
class RunScores:
    """Scores recorded in a stage's run.

    Attributes:
        files: file name -> JSON of every file under ``scores/``.
        best: ``best_`` metrics without the prefix; empty while the stage runs.
    """

    stage: str
    run_id: str
    files: dict[str, Any]
    best: dict[str, float]


def read_recorded_scores(store: Store, run_id: str) -> RunScores:
    """Scores of a stage's run, or of the last stage of a curriculum's run.

    Raises:
        MotipError: no such run, or a run without scored epochs.
    """
    client = store.client()
    run = stage_run(store, client, run_id)
    own = run.info.run_id
    names = [each.path for each in client.list_artifacts(own, "scores") if each.path.endswith(".json")]
    if not names:
        raise MotipError(
            "this run has no scores",
            where=f"run {own}",
            expected="scores/epoch_<n>.json among its artifacts",
            fix="wait until its first epoch is scored, or name another run",
        )
    files = {}
    with tempfile.TemporaryDirectory(prefix="motip-") as folder:
        for name in names:
            files[Path(name).name] = json.loads(Path(client.download_artifacts(own, name, folder)).read_text())
    best = {name.removeprefix("best_"): value for name, value in run.data.metrics.items() if name.startswith("best_")}
    return RunScores(run.data.tags.get(Tag.STAGE, ""), own, files, best)
