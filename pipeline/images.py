"""Image bytes in a data set: `model.decoding`'s reading, where a bad image is a BadSample.

Its reason is `image_format`, `image_too_large` or `image_undecodable`.
"""

import contextlib
import io
from collections.abc import Iterator

from PIL import Image
from torch import Tensor

from glipv2.model import decoding
from glipv2.model.decoding import MAX_BYTES, MAX_PIXELS
from glipv2.pipeline.errors import BadSample

__all__ = ["MAX_BYTES", "decode_image", "encode_jpeg", "image_format", "image_size"]


def image_format(data: bytes) -> str:
    """`jpg`, `png` or `webp` by the file's first bytes; the name it had doesn't count."""
    with _as_bad_sample():
        return decoding.image_format(data)


def image_size(data: bytes) -> tuple[tuple[int, int], str]:
    """((width, height) with EXIF orientation applied, format), from the header alone."""
    with _as_bad_sample():
        return decoding.image_size(data)


def decode_image(
    data: bytes,
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_BYTES,
    at_least: tuple[int, int] | None = None,
) -> Tensor:
    """(3, H, W) uint8 RGB; see `model.decoding.decode_image`."""
    with _as_bad_sample():
        return decoding.decode_image(data, max_pixels, max_bytes, at_least)


def encode_jpeg(image_3HW: Tensor, quality: int = 95) -> bytes:
    """JPEG bytes of a (3, H, W) uint8 RGB tensor."""
    buffer = io.BytesIO()
    pixels_HW3 = image_3HW.permute(1, 2, 0).contiguous().numpy()
    Image.fromarray(pixels_HW3).save(buffer, format="JPEG", quality=quality)
    return buffer.getvalue()


@contextlib.contextmanager
def _as_bad_sample() -> Iterator[None]:
    try:
        yield
    except decoding.ImageError as error:
        raise BadSample(error.reason, error.detail) from error
