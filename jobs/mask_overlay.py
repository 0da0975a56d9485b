"""A mask as a small picture to lay over the picture."""

import base64
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from glipv2.pipeline.records import Record
from glipv2.pipeline.region_masks import decode_mask

MAX_MASKS = 60
"""Drawn on one picture: each takes some hundred bytes, and time to decode."""


@dataclass(frozen=True, kw_only=True)
class Overlay:
    """One colour where the object is, clear elsewhere; cut to the object."""

    uri: str
    """data: URI of a PNG with one bit a pixel."""
    x: int
    y: int
    width: int
    height: int
    """In pixels of the stored image."""


def mask_overlay(
    record: Record, mask: dict[str, Any], color: str, long_side: int
) -> Overlay | None:
    """A record's mask in a colour `#rrggbb`, for a picture shown at most `long_side` pixels long.

    None for a mask without a pixel; BadSample (`mask_invalid`) for one that can't be read.
    """
    mask_HW = decode_mask(mask, record.width, record.height)
    rows, columns = np.flatnonzero(mask_HW.any(axis=1)), np.flatnonzero(mask_HW.any(axis=0))
    if not len(rows):
        return None
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    shrink = min(1.0, long_side / max(record.width, record.height))
    size = (max(1, round((right - left) * shrink)), max(1, round((bottom - top) * shrink)))
    cut = Image.fromarray(mask_HW[top:bottom, left:right].astype(np.uint8) * 255)
    inside = np.asarray(cut.resize(size, Image.Resampling.BOX)) >= 128
    return Overlay(
        uri=_png(inside, bytes.fromhex(color.removeprefix("#"))),
        x=int(left),
        y=int(top),
        width=int(right - left),
        height=int(bottom - top),
    )


def _png(inside_HW: np.ndarray, color: bytes) -> str:
    picture = Image.fromarray(inside_HW.astype(np.uint8)).convert("P")
    picture.putpalette(bytes(3) + color)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", bits=1, transparency=0, optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
