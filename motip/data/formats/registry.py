"""Registry of the dataset readers, by the ``format`` of a source in the curriculum file."""

from __future__ import annotations

from motip.data.formats import bdd100k, motchallenge, visdrone
from motip.data.formats.common import RawSequence, Reader
from motip.errors import MotipError

READERS: dict[str, Reader] = {
    "bdd100k": bdd100k,
    "visdrone": visdrone,
    "motchallenge": motchallenge,
}
"""A new format is a reader module, a name in `motip.config.DatasetFormat` and an entry here (docs/data.md)."""

__all__ = ["READERS", "RawSequence", "Reader", "reader"]


def reader(name: str) -> Reader:
    """The reader of a format; raises MotipError for an unknown one."""
    if name not in READERS:
        raise MotipError(
            f"unknown data format {name!r}",
            where="format of a source",
            expected="one of " + ", ".join(READERS),
            fix="DanceTrack and MOT17 are 'motchallenge'",
        )
    return READERS[name]
