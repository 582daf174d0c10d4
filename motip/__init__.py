"""MOTIP Curriculum: from public DanceTrack weights to a specialised aerial tracker, every number traceable."""

from motip.version import __version__

__all__ = ["__version__"]
