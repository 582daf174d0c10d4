"""Identity of the process that drives a run, and a check whether it is still alive."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from pathlib import Path

_PROC = Path("/proc")
_DRIVER = re.compile(r"(?P<host>.+)/(?P<pid>[1-9]\d*)/(?P<start>\d*)")
_PYTHON = re.compile(r"python|^ray::", re.IGNORECASE)
"""Command lines of processes that can be a driver; Ray renames its workers."""


def this_driver() -> str:
    """This process as ``host/pid/start``; the start time, in clock ticks since boot, distinguishes a reused pid.

    The start time is empty on systems without /proc.
    """
    return f"{socket.gethostname()}/{os.getpid()}/{_start(os.getpid()) or ''}"


def driver_is_alive(driver: str) -> bool:
    """Whether the process named by ``this_driver`` is alive.

    Returns:
        True only for a process of this host with that pid and start time; False for other hosts, whose processes cannot
        be checked, and for malformed names. Without start times the process must be a Python process, since a reused
        pid would block the stage forever.
    """
    match = _DRIVER.fullmatch(driver)
    if match is None or match["host"] != socket.gethostname():
        return False
    pid = int(match["pid"])
    if not match["start"]:
        return _start(os.getpid()) is None and _exists(pid) and _PYTHON.search(_command(pid)) is not None
    return _start(pid) == match["start"]


def _start(pid: int) -> str | None:
    """Start time (field 22 of /proc/PID/stat); None if the process does not exist or is a zombie."""
    try:
        # The process name may contain any bytes.
        status = (_PROC / str(pid) / "stat").read_bytes().decode(errors="replace")
    except OSError:
        return None
    # The name, in parentheses, may contain parentheses and spaces.
    fields = status.rpartition(")")[2].split()
    return None if len(fields) < 20 or fields[0] in ("Z", "X") else fields[19]


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _command(pid: int) -> str:
    """Command line of a process; empty if unknown or if the process has ended."""
    query = ["ps", "-p", str(pid), "-o", "stat=", "-o", "command="]
    try:
        output = subprocess.run(query, capture_output=True, timeout=20, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
    state, _, command = output.decode(errors="replace").strip().partition(" ")
    return "" if state.startswith("Z") else command.strip()
