"""Image decoding to RGB, at the smallest scale that still has the pixels needed."""

from __future__ import annotations

import struct

import cv2
import numpy as np

from motip.errors import MotipError

_REDUCED_FLAGS = {
    1: cv2.IMREAD_COLOR,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}
"""OpenCV flag by reduction factor. JPEG skips its finest DCT coefficients then, which costs much less time."""

_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_WITHOUT_LENGTH = frozenset({0x01, *range(0xD0, 0xD8)})
_START_OF_SCAN = 0xDA


def image_height_width(encoded: bytes, where: object = None, *, complete: bool = True) -> tuple[int, int]:
    """(height, width) of a JPEG or PNG from its header, without decoding.

    The orientation tag is not applied: labels refer to the stored pixels.

    Args:
        where: sequence and frame, for the error.
        complete: also require the end of the file; False accepts a truncated file with a readable header.

    Raises:
        MotipError: neither a JPEG nor a PNG, or truncated.
    """
    if encoded[:2] == b"\xff\xd8":
        return _jpeg_height_width(encoded, where, complete)
    if encoded[:8] == b"\x89PNG\r\n\x1a\n" and len(encoded) >= 24:
        if complete and b"IEND" not in encoded[-64:]:
            raise _broken(where, f"a PNG truncated after {len(encoded)} bytes")
        width, height = struct.unpack(">II", encoded[16:24])
        return height, width
    raise _broken(where, _start_of(encoded))


def reduction_for(window_hw: tuple[int, int], target_hw: tuple[int, int]) -> int:
    """Largest reduction (1, 2, 4 or 8) at which a decoded window still has at least the target's (H, W) pixels."""
    fitting = [k for k in _REDUCED_FLAGS if all(w // k >= t for w, t in zip(window_hw, target_hw, strict=True))]
    return max(fitting, default=1)


def decode_rgb(encoded: bytes, reduction: int = 1, where: object = None) -> np.ndarray:
    """Decode an image.

    Args:
        encoded: JPEG, PNG or another format that OpenCV reads; grey and transparent images become RGB.
        reduction: 1, 2, 4 or 8; the result has ceil(size / reduction) pixels per side.
        where: sequence and frame, for the error.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        MotipError: not an image, or truncated.
    """
    if encoded[:2] == b"\xff\xd8":
        image_height_width(encoded, where)  # OpenCV fills a missing part with grey and only prints a warning
    try:
        image = cv2.imdecode(
            np.frombuffer(encoded, np.uint8), _REDUCED_FLAGS[reduction] | cv2.IMREAD_IGNORE_ORIENTATION
        )
    except cv2.error:  # an empty buffer raises instead of returning None
        image = None
    if image is None:
        raise _broken(where, _start_of(encoded))
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def _jpeg_height_width(encoded: bytes, where: object, complete: bool) -> tuple[int, int]:
    """Parse the segments up to the frame header; if ``complete``, also check that the scan has an end marker.

    Inside a scan 0xFF is always followed by 0x00 or a restart marker, so an end marker after the start of the scan
    belongs to the image itself; thumbnails, which have end markers too, are in segments that are skipped.
    """
    size: tuple[int, int] | None = None
    at = 2
    while at + 4 <= len(encoded) and encoded[at] == 0xFF:
        marker = encoded[at + 1]
        if marker == 0xFF or marker in _WITHOUT_LENGTH:  # fill bytes and bare markers
            at += 1 if marker == 0xFF else 2
            continue
        if marker in _START_OF_FRAME and at + 9 <= len(encoded):
            size = struct.unpack(">HH", encoded[at + 5 : at + 9])
            if not complete:
                return size
        if marker == _START_OF_SCAN:
            if size is None or encoded.rfind(b"\xff\xd9", at) < 0:
                break
            return size
        at += 2 + int.from_bytes(encoded[at + 2 : at + 4], "big")
    raise _broken(where, f"a JPEG truncated after {len(encoded)} bytes")


def _start_of(encoded: bytes) -> str:
    return f"{len(encoded)} bytes that start with {encoded[:4]!r}"


def _broken(where: object, found: str) -> MotipError:
    return MotipError(
        "a frame cannot be decoded",
        where=where,
        found=found,
        expected="a complete JPEG or PNG image",
        fix="download the frame again and convert its sequence again, or leave the sequence out",
    )
