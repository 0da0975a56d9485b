"""Which anchor answers for which box: adaptive training sample selection (ATSS)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from glipv2.model.boxes import last_pixel_corners, pairwise_iou

CANDIDATES_PER_LEVEL = 9
MIN_INSIDE = 0.01


@torch.no_grad()
def assign(
    anchors_A4: Tensor, anchors_per_level: Sequence[int], boxes_BN4: Tensor, box_mask_BN: Tensor
) -> Tensor:
    """Give each anchor the box that it must predict: int64 (B, A) rows of boxes_BN4, or -1.

    Per box, the 9 anchors nearest to its centre on every level are candidates; those whose overlap
    reaches the candidates' mean plus standard deviation and whose centre lies inside the box are
    positive. An anchor won by several boxes goes to the one it overlaps most, among equals to the
    first. All images and boxes are handled at once; padded boxes win nothing, and N may be 0. Boxes
    in pixels of the padded input. Equals GLIP's assigner (facts C.1).
    """
    B, N = boxes_BN4.shape[:2]
    A = anchors_A4.shape[0]
    if N == 0:
        return torch.full((B, A), -1, dtype=torch.int64, device=boxes_BN4.device)
    centres_A2 = (anchors_A4[:, :2] + anchors_A4[:, 2:]) / 2
    candidates_BNK = _nearest(centres_A2, anchors_per_level, boxes_BN4)

    iou_BNK = pairwise_iou(boxes_BN4[:, :, None], anchors_A4[candidates_BNK]).squeeze(2)
    threshold_BN1 = iou_BNK.mean(dim=2, keepdim=True) + _unbiased_std(iou_BNK)
    positive_BNK = iou_BNK >= threshold_BN1
    positive_BNK &= _inside(centres_A2[candidates_BNK], boxes_BN4[:, :, None])
    positive_BNK &= box_mask_BN[..., None]

    # Two rounds: first the best overlap that an anchor is offered, then the first box to offer it.
    offer_BC = torch.where(positive_BNK, iou_BNK, -1.0).flatten(1)
    anchor_BC = candidates_BNK.flatten(1)
    best_BA = offer_BC.new_full((B, A), -1.0).scatter_reduce(1, anchor_BC, offer_BC, "amax")
    wins_BC = positive_BNK.flatten(1) & (offer_BC == best_BA.gather(1, anchor_BC))
    box_C = torch.arange(N, device=boxes_BN4.device).repeat_interleave(positive_BNK.shape[2])
    nobody_BA = torch.full((B, A), N, device=boxes_BN4.device)
    box_BA = nobody_BA.scatter_reduce(1, anchor_BC, torch.where(wins_BC, box_C, N), "amin")
    return torch.where(box_BA < N, box_BA, -1)


def _nearest(centres_A2: Tensor, anchors_per_level: Sequence[int], boxes_BN4: Tensor) -> Tensor:
    """Indices (B, N, K) of the anchors nearest to each box centre, some from every level."""
    box_centres_BN2 = (boxes_BN4[..., :2] + boxes_BN4[..., 2:]) / 2
    distance_BNA = torch.cdist(box_centres_BN2, centres_A2[None], compute_mode=_EXACT)
    found, first = [], 0
    for count in anchors_per_level:
        level = distance_BNA[..., first : first + count]
        nearest = level.topk(min(CANDIDATES_PER_LEVEL, count), dim=-1, largest=False).indices
        found.append(nearest + first)
        first += count
    return torch.cat(found, dim=-1)


_EXACT = "donot_use_mm_for_euclid_dist"


def _unbiased_std(values: Tensor) -> Tensor:
    if values.shape[-1] < 2:  # a pyramid of one location: no spread to speak of
        return torch.zeros_like(values)
    return values.std(dim=-1, unbiased=True, keepdim=True)


def _inside(points: Tensor, boxes: Tensor) -> Tensor:
    """Whether points (..., 2) lie within boxes (..., 4) by more than MIN_INSIDE pixels.

    Anchor centres and corners are both counted in GLIP's pixels here, half a pixel less than edges.
    """
    corners = last_pixel_corners(boxes)
    pixel = points - 0.5
    before = (pixel - corners[..., :2]).amin(dim=-1)
    after = (corners[..., 2:] - pixel).amin(dim=-1)
    return torch.minimum(before, after) > MIN_INSIDE
