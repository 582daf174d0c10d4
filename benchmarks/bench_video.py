"""Frames per second of drawing tracks and encoding 1080p video, without detector and decoding, against baselines.

    python -m benchmarks.bench_video                        # 300 frames, 30 objects
    python -m benchmarks.bench_video --objects 100 --frames 120

Ours is the output path of `motip track`: trails, boxes with rims, labels, status bar, H.264 in yuv420p that plays in a
browser. The baselines draw boxes and labels with plain OpenCV calls and write with `cv2.VideoWriter` (MPEG-4 part 2,
which browsers do not play; its wheels have no H.264 encoder) or with PyAV as in its documentation (H.264, default
preset of x264). Wall time is relevant on an idle machine; CPU time per frame is more reliable on a busy one.

The image is the real 1080p clip of the samples (MOTIP_SAMPLES_DIR) played forward and backward; without it a synthetic
one.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np

from benchmarks.machine import Stopwatch
from benchmarks.records import Recorder, add_flags, quantity
from motip.data.video_reader import open_source
from motip.report.drawing import DrawnTracks, Painter
from motip.report.video_writer import VideoWriter

ROOT = Path(__file__).resolve().parents[1]
HEIGHT, WIDTH = 1080, 1920
FPS = Fraction(30)
NAMES = ("pedestrian", "car")


def source_frames() -> tuple[list[np.ndarray], str]:
    """Frames of one cycle, and their description for the record."""
    clip = Path(os.environ.get("MOTIP_SAMPLES_DIR", ROOT / "../shared/samples")) / "video" / "street_8_frames.mp4"
    if clip.is_file():
        frames = [image for _, image in open_source(str(clip))]
        if frames[0].shape == (HEIGHT, WIDTH, 3):
            return [*frames, *frames[-2:0:-1]], f"real street, {len(frames)} frames forward and backward"
    coarse = np.random.default_rng(0).integers(0, 255, (68, 140, 3), dtype=np.uint8)
    background = cv2.resize(coarse, (WIDTH + 160, HEIGHT), interpolation=cv2.INTER_CUBIC)
    return [background[:, shift : shift + WIDTH].copy() for shift in range(0, 160, 8)], "synthetic, moving sideways"


def tracks(number: int, objects: int) -> DrawnTracks:
    """Boxes that move over the image at different speeds."""
    ids = np.arange(objects)
    x = (97 * ids + number * (2 + ids % 5)) % (WIDTH - 120)
    y = 60 + (211 * ids + number * (ids % 3)) % (HEIGHT - 300)
    boxes = np.stack([x, y, x + 60 + ids % 50, y + 120 + ids % 90], axis=1).astype(np.float32)
    return DrawnTracks(ids, boxes, ids % 2, (0.5 + 0.49 * np.cos(ids)).astype(np.float32))


def draw_naively(image: np.ndarray, shown: DrawnTracks) -> np.ndarray:
    drawn = image.copy()
    for track_id, box, class_id, score in zip(shown.ids, shown.boxes_xyxy, shown.class_ids, shown.scores, strict=True):
        x0, y0, x1, y1 = map(int, box)
        cv2.rectangle(drawn, (x0, y0), (x1, y1), (0, 255, 0), 2)
        text = f"{track_id} {NAMES[class_id]} {score:.2f}"
        cv2.putText(drawn, text, (x0, y0 - 4), cv2.FONT_HERSHEY_SIMPLEX, 0.6, (0, 255, 0), 2)
    return drawn


def ours(path: Path, frames: list[np.ndarray], count: int, objects: int) -> None:
    painter = Painter(NAMES)
    with VideoWriter(path, FPS) as writer:
        for number in range(count):
            bar = f"frame {number + 1}   {objects} tracks   60.0 fps"
            writer.write(painter.draw(frames[number % len(frames)], tracks(number, objects), bar))


def with_opencv(path: Path, frames: list[np.ndarray], count: int, objects: int) -> None:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), float(FPS), (WIDTH, HEIGHT))
    for number in range(count):
        drawn = draw_naively(frames[number % len(frames)], tracks(number, objects))
        writer.write(cv2.cvtColor(drawn, cv2.COLOR_RGB2BGR))
    writer.release()


def with_pyav(path: Path, frames: list[np.ndarray], count: int, objects: int) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for number in range(count):
            drawn = draw_naively(frames[number % len(frames)], tracks(number, objects))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(drawn, format="rgb24")))
        container.mux(stream.encode(None))


def drawing_only(path: Path, frames: list[np.ndarray], count: int, objects: int) -> None:
    painter = Painter(NAMES)
    for number in range(count):
        painter.draw(frames[number % len(frames)], tracks(number, objects), "frame   tracks   fps")


Work = Callable[[Path, list[np.ndarray], int, int], None]
BASELINES: dict[str, Work] = {
    "PyAV, default x264": with_pyav,
    "cv2.VideoWriter, MPEG-4 part 2": with_opencv,
}
QUANTITIES = ("frames/s", "CPU ms per frame", "MB per 100 frames")


def measure(work: Work, frames: list[np.ndarray], args: argparse.Namespace) -> list[list[float]]:
    """Values of each of QUANTITIES, one per repeat."""
    found: list[list[float]] = [[] for _ in QUANTITIES]
    for _ in range(args.repeats):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "out.mp4"
            stopwatch = Stopwatch()
            with stopwatch:
                work(path, frames, args.frames, args.objects)
            wall, cpu = stopwatch.wall_s[0], stopwatch.cpu_s[0]
            size = path.stat().st_size / 1e6 if path.is_file() else 0.0
        for values, value in zip(
            found, (args.frames / wall, 1000 * cpu / args.frames, 100 * size / args.frames), strict=True
        ):
            values.append(value)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=300)
    parser.add_argument("--objects", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=3)
    add_flags(parser, "20 frames, once")
    args = parser.parse_args()
    if args.quick:
        args.frames, args.repeats = 20, 1
    frames, what = source_frames()
    recorder = Recorder("video", "Drawing tracks and writing 1080p video", args)
    settings = {"size": f"{WIDTH}x{HEIGHT}", "frames": args.frames, "picture": what}
    mine = measure(ours, frames, args)
    for name, work in BASELINES.items():
        figures = zip(QUANTITIES, mine, measure(work, frames, args), strict=True)
        recorder.add(
            f"{args.objects} tracks, against {name}", settings, name, [quantity(*figure) for figure in figures]
        )
    drawing = measure(drawing_only, frames, args)
    recorder.add(f"{args.objects} tracks, drawing only", settings, None, [quantity(QUANTITIES[1], drawing[1])])
    recorder.finish()


if __name__ == "__main__":
    main()
