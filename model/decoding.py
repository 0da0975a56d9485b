"""Image bytes from strangers: sized before decoding, always ending as uint8 RGB.

Only JPEG, PNG and WebP are looked at, by their first bytes. EXIF orientation is applied, 16-bit
images keep their upper 8 bits, transparency is laid over white, CMYK goes through Pillow's
conversion.
"""

import io
import re
import struct
from collections.abc import Callable, Iterator

import numpy as np
import simplejpeg
import torch
from PIL import Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile
from torch import Tensor

MAX_PIXELS = 89_000_000
MAX_COSTLY_PIXELS = 25_000_000
"""Of all but JPEGs of one scan, which take 3 bytes a pixel: others take up to 19 while they are
decoded, and a process should not need a GB."""
MAX_BYTES = 64 * 2**20
MAX_JPEG_SCANS = 100
MARKER = re.compile(rb"\xff+([^\x00\x01\xd0-\xd8\xff])")
"""Of JPEG, but those without a segment that may stand among a scan's data."""
SCAN, END = 0xDA, 0xD9
STRIP = 1 << 20
"""Pixels that are made RGB at a time."""
ORIENTATION = 0x0112
SIDEWAYS = (5, 6, 7, 8)
"""EXIF orientations that exchange height and width."""
OPENERS: dict[str, Callable[[io.BytesIO], Image.Image]] = {
    "jpg": JpegImageFile,
    "png": PngImageFile,
    "webp": WebPImageFile,
}
"""Of Pillow; its `open` would warn of sizes for which there are rules here."""
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
    _check_pixels(image, MAX_PIXELS)
    try:
        sideways = image.getexif().get(ORIENTATION) in SIDEWAYS
    except UNDECODABLE as error:
        raise ImageError("image_undecodable", f"EXIF: {error}") from error
    return (image.size[::-1] if sideways else image.size), name


def decode_image(
    data: bytes,
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_BYTES,
    at_least: tuple[int, int] | None = None,
) -> Tensor:
    """(3, H, W) uint8 RGB; the header's size is checked before a pixel is decoded.

    With `at_least` (height, width), a JPEG may come smaller than stored, but no smaller than that:
    libjpeg then decodes 1/8, 1/4, ... of the frequencies, which saves most of the time for large
    photographs that are about to be resized.
    """
    if len(data) > max_bytes:
        raise ImageError("image_too_large", f"{len(data)} bytes, at most {max_bytes}")
    image, name = _open(data)
    fast = name == "jpg" and image.mode in ("RGB", "L")
    large = image.width * image.height > MAX_COSTLY_PIXELS
    scans = _scan_count(data) if image.info.get("progressive") or (fast and large) else 1
    if scans > MAX_JPEG_SCANS:
        raise ImageError("image_too_large", f"more than {MAX_JPEG_SCANS} progressive scans")
    _check_pixels(image, max_pixels if fast and scans == 1 else min(max_pixels, MAX_COSTLY_PIXELS))
    if fast:
        pixels_HW3 = _fast_jpeg(data, image, at_least)
        if pixels_HW3 is not None:
            return torch.from_numpy(pixels_HW3).permute(2, 0, 1)
    return rgb_pixels(image, min(max_pixels, MAX_COSTLY_PIXELS))


def rgb_pixels(image: Image.Image, max_pixels: int = MAX_PIXELS) -> Tensor:
    """(3, H, W) uint8 RGB of a Pillow image of any mode, EXIF orientation applied."""
    _check_pixels(image, max_pixels)
    try:
        rgb = np.concatenate([np.asarray(_to_rgb(strip)) for strip in _strips(image)])
    except UNDECODABLE as error:
        raise ImageError("image_undecodable", str(error)[:200]) from error
    return torch.from_numpy(rgb).permute(2, 0, 1)  # colours stay together: resizing is faster so


def _check_pixels(image: Image.Image, most: int) -> None:
    if not 0 < image.width * image.height <= most:
        reason = "image_too_large" if image.width else "image_undecodable"
        raise ImageError(reason, f"{image.width}x{image.height} pixels")


def _fast_jpeg(
    data: bytes, image: Image.Image, at_least: tuple[int, int] | None
) -> np.ndarray | None:
    """uint8 (H, W, 3) by libjpeg-turbo, the same pixels as Pillow's; None where Pillow must do it.

    Both bind the same library, but Pillow's way costs twice the time or more."""
    try:
        orientation = image.getexif().get(ORIENTATION, 1)
        height, width = at_least or (0, 0)
        if orientation in SIDEWAYS:
            height, width = width, height
        pixels_HW3 = simplejpeg.decode_jpeg(data, min_height=height, min_width=width)
    except UNDECODABLE:
        return None
    return np.ascontiguousarray(_upright(pixels_HW3, orientation))


def _upright(pixels_HW3: np.ndarray, orientation: object) -> np.ndarray:
    """The picture as EXIF says it is to be seen."""
    if orientation in SIDEWAYS:
        pixels_HW3 = pixels_HW3.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels_HW3 = pixels_HW3[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels_HW3 = pixels_HW3[::-1]
    return pixels_HW3


def _open(data: bytes) -> tuple[Image.Image, str]:
    """Pillow's lazy image (header read, nothing decoded) and the format."""
    name = image_format(data)
    try:
        image = OPENERS[name](io.BytesIO(data))
    except Image.DecompressionBombError as error:
        raise ImageError("image_too_large", str(error)) from error
    except UNDECODABLE as error:
        raise ImageError("image_undecodable", str(error)[:200]) from error
    return image, name


def _scan_count(data: bytes) -> int:
    """Scans of a JPEG, without those of a thumbnail in its header and of what is appended."""
    place, scans = 0, 0
    while (found := MARKER.search(data, place)) and found[1][0] != END:
        place = found.end() + int.from_bytes(data[found.end() : found.end() + 2], "big")
        scans += found[1][0] == SCAN
    return scans


def _strips(image: Image.Image) -> Iterator[Image.Image]:
    """The image as it is to be seen, in strips from top to bottom: converting takes memory."""
    image = ImageOps.exif_transpose(image)
    rows = max(1, STRIP // image.width)
    for top in range(0, image.height, rows):
        yield image.crop((0, top, image.width, min(top + rows, image.height)))


def _to_rgb(image: Image.Image) -> Image.Image:
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
