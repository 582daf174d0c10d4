"""Runs a curriculum: converts the data, trains stale stages in order, scores the domains after each stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from motip.cluster import Cluster
from motip.config import Curriculum, Stage, without_effect_message
from motip.curriculum.base_weights import check_given_weights, parent_of
from motip.curriculum.domain_report import DomainReport
from motip.curriculum.failure import log_exceptions, mark_run_failed
from motip.curriculum.forgetting import ForgettingTracker
from motip.curriculum.options import Options, curriculum_folder
from motip.curriculum.stage import Session, Ui, run_stage
from motip.curriculum.synthetic_sources import with_synthetic_sources
from motip.data.convert import convert, ray_map
from motip.data.manifest import Manifest
from motip.lineage import Lineage
from motip.report.stage_list import listed, write_stage_list
from motip.stage_folder import InUse, StageRecord
from motip.storage.paths import location
from motip.train.stage_job import Parent


@dataclass(frozen=True)
class CurriculumResult:
    """Records of all stages, trained or found finished; ``domains`` is None if no domain was scored."""

    name: str
    records: tuple[StageRecord, ...]
    run_id: str
    lineage: Lineage
    domains: DomainReport | None = None


class Tuner(Protocol):
    """Tunes a stage before it is trained; implemented by :class:`motip.tune.stage_tuner.StageTuner`."""

    def stages_to_tune(self, curriculum: Curriculum, options: Options, cluster: Cluster | None) -> set[str]:
        """Names of the stages to tune; MotipError if one of them cannot be tuned."""

    def tuned(self, session: Session, stage: Stage, parent: Parent | None) -> Stage:
        """The stage with the best values found by its sweep."""


def run_curriculum(
    curriculum: Curriculum,
    options: Options,
    cluster: Cluster | None,
    lineage: Lineage,
    ui: Ui,
    tuner: Tuner | None = None,
) -> CurriculumResult:
    """Convert missing data, then train every stage whose inputs are new or changed, in order.

    After each stage the domains that its model has seen are scored
    (:class:`motip.curriculum.forgetting.ForgettingTracker`).

    Args:
        cluster: resources of the Ray cluster; None with ``options.workers`` 0.
        tuner: tunes the stages that name a sweep; None trains every stage as configured.

    Raises:
        MotipError: invalid input; or a stage lost more than `allowed_loss` and `domains.on_loss` is `stop`. Finished
            stages stay finished.
    """
    # data
    warn_without_effect(curriculum, ui)
    to_tune = tuner.stages_to_tune(curriculum, options, cluster) if tuner else set()
    curriculum, manifest = prepare_data(curriculum, options, cluster, ui)
    # run in MLflow
    inputs = {"name": curriculum.name, "stages": [stage.name for stage in curriculum.stages]}
    run_id = lineage.start_curriculum(
        curriculum.name, inputs, {"motip.config": options.config_path}, reopen_finished=True
    )
    session = Session(curriculum, options, manifest, cluster, lineage, run_id, ui)
    tracker = ForgettingTracker(session)
    records: list[StageRecord] = []
    # stages
    try:
        for stage in curriculum.stages:
            parent = parent_of(curriculum, stage, records, options)
            if tuner is not None and stage.name in to_tune:
                stage = tuner.tuned(session, stage, parent)
            tracker.before(stage, parent)
            record = run_stage(session, stage, parent)
            records.append(record)
            ui.stage_ends(record)
            _list_stages(session, records)
            tracker.after(stage, record)
            if stage.name == options.until:
                break
        domains = tracker.finish()
    except InUse as error:
        # Two simultaneous starts may share one MLflow run; the process that holds the lock then still needs it.
        if error.parent_run_id != run_id:
            with log_exceptions(f"the end of run {run_id} could not be recorded in MLflow"):
                lineage.finish(run_id, "KILLED")
        raise
    except BaseException as error:
        mark_run_failed(lineage, run_id, error)
        raise
    lineage.finish(run_id, "FINISHED")
    return CurriculumResult(curriculum.name, tuple(records), run_id, lineage, domains)


def prepare_data(
    curriculum: Curriculum, options: Options, cluster: Cluster | None, ui: Ui
) -> tuple[Curriculum, Manifest]:
    """Render synthetic sources and convert missing data; returns the curriculum with their roots, and the manifest."""
    curriculum = with_synthetic_sources(curriculum, options.storage, ui.note)
    check_given_weights(curriculum, options)
    report = convert(
        curriculum,
        options.data_root,
        options.storage,
        strict=options.strict,
        map_fn=ray_map() if cluster is not None else None,
        progress=ui.converting,
    )
    ui.converted(report)
    return curriculum, report.manifest  # not read again: another run may have changed it on disk


def _list_stages(session: Session, records: list[StageRecord]) -> None:
    """Write the list of stages and their folders, for the report page."""
    folders = {record.stage: location(record.checkpoint).parent for record in records}
    names = [stage.name for stage in session.curriculum.stages]
    stages = listed(session.curriculum.name, names, folders, session.run_id)
    write_stage_list(curriculum_folder(session.curriculum, session.options), stages)


def warn_without_effect(curriculum: Curriculum, ui: Ui) -> None:
    """Warn of every configuration key that is set but has no effect."""
    for stage in curriculum.stages:
        message = without_effect_message(stage.config)
        if message:
            ui.note(f"warning: {stage.name}: {message}")
