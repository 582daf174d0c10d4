"""Long-term memory: a newborn that looks like a track lost long ago takes that track's id back.

Not part of MOTIP, so off by default; scores taken with it must say so. Features are the detector's outputs, compared
by cosine similarity.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from motip.errors import MotipError


@dataclass
class _Lost:
    track_id: int
    feature: np.ndarray
    since: int


class LongTermMemory:
    """A gallery of lost tracks.

    Args:
        patience: frames a lost track stays.
        similarity: smallest cosine similarity of a match.
        capacity: tracks kept; beyond it the one lost longest ago leaves.
        momentum: share of the old feature when a track is seen again (running mean of its unit features).
    """

    def __init__(self, patience: int, similarity: float = 0.85, capacity: int = 1000, momentum: float = 0.9) -> None:
        if patience < 1 or capacity < 1 or not -1.0 <= similarity <= 1.0 or not 0.0 <= momentum < 1.0:
            raise MotipError(
                "the long-term memory cannot work with these options",
                found=f"patience {patience}, similarity {similarity}, capacity {capacity}, momentum {momentum}",
                expected="patience and capacity of 1 or more, similarity in -1..1, momentum in [0, 1)",
            )
        self.patience = patience
        self.similarity = similarity
        self.capacity = capacity
        self.momentum = momentum
        self._seen: dict[int, np.ndarray] = {}
        self._lost: list[_Lost] = []

    def __len__(self) -> int:
        return len(self._lost)

    def observe(self, track_ids: np.ndarray, features: np.ndarray) -> None:
        """Update the running features (n, D) of tracks seen in this frame."""
        for track_id, feature in zip(track_ids.tolist(), _unit(features), strict=True):
            old = self._seen.get(track_id)
            mixed = feature if old is None else self.momentum * old + (1.0 - self.momentum) * feature
            self._seen[track_id] = _unit(mixed[None])[0]

    def lose(self, track_ids: np.ndarray, frame: int) -> None:
        """Move tracks the tracker no longer remembers into the gallery."""
        for track_id in track_ids.tolist():
            self._lost.append(_Lost(track_id, self._seen.pop(track_id), frame))
        self._lost = self._lost[-self.capacity :]

    def recall(self, features: np.ndarray, frame: int) -> np.ndarray:
        """(n,) track id for each newborn's feature (n, D), -1 for none; matched tracks leave the gallery."""
        self._lost = [lost for lost in self._lost if frame - lost.since <= self.patience]
        recalled = np.full(len(features), -1, np.int64)
        if not self._lost or not len(features):
            return recalled
        likeness = _unit(features) @ np.stack([lost.feature for lost in self._lost]).T
        # Pairs below the threshold must not push a good pair aside, so they count nothing at all.
        rows, columns = linear_sum_assignment(np.where(likeness >= self.similarity, 2.0 + likeness, 0.0), maximize=True)
        good = likeness[rows, columns] >= self.similarity
        rows, columns = rows[good], columns[good]
        for row, column in zip(rows.tolist(), columns.tolist(), strict=True):
            recalled[row] = self._lost[column].track_id
            self._seen[self._lost[column].track_id] = self._lost[column].feature
        self._lost = [lost for index, lost in enumerate(self._lost) if index not in set(columns.tolist())]
        return recalled


def _unit(features: np.ndarray) -> np.ndarray:
    features = features.astype(np.float64)
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
