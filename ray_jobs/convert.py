"""Raw datasets to shards: read, pick videos for every stage, lock val and test, report every label row.

Examples:
    python ray_jobs/convert.py --config configs/curriculum.yaml --data-root /data
    python ray_jobs/convert.py --config configs/samples/curriculum.yaml --data-root SAMPLES --strict
    ray job submit --working-dir . -- python ray_jobs/convert.py --config configs/curriculum.yaml \\
        --data-root s3://bucket/raw --storage s3://bucket/motip

Run again, it adds what is missing and leaves the rest: more videos in the curriculum, a run that was stopped.
S3 takes endpoint, region and credentials from the environment (AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID, ...).
It writes under STORAGE/shards: SOURCE/SPLIT/VIDEO.parquet, manifest.json, report.json, SOURCE_overlay.png.
"""

from __future__ import annotations

import argparse

from motip.errors import exit_on_error


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/curriculum.yaml", help="curriculum file (default: %(default)s)")
    parser.add_argument("--data-root", default=".", help="folder or s3:// URI with the raw datasets (default: here)")
    parser.add_argument("--storage", default="~/motip", help="folder or s3:// URI for the shards (default: ~/motip)")
    parser.add_argument(
        "--strict", action="store_true", help="broken images and look-alikes of val in train are errors"
    )
    parser.add_argument(
        "--seed",
        type=int,
        help="order in which videos are picked, here and in the stages that follow (default: that of the conversion "
        "before, else 0)",
    )
    parser.add_argument("--allow-fewer", action="store_true", help="take what there is where a stage asks for more")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    with exit_on_error():
        from motip.cluster import connect, disconnect
        from motip.config import load_curriculum
        from motip.curriculum.synthetic_sources import with_worlds
        from motip.data.convert import check_data_root, convert, ray_map
        from motip.data.convert_report import ConversionUi

        check_data_root(args.data_root)
        curriculum = with_worlds(load_curriculum(args.config), args.storage, print)
        with ConversionUi() as ui:
            connect()
            try:
                report = convert(
                    curriculum,
                    args.data_root,
                    args.storage,
                    strict=args.strict,
                    seed=args.seed,
                    allow_fewer=args.allow_fewer,
                    map_fn=ray_map(),
                    progress=ui.progress,
                )
            finally:
                disconnect()
        ui.show(report)


if __name__ == "__main__":
    main()
