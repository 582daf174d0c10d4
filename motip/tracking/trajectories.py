"""Trajectory history of the tracker: keys and values of past detections, projected once."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from motip.model.fast.frame_decoder import HistoryTokens


class TokenHistory:
    """FIFO queue of history tokens in order of time.

    Only observed detections are stored (a masked token has no influence). Tokens are contiguous in a buffer with spare
    capacity, so a frame costs one small copy; at the end of the buffer they are moved to its start. The zero token
    precedes the first of them and overwrites forgotten tokens.
    """

    def __init__(self) -> None:
        self._buffer: Tensor | None = None  # (2, layers, heads, capacity, head_dim): keys and values
        self._start = 0  # of the zero token
        self._end = 1
        self.frames = np.zeros(0, np.int64)
        """(S,) frame of each token."""
        self.labels = np.zeros(0, np.int64)
        """(S,) ID label of each token; -1 where its track was dropped."""

    def __len__(self) -> int:
        return self._end - self._start - 1

    def append(self, tokens: HistoryTokens, labels: np.ndarray, frame: int) -> None:
        """Append the tokens of the n objects of one frame, with their (n,) labels."""
        count = len(labels)
        for stored, added in zip(self._reserve(tokens, count), tokens, strict=True):
            stored[:, :, self._end : self._end + count] = added[:, :, 1:]
        self._end += count
        self.frames = np.append(self.frames, np.full(count, frame))
        self.labels = np.append(self.labels, labels)

    def forget_before(self, frame: int) -> None:
        """Drop the tokens of frames earlier than `frame`."""
        old = int(np.searchsorted(self.frames, frame))
        if old and self._buffer is not None:
            self._start += old
            self._buffer[..., self._start, :] = 0.0
        self.frames, self.labels = self.frames[old:], self.labels[old:]

    def drop_labels(self, labels: np.ndarray) -> None:
        """Mask every token of these labels from now on."""
        self.labels[np.isin(self.labels, labels)] = -1

    def tokens(self) -> HistoryTokens:
        """Views of the zero token and all S tokens, masked ones included (``labels == -1``)."""
        assert self._buffer is not None
        return HistoryTokens(*self._buffer[..., self._start : self._end, :])

    def _reserve(self, like: HistoryTokens, count: int) -> Tensor:
        """The buffer, with capacity for `count` more tokens after the last."""
        old, rows = self._buffer, self._end - self._start
        if old is not None and self._end + count <= old.shape[-2]:
            return old
        buffer = old
        # Reuse the buffer unless source and target overlap: an allocation costs more than the copy.
        if buffer is None or rows > self._start or rows + count > buffer.shape[-2]:
            layers, heads, _, head_dim = like.keys.shape
            buffer = like.keys.new_empty(2, layers, heads, 2 * (rows + count) + 64, head_dim)
        buffer[..., :rows, :] = 0.0 if old is None else old[..., self._start : self._end, :]
        self._buffer, self._start, self._end = buffer, 0, rows
        return buffer
