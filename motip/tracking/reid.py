"""Long-term memory: re-identifies a newborn with a lost track by cosine similarity of the detector's outputs.

Not part of MOTIP and off by default; scores taken with it carry a note.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from motip.errors import MotipError

_MOMENTUM = 0.9
"""Weight of the old feature in the running mean of a track's unit features."""


@dataclass
class _Lost:
    track_id: int
    feature: np.ndarray
    since: int


class LongTermMemory:
    """Gallery of lost tracks.

    Args:
        patience: frames a lost track stays, 1 or more.
        similarity: smallest cosine similarity of a match, -1..1.
        capacity: largest number of tracks, 1 or more; beyond it the one lost longest ago is removed.

    Raises:
        MotipError: a value is out of range.
    """

    def __init__(self, patience: int, similarity: float = 0.85, capacity: int = 1000) -> None:
        if patience < 1 or capacity < 1 or not -1.0 <= similarity <= 1.0:
            raise MotipError(
                "invalid options of the long-term memory",
                found=f"patience {patience}, similarity {similarity}, capacity {capacity}",
                expected="patience and capacity of 1 or more, similarity in -1..1",
            )
        self.patience = patience
        self.similarity = similarity
        self.capacity = capacity
        self._seen: dict[int, np.ndarray] = {}
        self._lost: list[_Lost] = []

    def __len__(self) -> int:
        return len(self._lost)

    def observe(self, track_ids: np.ndarray, features: np.ndarray) -> None:
        """Update the running features of the (n,) tracks of this frame with their (n, D) features."""
        for track_id, feature in zip(track_ids.tolist(), _unit(features), strict=True):
            old = self._seen.get(track_id)
            mixed = feature if old is None else _MOMENTUM * old + (1.0 - _MOMENTUM) * feature
            self._seen[track_id] = _unit(mixed[None])[0]

    def lose(self, track_ids: np.ndarray, frame: int) -> None:
        """Move tracks that the tracker forgot in `frame` into the gallery."""
        for track_id in track_ids.tolist():
            self._lost.append(_Lost(track_id, self._seen.pop(track_id), frame))
        self._lost = self._lost[-self.capacity :]

    def recall(self, features: np.ndarray, frame: int) -> np.ndarray:
        """(n,) int64 track ids for the (n, D) features of newborns, -1 for no match; matched ones leave the gallery."""
        self._lost = [lost for lost in self._lost if frame - lost.since <= self.patience]
        recalled = np.full(len(features), -1, np.int64)
        if not self._lost or not len(features):
            return recalled
        similarities = _unit(features) @ np.stack([lost.feature for lost in self._lost]).T
        # Pairs below the threshold must not displace an accepted pair, so they have weight 0.
        rows, columns = linear_sum_assignment(
            np.where(similarities >= self.similarity, 2.0 + similarities, 0.0), maximize=True
        )
        accepted = similarities[rows, columns] >= self.similarity
        rows, columns = rows[accepted], columns[accepted]
        for row, column in zip(rows.tolist(), columns.tolist(), strict=True):
            recalled[row] = self._lost[column].track_id
            self._seen[self._lost[column].track_id] = self._lost[column].feature
        self._lost = [lost for index, lost in enumerate(self._lost) if index not in set(columns.tolist())]
        return recalled


def _unit(features: np.ndarray) -> np.ndarray:
    features = features.astype(np.float64)
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
