"""Properties of this machine (hardware, versions, load), process memory, and a stopwatch."""

from __future__ import annotations

import os
import platform
import re
import time
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
"""Packages whose versions affect the measurements."""


def hardware() -> dict[str, Any]:
    """Processor, number of cores, memory in GB, and the first CUDA GPU or None; no host name and no paths."""
    return {
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "gpu": _gpu(),
        "system": platform.system(),
    }


def machine_name(found: dict[str, Any]) -> str:
    """Stem of the results file: the GPU if there is one, else the processor and its cores."""
    words = found["gpu"]["name"] if found["gpu"] else f"{found['cpu']} {found['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # not installed; the record shows it by its absence
    return found


def load() -> float:
    """Load average of the last minute."""
    return round(os.getloadavg()[0], 1)


def cores_allowed() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_mb(field: str) -> float:
    """A field of /proc/self/status in MB. VmHWM, the peak, is reset by exec; `ru_maxrss` is not."""
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise SystemExit(f"/proc/self/status has no {field}: this benchmark needs Linux")
    return int(found[1]) * 1024 / 1e6


class Stopwatch:
    """Wall and CPU seconds of this process for each ``with`` block, in `wall_s` and `cpu_s`."""

    def __init__(self) -> None:
        self.wall_s: list[float] = []
        self.cpu_s: list[float] = []
        self._began = (0.0, 0.0)

    def __enter__(self) -> Stopwatch:
        self._began = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        self.wall_s.append(wall - self._began[0])
        self.cpu_s.append(cpu - self._began[1])


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        found = re.search(r"^model name\s*:\s*(.+)$", information.read_text(), re.MULTILINE)
        if found is not None:
            return found[1].strip()
    return platform.processor() or platform.machine()


def _gpu() -> dict[str, Any] | None:
    import torch

    if not torch.cuda.is_available():
        return None
    gpu = torch.cuda.get_device_properties(0)
    return {"name": gpu.name, "memory_gb": round(gpu.total_memory / 1e9), "cuda": torch.version.cuda}
