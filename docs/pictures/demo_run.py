"""Pictures of a finished demo run, for the README and docs/report.md; needs Chromium and chromedriver.

    make demo
    python docs/pictures/demo_run.py outputs/demo/curricula/demo
    python docs/pictures/demo_run.py outputs/demo/curricula/demo --out elsewhere/

The run is only read. `tracked_video.jpg`: for each domain, the frame with most tracks of its first validation video,
tracked by the domain's last stage and drawn as by `motip track`; the demo's frames are 224 pixels wide and enlarged
first. `failure_sheet.jpg`: the contact sheet of the last stage, from its stored tracks. `dashboard.png`: its dashboard.
`report_page.png`, `report_page_phone.png`: the top of the run's report page in a browser.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from motip.data.clip_loader import read_video_frames  # noqa: E402
from motip.data.manifest import Manifest  # noqa: E402
from motip.data.video_reader import open_source  # noqa: E402
from motip.errors import MotipError, exit_on_error  # noqa: E402
from motip.report.dashboard import draw_dashboard  # noqa: E402
from motip.report.failures import SHEET, write_failures  # noqa: E402
from motip.report.stage_list import read_stage_list  # noqa: E402
from motip.report.tracked_run import load_stored_run  # noqa: E402
from motip.report.tracked_video import track_video  # noqa: E402
from motip.storage.atomic import atomic_write  # noqa: E402
from motip.tracking.api import track  # noqa: E402
from tests.helpers.browser import browser  # noqa: E402

MAX_BYTES = 250_000
ENLARGED = 4
SHOTS = (("report_page.png", 1280, "light", None), ("report_page_phone.png", 390, "dark", 1400))
"""File, width in CSS pixels, colour scheme, height of what is shown; None: to the end of the heat map."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of a curriculum with its report.html")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="default: %(default)s")
    args = parser.parse_args()
    folder, out = args.folder.resolve(), args.out
    stages = {name: Path(str(place)) for name, place in read_stage_list(folder).folders.items() if place is not None}
    last = list(stages)[-1]
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        # Tracked frames.
        tiles = [tracked_frame(folder.parent.parent, stages[name], work / name) for name in own_last(stages)]
        save(out / "tracked_video.jpg", np.concatenate(side_by_side(tiles), axis=1))
        # Failure sheet and dashboard of the last stage.
        tracked = load_stored_run(stages[last])
        write_failures(tracked.videos(), work, tracked.title, clips=0)
        save(out / "failure_sheet.jpg", shrunk(read(work / SHEET), 0.75))
        draw_dashboard(stages[last], work / "dashboard.png")
        save(out / "dashboard.png", shrunk(read(work / "dashboard.png"), 0.75))
        # Report page.
        with browser(work) as window:
            for name, width, scheme, height in SHOTS:
                window.set_screen(width, 844, scheme)
                window.open((folder / "report.html").as_uri())
                end = "return document.getElementById('weights').getBoundingClientRect().top"
                window.screenshot(work / name, height or round(window.run(end)))
                save(out / name, shrunk(read(work / name), 0.7 if width > 1000 else 1.0))


def own_last(stages: dict[str, Path]) -> list[str]:
    """For each validation source, the last stage validated on it; without duplicates."""
    found: dict[str, str] = {}
    for name, place in stages.items():
        for source in json.loads((place / "job.json").read_text())["val"]:
            found[source] = name
    return list(dict.fromkeys(found.values()))


def tracked_frame(storage: Path, stage: Path, work: Path) -> np.ndarray:
    """The frame with most tracks of the stage's first validation video, as `motip track` draws it."""
    source = json.loads((stage / "job.json").read_text())["val"][0]
    video = min(Manifest.load(storage).of(source, "val"), key=lambda each: each.video)
    images = work / "img1"
    images.mkdir(parents=True)
    for number, image in read_video_frames(video, str(storage)):
        large = cv2.resize(image, None, fx=ENLARGED, fy=ENLARGED, interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(images / f"{number + 1:08d}.png"), large[..., ::-1])
    tracking = track(images / "%08d.png", stage / "checkpoint_best.pth", device="cpu", fps=float(Fraction(video.fps)))
    counts: list[int] = []
    done = track_video(tracking, work / "tracked.mp4", on_frame=lambda found: counts.append(len(found)))
    frames = [image for _, image in open_source(str(done.video))]
    return frames[counts.index(max(counts))]


def side_by_side(tiles: list[np.ndarray]) -> list[np.ndarray]:
    """The pictures at one height, with a white gap between them."""
    height = min(len(tile) for tile in tiles)
    parts: list[np.ndarray] = []
    for tile in tiles:
        gap = [np.full((height, 8, 3), 255, np.uint8)] if parts else []
        parts += [*gap, cv2.resize(tile, (round(tile.shape[1] * height / len(tile)), height))]
    return parts


def read(path: Path) -> np.ndarray:
    """(H, W, 3) uint8 RGB of an image file, on white where it is transparent."""
    with Image.open(path) as picture:
        layer = picture.convert("RGBA")
        return np.asarray(Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB"))


def shrunk(pixels: np.ndarray, factor: float) -> np.ndarray:
    return pixels if factor == 1 else cv2.resize(pixels, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)


def save(path: Path, pixels: np.ndarray) -> None:
    """Write an image in the best quality with at most MAX_BYTES; raises MotipError if none is small enough."""
    picture = Image.fromarray(pixels)
    for quality in (92, 88, 84, 80, 75, 70, 60):
        with atomic_write(path) as temporary:
            if path.suffix == ".jpg":
                picture.save(temporary, quality=quality, optimize=True, subsampling=0 if quality > 80 else 2)
            else:
                picture.quantize(quality * 2, dither=Image.Dither.NONE).save(temporary, optimize=True)
        if path.stat().st_size <= MAX_BYTES:
            print(f"{path}: {picture.width}x{picture.height}, {path.stat().st_size / 1000:.0f} kB")
            return
    raise MotipError("the image is too large at the lowest quality", where=path, found=path.stat().st_size)


if __name__ == "__main__":
    with exit_on_error():
        main()
