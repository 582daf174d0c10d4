"""Scores that can be believed: protocols, metrics, stage × domain."""
