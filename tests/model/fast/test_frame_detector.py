"""FrameDetector against DeformableDetr on CPU and GPU forms; fallbacks; weight snapshots."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from motip.model import build_model, deformable_attention
from motip.model.deformable_attention import use_implementation
from motip.model.detector import DeformableDetr
from motip.model.fast import frame_detector, packed
from motip.model.fast.frame_attention import PaddedMaps, Sampler
from motip.model.fast.frame_detector import FrameDetector, prepare_for_inference
from motip.model.fast.gpu_attention import GpuAttention
from motip.model.fast.packed import PackedConv, PackedLinear, can_pack
from motip.model.fast.triton_attention import triton_attention
from motip.model.spec import ModelSpec
from motip.tracking import api
from motip.tracking.api import track_sequence
from motip.tracking.settings import TrackerSettings
from tests.helpers.scripted_model import following_model
from tests.parity.recipe import fill, image, padded_batch

SMALL: dict[str, Any] = {
    "num_classes": 3,
    "enc_layers": 2,
    "dec_layers": 3,
    "hidden_dim": 64,
    "feature_dim": 64,
    "num_queries": 20,
    "dim_feedforward": 128,
    "only_detr": True,
}

pytestmark = pytest.mark.skipif(
    not can_pack(torch.zeros(2, 2)), reason="no oneDNN on an x86 processor: prepare_for_inference returns the module"
)
needs_bfloat16 = pytest.mark.skipif(
    not can_pack(torch.zeros(2, 2), torch.bfloat16), reason="no bfloat16 instructions on this processor"
)


def _detector(**changes: Any) -> DeformableDetr:
    model = build_model(ModelSpec(**{**SMALL, **changes})).eval()
    fill(model, salt=11)
    return model.detr  # type: ignore[return-value]


def _assert_equal(
    detector: DeformableDetr, ready: FrameDetector, images: Tensor, mask: Tensor, bound: float = 1e-4
) -> None:
    with torch.no_grad():
        expected, found = detector(images, mask), ready(images, mask)
    assert found.aux == []
    for name in ("pred_logits", "pred_boxes", "outputs"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert ours.shape == theirs.shape
        assert (ours.float() - theirs).abs().max() < bound, name


@pytest.mark.parametrize(
    "changes",
    [
        {"backbone": "tiny_gn"},
        {},
        {"dilation": True},
        {"backbone": "tiny_gn", "num_feature_levels": 3, "enc_points": 1, "dec_points": 3, "num_heads": 4},
    ],
    ids=["tiny_gn", "resnet50", "dc5", "three levels, other points"],
)
@pytest.mark.parametrize("for_gpu", [False, True], ids=["CPU form", "GPU form"])
def test_outputs_equal_those_of_the_module(
    changes: dict[str, Any], for_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padded batches, single frames and other sizes in turn: cached constants of one size must not affect another."""
    if for_gpu:  # plain products, as on a GPU
        monkeypatch.setattr(packed, "can_pack", lambda *_: False)
    detector = _detector(**changes)
    ready = FrameDetector(detector, for_gpu=for_gpu)
    images, mask = padded_batch([image(1, 97, 121), image(2, 73, 90)])
    alone = padded_batch([image(3, 97, 121)])
    other = padded_batch([image(4, 65, 33)])
    for batch in ((images, mask), alone, alone, other, (images[1:], mask[1:]), alone):
        _assert_equal(detector, ready, *batch)


def test_encoder_layers_in_chunks_of_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frame_detector, "ROWS", 100)
    detector = _detector(backbone="tiny_gn")
    _assert_equal(detector, FrameDetector(detector), *padded_batch([image(5, 110, 133)]))


