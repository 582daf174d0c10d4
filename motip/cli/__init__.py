"""The `motip` command line: one module per verb or group; heavy packages are imported when a verb runs."""
