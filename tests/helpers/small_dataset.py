"""Small DanceTrack dataset for tests of commands: moving red squares (pedestrians), static blue ones (cars)."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from motip.data.formats.dancetrack_writer import write_seqinfo, write_seqmap
from motip.weights import save_checkpoint

HEIGHT, WIDTH, FRAMES = 96, 160, 6


def write_sequence(folder: Path, seed: int, labels: tuple[str, ...] | None = ("pedestrian", "car")) -> None:
    """Write a sequence; ``labels`` None writes no gt/labels.txt, as in DanceTrack itself."""
    (folder / "img1").mkdir(parents=True)
    (folder / "gt").mkdir()
    ground = np.random.default_rng(seed).integers(80, 120, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    rows = []
    for frame in range(FRAMES):
        image = ground.copy()
        for number, (x, y, colour) in enumerate(((10 + 5 * frame, 20, (30, 30, 220)), (60 + seed, 60, (220, 60, 30)))):
            image[y : y + 24, x : x + 20] = colour
            rows.append(f"{frame + 1},{number + 1},{x},{y},20,24,1,{number + 1},1")
        cv2.imwrite(str(folder / "img1" / f"{frame + 1:08d}.png"), image)
    (folder / "gt" / "gt.txt").write_text("\n".join(rows) + "\n")
    if labels is not None:
        (folder / "gt" / "labels.txt").write_text("\n".join(labels) + "\n")
    write_seqinfo(folder / "seqinfo.ini", folder.name, 10, FRAMES, (WIDTH, HEIGHT), suffix=".png")


def write_dance_dataset(root: Path, labels: tuple[str, ...] | None = ("pedestrian", "car")) -> Path:
    """``root/DanceTrack/{train,val}`` with two training and two validation sequences and their sequence maps."""
    base = root / "DanceTrack"
    for split, names in (("train", ("t0", "t1")), ("val", ("v0", "v1"))):
        for number, name in enumerate(names):
            write_sequence(base / split / name, 10 * (split == "val") + number, labels)
        write_seqmap(base / f"{split}_seqmap.txt", names)
    return base


def write_curriculum(path: Path, repo_root: Path) -> Path:
    """A curriculum file with one two-class stage on that dataset and the tiny preset."""
    path.with_name("stage.yaml").write_text(
        f"SUPER_CONFIG_PATH: {repo_root / 'configs/demo/motip_tiny.yaml'}\n"
        "DEVICE: cpu\nNUM_CLASSES: 2\nsampler_lengths: [2]\nsample_intervals: [1]\n"
    )
    path.write_text(
        "name: small\n"
        "sources:\n"
        "  dance:\n"
        "    format: motchallenge\n"
        "    root: DanceTrack\n"
        "    domain: dance\n"
        "    classes: {pedestrian: [pedestrian], car: [car]}\n"
        "stages:\n"
        "  - {name: only, config: stage.yaml, data: [{source: dance, videos: 2}]}\n"
    )
    return path


def write_checkpoint(path: Path, stage_yaml: Path, *overrides: str) -> Path:
    """Initialised weights of the tiny preset with low thresholds: many boxes, none meaningful."""
    from motip.config import load_config
    from motip.train.setup import fresh_model

    settings = ["DET_THRESH=0.01", "NEWBORN_THRESH=0.01", "CLASSES=[pedestrian, car]", *overrides]
    config = load_config(stage_yaml, settings)
    return save_checkpoint(
        path, model=fresh_model(config), classes=config.class_names, config=config.to_dict(), epoch=0, step=1
    )
