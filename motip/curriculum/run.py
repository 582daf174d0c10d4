"""The stage graph: what is done, what is stale, what runs next, and the hand-over between stages."""

from __future__ import annotations

from dataclasses import dataclass, replace

from motip.cluster import Cluster
from motip.config import Curriculum, Stage, without_effect_message
from motip.config.yaml_chain import with_values
from motip.curriculum.base_weights import check_given_weights, parent_of
from motip.curriculum.domain_report import DomainReport
from motip.curriculum.failure import beside_a_failure, tell_failure
from motip.curriculum.forgetting import DomainWatch
from motip.curriculum.records import InUse, Options, StageRecord, curriculum_folder
from motip.curriculum.stage import Session, Ui, run_stage
from motip.curriculum.synthetic_sources import with_worlds
from motip.data.convert import convert, ray_map
from motip.data.manifest import Manifest
from motip.errors import MotipError
from motip.lineage import Lineage
from motip.report.stage_list import listed, write_stage_list
from motip.storage.paths import location
from motip.train.stage_job import Parent
from motip.tune.sweep import SweepResult, check_tuning, tune_stage


@dataclass(frozen=True)
class CurriculumResult:
    """What a run of a curriculum produced or found done; ``domains`` is None where no domain was scored."""

    name: str
    records: tuple[StageRecord, ...]
    run_id: str
    lineage: Lineage
    domains: DomainReport | None = None


def run_curriculum(
    curriculum: Curriculum, options: Options, cluster: Cluster | None, lineage: Lineage, ui: Ui
) -> CurriculumResult:
    """Convert what is missing, then run every stage whose inputs are new or changed, in order.

    After each stage the domains its model has seen are scored; see :class:`motip.curriculum.forgetting.DomainWatch`.

    Args:
        cluster: what Ray has to give; None with ``options.workers`` 0.

    Raises:
        MotipError: input that is wrong, naming place and remedy; or a stage forgot too much and `domains.on_loss` is
            `stop`. Finished stages stay finished.
    """
    _announce(curriculum, ui)
    tuned = check_sweeps(curriculum, options, cluster)
    curriculum, manifest = _with_data(curriculum, options, cluster, ui)
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
            if stage.name in tuned:
                stage = _tuned(session, stage, parent)
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


def run_sweep(
    curriculum: Curriculum, stage: Stage, options: Options, cluster: Cluster, lineage: Lineage, ui: Ui
) -> SweepResult:
    """Search values for one stage; earlier stages that its weights come from are trained first where they are not yet.

    Args:
        stage: of the curriculum, with a sweep.

    Raises:
        MotipError: input that is wrong, or a sweep that does not fit stage or cluster; said before anything is trained.
    """
    check_tuning(stage, options, cluster)
    earlier = curriculum.parent_of(stage)
    records: list[StageRecord] = []
    if earlier is not None:
        until = replace(options, until=earlier.name, tune=None)
        records = list(run_curriculum(curriculum, until, cluster, lineage, ui).records)
    else:
        _announce(curriculum, ui)
    curriculum, manifest = _with_data(curriculum, options, cluster, ui)
    session = Session(curriculum, options, manifest, cluster, lineage, "", ui)
    return tune_stage(session, stage, parent_of(curriculum, stage, records, options))


def check_sweeps(curriculum: Curriculum, options: Options, cluster: Cluster | None) -> set[str]:
    """Names of the stages that are to be tuned.

    Raises:
        MotipError: tuning is wanted and no stage asks for it, or a sweep does not fit its stage or the cluster.
    """
    if options.tune is None:
        return set()
    wanted = [stage for stage in curriculum.stages if stage.sweep is not None]
    if not wanted:
        raise MotipError(
            "no stage asks to be tuned",
            where=f"--tune, {options.config_path}",
            expected="a line `sweep: FILE` in at least one stage",
            fix="add it, e.g. sweep: sweeps/lr_and_intervals.yaml, or leave --tune out",
        )
    for stage in wanted:
        check_tuning(stage, options, cluster)
    return {stage.name for stage in wanted}


def _with_data(
    curriculum: Curriculum, options: Options, cluster: Cluster | None, ui: Ui
) -> tuple[Curriculum, Manifest]:
    """The curriculum with its drawn worlds, and what there is to train on."""
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


def _tuned(session: Session, stage: Stage, parent: Parent | None) -> Stage:
    """The stage with the values that its sweep finds."""
    found = tune_stage(session, stage, parent)
    session.ui.note(found.summary())
    return stage.model_copy(update={"config": with_values(stage.config, found.values, str(found.overlay))})


def _list_stages(session: Session, records: list[StageRecord]) -> None:
    """Which stages there are and where each lies, for whoever reads the folder later."""
    folders = {record.stage: location(record.checkpoint).parent for record in records}
    names = [stage.name for stage in session.curriculum.stages]
    stages = listed(session.curriculum.name, names, folders, session.run_id)
    write_stage_list(curriculum_folder(session.curriculum, session.options), stages)


def _announce(curriculum: Curriculum, ui: Ui) -> None:
    for stage in curriculum.stages:
        message = without_effect_message(stage.config)
        if message:
            ui.note(f"warning: {stage.name}: {message}")
