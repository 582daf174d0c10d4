"""Readers of raw dataset formats, and readers and writers of result files."""
