"""Regions of images: which ones to train masks on, their features, and maps that fill them.

M counts regions of all images of a batch together, K those of one image, S the cells of a region
along each side. A region's map fills its box: cell (0, 0) starts at the box's corner.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import roi_align

from glipv2.model.batch import UNKNOWN_MASK, Batch
from glipv2.model.boxes import area, pairwise_iou
from glipv2.model.losses import pick_regions

MAX_TRUE, MAX_PREDICTED = 64, 16
"""Boxes of one image that masks are trained on: annotated ones, and predictions near them."""
MIN_OVERLAP = 0.5
FINEST_CELLS = 14
SAMPLES = 2
"""Looks per cell and axis."""


@dataclass(kw_only=True)
class Regions:
    """Where masks are trained, as many for each image; some are only padding."""

    boxes_BK4: Tensor
    """xyxy in pixels of the resized image, inside of it."""
    matched_BK: Tensor
    """int64 row of the batch's boxes whose mask the region must find; -1 at padding."""


@torch.no_grad()
def pick_mask_regions(predicted_BA4: Tensor, batch: Batch) -> Regions:
    """The boxes whose mask is known, and predictions that overlap one of them by 0.5 or more.

    A prediction belongs to the box that it overlaps most. ValueError if the batch has no masks.
    """
    if batch.masks_BNSS is None:
        raise ValueError("a batch without masks")
    B, N = batch.boxes_BN4.shape[:2]
    if N == 0:
        nothing = batch.boxes_BN4.new_zeros(B, 0, 4)
        return Regions(boxes_BK4=nothing, matched_BK=nothing[..., 0].long())
    limit_B14 = batch.sizes_B2.flip(1).repeat(1, 2)[:, None].to(predicted_BA4.dtype)
    predicted_BA4 = torch.minimum(predicted_BA4.clamp(min=0), limit_B14)
    known_BN = batch.box_mask_BN & (batch.masks_BNSS[..., 0, 0] != UNKNOWN_MASK)
    iou_BAN = pairwise_iou(predicted_BA4, batch.boxes_BN4) * batch.box_mask_BN[:, None]
    best_BA, box_BA = iou_BAN.max(dim=2)
    near_BA = (best_BA >= MIN_OVERLAP) & known_BN.gather(1, box_BA)
    true_BK = pick_regions(known_BN, MAX_TRUE)
    near_BK = pick_regions(near_BA, MAX_PREDICTED)
    boxes = (_rows(batch.boxes_BN4, true_BK), _rows(predicted_BA4, near_BK).to(batch.boxes_BN4))
    matched = (true_BK, box_BA.gather(1, near_BK))
    valid = (known_BN.gather(1, true_BK), near_BA.gather(1, near_BK))
    return Regions(
        boxes_BK4=torch.cat(boxes, dim=1),
        matched_BK=torch.where(torch.cat(valid, dim=1), torch.cat(matched, dim=1), -1),
    )


def _rows(boxes: Tensor, index: Tensor) -> Tensor:
    return boxes.gather(1, index[..., None].expand(-1, -1, 4))


def region_levels(boxes_M4: Tensor, levels: int) -> Tensor:
    """int64 (M,) pyramid level to look at, 0 the finest: where a box is 14 to 28 cells wide.

    This is GLIP's floor(4 + log2(sqrt(area) / 224)), the finest level being 3 with stride 8. Boxes
    that are smaller or larger than all levels go to the nearest one: at 128 pixels, as the tiny
    model has, nearly all go to the finest.
    """
    side_M = area(boxes_M4).sqrt().clamp(min=1)
    return (side_M / (8 * FINEST_CELLS)).log2().floor().clamp(0, levels - 1).long()


def region_features(
    maps: Sequence[Tensor],
    strides: Sequence[int],
    boxes_M4: Tensor,
    image_M: Tensor,
    resolution: int,
) -> Tensor:
    """Features (M, D, S, S) of regions, S = resolution, from maps (B, D, H, W), finest first.

    Boxes are in pixels of the padded input, `image_M` says of which image. Edges are coordinates
    here, so location i of a map has its centre at (i + 0.5) strides: that is roi_align's `aligned`;
    without it everything would be read half a location off.
    """
    exact = torch.promote_types(maps[0].dtype, torch.float32)
    rois_M5 = torch.cat((image_M[:, None].to(exact), boxes_M4.to(exact)), dim=1)
    # All levels are read and one is kept: little next to what follows, and shapes stay static.
    pooled_LMDSS = torch.stack(
        [
            roi_align(x.to(exact), rois_M5, resolution, 1 / stride, SAMPLES, aligned=True)
            for x, stride in zip(maps, strides, strict=True)
        ]
    )
    level_M = region_levels(boxes_M4, len(maps))
    chosen = pooled_LMDSS[level_M, torch.arange(len(level_M), device=level_M.device)]
    return chosen.to(maps[0].dtype)


def look_up(maps_MSS: Tensor, frames_M4: Tensor, y_MH: Tensor, x_MW: Tensor) -> Tensor:
    """Values (M, H, W) of maps that fill their frames, at rows y and columns x, in pixels.

    Bilinear between cell centres; around a frame stands a ring of zeros, as if the map had been
    padded by one cell.
    """
    rows_MHS = _weights(y_MH, frames_M4[:, 1:2], frames_M4[:, 3:4], maps_MSS.shape[1])
    columns_MWS = _weights(x_MW, frames_M4[:, 0:1], frames_M4[:, 2:3], maps_MSS.shape[2])
    return rows_MHS @ maps_MSS @ columns_MWS.transpose(1, 2)


def _weights(places: Tensor, start: Tensor, end: Tensor, cells: int) -> Tensor:
    """How much each cell counts at each place; frames from `start` to `end` (M, 1)."""
    cell = (places - start) / (end - start).clamp(min=1e-6) * cells - 0.5
    distance = cell[..., None] - torch.arange(cells, dtype=cell.dtype, device=cell.device)
    return (1 - distance.abs()).clamp(min=0)


def cell_centres(start_M1: Tensor, end_M1: Tensor, cells: int) -> Tensor:
    """Centres (M, cells) of the cells between two edges."""
    step = torch.arange(cells, dtype=start_M1.dtype, device=start_M1.device) + 0.5
    return start_M1 + (end_M1 - start_M1) * step / cells


def crop_masks(masks_MSS: Tensor, frames_M4: Tensor, regions_M4: Tensor, cells: int) -> Tensor:
    """What masks (M, S, S), 0 or 1 in their own frames, look like in regions: 0. or 1., cells²."""
    y = cell_centres(regions_M4[:, 1:2], regions_M4[:, 3:4], cells)
    x = cell_centres(regions_M4[:, 0:1], regions_M4[:, 2:3], cells)
    return (look_up(masks_MSS.to(y.dtype), frames_M4, y, x) >= 0.5).to(y.dtype)
