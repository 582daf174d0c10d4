"""Masks, weights and decoder layers of the ID loss."""

from __future__ import annotations

import pytest
import torch

from motip.losses.identity import count_supervised, id_loss

SHAPE = (2, 3, 4, 5)
NUM_LABELS = 7


@pytest.fixture
def case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, *SHAPE, NUM_LABELS, generator=generator)
    labels = torch.randint(NUM_LABELS, SHAPE, generator=generator)
    masks = torch.rand(SHAPE, generator=generator) < 0.4
    return logits, labels.masked_fill(masks, -1), masks


@pytest.mark.parametrize("focal", [False, True])
def test_all_masked_is_zero_with_a_graph(case: tuple[torch.Tensor, ...], focal: bool) -> None:
    logits = case[0].requires_grad_()
    masks = torch.ones(SHAPE, dtype=torch.bool)
    loss = id_loss(logits, torch.full(SHAPE, -1), masks, 0, focal=focal)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("focal", [False, True])
def test_no_slots_give_zero_loss(focal: bool) -> None:
    logits = torch.zeros(1, 2, 3, 4, 0, NUM_LABELS, requires_grad=True)
    empty = torch.zeros(2, 3, 4, 0, dtype=torch.long)
    loss = id_loss(logits, empty, empty.bool(), 0, focal=focal)
    loss.backward()
    assert loss.item() == 0


@pytest.mark.parametrize("focal", [False, True])
def test_masked_entries_do_not_change_the_loss(case: tuple[torch.Tensor, ...], focal: bool) -> None:
    logits, labels, masks = case
    disturbed = torch.where(masks[None, ..., None], torch.tensor(1e4), logits)
    count = int((~masks).sum())
    assert id_loss(disturbed, labels, masks, count, focal=focal) == id_loss(logits, labels, masks, count, focal=focal)


def test_decoder_layers_are_averaged(case: tuple[torch.Tensor, ...]) -> None:
    logits, labels, masks = case
    both = id_loss(logits, labels, masks, 10)
    alone = [id_loss(logits[n : n + 1], labels, masks, 10) for n in range(2)]
    torch.testing.assert_close(both, (alone[0] + alone[1]) / 2)


def test_losses_of_two_ranks_sum_to_the_total(case: tuple[torch.Tensor, ...]) -> None:
    logits, labels, masks = case
    count = int((~masks).sum())
    total = id_loss(logits, labels, masks, count)
    shares = [id_loss(logits[:, n : n + 1], labels[n : n + 1], masks[n : n + 1], count) for n in range(2)]
    torch.testing.assert_close(total, shares[0] + shares[1])
    torch.testing.assert_close(id_loss(logits, labels, masks, count, weights=torch.tensor([1.0, 0.0])), shares[0])


def test_count_supervised_excludes_the_first_frame(case: tuple[torch.Tensor, ...]) -> None:
    masks = torch.ones(SHAPE, dtype=torch.bool)
    masks[:, :, 0] = False
    masks[1, 2, 3, 4] = False
    assert count_supervised(masks).tolist() == [0, 1]
