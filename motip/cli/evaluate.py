"""`motip evaluate`: track and score a checkpoint, explain its errors, choose its thresholds."""

from __future__ import annotations

from typing import Annotated

import typer


def evaluate(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="Checkpoint (.pth) or exported weights.")],
    config: Annotated[
        str, typer.Option(help="Curriculum file; it says which raw categories are which class.")
    ] = "configs/curriculum.yaml",
    storage: Annotated[str, typer.Option(help="Folder or s3:// URI of the shards.")] = "~/motip",
    data_root: Annotated[
        str | None, typer.Option(help="Raw datasets, to convert what the shards lack (default: shards only).")
    ] = None,
    split: Annotated[str, typer.Option(help="val or test.")] = "val",
    sources: Annotated[str | None, typer.Option(help="Only these, comma-separated (default: all).")] = None,
    workers: Annotated[int, typer.Option(help="Ray actors; 0 tracks in this process.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    errors: Annotated[
        bool, typer.Option("--errors", help="Say which objects are lost: by size, occlusion, truncation, place, crowd.")
    ] = False,
    sweep_thresholds: Annotated[
        bool, typer.Option("--sweep-thresholds", help="Find the DET_THRESH with the highest HOTA on val instead.")
    ] = False,
    thresholds: Annotated[
        str | None, typer.Option(help="Of the sweep, comma-separated (default: 0.1 to 0.9 in steps of 0.05).")
    ] = None,
    json_path: Annotated[str | None, typer.Option("--json", metavar="OUT", help="Write the result here too.")] = None,
) -> None:
    """Track and score the locked videos of every source.

    Writes tracks and scores_SPLIT.json (errors_SPLIT.json, thresholds_val.json and .png) to STORAGE/evaluations/SHA256.
    On a cluster use python ray_jobs/evaluate.py, which takes the same options.

    Example: motip evaluate checkpoint_best.pth --config configs/curriculum.yaml --storage ~/motip --errors
    """
    from motip.cli.evaluation_job import Asked, evaluation

    asked = Asked(
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
    evaluation(asked, errors=errors, sweep_thresholds=sweep_thresholds, thresholds=thresholds)
