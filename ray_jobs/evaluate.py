"""Track and score the locked videos of every domain with one checkpoint.

Examples:
    python ray_jobs/evaluate.py --checkpoint checkpoint_best.pth --config configs/curriculum.yaml --storage ~/motip
    python ray_jobs/evaluate.py --checkpoint checkpoint_best.pth --config configs/samples/curriculum.yaml \\
        --data-root SAMPLES --sources visdrone --workers 0
    ray job submit --working-dir . -- python ray_jobs/evaluate.py --checkpoint /shared/motip/best.pth \\
        --storage /shared/motip
    python ray_jobs/evaluate.py --checkpoint checkpoint_best.pth --sweep-thresholds

The checkpoint contains its configuration; the curriculum file has the class maps of the sources. Tracks (MOT rows) and
scores_SPLIT.json are written to STORAGE/evaluations/SHA256. A repeated run does not track finished videos again.
"""

from __future__ import annotations

import argparse

from motip.errors import exit_on_error


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="checkpoint or exported weights")
    parser.add_argument("--config", default="configs/curriculum.yaml", help="curriculum file (default: %(default)s)")
    parser.add_argument("--storage", default="~/motip", help="folder or s3:// URI of the shards (default: ~/motip)")
    parser.add_argument("--data-root", help="raw datasets, to convert missing shards (default: existing shards only)")
    parser.add_argument("--split", default="val", help="val or test (default: val)")
    parser.add_argument("--sources", help="sources to evaluate, comma-separated (default: all with this split)")
    parser.add_argument("--workers", type=int, help="Ray actors; 0: in this process (default: one per GPU or CPU)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--errors", action="store_true", help="also count lost objects by size, occlusion, ...")
    parser.add_argument("--sweep-thresholds", action="store_true", help="search the DET_THRESH of best HOTA on val")
    parser.add_argument("--thresholds", help="thresholds of the search (default: 0.1 to 0.9 in steps of 0.05)")
    parser.add_argument("--json", dest="json_path", metavar="OUT", help="also write the scores to this JSON file")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    with exit_on_error():
        from motip.cli.evaluation_job import EvaluateOptions, run_evaluation

        options = EvaluateOptions(
            args.checkpoint,
            args.config,
            storage=args.storage,
            data_root=args.data_root,
            split=args.split,
            sources=None if args.sources is None else [name.strip() for name in args.sources.split(",")],
            workers=args.workers,
            device=args.device,
            json_path=args.json_path,
        )
        run_evaluation(options, errors=args.errors, sweep_thresholds=args.sweep_thresholds, thresholds=args.thresholds)


if __name__ == "__main__":
    main()
