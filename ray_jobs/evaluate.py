"""Track and score the locked videos of every domain with one checkpoint.

Examples:
    python ray_jobs/evaluate.py --checkpoint checkpoint_best.pth --config configs/curriculum.yaml --storage ~/motip
    python ray_jobs/evaluate.py --checkpoint checkpoint_best.pth --config configs/samples/curriculum.yaml \\
        --data-root SAMPLES --sources visdrone --workers 0
    ray job submit --working-dir . -- python ray_jobs/evaluate.py --checkpoint /shared/motip/best.pth \\
        --storage /shared/motip
    python ray_jobs/evaluate.py --checkpoint checkpoint_best.pth --sweep-thresholds

The checkpoint carries its own configuration; the curriculum file says which raw categories are which class. Tracks (MOT
rows) and scores_SPLIT.json go to STORAGE/evaluations/SHA256. Run again, videos that are finished are not tracked again.
"""

from __future__ import annotations

import argparse

from motip.errors import exit_on_error


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="checkpoint or exported weights")
    parser.add_argument("--config", default="configs/curriculum.yaml", help="curriculum file (default: %(default)s)")
    parser.add_argument("--storage", default="~/motip", help="folder or s3:// URI of the shards (default: ~/motip)")
    parser.add_argument("--data-root", help="raw datasets, to convert what the shards lack (default: shards only)")
    parser.add_argument("--split", default="val", help="val or test (default: val)")
    parser.add_argument("--sources", help="only these, comma-separated (default: all of the manifest)")
    parser.add_argument("--workers", type=int, help="Ray actors; 0 tracks in this process (default: every CPU or GPU)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--errors", action="store_true", help="also say which objects are lost")
    parser.add_argument("--sweep-thresholds", action="store_true", help="find the DET_THRESH with the best HOTA on val")
    parser.add_argument("--thresholds", help="of the sweep, comma-separated (default: 0.1 to 0.9 in steps of 0.05)")
    parser.add_argument("--json", dest="json_path", metavar="OUT", help="write the scores here too")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    with exit_on_error():
        from motip.cli.evaluation_job import Asked, evaluation

        asked = Asked(
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
        evaluation(asked, errors=args.errors, sweep_thresholds=args.sweep_thresholds, thresholds=args.thresholds)


if __name__ == "__main__":
    main()
