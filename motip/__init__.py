"""MOTIP Curriculum: from public DanceTrack weights to a specialised aerial tracker, every number traceable."""

__version__ = "0.1.0"
