"""The main job: convert, train every stage of a curriculum in order, record where every weight came from.

Examples:
    python ray_jobs/curriculum.py --config configs/demo/curriculum.yaml
    python ray_jobs/curriculum.py --config configs/samples/curriculum.yaml --data-root ../shared/samples
    ray job submit --working-dir . -- python ray_jobs/curriculum.py --config configs/curriculum.yaml \\
        --data-root /data --storage /shared/motip --workers 4 --set EPOCHS=10 --set Vis-Specialist:LR=5e-6

It starts Ray on this machine, or joins the cluster that RAY_ADDRESS names. Run again, it goes on where it was cut off;
a stage that is finished and whose inputs have not changed is not run again.
"""

from __future__ import annotations

import argparse

from motip.errors import exit_on_error


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/curriculum.yaml", help="curriculum file (default: %(default)s)")
    parser.add_argument("--data-root", default=".", help="folder or s3:// URI with the raw datasets and base weights")
    parser.add_argument("--storage", default="~/motip", help="shards, checkpoints, MLflow database (default: ~/motip)")
    parser.add_argument(
        "--workers",
        default="1",
        metavar="N|MIN:MAX",
        help="training workers; MIN:MAX follows the room on the cluster; 0 trains in this process (default: 1)",
    )
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="[STAGE:]KEY=VALUE")
    parser.add_argument("--until", metavar="STAGE", help="stop after this stage")
    parser.add_argument("--strict", action="store_true", help="an undecodable image ends the conversion")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    with exit_on_error():
        from motip.commands.report_page import draw_sheets
        from motip.launch import launch_curriculum

        launch_curriculum(
            args.config,
            data_root=args.data_root,
            storage=args.storage,
            workers=args.workers,
            overrides=args.overrides,
            until=args.until,
            strict=args.strict,
            before_page=draw_sheets,
        )


if __name__ == "__main__":
    main()
