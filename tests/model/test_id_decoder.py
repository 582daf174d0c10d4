"""ID decoder against the naive implementation; memory and edge cases."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.bench_id_decoder import NaiveIdDecoder
from motip.errors import MotipError
from motip.model.id_decoder import IdDecoder
from motip.model.spec import ModelSpec
from tests.parity.recipe import fill

_FRAMES, _SLOTS, _GROUPS = 11, 5, 2


def _spec(**changes: Any) -> ModelSpec:
    sizes: dict[str, Any] = {
        "backbone": "tiny_gn",
        "hidden_dim": 32,
        "feature_dim": 32,
        "id_dim": 32,
        "head_dim": 16,
        "num_id_vocabulary": 9,
        "num_id_decoder_layers": 3,
        "rel_pe_length": 12,
    }
    return ModelSpec(**{**sizes, **changes})


def _decoder(**changes: Any) -> IdDecoder:
    decoder = IdDecoder(_spec(**changes))
    fill(decoder, salt=5, prefix="id_decoder.")
    return decoder


def _clip(spec: ModelSpec, frames: int = _FRAMES, slots: int = _SLOTS, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    shape = (1, _GROUPS, frames, slots)
    labels = torch.stack([torch.randperm(spec.num_id_vocabulary, generator=generator)[:slots] for _ in range(_GROUPS)])
    return {
        "trajectory_features": torch.randn(*shape, spec.feature_dim, generator=generator),
        "trajectory_labels": labels.view(1, _GROUPS, 1, slots).expand(shape).clone(),
        "trajectory_masks": torch.rand(shape, generator=generator) < 0.3,
        "trajectory_times": list(range(frames)),
        "unknown_features": torch.randn(*shape, spec.feature_dim, generator=generator),
        "unknown_masks": torch.rand(shape, generator=generator) < 0.3,
        "unknown_times": list(range(frames)),
    }


def test_equals_the_naive_decoder_with_gradients() -> None:
    """Eleven frames: more than one block of queries, the last one incomplete."""
    ours = _decoder()
    naive = NaiveIdDecoder(ours.spec)
    naive.copy_from(ours)
    clip = _clip(ours.spec)
    clip["unknown_masks"] = clip["trajectory_masks"]
    inputs = [clip["trajectory_features"].requires_grad_(), clip["unknown_features"].requires_grad_()]
    found = ours(**clip)[0, 0]
    expected = naive(inputs[0][0], clip["trajectory_labels"][0], clip["trajectory_masks"][0], inputs[1][0])
    assert (found - expected).abs().max() < 1e-4

    seed = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)) / 100
    shared = [ours.rel_pos_embeds, ours.word_to_embed.weight, *ours.cross_attn_layers.parameters()]
    theirs = [naive.rel_pos_embeds, naive.word_to_embed.weight, *naive.cross_attn.parameters()]
    for a, b in zip(
        torch.autograd.grad(found, inputs + shared, seed),
        torch.autograd.grad(expected, inputs + theirs, seed),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("frame", [0, 1, 7, 8, 10])
def test_logits_depend_on_earlier_frames_only(frame: int) -> None:
    decoder = _decoder()
    clip = _clip(decoder.spec)
    before = decoder(**clip)[0, :, :, frame]
    clip["trajectory_features"][:, :, frame:] += 10.0
    clip["trajectory_labels"][:, :, frame:] = 0
    assert torch.equal(decoder(**clip)[0, :, :, frame], before)
    if frame > 0:
        clip["trajectory_masks"][:, :, frame - 1] = False
        reference = decoder(**clip)[0, :, :, frame]
        clip["trajectory_features"][:, :, frame - 1] += 10.0
        assert (decoder(**clip)[0, :, :, frame] - reference).abs().max() > 1e-3


def test_masked_tokens_have_no_effect() -> None:
    decoder = _decoder()
    clip = _clip(decoder.spec)
    visible = ~clip["unknown_masks"]
    before = decoder(**clip)[0][visible]
    clip["trajectory_features"][clip["trajectory_masks"]] = 50.0
    clip["trajectory_labels"][clip["trajectory_masks"]] = -1
    clip["unknown_features"][clip["unknown_masks"]] = 50.0
    assert torch.equal(decoder(**clip)[0][visible], before)


def test_all_masked_tokens_give_finite_logits_and_gradients() -> None:
    decoder = _decoder()
    clip = _clip(decoder.spec)
    clip["trajectory_masks"][:] = True
    clip["unknown_masks"][:] = True
    features = clip["unknown_features"].requires_grad_()
    logits = decoder(**clip)
    logits.square().sum().backward()
    assert torch.isfinite(logits).all() and torch.isfinite(features.grad).all()
    assert all(torch.isfinite(p.grad).all() for p in decoder.parameters() if p.grad is not None)


@pytest.mark.parametrize(("slots", "frames"), [(0, 4), (3, 1)])
def test_shape_without_objects_and_with_one_frame(slots: int, frames: int) -> None:
    decoder = _decoder()
    out = decoder(**_clip(decoder.spec, frames=frames, slots=slots))
    assert out.shape == (1, 1, _GROUPS, frames, slots, 10)


def test_activation_checkpointing_gives_equal_gradients() -> None:
    plain, saving = _decoder(), _decoder(use_decoder_checkpoint=True)
    gradients = []
    for decoder in (plain, saving):
        logits = decoder(**_clip(decoder.spec))
        logits.square().mean().backward()
        gradients.append([p.grad for p in decoder.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_all_layers_are_returned_in_training_with_aux_loss() -> None:
    decoder = _decoder(use_aux_loss=True)
    clip = _clip(decoder.spec)
    every, last = decoder.train()(**clip), decoder.eval()(**clip)
    assert every.shape[0] == 3 and last.shape[0] == 1
    assert torch.equal(every[-1], last[0])
    assert decoder(**clip, all_layers=True).shape[0] == 3


def test_unused_labels_have_probability_zero() -> None:
    decoder = _decoder()
    clip = _clip(decoder.spec)
    unused = torch.zeros(10, dtype=torch.bool)
    unused[[2, 5]] = True
    free, masked = decoder(**clip), decoder(**clip, label_mask=unused)
    assert (masked[..., unused] == -torch.inf).all()
    assert torch.equal(masked[..., ~unused], free[..., ~unused])
    assert (masked.softmax(-1)[..., unused] == 0).all()


@pytest.mark.parametrize("times", [[0, 1, 12], [-1, 0, 1]])
def test_times_outside_the_relative_position_embedding_are_an_error(times: list[int]) -> None:
    decoder = _decoder()
    clip = _clip(decoder.spec, frames=3)
    clip["unknown_times"] = times
    with pytest.raises(MotipError, match="REL_PE_LENGTH"):
        decoder(**clip)


def test_saved_tensors_are_not_quadratic_in_the_tokens() -> None:
    decoder = _decoder(rel_pe_length=24)
    frames, slots = 24, 8
    clip = _clip(decoder.spec, frames=frames, slots=slots)
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        decoder(**clip)
    tokens = frames * slots
    one_map = _GROUPS * decoder.heads * tokens**2
    assert max(kept) < one_map / 4
    assert max(kept) <= _GROUPS * (tokens + 1) * 2 * 2 * decoder.spec.embed_dim


def test_bfloat16_autocast_stays_close() -> None:
    decoder = _decoder()
    clip = _clip(decoder.spec)
    exact = decoder(**clip)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = decoder(**clip)
        nn.functional.cross_entropy(rough.float().flatten(0, -2), torch.zeros(rough[..., 0].numel()).long()).backward()
    assert torch.isfinite(rough).all()
    assert (rough.float() - exact).abs().mean() < 0.05 * exact.abs().mean()
    assert all(torch.isfinite(p.grad).all() for p in decoder.parameters() if p.grad is not None)
