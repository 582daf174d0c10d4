"""The verbs of the `motip` command, one file a group; heavy packages are imported when a verb runs."""
