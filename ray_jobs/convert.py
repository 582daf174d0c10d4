"""Convert raw datasets to shards: select videos for every stage, lock val and test, account for every label row.

Examples:
    python ray_jobs/convert.py --config configs/curriculum.yaml --data-root /data
    python ray_jobs/convert.py --config configs/samples/curriculum.yaml --data-root SAMPLES --strict
    ray job submit --working-dir . -- python ray_jobs/convert.py --config configs/curriculum.yaml \\
        --data-root s3://bucket/raw --storage s3://bucket/motip

A repeated run converts only what is missing, after an interruption or with more videos in the curriculum.
S3 endpoint, region and credentials come from the environment (AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID, ...).
Output under STORAGE/shards: SOURCE/SPLIT/VIDEO.parquet, manifest.json, report.json, SOURCE_overlay.png.
"""

from __future__ import annotations

import argparse

from motip.errors import exit_on_error


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/curriculum.yaml", help="curriculum file (default: %(default)s)")
    parser.add_argument("--data-root", default=".", help="folder or s3:// URI with the raw datasets (default: .)")
    parser.add_argument("--storage", default="~/motip", help="folder or s3:// URI for the shards (default: ~/motip)")
    parser.add_argument(
        "--strict", action="store_true", help="fail on undecodable images and near-duplicates of val videos in train"
    )
    parser.add_argument(
        "--seed",
        type=int,
        help="seed of the order in which videos are selected, here and in all stages (default: that of the previous "
        "conversion, else 0)",
    )
    parser.add_argument("--allow-fewer", action="store_true", help="use the available videos if a stage requests more")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    with exit_on_error():
        from motip.cluster import connect, disconnect
        from motip.config import load_curriculum
        from motip.curriculum.synthetic_sources import with_synthetic_sources
        from motip.data.convert import check_data_root, convert, ray_map
        from motip.data.convert_report import ConversionUi

        check_data_root(args.data_root)
        curriculum = with_synthetic_sources(load_curriculum(args.config), args.storage, print)
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
