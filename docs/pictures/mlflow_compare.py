"""Take a screenshot of MLflow's comparison of a curriculum's stages; needs Chromium and chromedriver.

Usage:
    python docs/pictures/mlflow_compare.py outputs/demo
    python docs/pictures/mlflow_compare.py STORAGE --curriculum NAME --out elsewhere/

The storage is only read: MLflow serves a copy of its database.
"""

from __future__ import annotations

import argparse
import sqlite3
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import cv2  # noqa: E402

from tests.helpers.browser import browser  # noqa: E402
from tests.helpers.mlflow_server import compared, comparison, only_differences, row, serving  # noqa: E402

NAME = "mlflow_compare.png"
WIDTH, HEIGHT = 1500, 1480


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("storage", type=Path, help="storage of a curriculum that has run")
    parser.add_argument("--curriculum", default="demo", help="its name (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=HERE, help="folder for the picture (default: %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / "copy.db"
        with sqlite3.connect(f"file:{args.storage}/mlflow/mlflow.db?mode=ro", uri=True) as source:
            source.backup(sqlite3.connect(copy))
        runs, experiment = stages(copy, args.curriculum)
        with serving(Path(temporary), copy) as server, browser(Path(temporary)) as window:
            window.set_screen(WIDTH, HEIGHT, "light")
            compared(window, comparison(server.address, runs, experiment), ["LR"], len(runs))
            only_differences(window)
            print("best_HOTA", *row(window, "best_HOTA", len(runs)))
            time.sleep(2)
            taken = Path(temporary) / NAME
            window.screenshot(taken, HEIGHT)
        pixels = cv2.imread(str(taken))
        assert pixels is not None
        pixels = cv2.resize(pixels, None, fx=0.8, fy=0.8, interpolation=cv2.INTER_AREA)
        cv2.imwrite(str(args.out / NAME), pixels, [cv2.IMWRITE_PNG_COMPRESSION, 9])
    print(args.out / NAME, (args.out / NAME).stat().st_size, "bytes")


def stages(database: Path, curriculum: str) -> tuple[list[str], str]:
    """Run ids of a curriculum's stages by start time, and the id of their experiment."""
    with sqlite3.connect(database) as connection:
        found = connection.execute(
            "select runs.run_uuid, runs.experiment_id from runs join tags on tags.run_uuid = runs.run_uuid "
            "where tags.key = 'mlflow.parentRunId' and tags.value in (select run_uuid from tags "
            "where key = 'motip.curriculum' and value = ?) order by runs.start_time",
            (curriculum,),
        ).fetchall()
    if not found:
        raise SystemExit(f"no stage of a curriculum named {curriculum} in {database}")
    return [run for run, _ in found], str(found[0][1])


if __name__ == "__main__":
    main()
