"""Buffer of the trajectory history: equal to a plain list after appending, forgetting and moving."""

from __future__ import annotations

import numpy as np
import torch

from motip.model.fast.frame_decoder import HistoryTokens
from motip.tracking.trajectories import TokenHistory


def _tokens(count: int) -> HistoryTokens:
    """Random tokens of 2 layers and 3 heads after a zero token."""
    keys, values = torch.randn(2, 2, 3, 1 + count, 4).unbind()
    keys[:, :, 0] = values[:, :, 0] = 0.0
    return HistoryTokens(keys, values)


def test_history_equals_a_list_after_every_append_and_move() -> None:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    history, kept = TokenHistory(), list[tuple[int, HistoryTokens]]()
    buffers, moved = set[int](), 0
    for frame in range(200):
        count = int(rng.integers(1, 9 if frame < 100 else 30))  # more objects later, so that the buffer must grow
        new = _tokens(count)
        start = history._start
        history.append(new, np.arange(count), frame)
        moved += history._start < start
        kept = [*kept, (frame, new)]
        oldest = frame - int(rng.integers(3, 12))
        history.forget_before(oldest)
        kept = [(number, tokens) for number, tokens in kept if number >= oldest]
        zero = torch.zeros(2, 3, 1, 4)
        assert torch.equal(history.tokens().keys, torch.cat([zero, *(each.keys[:, :, 1:] for _, each in kept)], 2))
        assert torch.equal(history.tokens().values, torch.cat([zero, *(each.values[:, :, 1:] for _, each in kept)], 2))
        assert len(history) == sum(len(each) for _, each in kept) == len(history.frames) == len(history.labels)
        assert history.frames.tolist() == [number for number, tokens in kept for _ in range(len(tokens))]
        assert history._buffer is not None
        buffers.add(history._buffer.data_ptr())
    assert moved > len(buffers) > 1, "the buffer must have moved in place and grown"


def test_only_dropped_labels_are_masked() -> None:
    history = TokenHistory()
    history.append(_tokens(3), np.array([4, 0, 2]), 0)
    history.append(_tokens(2), np.array([2, 4]), 1)
    history.drop_labels(np.array([4, 7]))
    assert history.labels.tolist() == [-1, 0, 2, 2, -1]
    assert len(history) == 5
    history.forget_before(5)
    assert len(history) == 0
    assert len(history.tokens()) == 0 and not history.tokens().keys.any()
