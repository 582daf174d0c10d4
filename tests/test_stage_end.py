"""What a stage leaves behind where a process dies at an awkward moment: nothing is lost, nothing is done twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from motip.lineage import Lineage
from tests.small_curriculum import CURRICULUM, run, write_files


def one_stage(folder: Path) -> Path:
    """A curriculum file with the first stage alone."""
    path = write_files(folder)
    lines = CURRICULUM.splitlines()
    kept = lines[: lines.index("stages:") + 2]
    path.write_text("\n".join([*kept, "domains: {score: none}"]) + "\n")
    return path


def test_an_end_that_mlflow_was_not_told_of_is_told_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """kill -9 between the stage's record and the last words to MLflow."""
    path, storage = one_stage(tmp_path), tmp_path / "storage"
    lineage = Lineage(storage=storage)
    real, calls = Lineage.log_stage_result, []

    def dies(self: Lineage, *arguments: Any, **named: Any) -> None:
        calls.append(arguments)
        if len(calls) == 1:
            raise RuntimeError("power cut")
        real(self, *arguments, **named)

    monkeypatch.setattr(Lineage, "log_stage_result", dies)
    with pytest.raises(RuntimeError, match="power cut"):
        run(path, storage, lineage=lineage)
    (stored,) = (storage / "curricula").rglob("stage.json")
    run_id = json.loads(stored.read_text())["run_id"]
    client = lineage._store.client()
    assert "best_HOTA" not in client.get_run(run_id).data.metrics

    again, ui, _ = run(path, storage, lineage=lineage)
    assert ui.begun == [] and again.records[0].skipped
    told = client.get_run(run_id)
    assert told.info.status == "FINISHED" and "best_HOTA" in told.data.metrics
    alias = client.get_model_version_by_alias("motip-curriculum", "bdd-foundation")
    assert alias.run_id == run_id
    run(path, storage, lineage=lineage)
    assert len(calls) == 2, "told once"
