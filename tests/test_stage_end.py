"""What a stage leaves behind where a process dies at an awkward moment: nothing is lost, nothing is done twice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest

from motip.errors import MotipError
from motip.lineage import Lineage
from tests.small_curriculum import CURRICULUM, QuietUi, run, write_files


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


def test_a_cut_off_stage_goes_on_with_another_pace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What only says how fast or how patiently a stage runs may change between two attempts."""
    path, storage = one_stage(tmp_path), tmp_path / "storage"
    lineage = Lineage(storage=storage)
    monkeypatch.setattr(QuietUi, "record", _interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(path, storage, lineage=lineage)
    monkeypatch.undo()
    result, _, _ = run(path, storage, lineage=lineage, overrides=("NUM_WORKERS=2", "PROGRESS_TIMEOUT_S=7200"))
    runs = lineage._store.client().search_runs([lineage._store.experiment_id], "tags.motip.stage = 'BDD-Foundation'")
    assert [each.info.run_id for each in runs] == [result.records[0].run_id]
    assert runs[0].info.status == "FINISHED"
    assert any("NUM_WORKERS 1 -> 2" in value for key, value in runs[0].data.tags.items() if "resumed" in key)


def test_a_stage_that_another_process_trains_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, storage = one_stage(tmp_path), tmp_path / "storage"
    monkeypatch.setattr(QuietUi, "record", _interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(path, storage)
    monkeypatch.undo()
    (stored,) = (storage / "curricula").rglob("stage.json")
    waits = (
        "import sys; from motip.lineage.driver import this_driver; print(this_driver(), flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", waits], stdin=PIPE, stdout=PIPE, text=True) as other:
        assert other.stdout is not None and other.stdin is not None
        driver = other.stdout.readline().strip()
        stored.write_text(json.dumps({**json.loads(stored.read_text()), "driver": driver}))
        with pytest.raises(MotipError, match=f"running already(.|\n)*process {other.pid} of this machine"):
            run(path, storage)
        other.stdin.close()
        other.wait(30)
    result, _, _ = run(path, storage)
    assert not result.records[0].skipped


def _interrupt(self: QuietUi, kind: str, values: dict[str, Any]) -> None:
    raise KeyboardInterrupt
