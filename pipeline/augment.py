"""What training does to a picture, its boxes and their masks: perhaps a crop, a size, a flip."""

import re
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from glipv2.model.images import resize, resized_size
from glipv2.pipeline.images import decode_image
from glipv2.pipeline.records import Box, Record, Region
from glipv2.pipeline.region_masks import region_masks

SIDED = re.compile(r"\b(left|right)", re.IGNORECASE)
"""Texts that a mirrored picture would make untrue."""
LEAST_SEEN = 0.5
"""Share of a box that a crop must show for the box to be learned."""


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    short_sides: tuple[int, ...]
    """The short side is drawn from these (pixels)."""
    long_side: int
    """Unless this would be exceeded."""
    flip: float
    """Probability of a horizontal flip."""
    crop: float = 0.0
    """Probability of a random crop."""
    crop_least: float = 0.5
    """Smallest share of each side that a crop keeps."""


@dataclass(frozen=True, kw_only=True)
class View:
    """How one picture is seen this time."""

    crop: tuple[int, int, int, int]
    """x0, y0, x1, y1 in pixels of the stored image; all of it without a crop."""
    short_side: int
    long_side: int
    mirrored: bool

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of what the model gets."""
        x0, y0, x1, y1 = self.crop
        return resized_size(y1 - y0, x1 - x0, self.short_side, self.long_side)


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An image and what is known of its N regions."""

    image_3HW: Tensor
    """uint8."""
    boxes_N4: Tensor
    """float32 xyxy in pixels of the image."""
    masks_NSS: np.ndarray | None = None
    """uint8, each in the frame of its box, so that they have no size in pixels."""


def draw_view(
    size: tuple[int, int], text: str, settings: Augmentation, rng: np.random.Generator
) -> View:
    """A random view of an image of `size` (width, height); `text` is what is claimed of it."""
    flip, short_side = rng.random() < settings.flip, rng.choice(settings.short_sides)
    crop = (0, 0, *size)
    if settings.crop and rng.random() < settings.crop:
        crop = _draw_crop(size, settings.crop_least, rng)
    return View(
        crop=crop,
        short_side=int(short_side),
        long_side=settings.long_side,
        mirrored=bool(flip and not SIDED.search(text)),
    )


def cropped(record: Record, view: View) -> Record:
    """The record as the crop shows it; its boxes stay in pixels of the stored image.

    A region that the crop cuts to less than LEAST_SEEN of its box becomes a crowd: there is
    something of it, but nothing to learn. One that lies outside is left out.
    """
    if view.crop == (0, 0, record.width, record.height):
        return record
    regions = (_cut(region, view.crop) for region in record.regions)
    return replace(record, regions=tuple(region for region in regions if region is not None))


def picture(record: Record, view: View, masks: bool = False) -> Picture:
    """The pixels, boxes and (with `masks`) masks of a record as `cropped` gives it."""
    x0, y0, x1, y1 = view.crop
    height, width = view.size
    whole = (
        -(-height * record.height // (y1 - y0)),
        -(-width * record.width // (x1 - x0)),
    )  # what the whole image would be resized to
    image_3HW = decode_image(record.image, at_least=whole)
    if view.crop != (0, 0, record.width, record.height):
        y, x = image_3HW.shape[1] / record.height, image_3HW.shape[2] / record.width
        top, left, bottom, right = round(y0 * y), round(x0 * x), round(y1 * y), round(x1 * x)
        image_3HW = transforms.crop_image(image_3HW, top, left, bottom - top, right - left)
    image_3HW = resize(image_3HW, (height, width))
    boxes_N4 = torch.tensor([r.box for r in record.regions], dtype=torch.float32).reshape(-1, 4)
    boxes_N4 = boxes_N4 - boxes_N4.new_tensor([x0, y0, x0, y0])
    boxes_N4 *= boxes_N4.new_tensor([width / (x1 - x0), height / (y1 - y0)] * 2)
    seen = Picture(
        image_3HW=image_3HW,
        boxes_N4=boxes_N4,
        masks_NSS=region_masks(record) if masks else None,
    )
    return mirror(seen) if view.mirrored else seen


def mirror(seen: Picture) -> Picture:
    """Exchange left and right."""
    width = seen.image_3HW.shape[2]
    x0, y0, x1, y1 = seen.boxes_N4.unbind(1)
    return Picture(
        image_3HW=transforms.horizontal_flip_image(seen.image_3HW),
        boxes_N4=torch.stack([width - x1, y0, width - x0, y1], dim=1),
        masks_NSS=None if seen.masks_NSS is None else seen.masks_NSS[:, :, ::-1],
    )


def _draw_crop(
    size: tuple[int, int], least: float, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    sides = [max(1, round(side * rng.uniform(least, 1))) for side in size]
    x0, y0 = (int(rng.integers(whole - side + 1)) for whole, side in zip(size, sides, strict=True))
    return x0, y0, x0 + sides[0], y0 + sides[1]


def _cut(region: Region, crop: Box) -> Region | None:
    x0, y0, x1, y1 = region.box
    box = (max(x0, crop[0]), max(y0, crop[1]), min(x1, crop[2]), min(y1, crop[3]))
    if box[0] >= box[2] or box[1] >= box[3]:
        return None
    seen = (box[2] - box[0]) * (box[3] - box[1]) / ((x1 - x0) * (y1 - y0))
    return replace(region, box=box, area=None, crowd=region.crowd or seen < LEAST_SEEN)
