"""Limit on consecutive skipped batches, and detection of gradient-norm spikes."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from statistics import median

from motip.errors import MotipError

_SPIKE_FACTOR = 10.0
"""A gradient norm above this multiple of the running median is logged."""

_WINDOW = 100
_MIN_NORMS = 20
"""Norms recorded before the median is trusted."""


class SkipLimit:
    """Counts consecutive skipped batches and steps.

    Args:
        limit: number of consecutive skips that ends the training (NONFINITE_LIMIT).
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.in_a_row = 0

    def reset(self) -> None:
        self.in_a_row = 0

    def add(self, reason: str) -> None:
        """Count one skip.

        Raises:
            MotipError: the limit is reached.
        """
        self.in_a_row += 1
        if self.in_a_row < self.limit:
            return
        raise MotipError(
            f"training stops: {self.in_a_row} batches in a row were skipped",
            where=f"the last one: {reason}",
            expected=f"fewer than {self.limit} in a row (NONFINITE_LIMIT)",
            fix="not finite: lower LR, or restart from an earlier checkpoint (MIXED_PRECISION: no distinguishes a "
            "range problem from divergence); out of memory: MEMORY_EFFICIENT: True, shorter clips or smaller "
            "AUG_RESIZE_SCALES",
        )


class GradNormMonitor:
    """Compares each gradient norm with the median of the last hundred."""

    def __init__(self) -> None:
        self._norms: dict[str, deque[float]] = {}

    def update(self, norms: Mapping[str, float]) -> list[str]:
        """Record the norms of a step; returns one line for each norm above `_SPIKE_FACTOR` times its median."""
        spikes = []
        for name, norm in norms.items():
            recent = self._norms.setdefault(name, deque(maxlen=_WINDOW))
            if len(recent) >= _MIN_NORMS and norm > _SPIKE_FACTOR * (usual := median(recent)) > 0:
                spikes.append(f"{name} is {norm:.3g}, usually {usual:.3g}")
            recent.append(norm)
        return spikes

    def state_dict(self) -> dict[str, list[float]]:
        return {name: list(recent) for name, recent in self._norms.items()}

    def load_state_dict(self, state: Mapping[str, Sequence[float]]) -> None:
        self._norms = {name: deque(values, maxlen=_WINDOW) for name, values in state.items()}
