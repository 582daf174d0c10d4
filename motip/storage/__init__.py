"""Storage: local and S3 paths, atomic writes, retries."""
