"""The terms of the GLIPv2 loss, one function each.

Every term is a local sum divided by a count that is averaged over ranks. So the mean of the ranks'
losses does not depend on how a global batch is dealt to them (values and gradients), and no rank
divides by zero: `Normalisers` falls back to the number of images, also averaged.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from glipv2.model.batch import Batch, Collectives
from glipv2.model.boxes import elementwise_giou, last_pixel_corners
from glipv2.model.heads import ContrastHead

FOCAL_ALPHA = 0.25
FOCAL_GAMMA = 2.0
IGNORED_WORD = -100
# Ids that equal no category, neither NO_CATEGORY nor NO_WORD, and not each other:
_UNMATCHED = -100  # a region of the background
_PADDING = -1000  # a token position that holds no token
_HASH = 2654435761  # Knuth's multiplicative hash


@dataclass(kw_only=True)
class Targets:
    """What the assignment asks of every anchor."""

    matched_BA: Tensor
    """int64 row of the batch's boxes, or -1."""
    boxes_BA4: Tensor
    """The matched box; any box where there is none."""
    centerness_BA: Tensor
    """0 for unmatched anchors."""

    @property
    def positive(self) -> Tensor:
        """bool (B, A): the anchors that have a box."""
        return self.matched_BA >= 0


@dataclass(kw_only=True)
class Normalisers:
    """Counts averaged over ranks, 0-dimensional; 1 image stands in where a count is zero."""

    positives: Tensor
    centerness: Tensor
    contrasted: Tensor
    masked_words: Tensor


def make_targets(matched_BA: Tensor, batch: Batch, anchors_A4: Tensor) -> Targets:
    """Boxes and centerness for the anchors of `assign`."""
    B, N = batch.boxes_BN4.shape[:2]
    if N == 0:
        boxes_BA4 = anchors_A4.expand(B, -1, -1)
    else:
        index = matched_BA.clamp(min=0)[..., None].expand(-1, -1, 4)
        boxes_BA4 = batch.boxes_BN4.gather(1, index)
    centerness_BA = _centerness(boxes_BA4, anchors_A4) * (matched_BA >= 0)
    return Targets(matched_BA=matched_BA, boxes_BA4=boxes_BA4, centerness_BA=centerness_BA)


def _centerness(boxes_BA4: Tensor, anchors_A4: Tensor) -> Tensor:
    """sqrt of how central an anchor is in its box, horizontally times vertically; in [0, 1]."""
    centres_A2 = (anchors_A4[:, :2] + anchors_A4[:, 2:]) / 2 - 0.5  # GLIP's pixels, see boxes.py
    corners_BA4 = last_pixel_corners(boxes_BA4)
    before_BA2 = (centres_A2 - corners_BA4[..., :2]).clamp(min=0)
    after_BA2 = (corners_BA4[..., 2:] - centres_A2).clamp(min=0)
    near = torch.minimum(before_BA2, after_BA2)
    far = torch.maximum(before_BA2, after_BA2).clamp(min=1e-6)
    return (near / far).prod(dim=-1).sqrt()


def count_targets(targets: Targets, batch: Batch, contrast_regions: int) -> Tensor:
    """What a batch adds to each count of `Normalisers`, and what where there is none: (2, 4)."""
    positives_B = targets.positive.sum(dim=1)
    counts = torch.stack(
        [
            positives_B.sum().float(),
            targets.centerness_BA.sum(),
            positives_B.clamp(max=contrast_regions).sum().float(),
            (batch.mlm_labels_BT != IGNORED_WORD).sum().float(),
        ]
    )
    return torch.stack([counts, torch.full_like(counts, float(len(positives_B)))])


def make_normalisers(
    targets: Targets, batch: Batch, contrast_regions: int, collectives: Collectives
) -> Normalisers:
    """One collective call for all counts, which every rank must make, unless the step's are known
    already."""
    mean = collectives.step_counts
    if mean is None:
        mean = collectives.mean(count_targets(targets, batch, contrast_regions))
    counts, images = mean.unbind()
    positives, centerness, contrasted, masked = torch.where(counts > 0, counts, images).unbind()
    return Normalisers(
        positives=positives, centerness=centerness, contrasted=contrasted, masked_words=masked
    )


