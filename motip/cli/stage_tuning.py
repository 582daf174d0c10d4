"""Stage of a sweep, given by its own configuration or as a stage of a curriculum file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from motip.cli.launch import checked_options, launch_sweep
from motip.cli.options import check_known
from motip.config import Curriculum, Stage, load_config, load_curriculum
from motip.config.single_stage import single_stage
from motip.config.sweep_file import SweepFile, check_sweep, load_sweep
from motip.config.yaml_chain import read_yaml
from motip.data.formats.motchallenge import CATEGORIES
from motip.errors import MotipError
from motip.storage.named_folders import checked_data_root
from motip.tune import SweepResult, Tuning


@dataclass(frozen=True)
class TuneOptions:
    """Options of `motip tune`, beside those of the sweep itself.

    Attributes:
        config: a stage's configuration, or a curriculum file.
        sweep: sweep file; None: the one that the stage in the curriculum file names.
        stage: stage of the curriculum file; None for a file with one stage, or a stage's configuration.
        data_root: None: root_path of a stage's configuration, or the working directory for a curriculum file.
        videos: number of training videos of each dataset, for a stage's configuration.
    """

    config: str
    sweep: str | None = None
    stage: str | None = None
    data_root: str | None = None
    storage: str = "~/motip"
    overrides: Sequence[str] = ()
    videos: int | None = None
    strict: bool = False


def sweep_stage(options: TuneOptions, tuning: Tuning) -> SweepResult:
    """Run or resume a sweep, and print its result.

    Raises:
        MotipError: invalid arguments, configuration or data; options are checked before any training.
    """
    for flag, value, minimum in (
        ("--workers-per-trial", tuning.workers, 1),
        ("--trials", tuning.trials, 2),
        ("--at-once", tuning.max_concurrent_trials, 1),
    ):
        if value is not None and value < minimum:
            raise MotipError("the number is too small", where=flag, found=value, expected=f"{minimum} or more")
    sweep = None if options.sweep is None else load_sweep(options.sweep)
    curriculum, root = _curriculum(options, sweep)
    stage = _stage(curriculum, options, sweep)
    stages = tuple(stage if each.name == stage.name else each for each in curriculum.stages)
    run_options = checked_options(
        options.config,
        data_root=root,
        storage=options.storage,
        workers=tuning.workers,
        strict=options.strict,
        until=stage.name,
    )
    return launch_sweep(curriculum.model_copy(update={"stages": stages}), stage, run_options, tuning)


def _curriculum(options: TuneOptions, sweep: SweepFile | None) -> tuple[Curriculum, str]:
    """The stage in its curriculum, and the data root."""
    if "stages" in read_yaml(Path(options.config).expanduser()).values:
        if options.videos is not None:
            raise MotipError(
                "--videos does not apply to a curriculum file, which sets the videos of its stages",
                where="--videos",
                fix="omit it",
            )
        root = checked_data_root(options.data_root or ".")
        return load_curriculum(options.config, options.overrides, tune=options.stage or True), root
    if sweep is None:
        raise MotipError(
            "a sweep file with the search space is required",
            where="--sweep",
            expected="e.g. --sweep configs/sweeps/lr_and_intervals.yaml",
        )
    config = load_config(options.config, options.overrides)
    check_sweep(sweep, config, str(options.sweep))
    root = checked_data_root(options.data_root or config.root_path)
    return single_stage(config, root, CATEGORIES, videos=options.videos), root


def _stage(curriculum: Curriculum, options: TuneOptions, sweep: SweepFile | None) -> Stage:
    names = [stage.name for stage in curriculum.stages]
    if options.stage is None and len(names) > 1:
        raise MotipError("the stage to tune is required", where="--stage", expected="one of " + ", ".join(names))
    chosen = options.stage or names[0]
    check_known("there is no such stage", "--stage", chosen, names)
    stage = curriculum.stage(chosen)
    sweep = sweep or stage.sweep
    if sweep is None:
        raise MotipError(
            f"stage {stage.name} names no sweep file",
            where="--sweep",
            fix="pass one, e.g. --sweep configs/sweeps/lr_and_intervals.yaml, or give the stage a line `sweep:`",
        )
    check_sweep(sweep, stage.config, options.sweep or f"sweep of stage {stage.name}")
    return stage.model_copy(update={"sweep": sweep})
