"""Tiny datasets in the raw formats, and stand-ins for a curriculum's sources and mixes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np

WIDTH, HEIGHT = 64, 48


def jpeg(seed: int, width: int = WIDTH, height: int = HEIGHT) -> bytes:
    """An image that differs clearly from that of another seed."""
    cells = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    image = cv2.resize(cells, (width, height), interpolation=cv2.INTER_NEAREST)
    return cv2.imencode(".jpg", image)[1].tobytes()


def write_images(folder: Path, names: Iterable[str], seed: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index, name in enumerate(names):
        (folder / name).write_bytes(jpeg(seed * 1000 + index))


def bdd_label(
    track: str = "a", category: str = "car", box: tuple[float, ...] = (5, 5, 20, 20), **attributes: Any
) -> dict:
    x1, y1, x2, y2 = box
    flags = {"crowd": False, "occluded": False, "truncated": False, **attributes}
    return {"id": track, "category": category, "attributes": flags, "box2d": {"x1": x1, "y1": y1, "x2": x2, "y2": y2}}


def bdd_frame(video: str, number: int, labels: list[dict] | None, **changes: Any) -> dict:
    frame = {"name": f"{video}-{number + 1:07d}.jpg", "videoName": video, "frameIndex": number, "labels": labels}
    return {key: value for key, value in {**frame, **changes}.items() if value is not ...}


def write_bdd(
    root: Path, video: str, frames: list[dict], *, split: str = "train", images: Iterable[int] | None = None
) -> None:
    """Write one video; ``images`` are 0-based frame numbers (default: one per label frame)."""
    numbers = range(len(frames)) if images is None else images
    names = [f"{video}-{number + 1:07d}.jpg" for number in numbers]
    write_images(root / "images" / "track" / split / video, names, seed=sum(map(ord, split + video)))
    labels = root / "labels" / "box_track_20" / split
    labels.mkdir(parents=True, exist_ok=True)
    (labels / f"{video}.json").write_text(json.dumps(frames))


def bdd_video(
    root: Path, video: str, length: int, *, split: str = "train", categories: tuple[str, ...] = ("car",)
) -> None:
    """Write a video of ``length`` frames with one moving object of each category and one crowd region."""
    frames = []
    for number in range(length):
        labels = [
            bdd_label(f"{category}-1", category, (index * 12 + number % 5, 4, index * 12 + 10 + number % 5, 24))
            for index, category in enumerate(categories)
        ]
        labels.append(bdd_label("crowd-1", categories[0], (40, 30, 60, 44), crowd=True))
        frames.append(bdd_frame(video, number, labels))
    write_bdd(root, video, frames, split=split)


def write_table(path: Path, rows: Iterable[Iterable[Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(",".join(map(str, row)) + "\n" for row in rows))
    return path


def write_visdrone(
    root: Path, sequence: str, rows: Iterable[Iterable[Any]], frames: int, *, split: str = "train"
) -> None:
    base = root / f"VisDrone2019-MOT-{split}"
    write_table(base / "annotations" / f"{sequence}.txt", rows)
    names = [f"{number:07d}.jpg" for number in range(1, frames + 1)]
    write_images(base / "sequences" / sequence, names, seed=sum(map(ord, split + sequence)))


def visdrone_video(root: Path, sequence: str, length: int, *, split: str = "train") -> None:
    rows = [[number, 1, 5 + number % 9, 5, 10, 12, 1, 1, 0, 0] for number in range(1, length + 1)]
    rows += [[number, 0, 40, 30, 20, 10, 0, 0, 0, 0] for number in range(1, length + 1)]
    write_visdrone(root, sequence, rows, length, split=split)


def write_mot(
    root: Path,
    sequence: str,
    rows: Iterable[Iterable[Any]],
    frames: int,
    *,
    split: str = "train",
    length: int | None = None,
) -> Path:
    folder = root / split / sequence
    write_table(folder / "gt" / "gt.txt", rows)
    write_images(folder / "img1", [f"{number:08d}.jpg" for number in range(1, frames + 1)])
    (folder / "seqinfo.ini").write_text(
        f"[Sequence]\nname={sequence}\nimDir=img1\nframeRate=20\nseqLength={length or frames}\n"
        f"imWidth={WIDTH}\nimHeight={HEIGHT}\nimExt=.jpg\n"
    )
    return folder


def source(name: str, format: str, root: str, **changes: Any) -> SimpleNamespace:
    """The attributes of `motip.config.Source` that the conversion uses."""
    values = {
        "name": name,
        "format": format,
        "root": root,
        "splits": {"train": "train", "val": "val"},
        "sequences": {},
        "classes": {"pedestrian": ("pedestrian",), "car": ("car",)},
        "fps": None,
        "max_frames_per_video": 200,
    }
    return SimpleNamespace(**{**values, **changes})


def mix(
    source: str, videos: int | None = None, frame_budget: int | None = None, allow_fewer: bool = False
) -> SimpleNamespace:
    return SimpleNamespace(source=source, videos=videos, frame_budget=frame_budget, weight=1.0, allow_fewer=allow_fewer)


def curriculum(
    sources: Iterable[Any],
    *stages: Iterable[Any],
    classes: tuple[str, ...] = ("car",),
    allow_unlabelled: tuple[str, ...] = (),
) -> SimpleNamespace:
    """The attributes of `motip.config.Curriculum` that the conversion uses; one list of mixes per stage."""
    return SimpleNamespace(
        name="test",
        sources={item.name: item for item in sources},
        stages=[
            SimpleNamespace(
                name=f"stage{number}",
                config=SimpleNamespace(class_names=classes),
                data=list(mixes),
                allow_unlabelled=allow_unlabelled,
            )
            for number, mixes in enumerate(stages, start=1)
        ],
    )
