"""The mask of what a phrase names inside a box: instance and referring segmentation (facts A.12).

Shapes as in regions.py; R cells along a region's features, S = 2 R along its mask.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glipv2.model.batch import Batch, Collectives, Outputs
from glipv2.model.config import ModelConfig
from glipv2.model.heads import LOGIT_LIMIT
from glipv2.model.losses import anchor_words
from glipv2.model.regions import (
    FINEST_CELLS,
    crop_masks,
    look_up,
    pick_mask_regions,
    region_features,
)

if TYPE_CHECKING:
    from glipv2.model.glip import GLIPv2

THRESHOLD = 0.5
REGIONS_AT_ONCE = 128
"""Predictions that are worked on together: bounds the memory."""


class Residual(nn.Module):
    """Three convolutions, the middle one dilated, around a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.conv1 = nn.Conv2d(width, half, 3, padding=1)
        self.conv2 = nn.Conv2d(half, half, 3, padding=3, dilation=3)
        self.conv3 = nn.Conv2d(half, width, 3, padding=1)
        for conv in (self.conv1, self.conv2, self.conv3):
            _start(conv)

    def forward(self, x: Tensor) -> Tensor:
        """(M, D, H, W) to the same shape."""
        y = self.conv1(F.relu(x))
        y = self.conv2(F.relu(y))
        return x + self.conv3(F.relu(y))


def _start(conv: nn.Conv2d | nn.ConvTranspose2d) -> None:
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)


class Hourglass(nn.Module):
    """Residuals at `depth` + 1 scales, each half the one before."""

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        self.up1 = Residual(width)
        self.low1 = Residual(width)
        self.low2 = Hourglass(depth - 1, width) if depth > 1 else Residual(width)
        self.low3 = Residual(width)

    def forward(self, x: Tensor) -> Tensor:
        """(M, D, H, W) to the same shape; H and W are multiples of 2**depth."""
        low = self.low3(self.low2(self.low1(F.max_pool2d(x, 2))))
        return self.up1(x) + F.interpolate(low, scale_factor=2.0, mode="nearest")


