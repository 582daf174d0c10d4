"""A sweep for one stage: many short trainings with other values, the best confirmed with further seeds.

Examples:
    python ray_jobs/tune.py --config configs/bdd_stage2.yaml --sweep configs/sweeps/lr_and_intervals.yaml \\
        --data-root /data --set DETR_PRETRAIN=checkpoint_best.pth --videos 150 --trials 16
    python ray_jobs/tune.py --config configs/curriculum.yaml --stage Vis-Adaptation \\
        --sweep configs/sweeps/visdrone_stage1.yaml --data-root /data
    python ray_jobs/tune.py --config configs/demo/curriculum.yaml --stage BDD-Foundation --sweep configs/demo/sweep.yaml
    ray job submit --working-dir . -- python ray_jobs/tune.py --config configs/curriculum.yaml --stage BDD-Refinement \\
        --sweep configs/sweeps/lr_and_intervals.yaml --data-root /data --storage /shared/motip --workers-per-trial 2

Each trial has workers of its own and is a child run of the sweep's run in MLflow; how many run side by side follows
from the cluster. Run again, it goes on; with more --trials it goes further. The values found are written as a small
YAML file with their evidence, which a stage of a curriculum file names in a line `tuned: FILE`.
"""

from __future__ import annotations

import argparse

from motip.errors import exit_on_error


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="configuration of the stage, or a curriculum file")
    parser.add_argument("--sweep", help="what is searched and how (default: the file that the stage names)")
    parser.add_argument("--stage", help="stage of the curriculum file; those before it are trained first if need be")
    parser.add_argument("--trials", type=int, metavar="N", help="settings that are tried (default: the sweep file's)")
    parser.add_argument("--workers-per-trial", type=int, default=1, metavar="N", help="(default: 1)")
    parser.add_argument("--at-once", type=int, metavar="N", help="trials side by side (default: as many as fit)")
    place = "the stage's `tuned:`, else under configs/tuned/"
    parser.add_argument("--tuned", metavar="FILE", help=f"where the values go (default: {place})")
    parser.add_argument("--data-root", help="folder with the raw datasets")
    parser.add_argument("--storage", default="~/motip", help="shards, trials, MLflow database (default: ~/motip)")
    parser.add_argument("--videos", type=int, help="training videos of each dataset, for a stage's configuration")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--strict", action="store_true", help="an undecodable image ends the conversion")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    with exit_on_error():
        from motip.cli.stage_tuning import AskedSweep, sweep_stage
        from motip.tune import Tuning

        sweep_stage(
            AskedSweep(
                *(args.config, args.sweep, args.stage, args.data_root, args.storage, args.overrides, args.videos),
                strict=args.strict,
            ),
            Tuning(args.workers_per_trial, args.trials, args.at_once, args.tuned),
        )


if __name__ == "__main__":
    main()