def box_loss(predicted_BA4: Tensor, targets: Targets, normaliser: Tensor) -> Tensor:
    """1 - GIoU of matched anchors, weighted by their centerness (facts B.2)."""
    giou_BA = elementwise_giou(
        last_pixel_corners(predicted_BA4.float()), last_pixel_corners(targets.boxes_BA4)
    )
    return (targets.centerness_BA * (1 - giou_BA)).sum() / normaliser


def centerness_loss(logits_BA: Tensor, targets: Targets, normaliser: Tensor) -> Tensor:
    """Binary cross entropy of matched anchors."""
    loss_BA = F.binary_cross_entropy_with_logits(
        logits_BA.float(), targets.centerness_BA, reduction="none"
    )
    return (loss_BA * targets.positive).sum() / normaliser


def token_loss(logits_BAT: Tensor, targets: Targets, batch: Batch, normaliser: Tensor) -> Tensor:
    """Focal loss between all anchors and all tokens that are not padding (facts B.3).

    Special tokens, separators and the words of other boxes are negatives.
    """
    # One more row is that of the background: its tokens are all negatives.
    positive_BNT = F.pad(batch.positive_BNT, (0, 0, 0, 1))
    row_BA = targets.matched_BA % positive_BNT.shape[1]
    weight_BNT = torch.where(positive_BNT, FOCAL_ALPHA, FOCAL_ALPHA - 1)
    weight_BNT = weight_BNT * batch.token_mask_BT[:, None]
    return _FocalSum.apply(logits_BAT, weight_BNT, row_BA) / normaliser


class _FocalSum(torch.autograd.Function):
    """Sum of |weight| (1 - p)^gamma (-log p), p the probability of what the weight's sign says.

    Takes logits (B, A, T), weights (B, N, T) that are positive where a token should be found, and
    which row of weights holds for an anchor (B, A). The gradient is written out, image by image:
    autograd would keep ten tensors as large as the logits, this keeps none.
    """

    @staticmethod
    def forward(ctx: Any, logits_BAT: Tensor, weight_BNT: Tensor, row_BA: Tensor) -> Tensor:
        ctx.save_for_backward(logits_BAT, weight_BNT, row_BA)
        sums = []
        for image in zip(logits_BAT, weight_BNT, row_BA, strict=True):
            weight_AT, miss_AT, surprise_AT = _focal_parts(*image)
            sums.append((miss_AT**FOCAL_GAMMA).mul_(surprise_AT).mul_(weight_AT.abs()).sum())
        return torch.stack(sums).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_sum: Tensor) -> tuple[Tensor, None, None]:
        logits_BAT, weight_BNT, row_BA = ctx.saved_tensors
        d_logits_BAT = torch.empty_like(logits_BAT)
        for d_AT, *image in zip(d_logits_BAT, logits_BAT, weight_BNT, row_BA, strict=True):
            weight_AT, miss_AT, surprise_AT = _focal_parts(*image)
            steepness_AT = torch.addcmul(miss_AT, 1 - miss_AT, surprise_AT, value=FOCAL_GAMMA)
            d_AT.copy_((miss_AT**FOCAL_GAMMA).mul_(steepness_AT).mul_(weight_AT).mul_(-d_sum))
        return d_logits_BAT, None, None


