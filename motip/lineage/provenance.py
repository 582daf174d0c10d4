"""What a result depends on beside its inputs: the code, the packages, the machine. And what must not be recorded."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PACKAGES = (
    *("motip-curriculum", "torch", "torchvision", "ray", "mlflow", "numpy", "scipy", "pyarrow"),
    *("opencv-python", "trackeval", "safetensors"),
)
"""Distributions whose version can change a result."""

COMMIT_VARIABLE = "MOTIP_GIT_COMMIT"
"""Where a submitted job, which runs in a copy without history, is told its commit (``<sha>`` or ``<sha>-dirty``)."""

REDACTED = "<redacted>"
_SECRET_KEY = re.compile(
    r"(^|[_.\-])(token|secret|password|passwd|credentials?|api[_\-]?key|access[_\-]?key(_id)?|private[_\-]?key)s?$",
    re.IGNORECASE,
)
# What stands behind must have one width: "ttps" is the end of https.
_USERINFO = re.compile(
    r"(?P<scheme>[A-Za-z][A-Za-z0-9+.\-]*://)"
    r"(?!(?<=http://|ttps://)(\[[0-9A-Fa-f:.]+\]|[^/?#\s\"'@:\[\]]+)(:\d{0,5})?[/?#])"
    r"(?=[^/?#\s\"']*[:@])[^\s\"']*@",
    re.IGNORECASE,
)
"""User and password, up to the last @ of the address: a password that nobody encoded may hold any of / ? # @.

There is no user, and an @ later on belongs to the path,

* where neither a colon nor an @ stands before the first slash: ``s3://bucket/data@v2``;
* in http and https, where nothing but a host and the digits of a port stand before it: ``http://h:5000/x@y``. Their
  clients end the host at the first slash, whatever follows. Those of databases do not, and in
  ``postgresql://u:12/ss@host`` the digits begin a password.
"""

_SIGNED_QUERY = re.compile(
    r"\?[^\s\"']*(x-amz-\w+|x-goog-\w+|\bsig|signature|token|secret|password|passwd|passphrase|credentials?"
    r"|(access|secret|api|private|account)[_\-]?key(_id)?)=[^\s\"']*",
    re.IGNORECASE,
)
"""A query with a parameter whose name ends like these (``sslpassword``), whole."""


def provenance() -> dict[str, Any]:
    """Facts about code and machine, free of secrets: the environment is never dumped.

    Returns:
        ``git`` {commit, dirty} (None where unknown), ``python``, ``versions`` {distribution: version}, ``hardware``
        {platform, processor, cpus, memory_gib, gpus}.
    """
    return {
        "git": _git(),
        "python": platform.python_version(),
        "versions": _versions(),
        "hardware": {
            "platform": platform.platform(terse=True),
            "processor": _processor(),
            "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "memory_gib": _memory_gib(),
            "gpus": _gpus(),
        },
    }


def redact(value: Any, key: str = "") -> Any:
    """``value`` without what would let a reader in, at any depth.

    That is: values of keys whose name says secret; in addresses, the user and password before the last @ (after a host
    with a port, in http and https, an @ is none of theirs) and a query with a signature or a secret in it.
    """
    if key and _SECRET_KEY.search(key) and isinstance(value, str) and value:
        return REDACTED
    if isinstance(value, Mapping):
        return {str(name): redact(item, str(name)) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact(item, key) for item in value]
    if isinstance(value, str):
        return _SIGNED_QUERY.sub(f"?{REDACTED}", _USERINFO.sub(rf"\g<scheme>{REDACTED}@", value))
    return value


def _git() -> dict[str, Any]:
    told = os.environ.get(COMMIT_VARIABLE, "")
    if re.fullmatch(r"[0-9a-f]{7,64}(-dirty)?", told):
        return {"commit": told.removesuffix("-dirty"), "dirty": told.endswith("-dirty")}
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / ".git").exists():
        return {"commit": None, "dirty": None}
    commit = _output(["git", "-C", str(checkout), "rev-parse", "HEAD"])
    status = _output(["git", "-C", str(checkout), "status", "--porcelain"])
    return {"commit": commit or None, "dirty": None if commit is None or status is None else bool(status)}


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    if sys.platform.startswith("linux"):
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    return None


def _gpus() -> list[str]:
    """Names and memory as the driver tells them: asking through torch would take memory on every device."""
    listed = _output(["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"])
    return listed.splitlines() if listed else []


def _output(command: list[str]) -> str | None:
    """What a program prints, or None where it is not installed or fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
