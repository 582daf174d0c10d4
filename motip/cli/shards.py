"""`motip convert` and `motip shards`: convert raw datasets to shards; inspect shards."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from motip.cli import options
from motip.errors import MotipError

if TYPE_CHECKING:
    from motip.config import Curriculum
    from motip.data.manifest import Manifest

app = typer.Typer(no_args_is_help=True, help="Inspect converted data.")


def convert(
    context: typer.Context,
    config: options.CurriculumFile = "configs/curriculum.yaml",
    data_root: options.DataRoot = ".",
    storage: options.Storage = "~/motip",
    strict: options.Strict = False,
    seed: Annotated[
        int | None,
        typer.Option(
            help="Seed of the order in which videos are selected, here and in all stages "
            "(default: that of the previous conversion, else 0)."
        ),
    ] = None,
    allow_fewer: Annotated[
        bool, typer.Option("--allow-fewer", help="Use the available videos if a stage requests more.")
    ] = False,
    processes: Annotated[
        int | None,
        typer.Option(min=1, help="Processes on this machine (default: 1; as a Ray job, all CPUs of the cluster)."),
    ] = None,
    to: Annotated[
        tuple[str, str] | None,
        typer.Option(metavar="dancetrack DIR", help="Also write the shards as a DanceTrack-style folder."),
    ] = None,
) -> None:
    """Convert raw datasets to shards: select videos for every stage, lock val and test, account for every label row.

    A repeated run converts only what is missing, after an interruption or with more videos in the curriculum. S3
    endpoint, region and credentials come from the environment (AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID, ...).
    Output under STORAGE/shards: SOURCE/SPLIT/VIDEO.parquet, manifest.json, report.json, SOURCE_overlay.png.

    Example: motip convert --config configs/samples/curriculum.yaml --data-root SAMPLES --storage outputs

    As a Ray job, it joins the cluster at RAY_ADDRESS or starts Ray on this machine:
    python ray_jobs/convert.py --config configs/curriculum.yaml --data-root /data

    On a cluster: ray job submit --working-dir . --
    python ray_jobs/convert.py --config configs/curriculum.yaml
    --data-root s3://bucket/raw --storage s3://bucket/motip
    """
    from motip.cluster import joined_cluster
    from motip.config import load_curriculum
    from motip.curriculum.synthetic_sources import with_synthetic_sources
    from motip.data.convert import check_data_root, process_map, ray_map
    from motip.data.convert import convert as convert_all
    from motip.data.convert_report import ConversionUi

    if to is not None and to[0] != "dancetrack":
        raise MotipError("unknown layout", where="--to", found=to[0], expected="dancetrack")
    check_data_root(data_root)
    curriculum = with_synthetic_sources(load_curriculum(config), storage, print)
    on_cluster = options.is_job(context) and processes is None
    with ConversionUi() as ui, joined_cluster(on_cluster):
        in_processes = process_map(processes) if processes is not None and processes > 1 else None
        report = convert_all(
            curriculum,
            data_root,
            storage,
            strict=strict,
            seed=seed,
            allow_fewer=allow_fewer,
            map_fn=ray_map() if on_cluster else in_processes,
            progress=ui.progress,
        )
    ui.show(report)
    if to is not None:
        _export(curriculum, report.manifest, storage, to[1])


def _export(curriculum: Curriculum, manifest: Manifest, storage: str, folder: str) -> None:
    from motip.data.dancetrack_export import export_dancetrack
    from motip.storage.paths import location

    names = tuple(dict.fromkeys(name for stage in curriculum.stages for name in stage.config.class_names))
    classes: dict[str, Any] = {name: source.classes for name, source in curriculum.sources.items()}
    counts = export_dancetrack(manifest, location(storage), folder, names, classes)
    for split, values in counts.items():
        print(f"{folder}/{split}: " + ", ".join(f"{value} {name}" for name, value in values.items()))


@app.command("inspect")
def inspect(
    storage: Annotated[str, typer.Argument(help="Storage folder or s3:// URI, or a single .parquet file.")],
    config: Annotated[
        str | None, typer.Option(help="Curriculum file: count boxes by its classes instead of raw categories.")
    ] = None,
    json: options.Json = False,
) -> None:
    """Report the content of shards: videos, frames, boxes by category, objects per frame, dropped label rows.

    Example: motip shards inspect ~/motip
    """
    if storage.endswith(".parquet"):
        _inspect_file(storage, json)
    else:
        _inspect_set(storage, config, json)


def _inspect_set(storage: str, config: str | None, json: bool) -> None:
    from motip.cli.console import as_json, console
    from motip.data.convert_report import inspect_shards
    from motip.data.manifest import Manifest
    from motip.storage.paths import location

    manifest = Manifest.load(location(storage))
    if json:
        as_json({key: value for key, value in manifest.to_dict().items() if key != "sequences"})
        return
    classes: dict[str, Any] | None = None
    if config is not None:
        from motip.config import load_curriculum

        classes = {name: source.classes for name, source in load_curriculum(config).sources.items()}
    console().print(inspect_shards(manifest, classes))
    for source, splits in manifest.locked.items():
        for split, names in splits.items():
            print(f"locked for {split}: {len(names)} sequences of {source}")
    frames = sum(entry.frames for entry in manifest.videos)
    size = sum(entry.shard_bytes for entry in manifest.videos)
    print(f"{len(manifest.videos)} videos, {frames} frames, {size / 1e6:.1f} MB, digest {manifest.digest()[:12]}")


def _inspect_file(path: str, json: bool) -> None:
    from dataclasses import asdict

    from motip.cli.console import as_json, facts, table
    from motip.data.shards import read_header
    from motip.storage.paths import location

    header = read_header(location(path))
    if json:
        as_json(asdict(header))
        return
    summary = header.summary or {}
    facts(
        [
            ("video", f"{header.source}/{header.split}/{header.video} (sequence {header.sequence}, {header.dataset})"),
            ("frames", f"{header.frames}, {header.width}x{header.height}, {header.fps:g} per second"),
            ("numbers", f"{summary['first_frame']}..{summary['last_frame']}" if "first_frame" in summary else None),
            ("objects", f"at most {summary['max_objects']} in a frame" if "max_objects" in summary else None),
            ("labels", f"sha256 {header.labels_sha256}"),
            ("images", f"sha256 {header.images_sha256}"),
        ]
    )
    boxes, ignored, tracks = (summary.get(name, {}) for name in ("boxes", "ignored", "tracks"))
    rows = [[name, str(n), str(ignored.get(name, 0)), str(tracks.get(name, 0))] for name, n in boxes.items()]
    if rows:
        table(["category", "boxes", "marked ignore", "tracks"], rows)
    print(f"{header.frames} frames, {sum(boxes.values())} boxes in {path}")
