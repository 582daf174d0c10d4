"""What training watches itself for: batches left out in a row, and gradients that suddenly grow."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from statistics import median

from motip.errors import MotipError

JUMP = 10.0
"""A gradient norm this many times the running median is logged."""

_WINDOW = 100
_LEAST = 20
"""Norms seen before the median is trusted."""


class LeftOut:
    """Counts the batches and steps that were left out without a good one between them.

    Args:
        limit: how many in a row end the training.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.in_a_row = 0

    def reset(self) -> None:
        self.in_a_row = 0

    def add(self, what: str) -> None:
        """Count one more.

        Raises:
            MotipError: that was the last that is tolerated.
        """
        self.in_a_row += 1
        if self.in_a_row < self.limit:
            return
        raise MotipError(
            f"training stops: {self.in_a_row} batches in a row could not be used",
            where=f"the last one: {what}",
            expected=f"fewer than {self.limit} in a row (NONFINITE_LIMIT)",
            fix="not finite: lower LR, or go back to an earlier checkpoint (MIXED_PRECISION: no tells a range problem "
            "from a diverged one); no memory: MEMORY_EFFICIENT: True, shorter clips or smaller AUG_RESIZE_SCALES",
        )


class GradientWatch:
    """Compares each gradient norm with the median of the last hundred."""

    def __init__(self) -> None:
        self._seen: dict[str, deque[float]] = {}

    def see(self, norms: Mapping[str, float]) -> list[str]:
        """Take in the norms of a step; returns a sentence for each that is far above its median."""
        jumps = []
        for name, norm in norms.items():
            seen = self._seen.setdefault(name, deque(maxlen=_WINDOW))
            if len(seen) >= _LEAST and norm > JUMP * (usual := median(seen)) > 0:
                jumps.append(f"{name} is {norm:.3g}, usually {usual:.3g}")
            seen.append(norm)
        return jumps

    def state_dict(self) -> dict[str, list[float]]:
        return {name: list(seen) for name, seen in self._seen.items()}

    def load_state_dict(self, state: Mapping[str, Sequence[float]]) -> None:
        self._seen = {name: deque(values, maxlen=_WINDOW) for name, values in state.items()}
