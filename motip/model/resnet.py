"""ResNet-50 with frozen batch norm, the published backbone.

A separate module, because torchvision takes as long to import as torch; it is imported only for this backbone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck, ResNet

from motip.model.ops import pointwise_conv


class FrozenBatchNorm(nn.Module):
    """Batch norm with four fixed buffers (weight, bias, running_mean, running_var) and no step counter.

    Running statistics of the one or two clips that fit a GPU would be noise.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.scale_and_shift()
        return x * scale.view(1, -1, 1, 1).to(x.dtype) + shift.view(1, -1, 1, 1).to(x.dtype)

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """(C,) factor and summand of the affine map of this layer."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return scale, self.bias - self.running_mean * scale


class ResNet50Body(ResNet):
    """torchvision's ResNet-50 without its classifier; returns the maps of layer2, layer3 and layer4.

    conv1 and layer1 are never trained, as in the published code; layer2-4 only if `train`. Each frozen batch norm is
    folded into the weights of its convolution, differentiably, which saves two passes over a large map forward and one
    backward. On a CPU maps are channels last, the layout of its convolutions.
    """

    channels = (512, 1024, 2048)

    def __init__(self, dilation: bool, train: bool) -> None:
        super().__init__(
            Bottleneck,
            [3, 4, 6, 3],
            norm_layer=FrozenBatchNorm,
            replace_stride_with_dilation=[False, False, dilation],
        )
        del self.avgpool, self.fc
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(train and name.startswith(("layer2", "layer3", "layer4")))

    def forward(self, images: Tensor) -> list[Tensor]:
        if images.device.type == "cpu":
            images = images.contiguous(memory_format=torch.channels_last)
        x = self.maxpool(_folded_conv(self.conv1, self.bn1, images, relu=True))
        maps = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in stage:
                x = _bottleneck(block, x)
            maps.append(x)
        return maps[1:]


def _bottleneck(block: Bottleneck, x: Tensor) -> Tensor:
    inner = _folded_conv(block.conv1, block.bn1, x, relu=True)
    inner = _folded_conv(block.conv2, block.bn2, inner, relu=True)
    shortcut = x if block.downsample is None else _folded_conv(block.downsample[0], block.downsample[1], x)
    return (_folded_conv(block.conv3, block.bn3, inner) + shortcut).relu_()


def _folded_conv(convolution: nn.Module, norm: nn.Module, x: Tensor, relu: bool = False) -> Tensor:
    """Convolution without bias, with the following frozen batch norm folded in; then ReLU if `relu`."""
    assert isinstance(convolution, nn.Conv2d) and isinstance(norm, FrozenBatchNorm)
    scale, shift = norm.scale_and_shift()
    weight = convolution.weight * scale.view(-1, 1, 1, 1)
    if convolution.kernel_size == (1, 1):
        return pointwise_conv(x, weight, shift, convolution.stride[0], relu)
    convolved = F.conv2d(x, weight, shift, convolution.stride, convolution.padding, convolution.dilation)
    return convolved.relu_() if relu else convolved
