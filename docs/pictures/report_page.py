"""Take the two pictures of a report page that the documentation shows; needs Chromium and chromedriver.

Usage:
    python docs/pictures/report_page.py CURRICULUM_FOLDER
    python docs/pictures/report_page.py CURRICULUM_FOLDER --out elsewhere/
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import cv2  # noqa: E402

from tests.browser import browser  # noqa: E402

SHOTS = (("report_page.png", 1280, "light", 1660), ("report_page_phone.png", 390, "dark", 1400))
"""File, width in CSS pixels, colour scheme, height of what is shown."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of a curriculum with its report.html")
    parser.add_argument("--out", type=Path, default=HERE, help="folder for the pictures (default: %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, browser(Path(temporary)) as window:
        for name, width, scheme, height in SHOTS:
            window.look(width, 844, scheme)
            window.open((args.folder.resolve() / "report.html").as_uri())
            taken = Path(temporary) / name
            window.picture(taken, height)
            pixels = cv2.imread(str(taken))
            assert pixels is not None
            if width > 1000:
                pixels = cv2.resize(pixels, None, fx=0.7, fy=0.7, interpolation=cv2.INTER_AREA)
            cv2.imwrite(str(args.out / name), pixels, [cv2.IMWRITE_PNG_COMPRESSION, 9])
            print(args.out / name, (args.out / name).stat().st_size, "bytes")


if __name__ == "__main__":
    main()
