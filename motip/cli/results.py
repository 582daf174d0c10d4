"""`motip results`: export of tracks in the result formats of the benchmark servers."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from motip.cli import options
from motip.errors import MotipError

if TYPE_CHECKING:
    from motip.data.sequence import TrackRows

app = typer.Typer(no_args_is_help=True, help="Export tracks for the benchmark servers.")

_FORMATS = ("bdd100k", "visdrone", "motchallenge")


@app.command("export")
def export(
    source: Annotated[
        str, typer.Argument(metavar="IN", help="Folder of MOT rows (one .txt per video), or one such file.")
    ],
    target: Annotated[
        str, typer.Argument(metavar="OUT", help="bdd100k: a .json file. Others: a folder, or a .zip for the server.")
    ],
    format: Annotated[str, typer.Option(help="Result format: bdd100k, visdrone or motchallenge.")],
    classes: Annotated[
        str, typer.Option(help="Names of the class ids in IN, comma-separated, in order.")
    ] = "pedestrian,car",
    storage: Annotated[
        str | None, typer.Option(help="bdd100k: storage with the shards, to also list frames without tracks.")
    ] = None,
) -> None:
    """Write tracks in the result format of a benchmark.

    Example: motip results export --format visdrone evaluations/3f2a/tracks/visdrone/val visdrone_val.zip
    """
    options.check_known("unknown format", "--format", format, _FORMATS)
    names = options.names_in(classes)
    videos = _read(Path(source).expanduser(), names)
    output = Path(target).expanduser()
    if format == "bdd100k":
        _write_bdd100k(output, videos, names, storage)
    else:
        writer = _visdrone_writer(names) if format == "visdrone" else _mot_writer
        _write_files(output, videos, writer)
    boxes = sum(len(rows) for rows in videos.values())
    print(f"{len(videos)} videos, {boxes} boxes written as {format}: {output}")


def _read(source: Path, names: Sequence[str]) -> dict[str, TrackRows]:
    from motip.data.formats.result_files import read_mot

    files = sorted(source.glob("*.txt")) if source.is_dir() else [source]
    if not files or not files[0].is_file():
        raise MotipError(
            "there are no tracks",
            where=source,
            expected="a folder of MOT rows, one .txt file per video, or one such file",
            fix="motip track and ray_jobs/evaluate.py write them",
        )
    videos = {file.stem: read_mot(file) for file in files}
    for video, rows in videos.items():
        most = int(rows.class_ids.max()) + 1 if len(rows) else 0
        if most > len(names):
            raise MotipError(
                f"the tracks of {video} have a class without a name",
                where="--classes",
                found=f"class {most} in the file, {len(names)} names ({', '.join(names)})",
                fix="name the classes in the order of their numbers, e.g. --classes pedestrian,car,bus",
            )
    return videos


def _write_bdd100k(output: Path, videos: Mapping[str, TrackRows], names: Sequence[str], storage: str | None) -> None:
    from motip.data.formats.result_files import write_bdd100k

    if output.suffix != ".json":
        raise MotipError("BDD100K takes one JSON file", where="OUT", found=output, expected="a path ending in .json")
    numbers = None
    if storage is not None:
        numbers = _frame_numbers(storage, videos)
    write_bdd100k(output, videos, names, numbers)


def _frame_numbers(storage: str, videos: Mapping[str, TrackRows]) -> dict[str, list[int]]:
    from motip.data.manifest import Manifest, entry_path
    from motip.data.shards import read_labels
    from motip.storage.paths import location

    place = location(storage)
    entries = {entry.video: entry for entry in Manifest.load(place).videos}
    missing = sorted(set(videos) - set(entries))
    if missing:
        raise MotipError(
            f"{len(missing)} of the videos are not in the shards, such as {missing[0]}",
            where="--storage",
            found=storage,
            fix="pass the storage of the videos that were tracked",
        )
    return {name: [frame.number for frame in read_labels(entry_path(place, entries[name])).frames] for name in videos}


def _visdrone_writer(names: Sequence[str]) -> Callable[[Path, TrackRows], None]:
    from motip.data.formats.result_files import write_visdrone
    from motip.data.formats.visdrone import CATEGORIES

    predicted = CATEGORIES[1:-1]
    unknown = [name for name in names if name not in predicted]
    if unknown:
        raise MotipError(
            f"VisDrone has no category {unknown[0]!r}", where="--classes", expected="some of " + ", ".join(predicted)
        )
    numbers = [CATEGORIES.index(name) for name in names]
    return lambda path, rows: write_visdrone(path, rows, numbers)


def _mot_writer(path: Path, rows: TrackRows) -> None:
    from motip.data.formats.result_files import write_mot

    write_mot(path, rows)


def _write_files(output: Path, videos: Mapping[str, TrackRows], writer: Callable[[Path, TrackRows], None]) -> None:
    """Write one .txt file per video, into a folder or a .zip."""
    import tempfile

    from motip.storage.atomic import atomic_write

    if output.suffix != ".zip":
        for video, rows in videos.items():
            writer(output / f"{video}.txt", rows)
        return
    with (
        tempfile.TemporaryDirectory() as folder,
        atomic_write(output) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        for video, rows in videos.items():
            path = Path(folder) / f"{video}.txt"
            writer(path, rows)
            archive.write(path, path.name)
