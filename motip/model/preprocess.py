"""Image normalisation: uint8 pixels to the input of the backbone."""

from __future__ import annotations

import torch
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalise(images_uint8: Tensor, mask: Tensor) -> Tensor:
    """Scale to [0,1], subtract the ImageNet mean, divide by the deviation, zero the padding.

    Args:
        images_uint8: (..., 3, H, W) RGB, 0..255.
        mask: (..., H, W) bool, True on padding.

    Returns:
        (..., 3, H, W) float32 on the same device. The padding is zeroed *after* normalisation, as the published
        weights were trained: a padded pixel is the mean colour, not black.
    """
    mean = torch.tensor(IMAGENET_MEAN, device=images_uint8.device).view(3, 1, 1)
    std = torch.tensor(IMAGENET_STD, device=images_uint8.device).view(3, 1, 1)
    images = images_uint8.to(torch.float32).div_(255.0).sub_(mean).div_(std)
    return images.masked_fill_(mask.unsqueeze(-3), 0.0)
