"""What images look like, as 64 bits each: near duplicates differ in few of them.

The perceptual hash of an image is which of the 64 lowest frequencies (two-dimensional cosine
transform of its 32 x 32 grey version) exceed their median. Scaling, recompression and small
changes of colour move few bits; a crop or a mirror image gives another hash.
"""

import hashlib
import io
from collections.abc import Iterable, Iterator
from itertools import chain, pairwise
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
RECENT = 1 << 14
"""Numbers that are kept apart before they are sorted into the others, which moves all of them."""


class Look(NamedTuple):
    """What duplicates are found by."""

    file: int
    """64 bits of the image file's digest."""
    text: int
    """64 bits of the digest of everything else that the record says."""
    hash: int
    """Perceptual hash."""

    @property
    def sample(self) -> int:
        """64 bits of image file and text together."""
        both = self.file.to_bytes(8, "big") + self.text.to_bytes(8, "big")
        return int.from_bytes(hashlib.blake2b(both, digest_size=8).digest(), "big")


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


class Numbers:
    """A set of 64-bit numbers in 8 bytes each: a sorted array, and the last few thousand apart."""

    def __init__(self) -> None:
        self._sorted = np.empty(0, dtype=np.uint64)
        self._recent: set[int] = set()

    @property
    def all_sorted(self) -> bool:
        return not self._recent

    def __len__(self) -> int:
        return len(self._sorted) + len(self._recent)

    def __contains__(self, value: int) -> bool:
        return value in self._recent or self.between(value, value).size > 0

    def add(self, value: int) -> None:
        """`value` must not be there yet."""
        self._recent.add(value)
        if len(self._recent) == RECENT:
            new = np.sort(np.fromiter(self._recent, dtype=np.uint64, count=RECENT))
            self._sorted = np.insert(self._sorted, np.searchsorted(self._sorted, new), new)
            self._recent.clear()

    def between(self, low: int, high: int) -> np.ndarray:
        """uint64: those in [low, high] that are sorted."""
        first = np.searchsorted(self._sorted, np.uint64(low))
        return self._sorted[first : np.searchsorted(self._sorted, np.uint64(high), side="right")]


class Looks:
    """Perceptual hashes seen so far, searchable by distance; 8 bytes each for distance + 1 parts.

    Hashes that differ in at most d bits agree in one of d + 1 parts, which is what they are found
    by: in each part's order, the hashes turned so that the part comes first, these are neighbours.
    """

    def __init__(self, distance: int, hashes: Iterable[int] = ()) -> None:
        """`distance`: bits in which hashes may differ and still look the same."""
        self.distance = distance
        edges = [BITS * part // (distance + 1) for part in range(distance + 2)]
        self._parts = [_Part(low, high) for low, high in pairwise(edges)]
        for value in hashes:
            self.add(value)

    def __len__(self) -> int:
        return len(self._parts[0].turned)

    def add(self, value: int) -> None:
        if value not in self._parts[0]:
            for part in self._parts:
                part.add(value)

    def has(self, value: int) -> bool:
        """Whether a known hash lies within the distance."""
        return any(True for _ in self._near(value))

    def nearest(self, value: int) -> int | None:
        """The known hash that differs least, the lowest of equals; None without one in reach."""
        return min(self._near(value), key=lambda k: ((value ^ k).bit_count(), k), default=None)

    def _near(self, value: int) -> Iterator[int]:
        return (
            known
            for part in self._parts
            for known in part.agreeing(value)
            if (value ^ known).bit_count() <= self.distance
        )


class _Part:
    """Hashes in the order of their bits [low, high), which come first when they are turned."""

    def __init__(self, low: int, high: int) -> None:
        self.high, self.rest = high, BITS - (high - low)
        self.turned = Numbers()
        self.recent: dict[int, list[int]] = {}
        """Bits of the part -> the turned hashes that aren't sorted yet."""

    def __contains__(self, value: int) -> bool:
        return _turn(value, self.high) in self.turned

    def add(self, value: int) -> None:
        turned = _turn(value, self.high)
        self.turned.add(turned)
        self.recent.setdefault(turned >> self.rest, []).append(turned)
        if self.turned.all_sorted:
            self.recent.clear()

    def agreeing(self, value: int) -> Iterator[int]:
        """Known hashes with the same bits in this part."""
        bits = _turn(value, self.high) >> self.rest
        low = bits << self.rest
        sorted_ones = self.turned.between(low, low | (1 << self.rest) - 1).tolist()
        for turned in chain(sorted_ones, self.recent.get(bits, ())):
            yield _turn(turned, BITS - self.high)


def _turn(value: int, high: int) -> int:
    """The bits below `high` come first, in a circle."""
    return (value << BITS - high | value >> high) & (1 << BITS) - 1


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
