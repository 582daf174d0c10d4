"""Writer of DanceTrack folders, for the published code and its tools.

``<root>/<split>/<seq>/{img1/00000001.jpg, gt/gt.txt, gt/ignore.txt, gt/labels.txt, seqinfo.ini}`` and
``<root>/<split>_seqmap.txt``. Frames are renumbered from 1 without gaps, because the published loader expects that.
Boxes of unmapped categories go to ``gt/ignore.txt``, which the published tools do not read.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from motip.data.decode import image_height_width
from motip.data.sequence import ClassMap, Sequence
from motip.errors import MotipError
from motip.storage.atomic import atomic_write


def write_dancetrack(sequence: Sequence, root: Path | str, split: str, class_map: ClassMap) -> dict[str, int]:
    """Write one sequence.

    Args:
        sequence: with images as files or bytes.
        class_map: raw categories that are objects, and the order of the class numbers.

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
    for position, frame in enumerate(sequence.frames, start=1):
        if frame.image is None:
            raise MotipError(
                f"frame {frame.number} of {sequence.name} has no image",
                where=folder,
                fix="a DanceTrack folder needs images: export from shards or raw data with images",
            )
        data = frame.image if isinstance(frame.image, bytes) else frame.image.read_bytes()
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
    _write_text(folder / "gt" / "gt.txt", objects)
    _write_text(folder / "gt" / "ignore.txt", ignored)
    _write_text(folder / "gt" / "labels.txt", list(class_map.names))
    write_seqinfo(folder / "seqinfo.ini", sequence.name, sequence.fps, len(sequence.frames), size, suffix=suffix)
    return {"frames": len(sequence.frames), "objects": len(objects), "ignored": len(ignored)}


def write_seqinfo(
    path: Path | str, name: str, fps: float, length: int, size: tuple[int, int], *, suffix: str = ".jpg"
) -> None:
    """Write ``seqinfo.ini``; ``size`` is (width, height)."""
    rate = int(fps) if fps == int(fps) else fps
    _write_text(
        path,
        [
            "[Sequence]",
            f"name={name}",
            "imDir=img1",
            f"frameRate={rate}",
            f"seqLength={length}",
            f"imWidth={size[0]}",
            f"imHeight={size[1]}",
            f"imExt={suffix}",
        ],
    )


def write_seqmap(path: Path | str, names: Iterable[str]) -> None:
    """Write a sequence map: a header line ``name``, then one sequence per line, sorted."""
    _write_text(path, ["name", *sorted(names)])


def seqmap_path(root: Path | str, split: str) -> Path:
    """Path of a split's sequence map."""
    return Path(os.fspath(root)) / f"{split}_seqmap.txt"


def _write_text(path: Path | str, lines: list[str]) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text("".join(line + "\n" for line in lines))
