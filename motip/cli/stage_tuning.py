"""Search the values of one stage: of a configuration that stands alone, or of a stage in a curriculum file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from motip.cli.launch import checked_data_root, checked_storage
from motip.cluster import connect, disconnect
from motip.config import Curriculum, Stage, load_config, load_curriculum
from motip.config.single_stage import single_stage
from motip.config.sweep_file import SweepFile, check_sweep, load_sweep
from motip.config.yaml_chain import read_yaml
from motip.curriculum import Options
from motip.curriculum.base_weights import check_given_weights
from motip.data.formats.motchallenge import CATEGORIES
from motip.errors import MotipError
from motip.lineage import Lineage
from motip.report.progress import DriverUi
from motip.tune import SweepResult, Tuning, run_sweep


@dataclass(frozen=True)
class AskedSweep:
    """What the command line says.

    Attributes:
        config: a stage's configuration, or a curriculum file.
        sweep: sweep file; None takes that of the stage in the curriculum file.
        stage: of the curriculum file; None where it has one stage, or config is a stage's.
        data_root: None takes root_path of a stage's configuration, the working directory for a curriculum file.
    """

    config: str
    sweep: str | None = None
    stage: str | None = None
    data_root: str | None = None
    storage: str = "~/motip"
    overrides: Sequence[str] = ()
    videos: int | None = None
    strict: bool = False


def sweep_stage(asked: AskedSweep, tuning: Tuning) -> SweepResult:
    """Run or go on with a sweep, and say what was found.

    Raises:
        MotipError: anything the user can put right; what does not fit is said before anything is trained.
    """
    _check_numbers(tuning)
    sweep = None if asked.sweep is None else load_sweep(asked.sweep)
    curriculum, root = _curriculum(asked, sweep)
    stage = _stage(curriculum, asked, sweep)
    curriculum = curriculum.model_copy(
        update={"stages": tuple(stage if each.name == stage.name else each for each in curriculum.stages)}
    )
    storage = checked_storage(asked.storage)
    workers = tuning.workers
    options = Options(root, storage, workers=workers, strict=asked.strict, config_path=asked.config, until=stage.name)
    check_given_weights(curriculum, options)
    ui = DriverUi()
    cluster = connect()
    try:
        lineage = Lineage(storage=storage)
        result = run_sweep(curriculum, stage, options, cluster, lineage, ui, tuning)
    finally:
        ui.close()
        disconnect()
    command, hint = lineage.compare_url_hint([result.run_id])
    ui.note(f"trials in MLflow, below the run `{stage.name} sweep`:\n  {command}" if command else f"trials: {hint}")
    ui.note(result.summary())
    return result


def _curriculum(asked: AskedSweep, sweep: SweepFile | None) -> tuple[Curriculum, str]:
    """The stage in its curriculum, and the data root."""
    if "stages" in read_yaml(Path(asked.config).expanduser()).values:
        if asked.videos is not None:
            raise MotipError(
                "the curriculum file says how many videos a stage trains on", where="--videos", fix="leave it out"
            )
        root = checked_data_root(asked.data_root or ".")
        return load_curriculum(asked.config, asked.overrides, tune=asked.stage or True), root
    if sweep is None:
        raise MotipError(
            "which values are searched stands in a sweep file",
            where="--sweep",
            expected="e.g. --sweep configs/sweeps/lr_and_intervals.yaml",
        )
    config = load_config(asked.config, asked.overrides)
    check_sweep(sweep, config, str(asked.sweep))
    root = checked_data_root(asked.data_root or config.root_path)
    return single_stage(config, root, CATEGORIES, videos=asked.videos), root


def _stage(curriculum: Curriculum, asked: AskedSweep, sweep: SweepFile | None) -> Stage:
    names = [stage.name for stage in curriculum.stages]
    if asked.stage is None and len(names) > 1:
        raise MotipError("which stage is tuned?", where="--stage", expected="one of " + ", ".join(names))
    if asked.stage is not None and asked.stage not in names:
        raise MotipError(
            "there is no such stage", where="--stage", found=asked.stage, expected="one of " + ", ".join(names)
        )
    stage = curriculum.stage(asked.stage or names[0])
    sweep = sweep or stage.sweep
    if sweep is None:
        raise MotipError(
            f"stage {stage.name} names no sweep file",
            where="--sweep",
            fix="pass one, e.g. --sweep configs/sweeps/lr_and_intervals.yaml, or give the stage a line `sweep:`",
        )
    check_sweep(sweep, stage.config, asked.sweep or f"sweep of stage {stage.name}")
    return stage.model_copy(update={"sweep": sweep})


def _check_numbers(tuning: Tuning) -> None:
    for flag, value, least in (
        ("--workers-per-trial", tuning.workers, 1),
        ("--trials", tuning.trials, 2),
        ("--at-once", tuning.at_once, 1),
    ):
        if value is not None and value < least:
            raise MotipError("the number is too small", where=flag, found=value, expected=f"{least} or more")
