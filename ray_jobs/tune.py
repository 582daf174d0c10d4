"""Hyperparameter sweep for one stage: short trials over a search space, the best confirmed with further seeds.

Examples:
    python ray_jobs/tune.py --config configs/bdd_stage2.yaml --sweep configs/sweeps/lr_and_intervals.yaml \\
        --data-root /data --set DETR_PRETRAIN=checkpoint_best.pth --videos 150 --trials 16
    python ray_jobs/tune.py --config configs/curriculum.yaml --stage Vis-Adaptation \\
        --sweep configs/sweeps/visdrone_stage1.yaml --data-root /data
    python ray_jobs/tune.py --config configs/demo/curriculum.yaml --stage BDD-Foundation --sweep configs/demo/sweep.yaml
    ray job submit --working-dir . -- python ray_jobs/tune.py --config configs/curriculum.yaml --stage BDD-Refinement \\
        --sweep configs/sweeps/lr_and_intervals.yaml --data-root /data --storage /shared/motip --workers-per-trial 2

Each trial has its own workers and is a child run of the sweep's run in MLflow; how many run concurrently follows from
the resources of the cluster. A repeated run resumes; with more --trials it extends the sweep. The values found are
written as a YAML file with the scores they are based on; a stage of a curriculum file uses it by `tuned: FILE`.
"""

from __future__ import annotations

import argparse

from motip.errors import exit_on_error


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="configuration of the stage, or a curriculum file")
    parser.add_argument("--sweep", help="sweep file with the search space (default: the one that the stage names)")
    parser.add_argument("--stage", help="stage of the curriculum file; unfinished stages before it are trained first")
    parser.add_argument("--trials", type=int, metavar="N", help="number of trials (default: the sweep file's)")
    parser.add_argument("--workers-per-trial", type=int, default=1, metavar="N", help="(default: 1)")
    parser.add_argument("--at-once", type=int, metavar="N", help="concurrent trials (default: as many as fit)")
    default = "the stage's `tuned:`, else under configs/tuned/"
    parser.add_argument("--tuned", metavar="FILE", help=f"file for the values found (default: {default})")
    parser.add_argument("--data-root", help="folder with the raw datasets")
    parser.add_argument("--storage", default="~/motip", help="shards, trials, MLflow database (default: ~/motip)")
    parser.add_argument("--videos", type=int, help="number of training videos of each dataset (stage configuration)")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--strict", action="store_true", help="stop the conversion at an undecodable image")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    with exit_on_error():
        from motip.cli.stage_tuning import TuneOptions, sweep_stage
        from motip.tune import Tuning

        sweep_stage(
            TuneOptions(
                args.config,
                sweep=args.sweep,
                stage=args.stage,
                data_root=args.data_root,
                storage=args.storage,
                overrides=args.overrides,
                videos=args.videos,
                strict=args.strict,
            ),
            Tuning(
                workers=args.workers_per_trial,
                trials=args.trials,
                max_concurrent_trials=args.at_once,
                overlay=args.tuned,
            ),
        )


if __name__ == "__main__":
    main()
