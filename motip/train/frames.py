"""Detector forward pass over the frames of a clip batch, and the features of its ID slots."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from motip.data.batch import ClipBatch
from motip.losses.matcher import DetectionTargets
from motip.model import MOTIP
from motip.model.detector import DetectorOutput
from motip.model.preprocess import normalise
from motip.model.transformer import no_nested_checkpointing


@dataclass(frozen=True)
class FramePlan:
    """Which frames get a gradient, and the number of images per forward pass of the detector.

    Attributes:
        train_frames: DETR_NUM_TRAIN_FRAMES, frames of each clip with gradient; the others only feed the ID decoder.
        chunk: DETR_NUM_CHECKPOINT_FRAMES; 0 = no chunks. Images with gradient that exceed one chunk are recomputed in
            the backward pass, chunk by chunk; images without gradient are processed in chunks four times as large.
        recompute: recompute images with gradient in the backward pass even if they fit one chunk.
    """

    train_frames: int
    chunk: int
    recompute: bool = False


def detect_frames(model: MOTIP, batch: ClipBatch, order: list[int], plan: FramePlan) -> DetectorOutput:
    """Detector outputs of all B*T frames, clip after clip (frame t of clip b at b*T + t).

    Args:
        model: its mode (training or evaluation) is left as it is.
        batch: clips on the model's device.
        order: a permutation of the T frames, shared by the clips; its first `train_frames` get a gradient.
        plan: chunks and frames with gradient.
    """
    clips, length = batch.images.shape[:2]
    images, masks = batch.images.flatten(0, 1), batch.masks.flatten(0, 1)

    def detector_input(index: Tensor) -> tuple[Tensor, Tensor]:
        return normalise(images[index], masks[index]), masks[index]

    # Normalising inside the recomputed part keeps uint8 instead of float images until the backward pass.
    def detect_unnested(index: Tensor) -> DetectorOutput:
        with no_nested_checkpointing():
            return model.detr(*detector_input(index))

    frames = [clip * length + t for t in order for clip in range(clips)]
    trained = min(plan.train_frames, length) * clips
    with_gradient, without = frames[:trained], frames[trained:]
    # Frames without gradient come first: their large chunks run before activations are kept for the backward pass.
    parts: list[DetectorOutput] = []
    with torch.no_grad():
        for index in _chunks(without, 4 * plan.chunk, images.device):
            parts.append(model.detr(*detector_input(index)))
    recompute = plan.recompute or 0 < plan.chunk < len(with_gradient)
    for index in _chunks(with_gradient, plan.chunk, images.device):
        parts.append(
            checkpoint(detect_unnested, index, use_reentrant=False) if recompute else model.detr(*detector_input(index))
        )

    position = torch.tensor(without + with_gradient).argsort().to(images.device)
    return _joined(parts, position)


def _chunks(frames: list[int], chunk: int, device: torch.device) -> Iterator[Tensor]:
    """The frame numbers in tensors of at most `chunk` elements, or in one with chunk 0."""
    size = chunk or max(1, len(frames))
    for start in range(0, len(frames), size):
        yield torch.tensor(frames[start : start + size], device=device)


def _joined(parts: list[DetectorOutput], position: Tensor) -> DetectorOutput:
    """Concatenate along the frames, then put frame i of the result at `position[i]` of the concatenation."""

    def join(tensors: list[Tensor]) -> Tensor:
        return torch.cat(tensors).index_select(0, position)

    return DetectorOutput(
        pred_logits=join([part.pred_logits for part in parts]),
        pred_boxes=join([part.pred_boxes for part in parts]),
        outputs=join([part.outputs for part in parts]),
        aux=[
            (join([part.aux[layer][0] for part in parts]), join([part.aux[layer][1] for part in parts]))
            for layer in range(len(parts[0].aux))
        ],
    )


def slot_features(
    outputs: Tensor,
    targets: DetectionTargets,
    query_of_object: Tensor,
    annotation: Tensor,
    masks: Tensor,
    times: slice,
) -> tuple[Tensor, Tensor]:
    """Look up for each ID slot the decoder output matched to its annotation.

    One lookup in a table with a row per object and a row of zeros; no loop over slots.

    Args:
        outputs: (B*T, Q, D) decoder outputs, clip after clip; the gradient goes through.
        targets: M objects of the B*T frames.
        query_of_object: (M,) matched query, -1 for none.
        annotation: (B, G, T, N) index into the boxes of that frame, -1 where absent.
        masks: (B, G, T, N) bool, True where the slot is absent, hidden or padding.
        times: the frames of the clips to return, U of T.

    Returns:
        (B, G, U, N, D) features, zero where absent, and (B, G, U, N) masks that also hide slots whose object has no
        query (a frame with more objects than queries).
    """
    clips, _, length, _ = annotation.shape
    rows = outputs.flatten(0, 1)[targets.frames * outputs.shape[1] + query_of_object.clamp(min=0)]
    found = query_of_object >= 0
    table = F.pad(rows * found.unsqueeze(-1), (0, 0, 0, 1))
    lost = F.pad(~found, (0, 1), value=True)

    counts = torch.tensor(targets.counts)
    starts = (counts.cumsum(0) - counts).view(clips, 1, length, 1).to(annotation.device)
    row = torch.where(masks | (annotation < 0), targets.num_objects, starts + annotation)[:, :, times]
    return F.embedding(row, table), lost[row]
