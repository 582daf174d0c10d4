"""Deterministic weights and images of the parity fixtures (written from their recipe; numbers only).

Every parity test regenerates the weights and images its fixture was computed with instead of storing them:
``fill(model, salt)`` for a whole model, ``weight(key, shape, salt)`` for one tensor, ``image(seed, h, w)`` for a frame.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], dtype=np.float32)
IMAGENET_STD = np.array([0.229, 0.224, 0.225], dtype=np.float32)


def canonical_key(key: str, shared_head: bool = True) -> str:
    """The key whose checksum seeds a tensor: the two names of an aliased tensor give one value."""
    key = key.replace("transformer.decoder.bbox_embed.", "bbox_embed.")
    if shared_head:
        key = re.sub(r"embed_to_word_layers\.\d+\.", "embed_to_word_layers.0.", key)
    return key


def weight(key: str, shape: Iterable[int], salt: int, shared_head: bool = True) -> np.ndarray:
    """The float32 array of `key` (a full MOTIP key, ``detr....``, ``id_decoder....``, or ``msda.<name>``)."""
    shape = tuple(int(size) for size in shape)
    name = canonical_key(key, shared_head)
    seed = (zlib.crc32(name.encode()) + int(salt)) % 2**32
    noise = np.random.RandomState(seed).standard_normal(shape)
    return _scaled(name, noise).astype(np.float32)


def _scaled(name: str, noise: np.ndarray) -> np.ndarray:
    last = name.rsplit(".", 1)[-1]
    fan = math.prod(noise.shape[1:])
    matrix = noise.ndim >= 2
    if ".backbone." in name:
        if noise.ndim == 4:
            return noise * math.sqrt(2.0 / fan)
        if last == "weight":
            return (0.3 if ".bn3." in name else 1.0) * (1.0 + 0.1 * noise)
        return 1.0 + 0.2 * np.abs(noise) if last == "running_var" else 0.1 * noise
    if last == "level_embed" or "query_embed" in name or "word_to_embed" in name:
        return noise
    if last == "rel_pos_embeds":
        return 0.5 * noise
    if "embed_to_word" in name:
        return 2.0 * noise / math.sqrt(fan)
    if "sampling_offsets" in name:
        return 0.5 * noise / math.sqrt(fan) if noise.ndim == 2 else 1.5 * noise
    if "class_embed" in name:
        return 3.0 * noise / math.sqrt(fan) if noise.ndim == 2 else -1.0 + 0.1 * noise
    if "bbox_embed" in name and name.endswith("layers.2.bias"):
        return 0.1 * noise + np.array([0.0, 0.0, -0.3, -0.3])
    if matrix:
        damped = name.endswith(("out_proj.weight", "output_proj.weight", "linear2.weight"))
        return noise / math.sqrt(fan) * (0.4 if damped else 1.0)
    return 1.0 + 0.1 * noise if last == "weight" else 0.05 * noise


@torch.no_grad()
def fill(model: nn.Module, salt: int, prefix: str = "", shared_head: bool = True) -> nn.Module:
    """Fill every floating tensor of `model` in place; `prefix` turns its keys into full MOTIP keys."""
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.from_numpy(weight(prefix + key, tensor.shape, salt, shared_head)))
    return model


def image(seed: int, height: int, width: int) -> np.ndarray:
    """A blocky random (h, w, 3) uint8 RGB image."""
    random = np.random.RandomState(seed)
    cells = random.randint(0, 256, (math.ceil(height / 8), math.ceil(width / 8), 3))
    base = cells.repeat(8, axis=0).repeat(8, axis=1)[:height, :width]
    return np.clip(base + random.randint(-20, 21, (height, width, 3)), 0, 255).astype(np.uint8)


def normalised(img: np.ndarray) -> Tensor:
    """(h, w, 3) uint8 -> (3, h, w) float32, ImageNet mean and standard deviation."""
    scaled = img.astype(np.float32) / np.float32(255)
    return torch.from_numpy(np.ascontiguousarray(((scaled - IMAGENET_MEAN) / IMAGENET_STD).transpose(2, 0, 1)))


def padded_batch(images: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Images padded bottom/right with zeros after normalisation; mask (B,H,W) is True on padding."""
    height = max(img.shape[0] for img in images)
    width = max(img.shape[1] for img in images)
    batch = torch.zeros(len(images), 3, height, width)
    mask = torch.ones(len(images), height, width, dtype=torch.bool)
    for index, img in enumerate(images):
        batch[index, :, : img.shape[0], : img.shape[1]] = normalised(img)
        mask[index, : img.shape[0], : img.shape[1]] = False
    return batch, mask


def copy_id_decoder_weights(shapes: Mapping[str, tuple[int, ...]] | nn.Module, salt: int) -> dict[str, Tensor]:
    """The "copy" weights of the tracker fixtures for trajectory_modeling and id_decoder (other keys are skipped).

    `shapes` is a model with those two children or a mapping key -> shape. Returns key -> float32 tensor.
    """
    if isinstance(shapes, nn.Module):
        shapes = {key: tuple(tensor.shape) for key, tensor in shapes.state_dict().items()}
    keys = [key for key in shapes if key.startswith(("trajectory_modeling.", "id_decoder."))]
    id_dim, words = shapes["id_decoder.word_to_embed.weight"]
    vectors = np.random.RandomState((77 + int(salt)) % 2**32).choice([-1.0, 1.0], (id_dim, words))
    return {key: torch.from_numpy(_copy_weight(key, shapes[key], vectors).astype(np.float32)) for key in keys}


def _copy_weight(key: str, shape: tuple[int, ...], vectors: np.ndarray) -> np.ndarray:
    value = np.zeros(shape)
    half = vectors.shape[0]
    eye = np.eye(half)
    if "norm" in key and key.endswith("weight"):
        value[...] = 1.0
    elif key.endswith("word_to_embed.weight"):
        value[...] = vectors
    elif "embed_to_word" in key:
        value[...] = 0.05 * vectors.T
    elif key.endswith("rel_pos_embeds"):
        value[...] = -0.02 * np.arange(shape[1])[None, :, None]
    elif "cross_attn_layers" in key and key.endswith("in_proj_weight"):
        for block in range(4):  # queries (two blocks of rows) and keys (two): both halves compare the feature half
            value[block * half : (block + 1) * half, :half] = eye
        value[5 * half :, half:] = eye  # values: the ID half only
    elif "cross_attn_layers" in key and key.endswith("out_proj.weight"):
        value[...] = np.eye(shape[0])
    return value