def _focal_parts(
    logits_AT: Tensor, weight_NT: Tensor, row_A: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, 1 - p and -log p, each float32 (A, T)."""
    weight_AT = weight_NT[row_A]
    against_AT = weight_AT.sign().neg_().mul_(logits_AT)
    return weight_AT, against_AT.sigmoid(), F.softplus(against_AT)


def anchor_words(matched: Tensor, positive_BNT: Tensor) -> Tensor:
    """bool (B, A, T): the words that name the box of each of the (B, A) matched anchors."""
    B, N, T = positive_BNT.shape
    if N == 0:
        return torch.zeros((*matched.shape, T), dtype=torch.bool, device=matched.device)
    index = matched.clamp(min=0)[..., None].expand(-1, -1, T)
    return positive_BNT.gather(1, index) & (matched >= 0)[..., None]


def masked_word_loss(logits_MV: Tensor, labels_M: Tensor, normaliser: Tensor) -> Tensor:
    """Cross entropy of the words to be predicted (facts B.5); M may be 0.

    Rows whose label is IGNORED_WORD count nothing.
    """
    loss = F.cross_entropy(logits_MV.float(), labels_M, reduction="sum", ignore_index=IGNORED_WORD)
    return loss / normaliser


def pick_regions(positive_BA: Tensor, count: int) -> Tensor:
    """Anchors (B, count) of each image for the contrast: matched ones first, then background.

    The order within both is a fixed hash of the anchor's number: spread over the image, the same
    in every run and for every way of dealing images to ranks.
    """
    A = positive_BA.shape[1]
    number_A = torch.arange(A, device=positive_BA.device)
    shuffled_A = (number_A * _HASH) % 2**32
    return (shuffled_A + positive_BA * 2**32).topk(min(count, A), dim=1).indices


def inter_image_loss(
    regions_BKD: Tensor,
    words_BMD: Tensor,
    matched_BK: Tensor,
    batch: Batch,
    head: ContrastHead,
    normaliser: Tensor,
    collectives: Collectives,
) -> Tensor:
    """Regions against the words of all images of all ranks, and words against all regions.

    `words_BMD` are unfused and padded to a length M that is equal on every rank; `matched_BK` is
    the box of each picked region or -1. A detection region is also positive for the words of its
    category in other images' prompts (facts B.4); words of captions belong to their own image.
    """
    B, K = matched_BK.shape
    regions, words = head(regions_BKD, words_BMD)
    spare = words.shape[1] - batch.token_mask_BT.shape[1]
    own_BKM = anchor_words(matched_BK, F.pad(batch.positive_BNT, (0, spare)))
    ids = torch.cat(_category_ids(matched_BK, batch, words.shape[1]), dim=1)
    everything = collectives.gather(torch.cat([regions, words], dim=1))
    all_ids = collectives.gather(ids)

    all_regions, all_words = everything[:, :K].flatten(0, 1), everything[:, K:].flatten(0, 1)
    all_region_ids, all_word_ids = all_ids[:, :K].flatten(), all_ids[:, K:].flatten()
    heat = (-head.log_temperature).exp()
    first = collectives.rank * B
    region_sum = _contrast(
        heat * regions.flatten(0, 1) @ all_words.T,
        _with_own_block(ids[:, :K].flatten()[:, None] == all_word_ids, own_BKM, first),
        all_word_ids != _PADDING,
    )
    word_sum = _contrast(
        heat * words.flatten(0, 1) @ all_regions.T,
        _with_own_block(
            ids[:, K:].flatten()[:, None] == all_region_ids, own_BKM.transpose(1, 2), first
        ),
        torch.ones_like(all_region_ids, dtype=torch.bool),
    )
    return (region_sum + word_sum) / (2 * normaliser)


def _category_ids(matched_BK: Tensor, batch: Batch, width: int) -> list[Tensor]:
    """Ids of regions (B, K) and words (B, width) that are equal where a label propagates."""
    if batch.box_category_BN.shape[1] == 0:
        region_ids = torch.full_like(matched_BK, _UNMATCHED)
    else:
        category_BK = batch.box_category_BN.gather(1, matched_BK.clamp(min=0))
        region_ids = torch.where(matched_BK >= 0, category_BK, _UNMATCHED)
    word_ids = batch.token_category_BT.masked_fill(~batch.token_mask_BT, _PADDING)
    return [region_ids, F.pad(word_ids, (0, width - word_ids.shape[1]), value=_PADDING)]


def _with_own_block(target_RC: Tensor, own_BRC: Tensor, first: int) -> Tensor:
    """Targets of local rows against all columns, the images' own blocks replaced by their spans."""
    B, rows, columns = own_BRC.shape
    blocks = target_RC.view(B, rows, -1, columns).transpose(1, 2).clone()  # (B, all, rows, columns)
    image = torch.arange(B, device=own_BRC.device)
    blocks[image, first + image] = own_BRC
    return blocks.transpose(1, 2).reshape(B * rows, -1)


def _contrast(logits_RC: Tensor, target_RC: Tensor, valid_C: Tensor) -> Tensor:
    """Sum of -T log softmax over valid columns; T shares each row's weight among its positives.

    Rows without positives add nothing.
    """
    log_share = logits_RC.float().masked_fill(~valid_C, -1e6).log_softmax(dim=1)
    positives_R1 = target_RC.sum(dim=1, keepdim=True)
    return -(log_share * target_RC / positives_R1.clamp(min=1)).sum()
