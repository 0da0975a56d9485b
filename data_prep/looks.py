"""What images look like, as 64 bits each: near duplicates differ in few of them.

The perceptual hash of an image is which of the 64 lowest frequencies (two-dimensional cosine
transform of its 32 x 32 grey version) exceed their median. Scaling, recompression and small
changes of colour move few bits; a crop or a mirror image gives another hash.
"""

import hashlib
import io
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from glipv2.model.decoding import UNDECODABLE
from glipv2.pipeline import storage
from glipv2.pipeline.images import decode_image
from glipv2.pipeline.records import Record

GREY_SIDE = 32
LOW = 8
BITS = LOW * LOW


class Look(NamedTuple):
    """What duplicates are found by."""

    file: int
    """64 bits of the image file's digest."""
    text: int
    """64 bits of the digest of everything else that the record says."""
    hash: int
    """Perceptual hash."""


def look_of(record: Record) -> Look:
    """Of a record whose image decodes."""
    said = [record.caption, record.captions, [(r.box, r.phrase) for r in record.regions]]
    said.append([question.text for question in record.questions])
    return Look(
        file=int(hashlib.sha256(record.image).hexdigest()[:16], 16),
        text=int(storage.digest(said), 16),
        hash=perceptual_hash(record.image),
    )


def perceptual_hash(data: bytes) -> int:
    """64 bits of an image file that decodes; EXIF orientation applied."""
    grey = _small_grey(data)
    low_88 = (_COSINES_8G @ grey @ _COSINES_8G.T).ravel()
    bits = low_88 > np.median(low_88[1:])  # without the mean brightness, which says little
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


class Looks:
    """Perceptual hashes seen so far, searchable by distance; about 1 KB of memory each.

    Hashes that differ in at most d bits agree in one of d + 1 parts, which is what they are found
    by.
    """

    def __init__(self, distance: int, hashes: Iterable[int] = ()) -> None:
        """`distance`: bits in which hashes may differ and still look the same."""
        self.distance = distance
        edges = [BITS * part // (distance + 1) for part in range(distance + 2)]
        self._parts = [(low, (1 << high - low) - 1) for low, high in pairwise(edges)]
        self._found: list[dict[int, list[int]]] = [{} for _ in self._parts]
        self._known: set[int] = set()
        for value in hashes:
            self.add(value)

    def __len__(self) -> int:
        return len(self._known)

    def add(self, value: int) -> None:
        if value not in self._known:
            self._known.add(value)
            for found, (shift, mask) in zip(self._found, self._parts, strict=True):
                found.setdefault(value >> shift & mask, []).append(value)

    def has(self, value: int) -> bool:
        """Whether a known hash lies within the distance."""
        return value in self._known or any(True for _ in self._near(value))

    def nearest(self, value: int) -> int | None:
        """The known hash that differs least, the lowest of equals; None without one in reach."""
        return min(self._near(value), key=lambda k: ((value ^ k).bit_count(), k), default=None)

    def _near(self, value: int) -> Iterator[int]:
        return (
            known
            for found, (shift, mask) in zip(self._found, self._parts, strict=True)
            for known in found.get(value >> shift & mask, ())
            if (value ^ known).bit_count() <= self.distance
        )


def _small_grey(data: bytes) -> np.ndarray:
    """float64 (GREY_SIDE, GREY_SIDE)."""
    try:
        image = Image.open(io.BytesIO(data))
        image.draft("L", (4 * GREY_SIDE, 4 * GREY_SIDE))  # JPEG: decodes a fraction of the pixels
        grey = ImageOps.exif_transpose(image).convert("L")
    except UNDECODABLE:
        pixels = decode_image(data).permute(1, 2, 0).numpy()
        grey = Image.fromarray(pixels).convert("L")
    small = grey.resize((GREY_SIDE, GREY_SIDE), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float64)


_FREQUENCY_81 = np.arange(LOW)[:, None]
_COSINES_8G = np.cos(np.pi * _FREQUENCY_81 * (2 * np.arange(GREY_SIDE) + 1) / (2 * GREY_SIDE))
