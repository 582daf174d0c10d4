"""A sweep over a stage without Ray: trial records, resuming, pruning, confirmation, overlay, figure and MLflow."""

from __future__ import annotations

import contextlib
import errno
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from motip.cluster import Cluster
from motip.config import Curriculum, load_curriculum
from motip.curriculum import Options, run_curriculum
from motip.errors import MotipError, find_motip_error
from motip.events import Note
from motip.lineage import Lineage
from motip.stage_folder import StageFolder
from motip.train.preemption import Stopped
from motip.tune import StageTuner, SweepResult, Tuning, run_sweep, trial
from motip.tune import sweep as sweep_module
from tests.curriculum.test_stage_end import delete_runs
from tests.helpers.small_curriculum import QuietUi
from tests.helpers.small_sweep import IN_PROCESS, InProcessSearch, write_sweep_files

TWO_CPUS = Cluster(2.0, 0.0, 1, False)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sweep_module, "plan_concurrency", lambda *_: IN_PROCESS)
    monkeypatch.setattr("motip.curriculum.run.ray_map", lambda: None)
    write_sweep_files(tmp_path)
    return tmp_path


def options(folder: Path) -> Options:
    return Options(str(folder), str(folder / "storage"), 0, config_path=str(folder / "curriculum.yaml"))


def tuning(folder: Path, trials: int | None = None) -> Tuning:
    return Tuning(workers=1, trials=trials, overlay=str(folder / "tuned" / "one.yaml"))


def run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, search: InProcessSearch, trials: int | None = None
) -> tuple[SweepResult, QuietUi, Lineage]:
    monkeypatch.setattr("motip.tune.ray_tune.search", search)
    curriculum: Curriculum = load_curriculum(folder / "curriculum.yaml", tune=True)
    ui, lineage = QuietUi(), Lineage(storage=folder / "storage")
    result = run_sweep(curriculum, curriculum.stages[0], options(folder), TWO_CPUS, lineage, ui, tuning(folder, trials))
    return result, ui, lineage


def children(lineage: Lineage, run_id: str) -> dict[str, Any]:
    """Child runs of the sweep's run, by trial."""
    runs = lineage._find_runs(f"tags.`mlflow.parentRunId` = '{run_id}'")
    assert len({run.data.tags["motip.trial"] for run in runs}) == len(runs), "one run for each trial"
    return {run.data.tags["motip.trial"]: run for run in runs}


