"""What training does to a picture, its boxes and their masks: a random size and a flip."""

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


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An image and what is known of its N regions."""

    image_3HW: Tensor
    """uint8."""
    boxes_N4: Tensor
    """float32 xyxy in pixels of the image."""
    masks_NSS: np.ndarray | None = None
    """uint8, each in the frame of its box, so that they have no size in pixels."""


def augment(
    picture: Picture, text: str, settings: Augmentation, rng: np.random.Generator
) -> Picture:
    """The picture as training sees it this time; `text` is what is claimed of it."""
    flip, short_side = rng.random() < settings.flip, rng.choice(settings.short_sides)
    resized_3HW = resize(picture.image_3HW, int(short_side), settings.long_side)
    resized = Picture(
        image_3HW=resized_3HW,
        boxes_N4=scale_boxes(picture.boxes_N4, picture.image_3HW.shape, resized_3HW.shape),
        masks_NSS=picture.masks_NSS,
    )
    return mirror(resized) if flip and not SIDED.search(text) else resized


def scale_boxes(boxes_N4: Tensor, before: torch.Size, after: torch.Size) -> Tensor:
    """Boxes of a (3, H, W) image in pixels of its resized version."""
    y, x = after[1] / before[1], after[2] / before[2]
    return boxes_N4 * boxes_N4.new_tensor([x, y, x, y])


def mirror(picture: Picture) -> Picture:
    """Exchange left and right."""
    width = picture.image_3HW.shape[2]
    x0, y0, x1, y1 = picture.boxes_N4.unbind(1)
    masks_NSS = picture.masks_NSS
    return Picture(
        image_3HW=picture.image_3HW.flip(2),
        boxes_N4=torch.stack([width - x1, y0, width - x0, y1], dim=1),
        masks_NSS=None if masks_NSS is None else masks_NSS[:, :, ::-1],
    )
