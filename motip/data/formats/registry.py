"""Raw formats by the name a curriculum calls them."""

from __future__ import annotations

from typing import cast

from motip.data.formats import bdd100k, motchallenge, visdrone
from motip.data.formats.common import RawSequence, Reader
from motip.errors import MotipError

READERS: dict[str, Reader] = {
    "bdd100k": cast(Reader, bdd100k),
    "visdrone": cast(Reader, visdrone),
    "motchallenge": cast(Reader, motchallenge),
}
__all__ = ["READERS", "RawSequence", "Reader", "reader"]


def reader(name: str) -> Reader:
    """The reader of a format. A new one is a module with ``list_sequences`` and ``read_sequence``, and a line above.

    Raises:
        MotipError: unknown name.
    """
    if name not in READERS:
        raise MotipError(
            f"unknown data format {name!r}",
            where="format of a source",
            expected="one of " + ", ".join(READERS),
            fix="DanceTrack and MOT17 are 'motchallenge'",
        )
    return READERS[name]
