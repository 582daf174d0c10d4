"""Checks of encoded images: defects, and near-duplicates between splits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf

import cv2
import numpy as np

from motip.data.decode import image_height_width
from motip.errors import MotipError

_NEAR_BITS = 3
"""Two images whose 64-bit difference hashes differ in at most this many bits are near-duplicates."""


def image_problem(data: bytes, size: tuple[int, int]) -> str | None:
    """Defect that makes a frame's image unusable for training, or None.

    OpenCV fills the missing part of a truncated JPEG with grey without an error, so the end marker is checked as well.

    Args:
        data: the encoded file.
        size: (width, height) of the sequence's images in pixels.
    """
    if not data:
        return "empty file"
    try:
        height, width = image_height_width(data, complete=False)
    except MotipError:
        return "no JPEG or PNG"
    if (width, height) != size:
        return f"is {width}x{height}, the sequence is {size[0]}x{size[1]}"
    if data[:2] == b"\xff\xd8" and b"\xff\xd9" not in data[-64:]:
        return "truncated JPEG"
    if _decode_small(data) is None:
        return "does not decode"
    return None


def _decode_small(data: bytes) -> np.ndarray | None:
    """(H/8, W/8) uint8 grey image, or None if OpenCV cannot decode it."""
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_REDUCED_GRAYSCALE_8)


def image_hash(data: bytes) -> str:
    """``<difference hash, 16 hex>:<sha256, first 16 hex>`` of an image.

    The difference hash (one bit per pair of neighbours in a 9x8 grid: does brightness rise?) is robust to scaling and
    recompression; see "Kind of Like That", hackerfactor.com 2013.

    Raises:
        MotipError: the image does not decode.
    """
    grey = _decode_small(data)
    if grey is None:
        raise MotipError("the image does not decode", fix="check it with image_problem first")
    cells = cv2.resize(grey, (9, 8), interpolation=cv2.INTER_AREA)
    bits = np.packbits(cells[:, 1:] > cells[:, :-1])
    return f"{bits.tobytes().hex()}:{hashlib.sha256(data).hexdigest()[:16]}"


def sampled_positions(count: int) -> list[int]:
    """First, middle and last of ``count`` frames."""
    return sorted({0, count // 2, count - 1}) if count else []


def near_duplicates(
    ours: SequenceOf[tuple[str, Iterable[str]]], theirs: SequenceOf[tuple[str, Iterable[str]]]
) -> list[tuple[str, str, bool]]:
    """Pairs of videos with a near-duplicate frame.

    Args:
        ours, theirs: names of videos with the :func:`image_hash` of their sampled frames.

    Returns:
        (our name, their name, whether a frame is byte-identical), each pair once, sorted.
    """
    first, second = _unpack(ours), _unpack(theirs)
    if not first or not second:
        return []
    hashes = np.array([value for _, value, _ in second], dtype=np.uint64)
    pairs: dict[tuple[str, str], bool] = {}
    for name, value, exact in first:
        distance = np.bitwise_count(hashes ^ np.uint64(value))
        for index in np.flatnonzero(distance <= _NEAR_BITS):
            other, _, other_exact = second[int(index)]
            pairs[name, other] = pairs.get((name, other), False) or exact == other_exact
    return sorted((name, other, equal) for (name, other), equal in pairs.items())


def _unpack(named: SequenceOf[tuple[str, Iterable[str]]]) -> list[tuple[str, int, str]]:
    return [
        (name, int(value.partition(":")[0], 16), value.partition(":")[2]) for name, values in named for value in values
    ]
