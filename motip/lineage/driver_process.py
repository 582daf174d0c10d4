"""Which process drives a run, so that another one can ask whether it still lives."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from motip.lineage.tags import Tag

if TYPE_CHECKING:
    from mlflow.entities import Run

_PROC = Path("/proc")
_DRIVER = re.compile(r"(?P<host>.+)/(?P<pid>[1-9]\d*)/(?P<start>\d*)")
_PYTHON = re.compile(r"python|^ray::", re.IGNORECASE)
"""Command lines of processes that can be a driver; Ray gives its workers names of its own."""


def this_driver() -> str:
    """This process: host name, process id, and start time in clock ticks since boot, which a reused id does not share.

    The start time is empty where there is no /proc.
    """
    return f"{socket.gethostname()}/{os.getpid()}/{_start(os.getpid()) or ''}"


def driver_lives(driver: str) -> bool:
    """Whether the process that ``this_driver`` named is still there.

    Returns:
        True only for a process of this host with that id and start time: what runs on another host cannot be seen
        from here, and an empty or unknown name is nobody's. Where there are no start times the process must at least
        look like Python: an id that something else uses now would refuse a stage for ever.
    """
    told = _DRIVER.fullmatch(driver)
    if told is None or told["host"] != socket.gethostname():
        return False
    pid = int(told["pid"])
    if not told["start"]:
        return _start(os.getpid()) is None and _exists(pid) and _PYTHON.search(_command(pid)) is not None
    return _start(pid) == told["start"]


def driven_elsewhere(run: Run) -> bool:
    """Whether another process of this host, that lives, is at it; one that has ended it may do what it wants."""
    driver = run.data.tags.get(Tag.DRIVER, "")
    return run.info.status == "RUNNING" and driver != this_driver() and driver_lives(driver)


def _start(pid: int) -> str | None:
    """Field 22 of the process's status; None for one that is not there or has ended and waits for its parent."""
    try:
        # A name is whatever bytes its process chose.
        status = (_PROC / str(pid) / "stat").read_bytes().decode(errors="replace")
    except OSError:
        return None
    # The name, in brackets, may hold brackets and blanks itself.
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
    """The command line of a process; empty where it cannot be told, or the process has ended."""
    ask = ["ps", "-p", str(pid), "-o", "stat=", "-o", "command="]
    try:
        told = subprocess.run(ask, capture_output=True, timeout=20, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
    state, _, command = told.decode(errors="replace").strip().partition(" ")
    return "" if state.startswith("Z") else command.strip()
