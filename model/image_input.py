"""Whatever a caller holds an image in, as uint8 RGB (3, H, W)."""

from collections.abc import Iterator, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path

import fsspec
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from glipv2.model.decoding import MAX_BYTES, ImageError, decode_image, rgb_pixels
from glipv2.model.urls import scheme_of


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An image as a model sees it; `Grounder.prepare` makes it."""

    pixels_3HW: Tensor
    """uint8 RGB, resized."""
    own_size: tuple[int, int]
    """(height, width) of the image as given, EXIF orientation applied."""

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the resized image."""
        return self.pixels_3HW.shape[1], self.pixels_3HW.shape[2]


ImageInput = Image.Image | np.ndarray | Tensor | bytes | str | Path | Picture
"""A Pillow image; an array (H, W, 3) or (H, W), or a tensor (3, H, W), uint8 or floats in [0, 1];
the bytes of a JPEG, PNG or WebP file; its path or URL; or what `Grounder.prepare` made."""
Images = Sequence[ImageInput] | np.ndarray | Tensor
"""Several; also as one array (B, H, W, 3) or tensor (B, 3, H, W)."""

RANGE_SLACK = 1e-3
"""How far floats may leave [0, 1] by rounding: a quarter of a grey level."""
_WORDS = {
    "image_format": "of unknown format",
    "image_too_large": "too large",
    "image_undecodable": "can't be decoded",
}


def image_count(images: Images) -> int:
    """How many images these are; ValueError for one that is not in a list, TypeError for what has
    no length, such as a generator."""
    one_array = isinstance(images, np.ndarray | Tensor) and images.ndim != 4
    if one_array or isinstance(images, str | bytes | Path | Image.Image):
        raise ValueError("images must be a list, also if it is only one")
    if not isinstance(images, Sized):
        raise TypeError(
            f"images must be a list, not of type {type(images).__name__}; list(...) makes one of a "
            "generator"
        )
    return len(images)


def read_images(images: Images) -> Iterator[Tensor]:
    """One after the other as uint8 RGB (3, H, W); ValueError says which can't be read, and why."""
    for number, image in enumerate(images):
        try:
            yield read_image(image)
        except (ValueError, OSError) as error:
            raise ValueError(f"image {number}: {_plain(image, error)}") from error


def unusable(reason: str, detail: str) -> str:
    """What an `ImageError` says, in words for people."""
    return f"{_WORDS[reason]}: {detail}"


def _plain(image: ImageInput, error: Exception) -> str:
    """What is wrong with an image, with the name of its file."""
    if isinstance(error, ImageError):
        said = unusable(error.reason, error.detail)
    elif isinstance(error, FileNotFoundError):
        said = "no such file"
    elif isinstance(error, OSError):
        said = error.strerror or str(error)
    else:
        return str(error)
    return f"{image}: {said}" if isinstance(image, str | Path) else said


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
