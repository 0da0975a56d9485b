"""Resizing and padding, the same for training and prediction."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def resized_size(height: int, width: int, short_side: int, long_side: int) -> tuple[int, int]:
    """(height, width) with the shorter side at `short_side`, unless the longer exceeds `long_side`.

    The aspect ratio is kept up to rounding down to whole pixels, as in GLIP; never below 1 pixel.
    """
    short, long = min(height, width), max(height, width)
    if long * short_side > long_side * short:
        short_side = max(1, round(long_side * short / long))
    other = min(max(short_side, short_side * long // short), max(long_side, short_side))
    return (short_side, other) if height <= width else (other, short_side)


def resize(image_3HW: Tensor, size: tuple[int, int]) -> Tensor:
    """A uint8 (3, H, W) image of `size` (height, width), by antialiased bilinear interpolation.

    In memory the colours of a pixel stand beside each other, which is three times as fast.
    """
    if size == tuple(image_3HW.shape[1:]):
        return image_3HW
    # the new dimension comes first, or its stride would hide from torch what the layout is
    image_13HW = image_3HW.permute(1, 2, 0).contiguous()[None].permute(0, 3, 1, 2)
    return F.interpolate(image_13HW, size=size, mode="bilinear", antialias=True)[0]


def pad_images(
    images: Sequence[Tensor], pad_to: tuple[int, int] | None = None, multiple: int = 32
) -> tuple[Tensor, Tensor]:
    """Put uint8 (3, h, w) images into one tensor, zero-padded at the right and bottom.

    Returns uint8 (B, 3, H, W) and the int64 (B, 2) height and width of each before padding.
    The padded size is `pad_to` (height, width), or the largest height and width of the images
    rounded up to `multiple`. ValueError if an image does not fit `pad_to`.
    """
    sizes = [(image.shape[1], image.shape[2]) for image in images]
    height, width = max(h for h, _ in sizes), max(w for _, w in sizes)
    if pad_to is None:
        padded = (-(-height // multiple) * multiple, -(-width // multiple) * multiple)
    else:
        padded = pad_to
        if height > padded[0] or width > padded[1]:
            raise ValueError(f"an image of {height} x {width} pixels does not fit pad_to {pad_to}")
    pixels_BHW3 = torch.zeros((len(images), *padded, 3), dtype=torch.uint8)
    images_B3HW = pixels_BHW3.permute(0, 3, 1, 2)  # laid out as `resize` leaves them
    for row, image in enumerate(images):
        images_B3HW[row, :, : image.shape[1], : image.shape[2]] = image
    return images_B3HW, torch.tensor(sizes, dtype=torch.int64)
