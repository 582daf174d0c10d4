"""One reader per raw dataset format, and the writers of result files."""
