import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou, generalized_box_iou

from glipv2.model.anchors import make_anchors
from glipv2.model.boxes import (
    area,
    clip,
    decode,
    elementwise_giou,
    encode,
    last_pixel_corners,
    pairwise_iou,
    suppress,
)


def random_boxes(count: int, seed: int) -> Tensor:
    corners = torch.rand(count, 2, 2, generator=torch.Generator().manual_seed(seed)) * 100
    return torch.cat((corners.amin(1), corners.amax(1) + 1), dim=-1)


def test_iou_and_giou_equal_torchvisions() -> None:
    a, b = random_boxes(20, 0), random_boxes(20, 1)
    torch.testing.assert_close(pairwise_iou(a, b), box_iou(a, b))
    torch.testing.assert_close(elementwise_giou(a, b), generalized_box_iou(a, b).diagonal())


def test_iou_equals_the_originals_plus_one_formula_on_last_pixels() -> None:
    a, b = (last_pixel_corners(random_boxes(20, seed)) for seed in (0, 1))
    size = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2]) + 1).clamp(0)
    overlap = size.prod(1)
    areas = [(x[:, 2:] - x[:, :2] + 1).prod(1) for x in (a, b)]
    expected = overlap / (areas[0] + areas[1] - overlap)
    actual = pairwise_iou(random_boxes(20, 0), random_boxes(20, 1)).diagonal()
    torch.testing.assert_close(actual, expected)


def test_empty_and_inverted_boxes_overlap_nothing_and_stay_finite() -> None:
    bad = torch.tensor([[5.0, 5, 5, 5], [9, 9, 2, 2]])
    assert area(bad).tolist() == [0, 0]
    assert pairwise_iou(bad, bad).sum() == 0
    assert elementwise_giou(bad, bad.flip(0).abs()).isfinite().all()


def test_giou_of_an_inverted_prediction_has_a_finite_gradient() -> None:
    predicted = torch.tensor([[9.0, 9, 2, 2]], requires_grad=True)
    elementwise_giou(predicted, torch.tensor([[0.0, 0, 5, 5]])).sum().backward()
    assert predicted.grad is not None and predicted.grad.isfinite().all()


def test_decoding_inverts_encoding() -> None:
    boxes, anchors = random_boxes(20, 0), random_boxes(20, 1)
    torch.testing.assert_close(decode(encode(boxes, anchors), anchors), boxes, rtol=0, atol=1e-3)


def test_decoding_zero_gives_the_anchor_and_huge_codes_stay_finite() -> None:
    anchors = random_boxes(3, 0)
    torch.testing.assert_close(decode(torch.zeros(3, 4), anchors), anchors)
    assert decode(torch.full((3, 4), 1e4), anchors).isfinite().all()


def test_clipping_keeps_at_least_a_pixel_at_the_border() -> None:
    boxes = torch.tensor([[-5.0, 3, 400, 20], [70.0, 80, 90, 95]])
    assert clip(boxes, height=50, width=60).tolist() == [[0, 3, 60, 20], [59, 49, 60, 50]]


def test_suppression_looks_at_one_label_at_a_time() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 9]])
    kept = suppress(boxes, torch.tensor([0.5, 0.9, 0.4]), torch.tensor([0, 0, 1]), 0.6)
    assert kept.tolist() == [1, 2]


def test_anchors_are_centred_squares_and_equal_the_originals() -> None:
    anchors = make_anchors([(2, 3), (1, 2)], strides=(8, 16), scale=8.0)
    assert anchors.shape == (8, 4)
    # The original counts the last pixel: (-28, -28, 35, 35).
    assert last_pixel_corners(anchors[0]).tolist() == [-28, -28, 35, 35]
    assert anchors[1].tolist() == [-20, -28, 44, 36]
    assert anchors[3].tolist() == [-28, -20, 36, 44]
    assert anchors[7].tolist() == [24 - 64, 8 - 64, 24 + 64, 8 + 64]


def test_levels_and_strides_must_agree() -> None:
    with pytest.raises(ValueError):
        make_anchors([(2, 3)], strides=(8, 16), scale=8.0)
