"""Sweeps within a curriculum: each stage with a `sweep:` is tuned before it is trained."""

from __future__ import annotations

from dataclasses import dataclass, replace

from motip.cluster import Cluster
from motip.config import Curriculum, Stage
from motip.config.yaml_chain import with_values
from motip.curriculum.base_weights import parent_of
from motip.curriculum.options import Options
from motip.curriculum.run import prepare_data, run_curriculum, warn_without_effect
from motip.curriculum.stage import Session, Ui
from motip.errors import MotipError
from motip.lineage import Lineage
from motip.stage_folder import StageRecord
from motip.train.stage_job import Parent
from motip.tune.sweep import SweepResult, Tuning, check_tuning, tune_stage


@dataclass(frozen=True)
class StageTuner:
    """The `tuner` of :func:`motip.curriculum.run.run_curriculum`."""

    tuning: Tuning

    def stages_to_tune(self, curriculum: Curriculum, options: Options, cluster: Cluster | None) -> set[str]:
        """Names of the stages to tune: those with a `sweep:`.

        Raises:
            MotipError: no stage has one, or a sweep does not fit its stage or the cluster.
        """
        stages = [stage for stage in curriculum.stages if stage.sweep is not None]
        if not stages:
            raise MotipError(
                "no stage names a sweep",
                where=f"--tune, {options.config_path}",
                expected="a line `sweep: FILE` in at least one stage",
                fix="add it, e.g. sweep: sweeps/lr_and_intervals.yaml, or leave --tune out",
            )
        for stage in stages:
            check_tuning(stage, self.tuning, cluster)
        return {stage.name for stage in stages}

    def tuned(self, session: Session, stage: Stage, parent: Parent | None) -> Stage:
        """Run the stage's sweep; returns the stage with the values found."""
        result = tune_stage(session, stage, parent, self.tuning)
        session.ui.note(result.summary())
        return stage.model_copy(update={"config": with_values(stage.config, result.values, str(result.overlay))})


def run_sweep(
    curriculum: Curriculum, stage: Stage, options: Options, cluster: Cluster, lineage: Lineage, ui: Ui, tuning: Tuning
) -> SweepResult:
    """Run the sweep of one stage, after training the earlier stages that its weights come from, unless they are done.

    Args:
        stage: of the curriculum, with a sweep.
        tuning: number of trials and their workers.

    Raises:
        MotipError: wrong input, or a sweep that does not fit stage or cluster; raised before any training.
    """
    check_tuning(stage, tuning, cluster)
    earlier = curriculum.parent_of(stage)
    records: list[StageRecord] = []
    if earlier is not None:
        until = replace(options, until=earlier.name)
        records = list(run_curriculum(curriculum, until, cluster, lineage, ui).records)
    else:
        warn_without_effect(curriculum, ui)
    curriculum, manifest = prepare_data(curriculum, options, cluster, ui)
    session = Session(curriculum, options, manifest, cluster, lineage, "", ui)
    return tune_stage(session, stage, parent_of(curriculum, stage, records, options), tuning)
