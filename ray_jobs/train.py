"""Train a single stage: convert its data, train, validate, record.

Examples:
    python ray_jobs/train.py --config configs/bdd_stage2.yaml --data-root /data --videos 150 \\
        --set DETR_PRETRAIN=checkpoint_best.pth
    python ray_jobs/train.py --config configs/samples/stage1.yaml --data-root SAMPLES --videos 1 \\
        --set DATASETS=[BDD100K] --set NUM_CLASSES=1 --set CLASSES=[car]
    ray job submit --working-dir . -- python ray_jobs/train.py --config configs/visdrone_stage1.yaml \\
        --data-root /data --storage /shared/motip --workers 4 --videos 80 \\
        --set DETR_PRETRAIN=/shared/motip/checkpoint_best.pth

DATASETS of the configuration names the datasets (BDD100K, VisDrone, DanceTrack), searched in DATA_ROOT under the data
root and in the data root itself. DETR_PRETRAIN is the path of the weights; null trains from fresh ones. A repeated run
resumes.
"""

from __future__ import annotations

import argparse

from motip.errors import exit_on_error


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="configuration of the stage")
    parser.add_argument("--data-root", help="folder with the raw datasets (default: root_path of the configuration)")
    parser.add_argument("--storage", default="~/motip", help="shards, checkpoints, MLflow database (default: ~/motip)")
    parser.add_argument(
        "--workers",
        default="1",
        metavar="N|MIN:MAX",
        help="training workers; MIN:MAX follows the resources of the cluster; 0 trains in this process (default: 1)",
    )
    parser.add_argument("--videos", type=int, help="number of training videos of each dataset (default: all)")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--strict", action="store_true", help="stop the conversion at an undecodable image")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    with exit_on_error():
        from motip.cli.stage_training import train_stage

        train_stage(
            args.config,
            data_root=args.data_root,
            storage=args.storage,
            workers=args.workers,
            overrides=args.overrides,
            videos=args.videos,
            strict=args.strict,
        )


if __name__ == "__main__":
    main()
