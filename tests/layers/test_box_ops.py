import pytest
import torch
from torchvision.ops import box_convert
from torchvision.ops import generalized_box_iou as torchvision_giou

from batchformer_panoptic.layers import cxcywh_to_xyxy, generalized_box_iou, xyxy_to_cxcywh


def random_boxes_xyxy(n: int, seed: int) -> torch.Tensor:
    corners = torch.rand(n, 2, 2, generator=torch.Generator().manual_seed(seed))
    return torch.cat([corners.amin(1), corners.amax(1)], dim=1)


def test_formats_agree_with_torchvision_and_invert_each_other():
    boxes = random_boxes_xyxy(20, seed=0)
    torch.testing.assert_close(xyxy_to_cxcywh(boxes), box_convert(boxes, "xyxy", "cxcywh"))
    torch.testing.assert_close(cxcywh_to_xyxy(xyxy_to_cxcywh(boxes)), boxes)


def test_pairwise_giou_agrees_with_torchvision():
    a, b = random_boxes_xyxy(7, seed=1), random_boxes_xyxy(5, seed=2)
    pairs = generalized_box_iou(xyxy_to_cxcywh(a)[:, None], xyxy_to_cxcywh(b)[None])
    torch.testing.assert_close(pairs, torchvision_giou(a, b))


def test_elementwise_giou_is_the_diagonal_of_the_pairwise():
    a, b = random_boxes_xyxy(6, seed=3), random_boxes_xyxy(6, seed=4)
    value = generalized_box_iou(xyxy_to_cxcywh(a), xyxy_to_cxcywh(b))
    torch.testing.assert_close(value, torchvision_giou(a, b).diagonal())


@pytest.mark.parametrize(
    ("box", "other", "expected"),
    [
        ([0.0, 0, 2, 2], [0.0, 0, 2, 2], 1.0),
        ([0.0, 0, 1, 1], [1.0, 0, 2, 1], 0.0),  # side by side: nothing shared, nothing wasted
        ([0.0, 0, 1, 1], [3.0, 0, 4, 1], -0.5),  # half of the hull is wasted
    ],
)
def test_giou_by_hand(box, other, expected):
    value = generalized_box_iou(*xyxy_to_cxcywh(torch.tensor([box, other])))
    torch.testing.assert_close(value, torch.tensor(expected))


def test_degenerate_boxes_have_finite_giou_and_gradient():
    point = torch.zeros(1, 4, requires_grad=True)
    value = generalized_box_iou(point, torch.zeros(1, 4))
    value.sum().backward()
    assert value.item() == -1
    assert point.grad.isfinite().all()
