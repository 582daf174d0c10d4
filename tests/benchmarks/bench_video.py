"""Frames per second of drawing tracks and encoding 1080p video, without detector and decoding, against plain ways.

    python tests/benchmarks/bench_video.py                        # 300 frames, 30 objects
    python tests/benchmarks/bench_video.py --objects 100 --frames 120

Ours is what `motip track` does with a frame and its tracks: trails, boxes with rims, labels, bar, H.264 in yuv420p that
plays in a browser. The others draw boxes and labels with bare OpenCV calls and write with `cv2.VideoWriter` (MPEG-4
part 2, which browsers do not play; its wheels have no H.264 encoder) or with PyAV as its documentation shows it (H.264,
x264's default preset). Wall time is what counts on a free machine; CPU time per frame tells more on a busy one.

The picture is the real 1080p clip of the samples (MOTIP_SAMPLES_DIR) played forth and back; without it a drawn one.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import av  # noqa: E402
import cv2  # noqa: E402
import numpy as np  # noqa: E402

from motip.data.video import open_source  # noqa: E402
from motip.report.draw import DrawnTracks, Painter  # noqa: E402
from motip.report.video import VideoWriter  # noqa: E402

HEIGHT, WIDTH = 1080, 1920
FPS = Fraction(30)
NAMES = ("pedestrian", "car")


def pictures() -> tuple[list[np.ndarray], str]:
    """Frames to be shown forth and back, and where they are from."""
    clip = Path(os.environ.get("MOTIP_SAMPLES_DIR", ROOT / "../shared/samples")) / "video" / "street_8_frames.mp4"
    if clip.is_file():
        frames = [image for _, image in open_source(str(clip))]
        if frames[0].shape == (HEIGHT, WIDTH, 3):
            return [*frames, *frames[-2:0:-1]], f"real street, {len(frames)} frames forth and back"
    coarse = np.random.default_rng(0).integers(0, 255, (68, 140, 3), dtype=np.uint8)
    ground = cv2.resize(coarse, (WIDTH + 160, HEIGHT), interpolation=cv2.INTER_CUBIC)
    return [ground[:, shift : shift + WIDTH].copy() for shift in range(0, 160, 8)], "drawn, moving sideways"


def tracks(number: int, objects: int) -> DrawnTracks:
    """Boxes that wander over the picture, each at its own pace."""
    ids = np.arange(objects)
    x = (97 * ids + number * (2 + ids % 5)) % (WIDTH - 120)
    y = 60 + (211 * ids + number * (ids % 3)) % (HEIGHT - 300)
    boxes = np.stack([x, y, x + 60 + ids % 50, y + 120 + ids % 90], axis=1).astype(np.float32)
    return DrawnTracks(ids, boxes, ids % 2, (0.5 + 0.49 * np.cos(ids)).astype(np.float32))


def naive_picture(image: np.ndarray, shown: DrawnTracks) -> np.ndarray:
    picture = image.copy()
    for track_id, box, class_id, score in zip(shown.ids, shown.boxes_xyxy, shown.class_ids, shown.scores, strict=True):
        x0, y0, x1, y1 = map(int, box)
        cv2.rectangle(picture, (x0, y0), (x1, y1), (0, 255, 0), 2)
        text = f"{track_id} {NAMES[class_id]} {score:.2f}"
        cv2.putText(picture, text, (x0, y0 - 4), cv2.FONT_HERSHEY_SIMPLEX, 0.6, (0, 255, 0), 2)
    return picture


def ours(path: Path, frames: list[np.ndarray], count: int, objects: int) -> None:
    painter = Painter(NAMES)
    with VideoWriter(path, FPS) as writer:
        for number in range(count):
            bar = f"frame {number + 1}   {objects} tracks   60.0 fps"
            writer.write(painter.draw(frames[number % len(frames)], tracks(number, objects), bar))


def with_opencv(path: Path, frames: list[np.ndarray], count: int, objects: int) -> None:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), float(FPS), (WIDTH, HEIGHT))
    for number in range(count):
        picture = naive_picture(frames[number % len(frames)], tracks(number, objects))
        writer.write(cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    writer.release()


def with_pyav(path: Path, frames: list[np.ndarray], count: int, objects: int) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for number in range(count):
            picture = naive_picture(frames[number % len(frames)], tracks(number, objects))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


def drawing_alone(path: Path, frames: list[np.ndarray], count: int, objects: int) -> None:
    painter = Painter(NAMES)
    for number in range(count):
        painter.draw(frames[number % len(frames)], tracks(number, objects), "frame   tracks   fps")


SIDES: dict[str, Callable[[Path, list[np.ndarray], int, int], None]] = {
    "ours": ours,
    "of it drawing": drawing_alone,
    "cv2.VideoWriter, MPEG-4": with_opencv,
    "PyAV, default x264": with_pyav,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=300)
    parser.add_argument("--objects", type=int, default=30)
    args = parser.parse_args()
    frames, what = pictures()
    print(f"{WIDTH}x{HEIGHT}, {args.frames} frames ({what}), {args.objects} objects, load {os.getloadavg()[0]:.1f}")
    print(f"{'':26}{'frames/s':>9}{'CPU ms/frame':>14}{'MB':>7}{'speed, ours = 1':>17}")
    first = 0.0
    for name, work in SIDES.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "out.mp4"
            wall, cpu = time.perf_counter(), time.process_time()
            work(path, frames, args.frames, args.objects)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            size = path.stat().st_size / 1e6 if path.is_file() else 0.0
        rate = args.frames / wall
        first = first or rate
        print(f"{name:26}{rate:9.1f}{1000 * cpu / args.frames:14.1f}{size:7.1f}{rate / first:17.2f}")


if __name__ == "__main__":
    main()
