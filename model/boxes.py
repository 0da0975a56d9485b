"""Box geometry. Boxes are xyxy with edges as coordinates: width is x1 - x0, pixel 0 is [0, 1).

GLIP counts pixels instead (x1 is the last pixel inside, width x1 - x0 + 1). Its formulas with the
"+1" are these formulas after moving x1 and y1 by one, so both give the same widths, overlaps and
codes. Where GLIP forgets the +1 (GIoU, centerness, centre-inside test) `last_pixel_corners`
reproduces its numbers.
"""

import math

import torch
from torch import Tensor
from torchvision.ops import batched_nms

CODE_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
MAX_LOG_RATIO = math.log(1000.0 / 16.0)
_LAST_PIXEL = (0.0, 0.0, 1.0, 1.0)


def last_pixel_corners(boxes: Tensor) -> Tensor:
    """GLIP's corners: (..., 4) boxes with x1 and y1 on the last pixel inside."""
    return boxes - boxes.new_tensor(_LAST_PIXEL)


def area(boxes: Tensor) -> Tensor:
    """Square pixels of (..., 4) boxes; 0 for inverted ones."""
    return (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(dim=-1)


def pairwise_iou(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union of every (..., N, 4) with every (..., M, 4) box: (..., N, M).

    Two empty boxes overlap by 0.
    """
    top_left = torch.maximum(first[..., :, None, :2], second[..., None, :, :2])
    bottom_right = torch.minimum(first[..., :, None, 2:], second[..., None, :, 2:])
    overlap = (bottom_right - top_left).clamp(min=0).prod(dim=-1)
    union = area(first)[..., :, None] + area(second)[..., None, :] - overlap
    return overlap / union.clamp(min=1e-9)


def elementwise_giou(predicted: Tensor, target: Tensor) -> Tensor:
    """Generalised IoU of paired (..., 4) boxes, in [-1, 1]; predictions may be inverted."""
    predicted = torch.cat(
        (predicted[..., :2], torch.maximum(predicted[..., :2], predicted[..., 2:])), dim=-1
    )
    low = torch.minimum(predicted, target)
    high = torch.maximum(predicted, target)
    overlap = (low[..., 2:] - high[..., :2]).clamp(min=0).prod(dim=-1)
    hull = (high[..., 2:] - low[..., :2]).prod(dim=-1) + 1e-7
    union = area(predicted) + area(target) - overlap + 1e-7
    return overlap / union - (hull - union) / hull


def encode(boxes: Tensor, anchors: Tensor) -> Tensor:
    """Offsets that `decode` turns into the boxes again: (..., 4) shifts and log size ratios."""
    box_sizes, anchor_sizes = boxes[..., 2:] - boxes[..., :2], anchors[..., 2:] - anchors[..., :2]
    shift = (boxes[..., :2] + boxes[..., 2:] - anchors[..., :2] - anchors[..., 2:]) / 2
    ratio = (box_sizes.clamp(min=1e-3) / anchor_sizes).log()
    return torch.cat((shift / anchor_sizes, ratio), dim=-1) * boxes.new_tensor(CODE_WEIGHTS)


def decode(deltas: Tensor, anchors: Tensor) -> Tensor:
    """Boxes (..., 4) from encoded offsets relative to anchors; sizes grow 62.5-fold at most."""
    deltas = deltas / deltas.new_tensor(CODE_WEIGHTS)
    anchor_sizes = anchors[..., 2:] - anchors[..., :2]
    centres = (anchors[..., :2] + anchors[..., 2:]) / 2 + deltas[..., :2] * anchor_sizes
    half_sizes = deltas[..., 2:].clamp(max=MAX_LOG_RATIO).exp() * anchor_sizes / 2
    return torch.cat((centres - half_sizes, centres + half_sizes), dim=-1)


def clip(boxes: Tensor, height: int, width: int) -> Tensor:
    """Move (..., 4) boxes into the image; a box outside becomes one pixel at the border (GLIP)."""
    size = (width, height)
    corners = [
        boxes[..., i].clamp(min=float(i >= 2), max=size[i % 2] - float(i < 2)) for i in range(4)
    ]
    return torch.stack(corners, dim=-1)


def suppress(boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float) -> Tensor:
    """Greedy non-maximum suppression among boxes of one label; indices kept, best score first."""
    # torchvision sets labels apart by large offsets: fp64 adds those without rounding overlaps.
    return batched_nms(boxes.double(), scores.double(), labels, threshold)
