"""Main memory of a process that trains on a CPU."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_NEVER = -1


def keep_freed_memory() -> None:
    """Have malloc keep what one training step frees for the next.

    A step frees tensors of up to a hundred megabytes and asks for the same again. By default each of them comes from
    the system, which has to map and clear its pages: 28 GB in a step of the full network, a third of its time. Only
    glibc can be told so, and only of what the main thread allocates where pieces are larger than 64 MB; elsewhere
    nothing changes. The process stays as large as its largest step made it.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, _NEVER)
