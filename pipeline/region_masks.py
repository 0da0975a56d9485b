"""Masks from records: COCO run lengths, checked, to small maps in the frames of their boxes."""

import math
from typing import Any

import numpy as np

from glipv2.model.batch import UNKNOWN_MASK
from glipv2.pipeline.errors import BadSample
from glipv2.pipeline.records import Box, Record

MASK_SIDE = 56
"""Cells along each side of a training mask: twice what GLIP's mask head predicts."""


def region_masks(record: Record, side: int = MASK_SIDE) -> np.ndarray:
    """uint8 (N, side, side): what of each region's box is its object, or UNKNOWN_MASK everywhere.

    A cell is 1 if half of its area or more is. BadSample (`mask_invalid`) for unreadable masks.
    """
    masks_NSS = np.full((len(record.regions), side, side), UNKNOWN_MASK, dtype=np.uint8)
    for row, region in enumerate(record.regions):
        if region.mask is not None:
            mask_HW = decode_mask(region.mask, record.width, record.height)
            masks_NSS[row] = mask_in_box(mask_HW, region.box, side)
    return masks_NSS


def decode_mask(mask: dict[str, Any], width: int, height: int) -> np.ndarray:
    """bool (height, width) from compressed run lengths; BadSample if they don't fill the image."""
    size, counts = mask.get("size"), mask.get("counts")
    runs = uncompress_runs(counts) if isinstance(counts, str) else None
    if size != [height, width] or runs is None or min(runs, default=-1) < 0:
        raise BadSample("mask_invalid", f"size {size}, the image is {[height, width]}")
    if sum(runs) != width * height:
        raise BadSample("mask_invalid", f"runs of {sum(runs)} pixels, not {width * height}")
    inside = np.arange(len(runs)) % 2 == 1  # the first run is outside
    return np.repeat(inside, runs).reshape(width, height).T  # COCO counts down the columns


def uncompress_runs(text: str) -> list[int] | None:
    """COCO's text form: 5 bits a character from 48 up, bit 5 says more follows, runs after the
    second are differences to the run two before. None if it is not that."""
    runs: list[int] = []
    value, shift = 0, 0
    for letter in text:
        bits = ord(letter) - 48
        if not 0 <= bits < 64 or shift > 30:
            return None
        value |= (bits & 0x1F) << shift
        shift += 5
        if bits & 0x20:
            continue
        if bits & 0x10:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value, shift = 0, 0
    return None if shift else runs


def mask_in_box(mask_HW: np.ndarray, box: Box, side: int) -> np.ndarray:
    """uint8 (side, side): the part of a mask in a box (xyxy in its pixels), by covered area."""
    x0, y0, x1, y1 = box
    left, top = math.floor(x0), math.floor(y0)
    window_HW = mask_HW[top : math.ceil(y1), left : math.ceil(x1)].astype(np.float32)
    rows_SH = _shares(y0 - top, y1 - top, window_HW.shape[0], side)
    columns_SW = _shares(x0 - left, x1 - left, window_HW.shape[1], side)
    return (rows_SH @ window_HW @ columns_SW.T >= 0.5).astype(np.uint8)


def _shares(start: float, end: float, pixels: int, cells: int) -> np.ndarray:
    """(cells, pixels): which share of each cell between start and end each pixel covers."""
    edges = np.linspace(start, end, cells + 1)[:, None]
    pixel = np.arange(pixels)
    overlap = np.minimum(edges[1:], pixel + 1) - np.maximum(edges[:-1], pixel)
    return (overlap.clip(min=0) * cells / (end - start)).astype(np.float32)
