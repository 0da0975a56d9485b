"""Whatever a caller holds an image in, as uint8 RGB (3, H, W)."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import fsspec
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from glipv2.model.decoding import MAX_BYTES, decode_image, rgb_pixels
from glipv2.model.urls import scheme_of

ImageInput = Image.Image | np.ndarray | Tensor | bytes | str | Path
"""A Pillow image; an array (H, W, 3) or (H, W), or a tensor (3, H, W), uint8 or floats in [0, 1];
the bytes of a JPEG, PNG or WebP file; its path or URL."""
Images = Sequence[ImageInput] | np.ndarray | Tensor
"""Several; also as one array (B, H, W, 3) or tensor (B, 3, H, W)."""

RANGE_SLACK = 1e-3
"""How far floats may leave [0, 1] by rounding: a quarter of a grey level."""


def image_count(images: Images) -> int:
    """How many images these are; ValueError for one that is not in a list."""
    one_array = isinstance(images, np.ndarray | Tensor) and images.ndim != 4
    if one_array or isinstance(images, str | bytes | Path | Image.Image):
        raise ValueError("images must be a list, also if it is only one")
    return len(images)


def read_images(images: Images) -> Iterator[Tensor]:
    """One after the other as uint8 RGB (3, H, W); ValueError says which can't be read, and why."""
    for number, image in enumerate(images):
        try:
            yield read_image(image)
        except (ValueError, OSError) as error:
            raise ValueError(f"image {number}: {error}") from error


def read_image(image: ImageInput) -> Tensor:
    """uint8 RGB (3, H, W); ValueError or OSError says why it can't be had."""
    if isinstance(image, str | Path):
        image = _fetch(str(image))
    if isinstance(image, bytes):
        return decode_image(image)
    if isinstance(image, Image.Image):
        return rgb_pixels(image)
    if isinstance(image, np.ndarray):
        return _from_array(image)
    if isinstance(image, Tensor):
        return _from_tensor(image)
    raise ValueError(f"a {type(image).__name__} is no image")


def _fetch(url: str) -> bytes:
    """The file's bytes, no more of them than show that it is too large."""
    if scheme_of(url) == "file":
        with Path(url.removeprefix("file://")).expanduser().open("rb") as file:
            return file.read(MAX_BYTES + 1)
    with fsspec.open(url, "rb") as file:
        return bytes(file.read(MAX_BYTES + 1))


def _from_array(array: np.ndarray) -> Tensor:
    if array.ndim == 2:
        array = np.stack([array] * 3, axis=2)
    if array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(f"an array of shape {array.shape}, expected (H, W, 3) or (H, W)")
    if array.dtype != np.uint8 and not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"an array of {array.dtype}, expected uint8 or floats in [0, 1]")
    return _from_tensor(torch.from_numpy(array.transpose(2, 0, 1).copy()))


def _from_tensor(image_3HW: Tensor) -> Tensor:
    if image_3HW.ndim != 3 or image_3HW.shape[0] != 3 or not image_3HW.numel():
        raise ValueError(f"a tensor of shape {tuple(image_3HW.shape)}, expected (3, H, W)")
    image_3HW = image_3HW.detach().cpu()
    if image_3HW.dtype == torch.uint8:
        return image_3HW
    if not image_3HW.is_floating_point():
        raise ValueError(f"a tensor of {image_3HW.dtype}, expected uint8 or floats in [0, 1]")
    image_3HW = image_3HW.float()
    if not image_3HW.isfinite().all():
        raise ValueError("NaN or infinite pixels")
    low, high = (float(value) for value in image_3HW.aminmax())
    if low < -RANGE_SLACK or high > 1 + RANGE_SLACK:
        raise ValueError(f"floats from {low:g} to {high:g}, expected [0, 1] (or uint8)")
    return (image_3HW * 255).round().clamp(0, 255).byte()
