"""Parts of GLIP as the original computes them, in plain steps: peers of the benchmarks, and what
tests compare with. Written from facts A.6, B and C.1; parameters are those of our modules.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import deform_conv2d

from glipv2.model.batch import Batch
from glipv2.model.deform import DeformConv, Taps
from glipv2.model.fusion import ImageTextAttention

LIMIT = 5e4
CODE_WEIGHTS = (10.0, 10.0, 5.0, 5.0)


def attention(
    m: ImageTextAttention, image_BND: Tensor, text_BTD: Tensor, mask_BT: Tensor
) -> tuple[Tensor, Tensor]:
    """Image-text attention that projects every location to the attention width."""
    B, N = image_BND.shape[:2]
    heads, d = m.heads, m.head_width

    def split(x: Tensor) -> Tensor:  # (B * heads, rows, d), contiguous
        return x.view(B, -1, heads, d).transpose(1, 2).contiguous().view(B * heads, -1, d)

    def join(x: Tensor) -> Tensor:
        return x.view(B, heads, -1, d).transpose(1, 2).reshape(B, -1, heads * d)

    image, words = m.norm_image(image_BND), m.norm_text(text_BTD)
    query, key = split(m.query(image) * d**-0.5), split(m.key(words))
    image_value, text_value = split(m.image_value(image)), split(m.text_value(words))
    scores = torch.bmm(query, key.transpose(1, 2))
    scores = scores.clamp(min=-LIMIT).clamp(max=LIMIT)

    turned = scores.transpose(1, 2)
    turned = turned - turned.max(dim=-1, keepdim=True)[0]
    to_image = turned.clamp(min=-LIMIT).clamp(max=LIMIT).softmax(dim=-1)

    added = mask_BT[:, None, None].expand(B, 1, N, -1).long()
    added = added.masked_fill(added == 0, -9e15)
    to_text = (scores.view(B, heads, N, -1) + added).view(B * heads, N, -1).softmax(dim=-1)

    to_text = F.dropout(to_text, m.dropout, m.training)
    to_image = F.dropout(to_image, m.dropout, m.training)
    image_delta = m.image_out(join(torch.bmm(to_text, text_value)))
    text_delta = m.text_out(join(torch.bmm(to_image, image_value)))
    return image + m.image_scale * image_delta, words + m.text_scale * text_delta


def deform(m: DeformConv, x_BDHW: Tensor, taps: Taps) -> Tensor:
    """The deformable convolution by torchvision's operator."""
    offset, mask = taps.offset_B18HW, taps.mask_B9HW
    return deform_conv2d(x_BDHW, offset, m.weight, m.bias, taps.stride, 1, mask=mask)


@contextmanager
def original_operators() -> Iterator[None]:
    """Models compute their attention and deformable convolutions as above."""

    def attend(
        m: ImageTextAttention, image: Tensor, text: Tensor, mask: Tensor, image_reads_text: bool
    ) -> tuple[Tensor, Tensor]:
        assert image_reads_text, "the original has no captions"
        return attention(m, image, text, mask)

    with (
        mock.patch.object(ImageTextAttention, "forward", attend),
        mock.patch.object(DeformConv, "forward", deform),
    ):
        yield


def assign_by_anchor(
    anchors: Sequence[Sequence[float]],
    per_level: Sequence[int],
    boxes: Sequence[Sequence[float]],
) -> list[int]:
    """ATSS for one image, anchor by anchor, with xyxy boxes in GLIP's way: x1 is inside."""
    best, winner = [0.0] * len(anchors), [-1] * len(anchors)
    centres = [((a[0] + a[2]) / 2, (a[1] + a[3]) / 2) for a in anchors]
    for n, box in enumerate(boxes):
        # GLIP takes the middle of the two corners as the centre, of boxes and anchors alike.
        x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
        candidates, first = [], 0
        for count in per_level:
            level = range(first, first + count)
            distance = {a: math.hypot(centres[a][0] - x, centres[a][1] - y) for a in level}
            candidates += sorted(level, key=distance.__getitem__)[:9]
            first += count
        overlaps = [_iou(anchors[a], box) for a in candidates]
        mean = sum(overlaps) / len(overlaps)
        spread = sum((o - mean) ** 2 for o in overlaps) / max(len(overlaps) - 1, 1)
        for a, overlap in zip(candidates, overlaps, strict=True):
            sides = _sides(centres[a], box)
            if overlap >= mean + spread**0.5 and min(sides) > 0.01 and overlap > best[a]:
                best[a], winner[a] = overlap, n
    return winner


