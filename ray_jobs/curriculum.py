"""The main job: convert, train every stage of a curriculum in order, record where every weight came from.

Examples:
    python ray_jobs/curriculum.py --config configs/demo/curriculum.yaml
    python ray_jobs/curriculum.py --config configs/samples/curriculum.yaml --data-root SAMPLES
    python ray_jobs/curriculum.py --config configs/demo/experiment.yaml --storage outputs/experiment --workers 0
    ray job submit --working-dir . -- python ray_jobs/curriculum.py --config configs/curriculum.yaml \\
        --data-root /data --storage /shared/motip --workers 4 --set EPOCHS=10 --set Vis-Specialist:LR=5e-6
    python ray_jobs/curriculum.py --config configs/demo/curriculum.yaml --tune --trials 8

It starts Ray on this machine, or joins the cluster that RAY_ADDRESS names. Run again, it goes on where it was cut off;
a stage that is finished and whose inputs have not changed is not run again. A file with `arms:` is an experiment: every
arm is run with every seed, and what they found is written as tables with intervals. With --tune each stage that has a
line `sweep: FILE` is tuned first and then trained with the values found.
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
    parser.add_argument("--arms", metavar="A,B", help="of an experiment file: only these arms (default: all)")
    parser.add_argument("--seeds", metavar="1,2", help="of an experiment file: only these seeds (default: all)")
    parser.add_argument("--tune", action="store_true", help="first tune each stage that names a sweep")
    parser.add_argument("--trials", type=int, metavar="N", help="with --tune: settings tried")
    parser.add_argument("--workers-per-trial", type=int, default=1, metavar="N", help="with --tune (default: 1)")
    parser.add_argument("--strict", action="store_true", help="an undecodable image ends the conversion")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    with exit_on_error():
        from motip.cli.launch import launch_curriculum, launch_experiment
        from motip.cli.report_page import draw_sheets
        from motip.config.experiment_file import is_experiment
        from motip.tune import Tuning

        if is_experiment(args.config):
            launch_experiment(
                args.config,
                data_root=args.data_root,
                storage=args.storage,
                workers=args.workers,
                overrides=args.overrides,
                arms=args.arms,
                seeds=args.seeds,
                strict=args.strict,
            )
            return
        launch_curriculum(
            args.config,
            data_root=args.data_root,
            storage=args.storage,
            workers=args.workers,
            overrides=args.overrides,
            until=args.until,
            strict=args.strict,
            before_page=draw_sheets,
            tune=Tuning(args.workers_per_trial, args.trials) if args.tune else None,
        )


if __name__ == "__main__":
    main()
