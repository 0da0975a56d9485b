"""What training does to a picture and its boxes: a random size and a flip."""

import re
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from glipv2.model.images import resize

SIDED = re.compile(r"\b(left|right)", re.IGNORECASE)
"""Texts that a mirrored picture would make untrue."""


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    short_sides: tuple[int, ...]
    """The short side is drawn from these (pixels)."""
    long_side: int
    """Unless this would be exceeded."""
    flip: float
    """Probability of a horizontal flip."""


def augment(
    image_3HW: Tensor,
    boxes_N4: Tensor,
    text: str,
    settings: Augmentation,
    rng: np.random.Generator,
) -> tuple[Tensor, Tensor]:
    """The picture (uint8) and its boxes (float32 xyxy in pixels of the result)."""
    flip, short_side = rng.random() < settings.flip, rng.choice(settings.short_sides)
    resized_3HW = resize(image_3HW, int(short_side), settings.long_side)
    boxes_N4 = scale_boxes(boxes_N4, image_3HW.shape, resized_3HW.shape)
    if flip and not SIDED.search(text):
        return mirror(resized_3HW, boxes_N4)
    return resized_3HW, boxes_N4


def scale_boxes(boxes_N4: Tensor, before: torch.Size, after: torch.Size) -> Tensor:
    """Boxes of a (3, H, W) image in pixels of its resized version."""
    y, x = after[1] / before[1], after[2] / before[2]
    return boxes_N4 * boxes_N4.new_tensor([x, y, x, y])


def mirror(image_3HW: Tensor, boxes_N4: Tensor) -> tuple[Tensor, Tensor]:
    """Exchange left and right of a picture and its xyxy boxes."""
    width = image_3HW.shape[2]
    x0, y0, x1, y1 = boxes_N4.unbind(1)
    return image_3HW.flip(2), torch.stack([width - x1, y0, width - x0, y1], dim=1)
