"""Encoder with checkpointed layers: same memory and gradients as the plain one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks.gpu_step import TINY
from motip.model import transformer
from motip.model.transformer import Encoder

SPEC = replace(TINY, enc_layers=2)
SHAPES = [(4, 5), (2, 3), (2, 2)]


def run(encoder: Encoder, calls: list[int] | None = None) -> tuple[Tensor, ...]:
    """Memory, and gradients of the inputs and of all parameters; `calls` counts runs of the first layer."""
    torch.manual_seed(5)
    src, position = (torch.randn(3, 30, 32, requires_grad=True) for _ in range(2))
    padding = torch.zeros(3, 30, dtype=torch.bool)
    padding[1, 5] = True
    ratios = torch.tensor([1.0, 0.8, 0.6]).view(3, 1, 1).expand(3, 3, 2)
    handle = encoder.layers[0].register_forward_pre_hook(lambda *_: calls.append(1) if calls is not None else None)
    memory = encoder(src, position, SHAPES, ratios, padding)
    found = torch.autograd.grad((memory * torch.randn(memory.shape)).sum(), [src, position, *encoder.parameters()])
    handle.remove()
    return memory, *found


def test_same_memory_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    encoder = Encoder(SPEC)
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    calls: list[int] = []
    plain = run(encoder, calls)
    assert len(calls) == 1
    calls.clear()
    monkeypatch.setattr(transformer, "_CHECKPOINT_MIN_ELEMENTS", 0)
    again = run(encoder, calls)
    assert len(calls) == 6, "each of 3 images forward and in its backward pass"
    for one, other in zip(plain, again, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_no_nested_checkpointing_disables_checkpointed_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformer, "_CHECKPOINT_MIN_ELEMENTS", 0)
    calls: list[int] = []
    with transformer.no_nested_checkpointing():
        run(Encoder(SPEC), calls)
    assert len(calls) == 1


def test_layers_are_not_checkpointed_without_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformer, "_CHECKPOINT_MIN_ELEMENTS", 0)
    encoder, calls = Encoder(SPEC), []
    handle = encoder.layers[0].register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        encoder(torch.randn(2, 30, 32), torch.randn(2, 30, 32), SHAPES, torch.ones(2, 3, 2), torch.zeros(2, 30) > 0)
    handle.remove()
    assert len(calls) == 1
