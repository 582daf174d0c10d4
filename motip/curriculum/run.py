"""The stage graph: what is done, what is stale, what runs next, and the hand-over between stages."""

from __future__ import annotations

from dataclasses import dataclass

from motip.cluster import Cluster
from motip.config import Curriculum, without_effect_message
from motip.curriculum.domain_report import DomainReport
from motip.curriculum.domains import DomainWatch
from motip.curriculum.records import Options, StageRecord, curriculum_folder
from motip.curriculum.stage import Session, Ui, run_stage
from motip.curriculum.weights import check_given_weights, parent_of
from motip.curriculum.worlds import with_worlds
from motip.data.convert import convert, ray_map
from motip.data.manifest import Manifest
from motip.data.storage import location
from motip.lineage import Lineage
from motip.report.stage_list import listed, write_stage_list


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

    After each stage the domains its model has seen are scored; see :class:`motip.curriculum.domains.DomainWatch`.

    Args:
        cluster: what Ray has to give; None with ``options.workers`` 0.

    Raises:
        MotipError: input that is wrong, naming place and remedy; or a stage forgot too much and `domains.on_loss` is
            `stop`. Finished stages stay finished.
    """
    _announce(curriculum, ui)
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
    manifest = Manifest.load(options.storage)
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
            watch.before(stage, parent)
            record = run_stage(session, stage, parent)
            records.append(record)
            ui.stage_ends(record)
            _list_stages(session, records)
            watch.after(stage, record)
            if stage.name == options.until:
                break
        domains = watch.finish()
    except KeyboardInterrupt:
        lineage.mark_interrupted(run_id)
        raise
    except BaseException:
        lineage.finish(run_id, "FAILED")
        raise
    lineage.finish(run_id, "FINISHED")
    return CurriculumResult(curriculum.name, tuple(records), run_id, lineage, domains)


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
