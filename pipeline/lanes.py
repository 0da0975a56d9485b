"""One lane of one source: which samples it reads in which order, from any position at once.

A source's samples are cut into units (slices of shards); each epoch the units are permuted and
dealt to the lanes like cards; a lane shuffles the samples of a few units at a time. All of it
follows from (seed, source, epoch, lane), so no position needs what came before.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from glipv2.pipeline.errors import BadSample, DataError
from glipv2.pipeline.position import LanePosition
from glipv2.pipeline.record_json import parse_record
from glipv2.pipeline.records import Record
from glipv2.pipeline.shard_format import RawSample, ShardSet
from glipv2.pipeline.storage import crc32c

UNITS_PER_LANE = 4
"""A tiny set is cut into smaller units, so that lanes get about equally many samples."""
PERMUTE, SHUFFLE, CHOOSE, SAMPLE, ASPECT = range(5)
"""What a random stream is for: streams of different purposes never coincide."""
ReadRaw = Callable[[ShardSet, int, int, int], list[RawSample]]


@dataclass(frozen=True, kw_only=True)
class Dealing:
    """What decides a lane's order besides the data itself."""

    seed: int
    lanes: int
    window_units: int


class Span(NamedTuple):
    """A window's place in its lane's epoch."""

    number: int
    start: int
    """Offset of its first sample."""
    end: int
    units: np.ndarray
    """int64 (U, 3): shard, first and last (exclusive) sample."""


class Window:
    """The samples that a lane has in memory; tall ones can be taken apart from the others."""

    def __init__(
        self, span: Span, shards: list[str], keys: list[str], found: list[Record | BadSample]
    ) -> None:
        self.start, self.end = span.start, span.end
        self.shards, self.keys = shards, keys
        self.captions = [r.caption for r in found if isinstance(r, Record) and r.caption]
        self._found: list[Record | BadSample | None] = list(found)
        self._wide = [place for place, sample in enumerate(found) if not _is_tall(sample)]
        self._tall = [place for place, sample in enumerate(found) if _is_tall(sample)]

    def place(self, taken: int, taken_tall: int, tall: bool | None) -> tuple[int, bool]:
        """The next sample and whether it is from the tall ones, after `taken` of which
        `taken_tall` were tall; `tall` is what is wanted as long as there is some, None either.
        """
        if tall is None:
            return taken, False
        taken_wide = taken - taken_tall
        if taken_wide < len(self._wide) and (not tall or taken_tall == len(self._tall)):
            return self._wide[taken_wide], False
        return self._tall[taken_tall], True

    def take(self, place: int) -> Record | BadSample:
        """Hand a sample over: its image is let go as the lane moves on."""
        found, self._found[place] = self._found[place], None
        if found is None:
            raise AssertionError("a sample was consumed twice")
        return found


def generator(seed: int, purpose: int, source: str, *numbers: int) -> np.random.Generator:
    """The random stream of one decision, the same on every machine."""
    return np.random.default_rng([seed, purpose, int(crc32c(source.encode()), 16), *numbers])