class MaskHead(nn.Module):
    """Mask logits of regions for the words that name them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, text_width = config.width, config.text_encoder.width
        halvings = 2**config.mask_depth
        self.resolution = -(-FINEST_CELLS // halvings) * halvings
        """Cells along a region's features: GLIP's 14, or the next that can be halved so often."""
        self.hourglasses = nn.ModuleList(
            Hourglass(config.mask_depth, width) for _ in range(config.mask_hourglasses)
        )
        self.upsample = nn.ConvTranspose2d(width, width, 2, stride=2)
        _start(self.upsample)
        self.project_text = nn.Linear(text_width, width)
        self.log_scale = nn.Parameter(torch.zeros(1))
        self.bias_text = nn.Parameter(torch.zeros(text_width))

    def forward(self, regions_MDRR: Tensor, phrases_MD: Tensor) -> Tensor:
        """Logits (M, S, S) of each region for its own phrase, as `phrases` gives it."""
        x = regions_MDRR
        for hourglass in self.hourglasses:
            x = F.relu(hourglass(x))
        x = F.relu(self.upsample(x))
        query_MD = self.project_text(phrases_MD / 2) / self.log_scale.exp()
        logits_MSS = torch.einsum("mdhw,md->mhw", x, query_MD)
        bias_M = phrases_MD @ self.bias_text
        return (logits_MSS + bias_M[:, None, None]).clamp(-LOGIT_LIMIT, LOGIT_LIMIT)


def phrases(words_BTD: Tensor, tokens_BPT: Tensor) -> Tensor:
    """Each phrase as the mean of its normalised fused words: (B, P, D), 0 for one without tokens.

    Logits are linear in it, so this gives the mean of the tokens' logits for the price of one.
    """
    weights_BPT = tokens_BPT.to(words_BTD.dtype)
    weights_BPT = weights_BPT / weights_BPT.sum(dim=2, keepdim=True).clamp(min=1)
    return weights_BPT @ F.normalize(words_BTD, dim=-1)


def mask_loss(
    head: MaskHead,
    outputs: Outputs,
    boxes_BA4: Tensor,
    strides: Sequence[int],
    batch: Batch,
    collectives: Collectives,
) -> Tensor:
    """Binary cross entropy of the mask of true boxes and of the predicted `boxes_BA4` near them.

    Mean over a region's cells; the sum over regions is divided by their number, averaged over ranks
    (1 an image if there are none). No gradient flows into the boxes. The batch must have masks,
    on every rank; boxes whose mask is unknown or that no word names don't count.
    """
    regions = pick_mask_regions(boxes_BA4, batch)
    tokens_BKT = anchor_words(regions.matched_BK, batch.positive_BNT)
    # Images differ much in their number of regions: padding would cost more than this one wait.
    image_M, place_M = tokens_BKT.any(dim=2).nonzero(as_tuple=True)
    counts = torch.tensor([len(image_M), len(tokens_BKT)], dtype=torch.float32)
    regions_mean, images_mean = collectives.mean(counts.to(boxes_BA4.device)).unbind()
    boxes_M4 = regions.boxes_BK4[image_M, place_M]
    box_M = regions.matched_BK[image_M, place_M]
    logits_MSS = head(
        region_features(outputs.pyramid, strides, boxes_M4, image_M, head.resolution),
        phrases(outputs.fused_words_BTD, tokens_BKT)[image_M, place_M],
    )
    assert batch.masks_BNSS is not None
    truth_MSS = crop_masks(
        batch.masks_BNSS[image_M, box_M],
        batch.boxes_BN4[image_M, box_M],
        boxes_M4,
        logits_MSS.shape[1],
    )
    loss_MSS = F.binary_cross_entropy_with_logits(logits_MSS.float(), truth_MSS, reduction="none")
    total = loss_MSS.sum() / logits_MSS.shape[1] ** 2
    return total / torch.where(regions_mean > 0, regions_mean, images_mean)


def region_masks(
    model: "GLIPv2",
    outputs: Outputs,
    phrase_tokens: Sequence[Tensor],
    boxes: Sequence[Tensor],
    labels: Sequence[Tensor],
) -> list[Tensor]:
    """Probabilities (K, S, S) of the mask of each box, which they fill; one tensor an image.

    `phrase_tokens[b]` is the bool (P, T) map of phrases to tokens of text b, `boxes[b]` (K, 4) are
    in pixels of the resized image and `labels[b]` (K,) say which phrase each is about. All 0 where
    a phrase has no token. ValueError if the model has no mask head.
    """
    if model.mask_head is None:
        raise ValueError("this model has no mask head: it was built with model.masks false")
    device = outputs.fused_words_BTD.device
    tokens = [x.to(device)[y.to(device)] for x, y in zip(phrase_tokens, labels, strict=True)]
    queries_MD = torch.cat(
        [
            phrases(words_TD[None, : x.shape[1]], x[None])[0]
            for words_TD, x in zip(outputs.fused_words_BTD, tokens, strict=True)
        ]
    )
    image_M = torch.cat([torch.full((len(x),), b, device=device) for b, x in enumerate(boxes)])
    boxes_M4 = torch.cat([x.to(device) for x in boxes])
    found = []
    for part in torch.arange(len(image_M), device=device).split(REGIONS_AT_ONCE):
        features = region_features(
            outputs.pyramid,
            model.config.strides,
            boxes_M4[part],
            image_M[part],
            model.mask_head.resolution,
        )
        found.append(model.mask_head(features, queries_MD[part]).float().sigmoid())
    probabilities_MSS = torch.cat(found) * torch.cat([x.any(dim=1) for x in tokens])[:, None, None]
    return list(probabilities_MSS.split([len(x) for x in boxes]))


def paste_masks(probabilities_KSS: Tensor, boxes_K4: Tensor, height: int, width: int) -> Tensor:
    """Where the mask of each box is above 0.5 in its image: bool (K, height, width).

    Boxes are in pixels of that image and may reach over its edge. Pixel centres are looked up
    between cell centres and a ring of zeros around the box, which is GLIP's padding by one cell;
    unlike GLIP's, boxes are not rounded to whole pixels.
    """
    K, device = len(boxes_K4), probabilities_KSS.device
    masks_KHW = torch.zeros((K, height, width), dtype=torch.bool, device=device)
    y_1H = (torch.arange(height, device=device) + 0.5)[None]
    x_1W = (torch.arange(width, device=device) + 0.5)[None]
    for k in range(K):  # one at a time: as floats, all would take gigabytes
        row = slice(k, k + 1)
        pasted_1HW = look_up(probabilities_KSS[row].float(), boxes_K4[row].float(), y_1H, x_1W)
        masks_KHW[k] = pasted_1HW[0] > THRESHOLD
    return masks_KHW
