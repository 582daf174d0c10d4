"""Provenance of results: code, packages, machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

PACKAGES = (
    "motip-curriculum",
    "torch",
    "torchvision",
    "ray",
    "mlflow",
    "numpy",
    "scipy",
    "pyarrow",
    "opencv-python",
    "trackeval",
    "safetensors",
)
"""Distributions whose version can affect a result."""

COMMIT_VARIABLE = "MOTIP_GIT_COMMIT"
"""Variable with the commit of a submitted job, whose copy has no git history (``<sha>`` or ``<sha>-dirty``)."""


def provenance() -> dict[str, Any]:
    """Facts about code and machine without secrets; the environment is never recorded.

    Returns:
        ``git`` {commit, dirty} (None if unknown), ``python``, ``versions`` {distribution: version}, ``hardware``
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


def _git() -> dict[str, Any]:
    given = os.environ.get(COMMIT_VARIABLE, "")
    if re.fullmatch(r"[0-9a-f]{7,64}(-dirty)?", given):
        return {"commit": given.removesuffix("-dirty"), "dirty": given.endswith("-dirty")}
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
    """Names and memory from nvidia-smi; a query through torch would allocate memory on every device."""
    listed = _output(["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"])
    return listed.splitlines() if listed else []


def _output(command: list[str]) -> str | None:
    """Standard output of a program, None if it is not installed or fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
