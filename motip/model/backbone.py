"""Image backbones: the published ResNet-50 (`resnet`), and a small GroupNorm network for the synthetic demo dataset."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from motip.model.spec import ModelSpec

if TYPE_CHECKING:
    from motip.model.resnet import ResNet50Body


class _GroupNormBlock(nn.Module):
    """Two 3x3 convolutions with GroupNorm(8) and a projected shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.GroupNorm(8, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.GroupNorm(8, outputs)
        self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.GroupNorm(8, outputs))

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(inner)) + self.downsample(x))


class TinyGroupNormBody(nn.Module):
    """Residual network of 0.7 M parameters, trainable from scratch on two CPU cores; strides 8, 16, 32.

    GroupNorm, because there are no ImageNet batch-norm statistics to freeze.
    """

    channels = (64, 96, 128)

    def __init__(self, train: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 2, 1, bias=False)
        self.norm1 = nn.GroupNorm(8, 16)
        self.conv2 = nn.Conv2d(16, 16, 3, 2, 1, bias=False)
        self.norm2 = nn.GroupNorm(8, 16)
        self.layer1 = _GroupNormBlock(16, 32, 1)
        self.layer2 = _GroupNormBlock(32, 64, 2)
        self.layer3 = _GroupNormBlock(64, 96, 2)
        self.layer4 = _GroupNormBlock(96, 128, 2)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.requires_grad_(train)

    def forward(self, images: Tensor) -> list[Tensor]:
        x = F.relu(self.norm1(self.conv1(images)))
        x = F.relu(self.norm2(self.conv2(x)))
        x = self.layer1(x)
        maps = []
        for layer in (self.layer2, self.layer3, self.layer4):
            x = layer(x)
            maps.append(x)
        return maps


class Backbone(nn.Module):
    """The configured body; returns its feature maps with the padding mask resized to each."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        body: ResNet50Body | TinyGroupNormBody
        if spec.backbone == "resnet50":
            from motip.model.resnet import ResNet50Body

            body = ResNet50Body(spec.dilation, spec.train_backbone)
        else:
            body = TinyGroupNormBody(spec.train_backbone)
        self.channels = body.channels
        self.body = body

    def forward(self, images: Tensor, mask: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(B,3,H,W), (B,H,W) -> [(map (B,C,h,w), mask (B,h,w))], finest first."""
        return [(features, resize_mask(mask, features)) for features in self.body(images)]


def resize_mask(mask: Tensor, features: Tensor) -> Tensor:
    """(B,H,W) padding mask -> (B,h,w) of `features` (B,C,h,w), nearest neighbour."""
    return F.interpolate(mask[:, None].float(), size=features.shape[-2:]).to(torch.bool)[:, 0]