@pytest.mark.parametrize("for_gpu", [pytest.param(False, marks=needs_bfloat16), True], ids=["CPU form", "GPU form"])
def test_bfloat16_error_is_at_most_that_of_autocast(for_gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    detector = _detector()
    images, mask = padded_batch([image(1, 97, 121), image(2, 73, 90)])
    with torch.no_grad():
        expected = detector(images, mask).outputs
        with torch.autocast("cpu", torch.bfloat16):
            autocast = (detector(images, mask).outputs.float() - expected).abs()
    if for_gpu:  # plain products, as on a GPU
        monkeypatch.setattr(packed, "can_pack", lambda *_: False)
    found = (FrameDetector(detector, torch.bfloat16, for_gpu)(images, mask).outputs.float() - expected).abs()
    assert 0.0 < found.mean() <= 1.5 * autocast.mean()


class _Operators(TorchDispatchMode):
    """Counts operators that create a tensor, which are kernel launches on a GPU."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def test_gpu_form_launches_less_than_half_of_the_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    def one_operator(value: Tensor, shapes: Any, locations: Tensor, weights: Tensor) -> Tensor:
        return value.new_empty(len(value), locations.shape[1], value.shape[2] * value.shape[3])

    monkeypatch.setattr(packed, "can_pack", lambda *_: False)
    monkeypatch.setitem(deformable_attention._implementations, "auto", one_operator)
    detector = _detector()
    images, mask = padded_batch([image(1, 97, 121)])
    mask = torch.zeros_like(mask)
    ready = FrameDetector(detector, torch.bfloat16, for_gpu=True)
    counts = []
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        ready(images, mask)  # computes the constants of this size
        for each in (detector, ready):
            with _Operators() as operators:
                each(images, mask)
            counts.append(operators.count)
    assert 0 < 2 * counts[1] < counts[0], counts


@pytest.mark.parametrize("padded", [False, True], ids=["unpadded", "padded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_all_tensors_of_the_gpu_form_are_on_the_gpu(
    dtype: torch.dtype, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs on fake CUDA tensors, without a GPU: operators with inputs on two devices raise."""
    monkeypatch.setitem(deformable_attention._implementations, "auto", triton_attention)
    monkeypatch.setattr(FakeTensor, "tolist", lambda self: [padded] * len(self))  # is there padding?
    with FakeTensorMode(), torch.device("cuda"):
        detector = build_model(ModelSpec(**SMALL)).eval().detr
        ready = FrameDetector(detector, dtype)  # type: ignore[arg-type]
        found = ready(torch.randn(1, 3, 97, 121), torch.zeros(1, 97, 121, dtype=torch.bool))
    assert isinstance(ready._encoder[0].attention, GpuAttention)
    assert {each.device.type for each in found[:3]} == {"cuda"}
    assert [each.dtype for each in found[:3]] == [dtype, torch.float32, torch.float32]


def test_samples_outside_the_maps_read_zeros() -> None:
    """Far outside, on the border and in its corners; NaN locations must not become an index."""
    maps = PaddedMaps([(2, 3), (1, 1)], heads=1, channels=2)
    sampler = Sampler(maps, points=1)
    table = maps.fill(torch.arange(1.0, 15.0).view(7, 2))
    for x, y, expected in (
        (1.0, 1.0, [1.0, 2.0]),  # the centre of the first pixel
        (3.0, 2.0, [11.0, 12.0]),
        (0.5, 1.0, [0.5, 1.0]),
        (3.5, 2.5, [2.75, 3.0]),
        (-1e9, 1.0, [0.0, 0.0]),
        (1e9, 1e9, [0.0, 0.0]),
        (4.0, 3.0, [0.0, 0.0]),
        (1.0, -torch.inf, [0.0, 0.0]),
    ):
        locations = torch.tensor([[[[x, 1.0]], [[y, 1.0]]]])
        scores = torch.tensor([[[40.0, -40.0]]])  # all weight on the first level
        assert torch.allclose(sampler(table, locations, scores), torch.tensor([expected])), (x, y)
    undefined = torch.full((1, 2, 1, 2), torch.nan)
    assert sampler(table, undefined, torch.full((1, 1, 2), torch.nan)).isnan().all()


def test_packed_convolution_and_linear_add_for_changing_sizes() -> None:
    torch.manual_seed(0)
    convolution = torch.nn.Conv2d(8, 16, 3, stride=2, padding=1)
    scale, shift = torch.rand(2, 16)
    ready = PackedConv(convolution, torch.float32, (scale, shift))
    for size in ((1, 8, 17, 20), (2, 8, 9, 9), (1, 8, 17, 20)):
        x = torch.randn(size).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            expected = convolution(x) * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)
            found = ready(x), ready(x, relu=True), ready.conv_add_relu(torch.ones_like(expected), x)
        for each, reference in zip(found, (expected, expected.relu(), (expected + 1).relu()), strict=True):
            torch.testing.assert_close(each, reference, rtol=1e-5, atol=1e-5)
    layer, x, other = torch.nn.Linear(8, 4), torch.randn(5, 8), torch.randn(5, 4)
    torch.testing.assert_close(PackedLinear.of(layer).linear_add(x, other), layer(x) + other, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(PackedLinear.of(layer)(x, relu=True), layer(x).relu(), rtol=1e-5, atol=1e-6)


def test_unsupported_cases_use_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    detector = _detector(backbone="tiny_gn")
    assert isinstance(prepare_for_inference(detector), FrameDetector)
    assert prepare_for_inference(detector, torch.float16) is detector
    doubles = _detector(backbone="tiny_gn").double()
    assert prepare_for_inference(doubles) is doubles
    diverged = _detector(backbone="tiny_gn")
    with torch.no_grad():
        diverged.transformer.encoder.layers[0].linear1.weight[0, 0] = torch.nan  # type: ignore[union-attr,index]
    assert prepare_for_inference(diverged) is diverged
    use_implementation("grid_sample")
    try:
        assert prepare_for_inference(detector) is detector
    finally:
        use_implementation("auto")
    monkeypatch.setattr(packed.platform, "machine", lambda: "arm64")
    assert prepare_for_inference(detector) is detector


def test_changed_weights_take_effect_with_the_next_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracks equal those of the module."""
    torch.manual_seed(0)
    model = following_model(vocabulary=20)
    settings = TrackerSettings(det_thresh=0.0, newborn_thresh=0.0, id_thresh=0.1, short_side=64, max_longer=128)
    frames = [(number, image(number, 90, 120)) for number in range(4)]

    def boxes() -> np.ndarray:
        return track_sequence(model, frames, settings).rows.boxes_xyxy

    first = boxes()
    with torch.no_grad():
        for head in model.detr.transformer.decoder.bbox_embed:  # type: ignore[union-attr]
            head.layers[-1].bias.add_(0.3)  # type: ignore[union-attr,operator]
    second = boxes()
    monkeypatch.setattr(api, "prepare_for_inference", lambda detector, dtype: detector)
    assert np.abs(second - boxes()).max() < 0.01
    assert first.shape != second.shape or np.abs(first - second).max() > 1.0
