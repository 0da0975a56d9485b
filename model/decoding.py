"""Image bytes from strangers: sized before decoding, always ending as uint8 RGB.

Only JPEG, PNG and WebP are looked at, by their first bytes. EXIF orientation is applied, 16-bit
images keep their upper 8 bits, transparency is laid over white, CMYK goes through Pillow's
conversion.
"""

import io
import struct

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

MAX_PIXELS = 89_000_000
MAX_BYTES = 64 * 2**20
MAX_JPEG_SCANS = 100
ORIENTATION = 0x0112
PILLOW_NAMES = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
UNDECODABLE = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
)
"""What Pillow and libjpeg are known to raise on damaged files (MemoryError is not among them)."""


class ImageError(ValueError):
    """An image that can't be used: `reason` is `image_format`, `image_too_large` or
    `image_undecodable`."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def image_format(data: bytes) -> str:
    """`jpg`, `png` or `webp` by the file's first bytes; the name it had doesn't count."""
    if data.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    raise ImageError("image_format", f"neither JPEG, PNG nor WebP, begins with {data[:12]!r}")


def image_size(data: bytes) -> tuple[tuple[int, int], str]:
    """((width, height) with EXIF orientation applied, format), from the header alone."""
    image, name = _open(data)
    try:
        sideways = image.getexif().get(ORIENTATION) in (5, 6, 7, 8)
    except UNDECODABLE as error:
        raise ImageError("image_undecodable", f"EXIF: {error}") from error
    return (image.size[::-1] if sideways else image.size), name


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES) -> Tensor:
    """(3, H, W) uint8 RGB; the header's size is checked before a pixel is decoded."""
    if len(data) > max_bytes:
        raise ImageError("image_too_large", f"{len(data)} bytes, at most {max_bytes}")
    image, name = _open(data)
    if name == "jpg" and data.count(b"\xff\xda") > MAX_JPEG_SCANS:
        raise ImageError("image_too_large", f"more than {MAX_JPEG_SCANS} progressive scans")
    return rgb_pixels(image, max_pixels)


def rgb_pixels(image: Image.Image, max_pixels: int = MAX_PIXELS) -> Tensor:
    """(3, H, W) uint8 RGB of a Pillow image of any mode, EXIF orientation applied."""
    if not 0 < image.width * image.height <= max_pixels:
        reason = "image_too_large" if image.width else "image_undecodable"
        raise ImageError(reason, f"{image.width}x{image.height} pixels")
    try:
        rgb = np.array(_to_rgb(ImageOps.exif_transpose(image)))
    except UNDECODABLE as error:
        raise ImageError("image_undecodable", str(error)[:200]) from error
    return torch.from_numpy(rgb).permute(2, 0, 1).contiguous()


def _open(data: bytes) -> tuple[Image.Image, str]:
    """Pillow's lazy image (header read, nothing decoded) and the format."""
    name = image_format(data)
    try:
        image = Image.open(io.BytesIO(data), formats=[PILLOW_NAMES[name]])
    except Image.DecompressionBombError as error:
        raise ImageError("image_too_large", str(error)) from error
    except UNDECODABLE as error:
        raise ImageError("image_undecodable", str(error)[:200]) from error
    return image, name


def _to_rgb(image: Image.Image) -> Image.Image:
    image.load()
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion would clip
        grey = np.asarray(image).astype(np.int64)
        return Image.fromarray((grey.clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floats of unknown range; convert the image to 8 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