def _sides(centre: tuple[float, float], box: Sequence[float]) -> tuple[float, float, float, float]:
    """Distances of a point to the left, top, right and bottom of a box."""
    x, y = centre
    return x - box[0], y - box[1], box[2] - x, box[3] - y


def _iou(a: Sequence[float], b: Sequence[float]) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0]) + 1
    height = min(a[3], b[3]) - max(a[1], b[1]) + 1
    both = max(width, 0.0) * max(height, 0.0)
    areas = ((x[2] - x[0] + 1) * (x[3] - x[1] + 1) for x in (a, b))
    return both / (sum(areas) - both)


def loss_by_anchor(
    deltas_BA4: Tensor,
    centerness_BA: Tensor,
    logits_BAT: Tensor,
    anchors_A4: Tensor,
    per_level: Sequence[int],
    batch: Batch,
) -> Tensor:
    """2 * box + centerness + token loss (facts B.2, B.3), one anchor after the other."""
    last_pixel = anchors_A4.new_tensor((0, 0, 1, 1))
    anchors = (anchors_A4 - last_pixel).tolist()
    box, centre, token = [], [], []
    weights, positives = 0.0, 0
    for b in range(len(logits_BAT)):
        boxes = (batch.boxes_BN4[b][batch.box_mask_BN[b]] - last_pixel).tolist()
        real_T = batch.token_mask_BT[b]
        matched = assign_by_anchor(anchors, per_level, boxes)
        deltas, centerness = deltas_BA4[b].unbind(), centerness_BA[b].unbind()
        for a, (n, logits_T) in enumerate(zip(matched, logits_BAT[b].unbind(), strict=True)):
            target_T = batch.positive_BNT[b, n].float() if n >= 0 else torch.zeros_like(logits_T)
            token.append(_focal(logits_T, target_T)[real_T].sum())
            if n < 0:
                continue
            middle = (anchors[a][0] + anchors[a][2]) / 2, (anchors[a][1] + anchors[a][3]) / 2
            left, top, right, bottom = _sides(middle, boxes[n])
            wide, high = sorted((left, right)), sorted((top, bottom))
            weight = (wide[0] / wide[1] * high[0] / high[1]) ** 0.5
            box.append(weight * (1 - _giou(_decoded(deltas[a], anchors[a]), boxes[n])))
            wanted = centerness[a].new_tensor(weight)
            centre.append(F.binary_cross_entropy_with_logits(centerness[a], wanted))
            weights, positives = weights + weight, positives + 1
    return 2 * sum(box) / weights + sum(centre) / positives + sum(token) / positives


def _focal(logits: Tensor, target: Tensor) -> Tensor:
    p = logits.sigmoid()
    right = p * target + (1 - p) * (1 - target)
    share = 0.25 * target + 0.75 * (1 - target)
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return share * (1 - right) ** 2 * entropy


def _decoded(deltas: Tensor, anchor: Sequence[float]) -> list[Tensor]:
    dx, dy, dw, dh = (deltas / deltas.new_tensor(CODE_WEIGHTS)).unbind()
    corners = []
    for shift, ratio, low, high in ((dx, dw, anchor[0], anchor[2]), (dy, dh, anchor[1], anchor[3])):
        size = high - low + 1
        middle = shift * size + (low + high) / 2
        reach = (ratio.clamp(max=math.log(1000 / 16)).exp() * size - 1) / 2
        corners.append((middle - reach, middle + reach))
    return [corners[0][0], corners[1][0], corners[0][1], corners[1][1]]


def _giou(predicted: Sequence[Tensor], box: Sequence[float]) -> Tensor:
    x0, y0, x1, y1 = predicted
    x1, y1 = torch.maximum(x0, x1), torch.maximum(y0, y1)
    wide = (x1.clamp(max=box[2]) - x0.clamp(min=box[0])).clamp(min=0)
    high = (y1.clamp(max=box[3]) - y0.clamp(min=box[1])).clamp(min=0)
    both = wide * high
    union = (x1 - x0) * (y1 - y0) + (box[2] - box[0]) * (box[3] - box[1]) - both + 1e-7
    hull_wide = x1.clamp(min=box[2]) - x0.clamp(max=box[0])
    hull_high = y1.clamp(min=box[3]) - y0.clamp(max=box[1])
    hull = hull_wide * hull_high + 1e-7
    return both / union - (hull - union) / hull
