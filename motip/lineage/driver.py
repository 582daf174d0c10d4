"""Which process drives a run, so that another one can ask whether it still lives."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

_PROC = Path("/proc")
_DRIVER = re.compile(r"(?P<host>.+)/(?P<pid>[1-9]\d*)/(?P<start>\d*)")


def this_driver() -> str:
    """This process: host name, process id, and start time in clock ticks since boot, which a reused id does not share.

    The start time is empty where there is no /proc.
    """
    return f"{socket.gethostname()}/{os.getpid()}/{_start(os.getpid()) or ''}"


def driver_lives(driver: str) -> bool:
    """Whether the process that ``this_driver`` named is still there.

    Returns:
        True only for a process of this host with that id and start time: what runs on another host cannot be seen
        from here, and an empty or unknown name is nobody's.
    """
    told = _DRIVER.fullmatch(driver)
    if told is None or told["host"] != socket.gethostname():
        return False
    pid = int(told["pid"])
    if not told["start"]:
        return _start(os.getpid()) is None and _exists(pid)
    return _start(pid) == told["start"]


def _start(pid: int) -> str | None:
    """Field 22 of the process's status; None for one that is not there or has ended and waits for its parent."""
    try:
        status = (_PROC / str(pid) / "stat").read_text()
    except OSError:
        return None
    # The name, in brackets, may hold brackets and blanks itself.
    fields = status.rpartition(")")[2].split()
    return None if fields[0] in ("Z", "X") else fields[19]


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
