"""Setting of the C allocator for processes that allocate and free the same large buffers repeatedly."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
_NEVER = -1


def keep_freed_memory() -> None:
    """Make glibc's malloc reuse freed memory instead of returning it to the system; no effect elsewhere.

    Used by decoding actors (frames and clips, 3 to 60 MB) and by training on a CPU (tensors up to a hundred MB). By
    default large buffers are mapped from the system and their pages cleared on every allocation: 28 GB per training
    step of the full network, a third of its time, and as much time per frame as decoding its JPEG. With no mapped
    buffers (M_MMAP_MAX 0) and no trimming of the heap, the resident size stays at the largest so far. Buffers above
    64 MB are reused only if the main thread allocates them.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, _NEVER)
