"""The written rule for boxes from strangers; every reader applies it and nothing else.

1. Not four finite numbers: dropped (`box_unreadable`, `box_not_finite`).
2. Right edge left of the left edge, or bottom above top: dropped (`box_inverted`), not swapped:
   nobody knows which corner is wrong.
3. No area: dropped (`box_empty`).
4. No area in common with the image: dropped (`box_outside`).
5. Within the image's first pixel: dropped (`box_normalised`), as its numbers are shares of the
   image and not pixels. In a source of shares, pixels come out far outside.
6. Partly outside: clipped to the image and counted (`box_clipped`).
"""

import math
from collections.abc import Sequence
from typing import Any

from glipv2.data_prep.reasons import Dropped
from glipv2.pipeline.errors import BadSample
from glipv2.pipeline.records import Box

MAX_BOXES = 1_000
"""Boxes a record may hold; more say that the annotation is broken."""


def check_box_count(boxes: Sequence[Any], where: str) -> None:
    """BadSample when an image has more boxes than a record holds."""
    if len(boxes) > MAX_BOXES:
        raise BadSample("boxes_too_many", f"{where}: {len(boxes)}")


def clean_box(
    corners: Sequence[Any], size: tuple[int, int], dropped: Dropped, where: str
) -> Box | None:
    """x0, y0, x1, y1 inside an image of `size` (width, height), or None with its reason noted.

    `corners` are numbers or the text of numbers, 0-based, the right and bottom edge exclusive.
    """
    reason, box = _judge(corners, *size)
    if reason:
        dropped.note(reason, where)
    return box


def _judge(corners: Sequence[Any], width: int, height: int) -> tuple[str, Box | None]:
    if len(corners) != 4 or any(isinstance(value, bool) for value in corners):
        return "box_unreadable", None
    try:
        x0, y0, x1, y1 = (float(value) for value in corners)
    except OverflowError:
        return "box_not_finite", None
    except (TypeError, ValueError):
        return "box_unreadable", None
    if not all(math.isfinite(value) for value in (x0, y0, x1, y1)):
        return "box_not_finite", None
    if x1 < x0 or y1 < y0:
        return "box_inverted", None
    if x1 == x0 or y1 == y0:
        return "box_empty", None
    clipped = (max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height)))
    if clipped[0] >= clipped[2] or clipped[1] >= clipped[3]:
        return "box_outside", None
    if max(x1, y1) <= 1 < min(width, height):
        return "box_normalised", None
    return "" if clipped == (x0, y0, x1, y1) else "box_clipped", clipped
