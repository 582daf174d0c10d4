"""Box arithmetic of the losses: coordinate forms, generalised IoU, share of a box inside ignore regions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Combine = Callable[[Tensor, Tensor], Tensor]


def cxcywh_to_xyxy(boxes_cxcywh: Tensor) -> Tensor:
    """(..., 4) centre and size to (..., 4) left, top, right, bottom, in the same unit."""
    cx, cy, w, h = boxes_cxcywh.unbind(-1)
    return torch.stack((cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2), dim=-1)


def _box_area(boxes_xyxy: Tensor) -> Tensor:
    """(..., 4) xyxy to (...) area; negative sides count as 0."""
    sides = (boxes_xyxy[..., 2:] - boxes_xyxy[..., :2]).clamp(min=0)
    return sides[..., 0] * sides[..., 1]


def generalised_iou(first_xyxy: Tensor, second_xyxy: Tensor) -> Tensor:
    """Generalised IoU (Rezatofighi et al., CVPR 2019) of boxes that broadcast against each other.

    Args:
        first_xyxy: (..., 4).
        second_xyxy: (..., 4), broadcastable to the first.

    Returns:
        (...) values in -1..1; a pair of empty boxes at one point has 0, not NaN.
    """
    smallest = torch.finfo(first_xyxy.dtype).tiny
    overlap = _corners(torch.maximum, torch.minimum, first_xyxy, second_xyxy)
    hull = _corners(torch.minimum, torch.maximum, first_xyxy, second_xyxy)
    intersection = _box_area(overlap)
    union = _box_area(first_xyxy) + _box_area(second_xyxy) - intersection
    hull_area = _box_area(hull)
    return intersection / union.clamp(min=smallest) - (hull_area - union) / hull_area.clamp(min=smallest)


def _corners(low: Combine, high: Combine, first_xyxy: Tensor, second_xyxy: Tensor) -> Tensor:
    """(..., 4) xyxy: the left and top sides of both boxes combined by `low`, the right and bottom ones by `high`."""
    sides = (low(first_xyxy[..., :2], second_xyxy[..., :2]), high(first_xyxy[..., 2:], second_xyxy[..., 2:]))
    return torch.cat(sides, dim=-1)


def covered_share(boxes_xyxy: Tensor, regions_xyxy: Tensor) -> Tensor:
    """Exact share of each box's own area inside the union of regions.

    The regions' edges cut a frame into a grid whose cells are entirely inside or outside the union, so the covered area
    of a box is a sum over cells. Overlapping regions are counted once, and a box across two adjoining regions is
    covered, which the largest single overlap would miss.

    Args:
        boxes_xyxy: (..., F, Q, 4) boxes of F frames.
        regions_xyxy: (F, R, 4) regions of each frame; padding with empty regions has no effect.

    Returns:
        (..., F, Q) in 0..1; boxes without area have 0.
    """
    left, top, right, bottom = regions_xyxy.unbind(-1)
    xs = torch.cat((left, right), dim=-1).sort(dim=-1).values
    ys = torch.cat((top, bottom), dim=-1).sort(dim=-1).values
    inside_x = _contains(left, right, (xs[:, 1:] + xs[:, :-1]) / 2)
    inside_y = _contains(top, bottom, (ys[:, 1:] + ys[:, :-1]) / 2)
    in_union = (torch.einsum("fri,frj->fij", inside_x, inside_y) > 0).to(boxes_xyxy.dtype)

    x1, y1, x2, y2 = (side.unsqueeze(-1) for side in boxes_xyxy.unbind(-1))
    widths = (torch.minimum(x2, xs[:, None, 1:]) - torch.maximum(x1, xs[:, None, :-1])).clamp(min=0)
    heights = (torch.minimum(y2, ys[:, None, 1:]) - torch.maximum(y1, ys[:, None, :-1])).clamp(min=0)
    covered = (torch.matmul(widths, in_union) * heights).sum(-1)
    area = _box_area(boxes_xyxy)
    return torch.where(area > 0, covered / area.clamp(min=torch.finfo(area.dtype).tiny), torch.zeros_like(area))


def _contains(low: Tensor, high: Tensor, points: Tensor) -> Tensor:
    """(F, R) intervals and (F, P) points to (F, R, P) ones where the interval contains the point."""
    points = points.unsqueeze(1)
    return ((points > low.unsqueeze(-1)) & (points < high.unsqueeze(-1))).to(low.dtype)
