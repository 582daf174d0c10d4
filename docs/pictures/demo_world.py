"""Figure of the demo dataset: frames with the labels that training uses.

    python docs/pictures/demo_world.py docs/pictures/demo_world.png

The sequences are written in the raw BDD100K and VisDrone formats and read back by the readers of the real
datasets; the figure shows the sequences that they return.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from motip.data.formats.common import RawSequence
from motip.data.formats.registry import reader
from motip.data.overlay import draw_labels
from motip.data.sequence import ClassMap, Frame, Sequence
from motip.demo import write_demo_dataset
from motip.errors import exit_on_error
from motip.storage.atomic import atomic_write

SEED = 7
SCALE = 3
COLOURS = 192
BORDER = 6
CAPTION_HEIGHT = 34
FRAMES = (0, 12, 24)
"""Frames of each sequence that are shown, from left to right."""
DOMAINS = {
    "ground": ("ground view, written and read as BDD100K", {"pedestrian": ("pedestrian",), "car": ("car",)}),
    "aerial": (
        "aerial view, written and read as VisDrone",
        {"pedestrian": ("pedestrian", "people"), "car": ("car", "van")},
    ),
}


def main(target: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        dataset = write_demo_dataset(
            Path(folder), seed=SEED, domains={domain: {"train": 1} for domain in DOMAINS}, frames=25
        )
        rows = []
        for domain, (title, classes) in DOMAINS.items():
            source = dataset.source(domain)
            formats = reader(source["format"])
            raw: RawSequence = formats.list_sequences(Path(source["root"]), "train")[0]
            sequence, _ = formats.read_sequence(raw)
            rows.append(caption(f"{title}: frames {', '.join(str(number) for number in FRAMES)}", 3 * width(sequence)))
            class_map = ClassMap(tuple(classes), classes)
            rows.append(np.concatenate([tile(sequence.frames[number], class_map) for number in FRAMES], axis=1))
    # OpenCV cannot write a palette, which keeps the file small.
    image = Image.fromarray(cv2.cvtColor(np.concatenate(rows), cv2.COLOR_BGR2RGB))
    with atomic_write(target) as temporary:
        image.quantize(COLOURS, dither=Image.Dither.NONE).save(temporary, format="PNG", optimize=True)
    print(f"{target}: {target.stat().st_size / 1000:.0f} kB")


def width(sequence: Sequence) -> int:
    return sequence.width * SCALE + BORDER


def tile(frame: Frame, class_map: ClassMap) -> np.ndarray:
    assert isinstance(frame.image, Path)
    image = cv2.imread(str(frame.image))
    image = cv2.resize(image, None, fx=SCALE, fy=SCALE, interpolation=cv2.INTER_NEAREST)
    draw_labels(image, frame, class_map, SCALE)
    return cv2.copyMakeBorder(image, 0, BORDER, 0, BORDER, cv2.BORDER_CONSTANT, value=(255, 255, 255))


def caption(text: str, columns: int) -> np.ndarray:
    strip = np.full((CAPTION_HEIGHT, columns, 3), 255, np.uint8)
    cv2.putText(strip, text, (4, 24), cv2.FONT_HERSHEY_SIMPLEX, 0.65, (40, 40, 40), 1, cv2.LINE_AA)
    return strip


if __name__ == "__main__":
    with exit_on_error():
        main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/pictures/demo_world.png"))
