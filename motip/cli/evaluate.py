"""`motip evaluate`: track and score a checkpoint, analyse its errors, choose its thresholds."""

from __future__ import annotations

from typing import Annotated

import typer

from motip.cli import options


def evaluate(
    context: typer.Context,
    checkpoint: Annotated[
        str | None, typer.Argument(metavar="CHECKPOINT", help="Checkpoint (.pth) or exported weights.")
    ] = None,
    named: Annotated[str | None, typer.Option("--checkpoint", help="The same as CHECKPOINT.")] = None,
    config: options.CurriculumFile = "configs/curriculum.yaml",
    storage: options.Storage = "~/motip",
    data_root: Annotated[
        str | None, typer.Option(help="Raw datasets, to convert missing shards first (default: existing shards only).")
    ] = None,
    split: options.Split = "val",
    sources: options.Sources = None,
    workers: Annotated[
        int | None,
        typer.Option(
            help="Ray actors; 0 tracks in this process (default: 0; as a Ray job, one per GPU or, without GPUs, CPU)."
        ),
    ] = None,
    device: options.Device = "auto",
    errors: Annotated[
        bool,
        typer.Option("--errors", help="Count lost objects by size, occlusion, truncation, position and crowding."),
    ] = False,
    sweep_thresholds: Annotated[
        bool,
        typer.Option("--sweep-thresholds", help="Instead, search the DET_THRESH with the highest HOTA on val."),
    ] = False,
    thresholds: Annotated[
        str | None,
        typer.Option(help="Thresholds of the search, comma-separated (default: 0.1 to 0.9 in steps of 0.05)."),
    ] = None,
    json_path: Annotated[
        str | None, typer.Option("--json", metavar="OUT", help="Also write the result to this JSON file.")
    ] = None,
) -> None:
    """Track and score the locked videos of every source with one checkpoint.

    The checkpoint contains its configuration; the curriculum file has the class maps of the sources. Writes tracks and
    scores_SPLIT.json (errors_SPLIT.json, thresholds_val.json and .png) to STORAGE/evaluations/SHA256. A repeated run
    does not track finished videos again.

    Example: motip evaluate checkpoint_best.pth --config configs/curriculum.yaml --storage ~/motip --errors

    As a Ray job, it joins the cluster at RAY_ADDRESS or starts Ray on this machine:
    python ray_jobs/evaluate.py --checkpoint checkpoint_best.pth --sweep-thresholds

    On a cluster: ray job submit --working-dir . --
    python ray_jobs/evaluate.py --checkpoint /shared/motip/best.pth
    --storage /shared/motip
    """
    from motip.cli.evaluation_output import run_evaluation
    from motip.evaluation.checkpoint import EvaluateOptions

    if (checkpoint is None) == (named is None):
        context.fail("Missing argument 'CHECKPOINT'." if named is None else "CHECKPOINT is given twice.")
    run_evaluation(
        EvaluateOptions(
            checkpoint=str(checkpoint or named),
            config=config,
            storage=storage,
            data_root=data_root,
            split=split,
            sources=None if sources is None else options.names_in(sources),
            workers=0 if workers is None and not options.is_job(context) else workers,
            device=device,
            json_path=json_path,
            errors=errors,
        ),
        sweep_thresholds=sweep_thresholds,
        thresholds=thresholds,
    )
