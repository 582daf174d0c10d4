"""The stage graph: what is done, what is stale, what runs next, and the hand-over between stages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from motip.cluster import Cluster
from motip.config import Curriculum, Stage, without_effect_message
from motip.curriculum.base_weights import check_given_weights, parent_of
from motip.curriculum.domain_report import DomainReport
from motip.curriculum.failure import beside_a_failure, tell_failure
from motip.curriculum.forgetting import DomainWatch
from motip.curriculum.records import InUse, Options, StageRecord, curriculum_folder
from motip.curriculum.stage import Session, Ui, run_stage
from motip.curriculum.synthetic_sources import with_worlds
from motip.data.convert import convert, ray_map
from motip.data.manifest import Manifest
from motip.lineage import Lineage
from motip.report.stage_list import listed, write_stage_list
from motip.storage.paths import location
from motip.train.stage_job import Parent


@dataclass(frozen=True)
class CurriculumResult:
    """What a run of a curriculum produced or found done; ``domains`` is None where no domain was scored."""

    name: str
    records: tuple[StageRecord, ...]
    run_id: str
    lineage: Lineage
    domains: DomainReport | None = None


class Tuner(Protocol):
    """Searches the values of a stage before the stage is trained; :class:`motip.tune.stage_tuner.StageTuner`."""

    def stages_to_tune(self, curriculum: Curriculum, options: Options, cluster: Cluster | None) -> set[str]:
        """Names of the stages that are tuned; MotipError if one of them cannot be."""

    def tuned(self, session: Session, stage: Stage, parent: Parent | None) -> Stage:
        """The stage with the values that its sweep found."""


def run_curriculum(
    curriculum: Curriculum,
    options: Options,
    cluster: Cluster | None,
    lineage: Lineage,
    ui: Ui,
    tuner: Tuner | None = None,
) -> CurriculumResult:
    """Convert what is missing, then run every stage whose inputs are new or changed, in order.

    After each stage the domains its model has seen are scored; see :class:`motip.curriculum.forgetting.DomainWatch`.

    Args:
        cluster: resources of the Ray cluster; None with ``options.workers`` 0.
        tuner: searches values for the stages that name a sweep; None trains every stage as configured.

    Raises:
        MotipError: input that is wrong, naming place and remedy; or a stage forgot too much and `domains.on_loss` is
            `stop`. Finished stages stay finished.
    """
    warn_without_effect(curriculum, ui)
    to_tune = tuner.stages_to_tune(curriculum, options, cluster) if tuner else set()
    curriculum, manifest = prepare_data(curriculum, options, cluster, ui)
    inputs = {"name": curriculum.name, "stages": [stage.name for stage in curriculum.stages]}
    run_id = lineage.start_curriculum(
        curriculum.name, inputs, {"motip.config": options.config_path}, reopen_finished=True
    )
    session = Session(curriculum, options, manifest, cluster, lineage, run_id, ui)
    watch = DomainWatch(session)
    records: list[StageRecord] = []
    try:
        for stage in curriculum.stages:
            parent = parent_of(curriculum, stage, records, options)
            if tuner is not None and stage.name in to_tune:
                stage = tuner.tuned(session, stage, parent)
            watch.before(stage, parent)
            record = run_stage(session, stage, parent)
            records.append(record)
            ui.stage_ends(record)
            _list_stages(session, records)
            watch.after(stage, record)
            if stage.name == options.until:
                break
        domains = watch.finish()
    except InUse as error:
        # Starts of the same second may have one run: it is then also that of the process that is at the stage.
        if error.under != run_id:
            with beside_a_failure(f"MLflow could not be told how run {run_id} ended"):
                lineage.finish(run_id, "KILLED")
        raise
    except BaseException as error:
        tell_failure(lineage, run_id, error)
        raise
    lineage.finish(run_id, "FINISHED")
    return CurriculumResult(curriculum.name, tuple(records), run_id, lineage, domains)


def prepare_data(
    curriculum: Curriculum, options: Options, cluster: Cluster | None, ui: Ui
) -> tuple[Curriculum, Manifest]:
    """Draw synthetic sources, convert what is missing: the curriculum with drawn sources, and the manifest."""
    curriculum = with_worlds(curriculum, options.storage, ui.note)
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
    return curriculum, report.manifest  # not what another run on this storage may have made of it since


def _list_stages(session: Session, records: list[StageRecord]) -> None:
    """Which stages there are and where each lies, for whoever reads the folder later."""
    folders = {record.stage: location(record.checkpoint).parent for record in records}
    names = [stage.name for stage in session.curriculum.stages]
    stages = listed(session.curriculum.name, names, folders, session.run_id)
    write_stage_list(curriculum_folder(session.curriculum, session.options), stages)


def warn_without_effect(curriculum: Curriculum, ui: Ui) -> None:
    """Note every configuration key that is set and has no effect."""
    for stage in curriculum.stages:
        message = without_effect_message(stage.config)
        if message:
            ui.note(f"warning: {stage.name}: {message}")
