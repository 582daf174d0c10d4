"""FrameDecoder against IdDecoder, with packed and plain weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from motip.errors import MotipError
from motip.model.fast import packed
from motip.model.fast.frame_decoder import FrameDecoder, HistoryTokens
from motip.model.fast.packed import PackedLinear, can_pack
from motip.model.id_decoder import IdDecoder, TrajectoryModeling
from motip.model.spec import ModelSpec
from tests.parity.recipe import fill

FRAMES, SLOTS, WORDS = 11, 5, 9


def _parts(**changes: Any) -> tuple[TrajectoryModeling, IdDecoder]:
    sizes = {"hidden_dim": 32, "feature_dim": 32, "id_dim": 32, "head_dim": 16, "num_id_vocabulary": WORDS}
    spec = ModelSpec(backbone="tiny_gn", num_id_decoder_layers=3, rel_pe_length=12, **{**sizes, **changes})
    modelling, decoder = TrajectoryModeling(spec).eval(), IdDecoder(spec).eval()
    fill(modelling, salt=4, prefix="trajectory_modeling.")
    fill(decoder, salt=5, prefix="id_decoder.")
    return modelling, decoder


@pytest.fixture(params=["packed", "plain"], autouse=True)
def _packed_and_plain(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "plain":
        monkeypatch.setattr(packed, "can_pack", lambda weight, dtype: False)
    elif not can_pack(torch.zeros(2, 2)):
        pytest.skip("no oneDNN on an x86 processor here: weights are never packed")


def test_packed_linear_equals_linear() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(48, 96)
    for shape in ((7, 48), (0, 48), (2, 3, 48)):
        x = torch.randn(shape)
        torch.testing.assert_close(PackedLinear.of(layer)(x), layer(x), rtol=1e-5, atol=1e-6)
        expected = nn.functional.gelu(layer(x))
        torch.testing.assert_close(PackedLinear.of(layer)(x, gelu=True), expected, rtol=1e-5, atol=1e-6)
    part = PackedLinear(layer.weight[:, :20])
    x = torch.randn(5, 40)[:, ::2]
    torch.testing.assert_close(part(x), nn.functional.linear(x, layer.weight[:, :20]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_float64_and_bfloat16_weights_are_not_packed(dtype: torch.dtype) -> None:
    layer = nn.Linear(16, 8).to(dtype)
    x = torch.randn(3, 16, dtype=dtype)
    assert not PackedLinear.of(layer).packed
    assert torch.equal(PackedLinear.of(layer)(x), layer(x))


@pytest.mark.parametrize("changes", [{}, {"use_aux_loss": True, "use_shared_aux_head": False}])
def test_frame_by_frame_equals_the_full_forward(changes: dict[str, Any]) -> None:
    """History grows by one frame at a time, with gaps and masked tokens."""
    modelling, decoder = _parts(**changes)
    torch.manual_seed(0)
    raw, objects = torch.randn(2, FRAMES, SLOTS, 32).unbind()
    hidden = torch.rand(FRAMES, SLOTS) < 0.3
    labels = torch.randperm(WORDS)[:SLOTS].expand(FRAMES, -1)
    clip = [x[None, None] for x in (modelling(raw), labels, hidden)]
    full = decoder(*clip, range(FRAMES), objects[None, None], torch.zeros_like(clip[2]), range(FRAMES))[-1, 0, 0]
    frame_by_frame = FrameDecoder(modelling, decoder)
    history = frame_by_frame.encode_history(torch.empty(0, 32), torch.empty(0, dtype=torch.long))
    times = torch.empty(0, dtype=torch.long)
    for frame in range(FRAMES):
        logits = frame_by_frame.decode(objects[frame], history, frame - times)
        assert (logits - full[frame]).abs().max() < 1e-5, frame
        seen = ~hidden[frame]
        features = frame_by_frame.model_trajectories(raw[frame, seen])
        newer = frame_by_frame.encode_history(features, labels[frame, seen])
        history = HistoryTokens(*(torch.cat([old, new[:, :, 1:]], 2) for old, new in zip(history, newer, strict=True)))
        times = torch.cat([times, torch.full((int(seen.sum()),), frame)])
    assert len(history) == int((~hidden).sum())


def test_masks_and_age_limits() -> None:
    decoder = FrameDecoder(*_parts())
    history = decoder.encode_history(torch.randn(4, 32), torch.tensor([0, 1, 2, 3]))
    objects, ages = torch.randn(2, 32), torch.tensor([1, 2, 3, 4])
    hidden = torch.tensor([False, True, False, True])
    masked = decoder.decode(objects, history, ages, history_masks=hidden)
    # Token 0 is the zero token.
    seen = HistoryTokens(*(part[:, :, [0, 1, 3]] for part in history))
    torch.testing.assert_close(masked, decoder.decode(objects, seen, ages[~hidden]))
    assert decoder.decode(objects[:0], history, ages).shape == (0, WORDS + 1)
    unused = torch.arange(WORDS + 1) == 4
    logits = decoder.decode(objects, history, ages, label_mask=unused)
    assert (logits[:, 4] == -torch.inf).all() and logits[:, ~unused].isfinite().all()
    for wrong in (torch.tensor([0, 1, 2, 3]), torch.tensor([1, 2, 3, 12])):
        with pytest.raises(MotipError, match="REL_PE_LENGTH"):
            decoder.decode(objects, history, wrong)
