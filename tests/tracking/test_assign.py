from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from motip.tracking.assign import hungarian, id_max, object_max

SCORES = st.integers(0, 6).flatmap(
    lambda count: arrays(np.float32, (count, 5), elements=st.floats(0, 1, width=32).filter(lambda x: x == x))
)
TRACKED = arrays(np.bool_, 4)


@given(SCORES, TRACKED)
def test_every_protocol_assigns_each_tracked_label_at_most_once(scores: np.ndarray, tracked: np.ndarray) -> None:
    for assign in (hungarian, object_max, id_max):
        labels = assign(scores, tracked, 0.2)
        assert labels.shape == (len(scores),)
        known = labels[labels < 4]
        assert len(set(known.tolist())) == len(known)
        assert tracked[known].all()
        rows = np.flatnonzero(labels < 4)
        assert (scores[rows, labels[rows]] >= np.float32(0.2)).all()


@given(SCORES, TRACKED)
def test_object_max_equals_a_direct_implementation(scores: np.ndarray, tracked: np.ndarray) -> None:
    best = [int(row.argmax()) for row in scores]
    expected = []
    for index, label in enumerate(best):
        rivals = [
            other
            for other in range(len(scores))
            if other != index
            and best[other] == label
            and (
                scores[other, label] > scores[index, label]
                or (scores[other, label] == scores[index, label] and other < index)
            )
        ]
        newborn = label == 4 or not tracked[label] or scores[index, label] < np.float32(0.2) or bool(rivals)
        expected.append(4 if newborn else label)
    assert object_max(scores, tracked, 0.2).tolist() == expected


@given(SCORES, TRACKED)
def test_id_max_equals_a_direct_implementation(scores: np.ndarray, tracked: np.ndarray) -> None:
    expected = []
    for index in range(len(scores)):
        won = [label for label in range(5) if int(scores[:, label].argmax()) == index]
        label = max(won, key=lambda label: (scores[index, label], label), default=4)
        newborn = label == 4 or not tracked[label] or scores[index, label] < np.float32(0.2)
        expected.append(4 if newborn else label)
    assert id_max(scores, tracked, 0.2).tolist() == expected


@given(arrays(np.float32, (3, 4), elements=st.integers(0, 1000).map(lambda x: np.float32(x / 1000))))
def test_hungarian_finds_the_largest_total(scores: np.ndarray) -> None:
    labels = hungarian(scores, np.ones(3, bool), 0.0)
    total = scores[np.arange(3), labels].astype(np.float64).sum()
    best = max(
        scores[np.arange(3), list(choice)].astype(np.float64).sum()
        for choice in itertools.product(range(4), repeat=3)
        if all(choice.count(label) <= 1 for label in range(3))
    )
    assert total >= best - 1e-6


def test_hungarian_includes_untracked_labels_in_the_assignment() -> None:
    scores = np.array([[0.5, 0.9, 0.0]], np.float32)
    assert hungarian(scores, np.array([True, False]), 0.2).tolist() == [2]
