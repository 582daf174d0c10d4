"""oneDNN linear layers and 1x1 convolutions against PyTorch in float64, forward and backward."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from motip.model import ModelSpec, build_model
from motip.model.fast import onednn
from motip.model.fast.onednn import onednn_linear, onednn_pointwise_conv
from motip.model.fast.packed import PackedLinear
from motip.model.ops import Linear, PointwiseConv, linear_relu

needs_onednn = pytest.mark.skipif(not onednn._has_onednn(), reason="no oneDNN operators for this PyTorch and processor")


@pytest.fixture(autouse=True)
def no_minimum_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "_MIN_MULTIPLICATIONS", 0)


def tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    torch.manual_seed(3)
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def assert_same(ours: Tensor, theirs: Tensor, inputs: list[Tensor], doubles: list[Tensor]) -> None:
    """Values, and the gradients of a random weighting of them."""
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    weights = torch.randn(theirs.shape)
    found = torch.autograd.grad(ours, inputs, weights)
    expected = torch.autograd.grad(theirs, doubles, weights.double())
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-4)


@needs_onednn
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("rows", [(7,), (2, 5), (2, 3, 4), (0, 4)])
def test_equals_a_linear_layer(rows: tuple[int, ...], relu: bool) -> None:
    inputs = tensors((*rows, 24), (16, 24), (16,))
    doubles = [each.detach().double().requires_grad_() for each in inputs]
    expected = F.linear(*doubles)
    ours = onednn_linear(*inputs, relu=relu)
    assert "OnednnLinear" in type(ours.grad_fn.next_functions[0][0]).__name__  # type: ignore[union-attr]
    assert_same(ours, F.relu(expected) if relu else expected, inputs, doubles)


@needs_onednn
def test_strided_inputs_and_no_bias() -> None:
    table, weight = tensors((24, 9), (16, 30))
    doubles = [each.detach().double().requires_grad_() for each in (table, weight)]
    ours = onednn_linear(table.t(), weight[:, :24])
    assert_same(ours, F.linear(doubles[0].t(), doubles[1][:, :24]), [table, weight], doubles)


@needs_onednn
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
def test_equals_a_1x1_convolution(stride: int, channels_last: bool) -> None:
    inputs = tensors((2, 24, 5, 7), (16, 24, 1, 1), (16,))
    doubles = [each.detach().double().requires_grad_() for each in inputs]
    form = torch.channels_last if channels_last else torch.contiguous_format
    ours = onednn_pointwise_conv(inputs[0].contiguous(memory_format=form), inputs[1], inputs[2], stride)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    assert_same(ours, F.conv2d(*doubles, stride=stride), inputs, doubles)


@needs_onednn
def test_gradients_only_where_required() -> None:
    x, weight, bias = tensors((6, 24), (16, 24), (16,))
    onednn_linear(x.detach(), weight, bias.detach()).sum().backward()
    assert x.grad is None and bias.grad is None and weight.grad is not None


@needs_onednn
def test_mkldnn_switch_takes_effect_on_each_call() -> None:
    inputs = tensors((6, 24), (16, 24), (16,))
    with torch.backends.mkldnn.flags(enabled=False):
        assert type(onednn_linear(*inputs).grad_fn).__name__ == "AddmmBackward0"
        assert not PackedLinear(inputs[1]).packed
    assert type(onednn_linear(*inputs).grad_fn).__name__ != "AddmmBackward0"
    assert PackedLinear(inputs[1]).packed


def test_other_dtypes_use_the_reference() -> None:
    x, weight, bias = (each.detach() for each in tensors((6, 24), (16, 24), (16,)))
    doubles = x.double(), weight.double(), bias.double()
    assert torch.equal(onednn_linear(*doubles), F.linear(*doubles))
    with torch.autocast("cpu", torch.bfloat16):
        assert onednn_linear(x, weight, bias).dtype == torch.bfloat16


def test_state_dict_keys_and_deep_copies() -> None:
    module = nn.Sequential(Linear(4, 3), PointwiseConv(3, 2))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    assert type(module[0]) is Linear and type(copy.deepcopy(module)[0]) is Linear
    shapes = {"0.weight": (3, 4), "0.bias": (3,), "1.weight": (2, 3, 1, 1), "1.bias": (2,)}
    assert {name: value.shape for name, value in before.items()} == shapes
    x = torch.randn(5, 4)
    torch.testing.assert_close(module[0](x), F.linear(x, before["0.weight"], before["0.bias"]))
    torch.testing.assert_close(linear_relu(module[0], x), F.linear(x, before["0.weight"], before["0.bias"]).relu())


def test_every_linear_layer_of_the_network_uses_the_operator() -> None:
    spec = ModelSpec(backbone="tiny_gn", enc_layers=1, dec_layers=1, num_id_decoder_layers=1, num_queries=4)
    kinds = {type(module) for module in build_model(spec).modules() if isinstance(module, nn.Linear)}
    assert kinds == {Linear}


def test_nan_weight_is_visible_after_the_relu() -> None:
    x, weight = torch.randn(64, 128), torch.randn(256, 128)
    weight[7] = torch.nan
    found = onednn_linear(x, weight.requires_grad_(), relu=True)
    assert found[:, 7].isnan().all() and found.isnan().sum() == 64
