"""What machine this is, without its name or any path: hardware for the results file, versions for each claim."""

from __future__ import annotations

import os
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch",
    "torchvision",
    "triton",
    "transformers",
    "trackeval",
    "numpy",
    "ray",
    "pyarrow",
    "opencv-python",
    "av",
    "mlflow",
)
"""Whose versions change what is measured."""


def hardware() -> dict[str, Any]:
    """Processor, its cores, memory in GB, and the first CUDA card or None."""
    return {
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "gpu": _card(),
        "system": platform.system(),
    }


def machine_name(found: dict[str, Any]) -> str:
    """The stem of the results file: the card where there is one, else the processor and its cores."""
    words = found["gpu"]["name"] if found["gpu"] else f"{found['cpu']} {found['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # this machine does without it, and the record shows that
    return found


def load() -> float:
    """Load average of the last minute."""
    return round(os.getloadavg()[0], 1)


def cores_allowed() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_mb(field: str) -> float:
    """A figure of this process in MB. VmHWM, the peak, starts afresh in a new program; `ru_maxrss` does not."""
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise SystemExit(f"/proc/self/status has no {field}: this benchmark needs Linux")
    return int(found[1]) * 1024 / 1e6


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        found = re.search(r"^model name\s*:\s*(.+)$", information.read_text(), re.MULTILINE)
        if found is not None:
            return found[1].strip()
    return platform.processor() or platform.machine()


def _card() -> dict[str, Any] | None:
    import torch

    if not torch.cuda.is_available():
        return None
    card = torch.cuda.get_device_properties(0)
    return {"name": card.name, "memory_gb": round(card.total_memory / 1e9), "cuda": torch.version.cuda}
