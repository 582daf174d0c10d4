"""Writer of DanceTrack folders, for the published code and its tools.

``<root>/<split>/<seq>/{img1/00000001.jpg, gt/gt.txt, gt/ignore.txt, gt/labels.txt, seqinfo.ini}`` and
``<root>/<split>_seqmap.txt``. Frames are renumbered from 1 without gaps, because the published loader expects that.
Boxes of unmapped categories go to ``gt/ignore.txt``, which the published tools do not read.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from motip.data.decode import image_height_width
from motip.data.formats.common import write_lines
from motip.data.sequence import ClassMap, Frame, Sequence
from motip.data.shards import image_bytes
from motip.errors import MotipError
from motip.storage.atomic import atomic_write


def write_dancetrack(
    sequence: Sequence, root: Path | str, split: str, class_map: ClassMap, frames: Iterable[Frame] | None = None
) -> dict[str, int]:
    """Write one sequence.

    Args:
        class_map: raw categories that are objects, and the order of the class numbers.
        frames: the sequence's frames with images as files or bytes, read one at a time (default: those it holds).

    Returns:
        number of ``frames``, ``objects`` and ``ignored`` boxes written.

    Raises:
        MotipError: a frame without an image, or a folder that cannot be written.
    """
    folder = Path(root) / split / sequence.name
    objects: list[str] = []
    ignored: list[str] = []
    suffix = ".jpg"
    size = (sequence.width, sequence.height)
    for position, frame in enumerate(frames or sequence.frames, start=1):
        data = image_bytes(frame)
        if data is None:
            raise MotipError(
                f"frame {frame.number} of {sequence.name} has no image",
                where=folder,
                fix="a DanceTrack folder needs images: export from shards or raw data with images",
            )
        if not all(size):
            height, width = image_height_width(data, sequence.name)
            size = (width, height)
        suffix = ".png" if data[:4] == b"\x89PNG" else ".jpg"
        with atomic_write(folder / "img1" / f"{position:08d}{suffix}") as temporary:
            temporary.write_bytes(data)
        # Rows of gt.txt and ignore.txt.
        labels = class_map.split(frame)
        rows = zip(labels.boxes_xyxy.tolist(), labels.track_ids, labels.class_ids, strict=True)
        for (x0, y0, x1, y1), track_id, class_id in rows:
            objects.append(
                f"{position},{track_id + 1},{x0:.4f},{y0:.4f},{x1 - x0:.4f},{y1 - y0:.4f},1,{class_id + 1},1"
            )
        for x0, y0, x1, y1 in labels.ignore_xyxy.tolist():
            ignored.append(f"{position},-1,{x0:.4f},{y0:.4f},{x1 - x0:.4f},{y1 - y0:.4f},0,-1,-1")
    write_lines(folder / "gt" / "gt.txt", objects)
    write_lines(folder / "gt" / "ignore.txt", ignored)
    write_lines(folder / "gt" / "labels.txt", class_map.names)
    write_seqinfo(folder / "seqinfo.ini", sequence.name, sequence.fps, len(sequence.frames), size, suffix=suffix)
    return {"frames": len(sequence.frames), "objects": len(objects), "ignored": len(ignored)}


def write_seqinfo(
    path: Path | str, name: str, fps: float, length: int, size: tuple[int, int], *, suffix: str = ".jpg"
) -> None:
    """Write ``seqinfo.ini``; ``size`` is (width, height)."""
    values = {
        "name": name,
        "imDir": "img1",
        "frameRate": int(fps) if fps == int(fps) else fps,
        "seqLength": length,
        "imWidth": size[0],
        "imHeight": size[1],
        "imExt": suffix,
    }
    write_lines(path, ["[Sequence]", *(f"{key}={value}" for key, value in values.items())])


def write_seqmap(path: Path | str, names: Iterable[str]) -> None:
    """Write a sequence map: a header line ``name``, then one sequence per line, sorted."""
    write_lines(path, ["name", *sorted(names)])


def seqmap_path(root: Path | str, split: str) -> Path:
    """Path of a split's sequence map."""
    return Path(root) / f"{split}_seqmap.txt"
