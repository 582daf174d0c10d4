"""From raw label folders to batches of clips."""