def test_an_interrupted_sweep_resumes_and_writes_an_overlay(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # interrupted in its second trial, then resumed
    trained: list[str] = []
    real = trial.fit

    def fit(job: Any, placement: Any, own: str, *rest: Any) -> Any:
        trained.append(Path(own).name.partition("-")[0])
        return real(job, placement, own, *rest)

    monkeypatch.setattr(trial, "fit", fit)
    first = InProcessSearch(interrupt=["001"])
    with pytest.raises(KeyboardInterrupt):
        run(folder, monkeypatch, first)
    assert first.ran == ["000", "001"]
    second = InProcessSearch(prune=["001"])
    result, ui, lineage = run(folder, monkeypatch, second)
    assert second.ran[:2] == ["001", "002"], "ended trials are not run again, interrupted ones are"
    assert trained[:4] == ["000", "001", "001", "002"], "pruned by the epochs before the interruption"
    assert any("1 trials ended, 1 were interrupted" in note for note in ui.notes)
    status = {trial.key: trial.status for trial in result.trials}
    assert status == {"000": "finished", "001": "pruned", "002": "finished"}
    assert [sorted(trial.history) for trial in result.trials] == [[1, 2], [1], [1, 2]]
    best = result.decision.best.key
    confirmed = {f"{key}-seed30" for key in {"000", best}}
    assert {trial.key for trial in result.repeats} == confirmed

    # overlay and figure
    overlay = folder / "tuned" / "one.yaml"
    assert str(result.overlay) == str(overlay)
    text = overlay.read_text()
    assert (yaml.safe_load(text) or {}) == result.values
    assert "3: 2 finished, 1 pruned" in text and "baseline  trial 000" in text and "1 locked validation videos" in text
    assert Path(str(result.figure)).stat().st_size > 10_000

    # MLflow and weights
    runs = children(lineage, result.run_id)
    assert set(runs) == {"000", "001", "002", *confirmed}
    assert runs["001"].info.status == "KILLED" and "after epoch 1 of 2" in runs["001"].data.tags["motip.pruned"]
    assert runs["000"].info.status == "FINISHED" and "best_HOTA" in runs["000"].data.metrics
    assert runs["001"].data.tags["motip.resumed"] == "1"
    assert {run.data.tags["motip.kind"] for run in runs.values()} == {"trial"}
    assert not [note for note in ui.notes if "not up to date" in note]
    own = {each.path for each in lineage._store.client().list_artifacts(runs["002"].info.run_id)}
    assert own >= {"config.json", "dashboard.png", "transfer.json"}, "a trial has the artifacts of a stage"
    parent = lineage._store.client().get_run(result.run_id)
    assert parent.data.tags["motip.kind"] == "sweep" and parent.info.status == "FINISHED"
    names = {each.path for each in lineage._store.client().list_artifacts(result.run_id)}
    assert names >= {"sweep.json", "sweep.png", "trials.json", "tuned.yaml"}
    weights = {path.parent.parent.name.rpartition("-")[0] for path in Path(str(result.folder)).rglob("*.pth")}
    assert weights == {best}, "only the best trial's weights are kept"

    # the same command again, and with more trials
    again = InProcessSearch()
    result, _, _ = run(folder, monkeypatch, again)
    assert again.ran == [] and result.decision.best.key == best
    more = InProcessSearch()
    result, _, lineage = run(folder, monkeypatch, more, trials=4)
    assert more.ran[0] == "003" and len(result.trials) == 4
    assert len(lineage._find_runs("tags.`motip.kind` = 'sweep'")) == 1


def test_a_tuned_curriculum_trains_the_stage_with_the_tuned_values(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("motip.tune.ray_tune.search", InProcessSearch())
    found: list[SweepResult] = []
    real = sweep_module.tune_stage

    def tune_stage(*arguments: Any) -> SweepResult:
        # These few steps may favour the baseline; the test needs values that differ from it.
        found.append(replace(real(*arguments), values={"LR": 3.0e-4}))
        return found[-1]

    monkeypatch.setattr("motip.tune.stage_tuner.tune_stage", tune_stage)
    curriculum = load_curriculum(folder / "curriculum.yaml", tune=True)
    lineage, ui = Lineage(storage=folder / "storage"), QuietUi()
    asked = replace(options(folder), until="BDD-Refinement")
    monkeypatch.setattr("motip.curriculum.stage.plan_resources", lambda *_: IN_PROCESS.resources)
    result = run_curriculum(curriculum, asked, TWO_CPUS, lineage, ui, StageTuner(tuning(folder, trials=2)))
    assert len(found) == 1 and ui.begun == ["BDD-Foundation", "BDD-Refinement"]
    first, second = result.records
    config = yaml.safe_load((Path(first.checkpoint).parent / "config.json").read_text())
    assert config["LR"] == 3.0e-4
    assert second.parent_sha256 == first.sha256
    sweep_run = lineage._store.client().get_run(found[0].run_id)
    assert sweep_run.data.tags["mlflow.parentRunId"] == result.run_id
    assert any(note.startswith("tuned BDD-Foundation: ") for note in ui.notes)


def test_a_trial_pruned_after_its_last_epoch_counts_as_finished(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = trial.fit

    def fit(job: Any, placement: Any, own: str, catch_up: Any, *rest: Any) -> Any:
        """Raise at the end, as with Ray, whose workers continue until the driver has processed an epoch's event."""
        stops: list[Stopped] = []

        def late() -> None:
            try:
                catch_up()
            except Stopped as stopped:
                stops.append(stopped)

        done = real(job, placement, own, late, *rest)
        if stops:
            raise stops[0]
        return done

    monkeypatch.setattr(trial, "fit", fit)
    result, ui, lineage = run(folder, monkeypatch, InProcessSearch(prune=["001"]), trials=2)
    assert result.trials[1].status == "finished" and sorted(result.trials[1].history) == [1, 2]
    late = children(lineage, result.run_id)["001"]
    assert late.info.status == "FINISHED" and "motip.pruned" not in late.data.tags
    assert any(note.startswith("trial 001 finished after 2 epochs") for note in ui.notes)


def test_a_failed_baseline_ends_the_sweep(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fit(*_: Any) -> None:
        raise MotipError("the disk is full", where="/somewhere")

    monkeypatch.setattr("motip.tune.trial.fit", fit)

    class FailingSearch(InProcessSearch):
        def __call__(self, searcher: Any, run_trial: Any, *rest: Any, **more: Any) -> Any:
            def run_or_fail(key: str, report: Any) -> None:
                with contextlib.suppress(MotipError):
                    run_trial(key, report)

            return super().__call__(searcher, run_or_fail, *rest, **more)

    with pytest.raises(MotipError, match="the baseline cannot be trained: the disk is full"):
        run(folder, monkeypatch, FailingSearch())
    monkeypatch.undo()


@pytest.mark.parametrize("failure", [RuntimeError("CUDA error"), MotipError("disk full"), KeyboardInterrupt()])
def test_a_trials_error_is_raised_although_it_cannot_be_recorded(
    failure: BaseException, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow rejects requests and the disk is full; the original error is raised all the same."""
    lineage = Lineage(storage=folder / "storage")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def fit(job: Any, placement: Any, own: str, catch_up: Any, *_: Any) -> None:
        StageFolder(own).log().send(Note("a worker was lost"))
        catch_up()
        delete_runs(lineage)
        monkeypatch.setattr(trial, "write_trial", full)
        monkeypatch.setattr("motip.stage_folder.write_json", full)
        raise failure

    monkeypatch.setattr(trial, "fit", fit)
    with pytest.raises(type(failure)) as caught:
        run(folder, monkeypatch, InProcessSearch())
    assert caught.value is failure and find_motip_error(failure) in (None, failure)


def test_a_sweep_whose_overlay_cannot_be_written_fails_and_resumes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "tuned").write_text("a file in place of the overlay's folder")
    with pytest.raises((MotipError, OSError)):
        run(folder, monkeypatch, InProcessSearch(), trials=2)
    lineage = Lineage(storage=folder / "storage")
    (sweep,) = lineage._find_runs("tags.`motip.kind` = 'sweep'")
    assert sweep.info.status == "FAILED"
    (stored,) = (folder / "storage" / "sweeps").rglob("sweep.json")
    assert "driver" not in json.loads(stored.read_text())
    (folder / "tuned").unlink()
    search = InProcessSearch()
    result, _, _ = run(folder, monkeypatch, search, trials=2)
    assert search.ran == [] and result.run_id == sweep.info.run_id
    assert lineage._store.client().get_run(result.run_id).info.status == "FINISHED"


def test_tune_without_a_stage_with_a_sweep_is_an_error(folder: Path) -> None:
    path = folder / "curriculum.yaml"
    path.write_text(path.read_text().replace(" sweep: sweep.yaml,", ""))
    curriculum = load_curriculum(path, tune=True)
    with pytest.raises(MotipError, match="no stage names a sweep"):
        tuner, lineage = StageTuner(tuning(folder)), Lineage(storage=folder / "storage")
        run_curriculum(curriculum, options(folder), TWO_CPUS, lineage, QuietUi(), tuner)
