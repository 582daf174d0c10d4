"""Datasets: raw formats, conversion to Parquet shards, clip plans and batches."""
