"""Box arithmetic against torchvision and pixel counts."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import box_convert, generalized_box_iou

from motip.losses.boxes import covered_share, cxcywh_to_xyxy, generalised_iou

SIDE = 24
corner = st.integers(0, SIDE)
pixel_box = st.tuples(corner, corner, corner, corner).map(
    lambda c: (min(c[0], c[1]), min(c[2], c[3]), max(c[0], c[1]), max(c[2], c[3]))
)


def test_box_forms_and_generalised_iou_equal_torchvision() -> None:
    generator = torch.Generator().manual_seed(3)
    first, second = torch.rand(7, 4, generator=generator), torch.rand(5, 4, generator=generator)
    first_xyxy, second_xyxy = cxcywh_to_xyxy(first), cxcywh_to_xyxy(second)
    torch.testing.assert_close(first_xyxy, box_convert(first, "cxcywh", "xyxy"))
    expected = generalized_box_iou(first_xyxy, second_xyxy)
    torch.testing.assert_close(generalised_iou(first_xyxy[:, None], second_xyxy[None]), expected, rtol=1e-5, atol=1e-6)


def test_empty_boxes_have_finite_iou_and_gradient() -> None:
    boxes = torch.zeros(3, 4, requires_grad=True)
    giou = generalised_iou(boxes, torch.zeros(3, 4))
    giou.sum().backward()
    assert torch.equal(giou.detach(), torch.zeros(3))
    assert boxes.grad is not None and torch.isfinite(boxes.grad).all()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(pixel_box, min_size=1, max_size=4),
    st.lists(st.lists(pixel_box, max_size=5), min_size=2, max_size=3),
)
def test_covered_share_equals_the_pixel_share_of_the_union(
    boxes: list[tuple[int, ...]], regions: list[list[tuple[int, ...]]]
) -> None:
    most = max(1, max(len(frame) for frame in regions))
    padded = torch.zeros(len(regions), most, 4)
    painted = torch.zeros(len(regions), SIDE, SIDE)
    for frame, frame_regions in enumerate(regions):
        for index, (x1, y1, x2, y2) in enumerate(frame_regions):
            padded[frame, index] = torch.tensor([x1, y1, x2, y2])
            painted[frame, y1:y2, x1:x2] = 1
    tensor = torch.tensor(boxes, dtype=torch.float32).expand(2, len(regions), -1, -1)  # two layers
    share = covered_share(tensor, padded)
    for frame in range(len(regions)):
        for index, (x1, y1, x2, y2) in enumerate(boxes):
            inside = painted[frame, y1:y2, x1:x2]
            expected = inside.mean().item() if inside.numel() else 0.0
            assert abs(share[0, frame, index].item() - expected) < 1e-5
            assert share[1, frame, index] == share[0, frame, index]
