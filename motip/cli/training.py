"""`motip curriculum`, `motip train` and `motip tune`: training on this machine or on a Ray cluster."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from motip.cli import options
from motip.cli.preflight import preflight

train_app = typer.Typer()
train_app.command("preflight")(preflight)


def curriculum(
    config: options.CurriculumFile = "configs/curriculum.yaml",
    data_root: options.DataRoot = ".",
    storage: options.Storage = "~/motip",
    workers: options.Workers = "1",
    overrides: options.Overrides = None,
    until: Annotated[str | None, typer.Option(metavar="STAGE", help="Last stage to run (default: all stages).")] = None,
    arms: Annotated[
        str | None, typer.Option(metavar="A,B", help="Experiment file: arms to run (default: all).")
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(metavar="1,2", help="Experiment file: seeds to run (default: all).")
    ] = None,
    tune: Annotated[
        bool, typer.Option("--tune", help="Tune each stage with a `sweep:` line before training it.")
    ] = False,
    trials: options.Trials = None,
    workers_per_trial: options.WorkersPerTrial = 1,
    strict: options.Strict = False,
) -> None:
    """Convert the data, train every stage of a curriculum in order, record the lineage of all weights.

    It starts Ray on this machine, or joins the cluster at RAY_ADDRESS. A repeated run resumes after an interruption; a
    finished stage with unchanged inputs is not trained again. A file with `arms:` is an experiment: every arm is run
    with every seed, and the results are written as tables with intervals. With --tune each stage with a line
    `sweep: FILE` is tuned first and then trained with the values found.

    Example: motip curriculum --config configs/demo/curriculum.yaml

    Example: motip curriculum --config configs/demo/experiment.yaml --storage outputs/experiment --workers 0

    On a cluster: ray job submit --working-dir . --
    python ray_jobs/curriculum.py --config configs/curriculum.yaml
    --data-root /data --storage /shared/motip --workers 4 --set EPOCHS=10
    --set Vis-Specialist:LR=5e-6
    """
    from motip.cli.launch import checked_options, launch, launch_experiment
    from motip.config import load_curriculum
    from motip.config.experiment_file import is_experiment, load_experiment
    from motip.tune import Tuning

    run = partial(checked_options, config, data_root=data_root, storage=storage, workers=workers, strict=strict)
    if is_experiment(config):
        launch_experiment(load_experiment(config, overrides or ()), run(), arms, seeds)
    else:
        tuning = Tuning(workers=workers_per_trial, trials=trials) if tune else None
        launch(load_curriculum(config, overrides or (), tune=tune), run(until=until), tuning)


@train_app.callback(invoke_without_command=True)
def train(
    context: typer.Context,
    config: Annotated[str | None, typer.Option(help="Configuration of the stage (required).")] = None,
    data_root: options.StageDataRoot = None,
    storage: options.Storage = "~/motip",
    workers: options.Workers = "1",
    videos: options.Videos = None,
    overrides: options.Overrides = None,
    strict: options.Strict = False,
) -> None:
    """Train a single stage: convert its data, train, validate, record. `motip train preflight` checks its memory first.

    DATASETS of the configuration names the datasets (BDD100K, VisDrone, DanceTrack), searched in DATA_ROOT under the
    data root and in the data root itself. DETR_PRETRAIN is the path of the weights; null trains from fresh ones. A
    repeated run resumes.

    Example: motip train --config configs/bdd_stage2.yaml --data-root /data --videos 150
    --set DETR_PRETRAIN=checkpoint_best.pth

    On a cluster: ray job submit --working-dir . --
    python ray_jobs/train.py --config configs/visdrone_stage1.yaml
    --data-root /data --storage /shared/motip --workers 4 --videos 80
    --set DETR_PRETRAIN=/shared/motip/checkpoint_best.pth
    """
    if context.invoked_subcommand is not None:
        return
    if config is None:
        context.fail("Missing option '--config'.")
    from motip.cli.launch import checked_options, launch
    from motip.config import load_config
    from motip.config.single_stage import single_stage
    from motip.data.formats.motchallenge import CATEGORIES
    from motip.storage.named_folders import checked_data_root

    settings = load_config(config, overrides or ())
    root = checked_data_root(data_root or settings.root_path)
    stage = single_stage(settings, root, CATEGORIES, videos=videos)
    launch(stage, checked_options(config, data_root=root, storage=storage, workers=workers, strict=strict))


def tune(
    config: options.StageFile,
    sweep: Annotated[
        str | None, typer.Option(help="Sweep file with the search space (default: the one that the stage names).")
    ] = None,
    stage: options.Stage = None,
    trials: options.Trials = None,
    workers_per_trial: options.WorkersPerTrial = 1,
    at_once: Annotated[
        int | None, typer.Option(metavar="N", help="Concurrent trials (default: as many as fit).")
    ] = None,
    tuned: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="File for the values found (default: the stage's `tuned:`, else under configs/tuned/).",
        ),
    ] = None,
    data_root: options.StageDataRoot = None,
    storage: options.Storage = "~/motip",
    videos: options.Videos = None,
    overrides: options.Overrides = None,
    strict: options.Strict = False,
) -> None:
    """Sweep the hyperparameters of one stage: short trials over a search space, the best confirmed with further seeds.

    Of a curriculum file, the unfinished stages before the stage are trained first. Each trial has its own workers and
    is a child run of the sweep's run in MLflow; how many run concurrently follows from the resources of the cluster. A
    repeated run resumes; with more --trials it extends the sweep. The values found are written as a YAML file with the
    scores they are based on; a stage of a curriculum file uses it by `tuned: FILE`.

    Example: motip tune --config configs/demo/curriculum.yaml --stage BDD-Foundation --sweep configs/demo/sweep.yaml

    On a cluster: ray job submit --working-dir . --
    python ray_jobs/tune.py --config configs/curriculum.yaml
    --stage BDD-Refinement --sweep configs/sweeps/lr_and_intervals.yaml
    --data-root /data --storage /shared/motip --workers-per-trial 2
    """
    from motip.cli.stage_tuning import TuneOptions, sweep_stage
    from motip.tune import Tuning

    sweep_stage(
        TuneOptions(config, sweep, stage, data_root, storage, overrides or (), videos, strict),
        Tuning(workers_per_trial, trials, at_once, tuned),
    )
