"""Masks as COCO's run lengths: made, checked, joined and compared.

The compressed form {"size": [height, width], "counts": str} goes through all scorers; pycocotools
does the work on it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from glipv2.pipeline.errors import DataError
from glipv2.pipeline.records import Region


def encode(mask_HW: np.ndarray) -> dict[str, Any]:
    """Compressed run lengths of a bool or 0/1 map."""
    code = coco_mask.encode(np.asfortranarray(mask_HW.astype(np.uint8)))
    return {"size": [int(side) for side in code["size"]], "counts": code["counts"].decode("ascii")}


def run_lengths(mask: Any, size: Sequence[int], where: str) -> Mapping[str, Any]:
    """Compressed run lengths of what annotation files hold: polygons, or run lengths of any form.

    DataError if it is neither, or not of an image of `size` (height, width) pixels.
    """
    height, width = (int(side) for side in size)
    if isinstance(mask, list) and mask:
        return coco_mask.merge(coco_mask.frPyObjects(mask, height, width))
    if (
        isinstance(mask, Mapping)
        and list(mask.get("size", ())) == [height, width]
        and mask.get("counts")
    ):
        plain = isinstance(mask["counts"], list)
        return coco_mask.frPyObjects(mask, height, width) if plain else mask
    raise DataError(
        f"{where} of {height} x {width} pixels: expected polygons or run lengths of that size, "
        f"not {str(mask)[:80]}"
    )


def mask_area(mask: Mapping[str, Any]) -> float:
    """In pixels. One mask at a time: pycocotools 2.0.11 fails on lists of more than 255."""
    return float(coco_mask.area(mask))


def region_area(region: Region) -> float:
    """What the source states, or else the pixels of the mask, or of the box."""
    if region.area is not None:
        return region.area
    if region.mask is not None:
        return mask_area(region.mask)
    x0, y0, x1, y1 = region.box
    return (x1 - x0) * (y1 - y0)


def union(masks: Sequence[Mapping[str, Any]], size: Sequence[int]) -> Mapping[str, Any]:
    """All pixels that are in one of the masks; none at all without masks."""
    if not masks:
        return encode(np.zeros([int(side) for side in size], dtype=bool))
    merged = coco_mask.merge([dict(mask) for mask in masks])
    counts = merged["counts"]
    text = counts.decode("ascii") if isinstance(counts, bytes) else counts
    return {"size": [int(side) for side in merged["size"]], "counts": text}


def overlap(one: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[float, float]:
    """Pixels in both masks, and in one or both."""
    both = mask_area(coco_mask.merge([dict(one), dict(other)], intersect=True))
    return both, mask_area(one) + mask_area(other) - both
