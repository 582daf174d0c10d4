"""`motip evaluate`: track and score a checkpoint, analyse its errors, choose its thresholds."""

from __future__ import annotations

from typing import Annotated

import typer


def evaluate(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="Checkpoint (.pth) or exported weights.")],
    config: Annotated[
        str, typer.Option(help="Curriculum file with the class map and protocol of every source.")
    ] = "configs/curriculum.yaml",
    storage: Annotated[str, typer.Option(help="Folder or s3:// URI of the shards.")] = "~/motip",
    data_root: Annotated[
        str | None, typer.Option(help="Raw datasets, to convert missing shards first (default: existing shards only).")
    ] = None,
    split: Annotated[str, typer.Option(help="Split to evaluate: val or test.")] = "val",
    sources: Annotated[
        str | None, typer.Option(help="Sources to evaluate, comma-separated (default: all with this split).")
    ] = None,
    workers: Annotated[int, typer.Option(help="Number of Ray actors; 0 tracks in this process.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
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
    """Track and score the locked videos of every source.

    Writes tracks and scores_SPLIT.json (errors_SPLIT.json, thresholds_val.json and .png) to STORAGE/evaluations/SHA256.
    For a cluster: python ray_jobs/evaluate.py takes the same options.

    Example: motip evaluate checkpoint_best.pth --config configs/curriculum.yaml --storage ~/motip --errors
    """
    from motip.cli.evaluation_job import EvaluateOptions, run_evaluation

    options = EvaluateOptions(
        checkpoint,
        config,
        storage=storage,
        data_root=data_root,
        split=split,
        sources=None if sources is None else [name.strip() for name in sources.split(",")],
        workers=workers,
        device=device,
        json_path=json_path,
    )
    run_evaluation(options, errors=errors, sweep_thresholds=sweep_thresholds, thresholds=thresholds)