def cut_into_units(source: str, shard_set: ShardSet, lanes: int, unit_samples: int) -> np.ndarray:
    """All units of a set, in shard order: int64 (U, 3) shard, first and last (exclusive) sample.

    At least one for each lane.
    """
    if not shard_set.samples:
        raise DataError(f"{source} ({shard_set.url}) has no samples; take another set")
    if shard_set.samples < lanes:
        raise DataError(
            f"{source} ({shard_set.url}) has {shard_set.samples} samples for {lanes} lanes: "
            f"set data.lanes to at most {shard_set.samples}, or take a larger set"
        )
    most = max(1, min(unit_samples, shard_set.samples // (UNITS_PER_LANE * lanes)))
    samples_S = np.array([shard.samples for shard in shard_set.shards], dtype=np.int64)
    pieces_S = -(-samples_S // most)
    shard_U = np.repeat(np.arange(len(samples_S)), pieces_S)
    piece_U = np.arange(len(shard_U)) - np.repeat(np.cumsum(pieces_S) - pieces_S, pieces_S)
    first_U = samples_S[shard_U] * piece_U // pieces_S[shard_U]
    last_U = samples_S[shard_U] * (piece_U + 1) // pieces_S[shard_U]
    return np.stack([shard_U, first_U, last_U], axis=1)


@lru_cache(maxsize=8)
def _order(seed: int, source: str, epoch: int, units: int) -> np.ndarray:
    """The epoch's order of the units: one for all lanes."""
    return generator(seed, PERMUTE, source, epoch).permutation(units)


class LaneReader:
    """The samples of one source in one lane, from a position on, epoch after epoch."""

    def __init__(  # noqa: PLR0913 (the stream names each of these)
        self,
        source: str,
        shard_set: ShardSet,
        units: np.ndarray,
        lane: int,
        dealing: Dealing,
        read: ReadRaw,
        ahead: ThreadPoolExecutor | None = None,
    ) -> None:
        """`ahead`: reads the next window while half of the present one is left."""
        self.source = source
        self.shard_set = shard_set
        self.units = units
        self.lane = lane
        self.dealing = dealing
        self.read = read
        self.ahead = ahead
        self.epoch, self.offset, self.tall = 0, 0, 0
        self._window: Window | None = None
        self._coming: tuple[tuple[int, int], Future[Window]] | None = None
        self._dealt: tuple[int, np.ndarray, np.ndarray] | None = None

    @property
    def position(self) -> LanePosition:
        return self.epoch, self.offset, self.tall

    def seek(self, position: LanePosition) -> None:
        self.epoch, self.offset, self.tall = position
        self._window = None

    def next(self, tall: bool | None) -> tuple[Window, int]:
        """The window that holds the next sample, and the sample's place there; counts it.

        `tall`: the aspect that is wanted while the window has it, None for whichever comes.
        """
        window = self._enter_window()
        place, from_tall = window.place(self.offset - window.start, self.tall, tall)
        self.offset += 1
        self.tall = self.tall + from_tall if self.offset < window.end else 0
        if self.ahead and 2 * self.offset >= window.start + window.end:
            self._look_ahead(window.end)
        return window, place

    def _enter_window(self) -> Window:
        _, ends = self._epoch_units()
        if self.offset >= ends[-1]:
            self.epoch, self.offset, self.tall, self._window = self.epoch + 1, 0, 0, None
        window = self._window
        if window is None or not window.start <= self.offset < window.end:
            span = self._span(self.offset)
            window = self._window = self._arrived(span) or self._load(self.epoch, span)
        return window

    def _arrived(self, span: Span) -> Window | None:
        """The window that was read ahead, if it is this one."""
        coming, self._coming = self._coming, None
        if coming is None or coming[0] != (self.epoch, span.number):
            return None
        return coming[1].result()

    def _look_ahead(self, offset: int) -> None:
        _, ends = self._epoch_units()
        if self._coming is None and offset < ends[-1] and self.ahead is not None:
            span = self._span(offset)
            future = self.ahead.submit(self._load, self.epoch, span)
            self._coming = ((self.epoch, span.number), future)

    def _epoch_units(self) -> tuple[np.ndarray, np.ndarray]:
        """This lane's units in the current epoch, and the offset at which each ends."""
        if self._dealt is None or self._dealt[0] != self.epoch:
            order = _order(self.dealing.seed, self.source, self.epoch, len(self.units))
            mine = self.units[order[self.lane :: self.dealing.lanes]]
            self._dealt = (self.epoch, mine, np.cumsum(mine[:, 2] - mine[:, 1]))
        return self._dealt[1], self._dealt[2]

    def _span(self, offset: int) -> Span:
        """The window that holds an offset of the current epoch."""
        units, ends = self._epoch_units()
        size = self.dealing.window_units
        number = int(np.searchsorted(ends, offset, side="right")) // size
        first, last = number * size, min((number + 1) * size, len(units))
        start = int(ends[first - 1]) if first else 0
        return Span(number, start, int(ends[last - 1]), units[first:last])

    def _load(self, epoch: int, span: Span) -> Window:
        raws = [
            (self.shard_set.shards[shard].name, raw)
            for shard, first, last in span.units.tolist()
            for raw in self.read(self.shard_set, shard, first, last)
        ]
        seed = self.dealing.seed
        rng = generator(seed, SHUFFLE, self.source, self.lane, epoch, span.number)
        raws = [raws[position] for position in rng.permutation(len(raws))]
        found: list[Record | BadSample] = []
        for _, raw in raws:
            try:
                found.append(parse_record(raw, len(self.shard_set.categories)))
            except BadSample as bad:
                found.append(bad)
        return Window(span, [shard for shard, _ in raws], [raw.key for _, raw in raws], found)


def _is_tall(sample: Record | BadSample) -> bool:
    return isinstance(sample, Record) and sample.height > sample.width
