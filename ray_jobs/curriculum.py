"""Main job: convert the data, train every stage of a curriculum in order, record the lineage of all weights.

Examples:
    python ray_jobs/curriculum.py --config configs/demo/curriculum.yaml
    python ray_jobs/curriculum.py --config configs/samples/curriculum.yaml --data-root SAMPLES
    python ray_jobs/curriculum.py --config configs/demo/experiment.yaml --storage outputs/experiment --workers 0
    ray job submit --working-dir . -- python ray_jobs/curriculum.py --config configs/curriculum.yaml \\
        --data-root /data --storage /shared/motip --workers 4 --set EPOCHS=10 --set Vis-Specialist:LR=5e-6
    python ray_jobs/curriculum.py --config configs/demo/curriculum.yaml --tune --trials 8

It starts Ray on this machine, or joins the cluster at RAY_ADDRESS. A repeated run resumes after an interruption; a
finished stage with unchanged inputs is not trained again. A file with `arms:` is an experiment: every arm is run with
every seed, and the results are written as tables with intervals. With --tune each stage with a line `sweep: FILE` is
tuned first and then trained with the values found.
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
        help="training workers; MIN:MAX follows the resources of the cluster; 0 trains in this process (default: 1)",
    )
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="[STAGE:]KEY=VALUE")
    parser.add_argument("--until", metavar="STAGE", help="last stage to run (default: all stages)")
    parser.add_argument("--arms", metavar="A,B", help="experiment file: arms to run (default: all)")
    parser.add_argument("--seeds", metavar="1,2", help="experiment file: seeds to run (default: all)")
    parser.add_argument("--tune", action="store_true", help="tune each stage with a `sweep:` line before training it")
    parser.add_argument("--trials", type=int, metavar="N", help="with --tune: number of trials (default: sweep file)")
    parser.add_argument("--workers-per-trial", type=int, default=1, metavar="N", help="with --tune (default: 1)")
    parser.add_argument("--strict", action="store_true", help="stop the conversion at an undecodable image")
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
            tune=Tuning(workers=args.workers_per_trial, trials=args.trials) if args.tune else None,
        )


if __name__ == "__main__":
    main()
