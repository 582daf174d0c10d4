"""ResNet-50 for inference: frozen batch norms folded into the convolutions, channels last, in-place sums."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck

from motip.model.fast.packed import PackedConv
from motip.model.resnet import FrozenBatchNorm, ResNet50Body


class PackedResNet:
    """`ResNet50Body` with packed weights in `dtype`; equal to it to rounding."""

    def __init__(self, body: ResNet50Body, dtype: torch.dtype) -> None:
        self._stem = _folded(body.conv1, body.bn1, dtype)
        stages = (body.layer1, body.layer2, body.layer3, body.layer4)
        self._stages = [[_Block(block, dtype) for block in stage] for stage in stages]

    def __call__(self, images: Tensor) -> list[Tensor]:
        """(B,3,H,W) -> the maps of layer2, layer3 and layer4, channels last."""
        x = self._stem(images.contiguous(memory_format=torch.channels_last), relu=True)
        x = F.max_pool2d(x, kernel_size=3, stride=2, padding=1)
        maps = []
        for stage in self._stages:
            for block in stage:
                x = block(x)
            maps.append(x)
        return maps[1:]


class _Block:
    """A bottleneck block."""

    def __init__(self, block: Bottleneck, dtype: torch.dtype) -> None:
        self._reduce_channels = _folded(block.conv1, block.bn1, dtype)
        self._conv3x3 = _folded(block.conv2, block.bn2, dtype)
        self._expand_channels = _folded(block.conv3, block.bn3, dtype)
        self._shortcut = None if block.downsample is None else _folded(block.downsample[0], block.downsample[1], dtype)

    def __call__(self, x: Tensor) -> Tensor:
        inner = self._conv3x3(self._reduce_channels(x, relu=True), relu=True)
        # In place: an identity shortcut is the input of the block, which is not used again. The returned maps are safe,
        # because the first block of the next stage has a shortcut convolution.
        return self._expand_channels.conv_add_relu(x if self._shortcut is None else self._shortcut(x), inner)


def _folded(convolution: nn.Module, norm: nn.Module, dtype: torch.dtype) -> PackedConv:
    """The convolution with the following frozen batch norm folded in."""
    assert isinstance(convolution, nn.Conv2d) and isinstance(norm, FrozenBatchNorm)
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return PackedConv(convolution, dtype, (scale, norm.bias - norm.running_mean * scale))
