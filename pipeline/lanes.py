"""One lane of one source: which samples it reads in which order, from any position at once.

A source's samples are cut into units (slices of shards); each epoch the units are permuted and
dealt to the lanes like cards; a lane shuffles the samples of a few units at a time. All of it
follows from (seed, source, epoch, lane), so no position needs what came before.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from glipv2.pipeline.errors import BadSample, DataError
from glipv2.pipeline.record_json import parse_record
from glipv2.pipeline.records import Record
from glipv2.pipeline.shard_format import ShardSet
from glipv2.pipeline.shard_reader import read_raw
from glipv2.pipeline.storage import crc32c

UNITS_PER_LANE = 4
"""A tiny set is cut into smaller units, so that lanes get about equally many samples."""
PERMUTE, SHUFFLE, CHOOSE, SAMPLE = range(4)
"""What a random stream is for: streams of different purposes never coincide."""


@dataclass(frozen=True, slots=True)
class Unit:
    """Samples [first, last) of one shard: one ranged read."""

    shard: int
    first: int
    last: int


@dataclass(frozen=True, kw_only=True)
class Dealing:
    """What decides a lane's order besides the data itself."""

    seed: int
    lanes: int
    window_units: int


@dataclass(frozen=True, kw_only=True)
class Window:
    """The samples that a lane has in memory, in reading order."""

    start: int
    """Offset of its first sample in the lane's epoch."""
    shards: list[str]
    keys: list[str]
    records: list[Record | BadSample | None]
    """None once consumed: images are let go as the lane moves on."""
    captions: list[str]


def generator(seed: int, purpose: int, source: str, *numbers: int) -> np.random.Generator:
    """The random stream of one decision, the same on every machine."""
    return np.random.default_rng([seed, purpose, int(crc32c(source.encode()), 16), *numbers])


def cut_into_units(source: str, shard_set: ShardSet, lanes: int, unit_samples: int) -> list[Unit]:
    """All units of a set, in shard order; at least one for each lane."""
    if shard_set.samples < lanes:
        raise DataError(
            f"{source} ({shard_set.url}) has {shard_set.samples} samples for {lanes} lanes: "
            f"set data.lanes to at most {shard_set.samples}, or take a larger set"
        )
    most = max(1, min(unit_samples, shard_set.samples // (UNITS_PER_LANE * lanes)))
    units = []
    for number, shard in enumerate(shard_set.shards):
        pieces = -(-shard.samples // most)
        edges = [shard.samples * piece // max(pieces, 1) for piece in range(pieces + 1)]
        units += [Unit(number, first, last) for first, last in zip(edges, edges[1:], strict=False)]
    return units


class LaneReader:
    """The samples of one source in one lane, from a position on, epoch after epoch."""

    def __init__(
        self,
        source: str,
        shard_set: ShardSet,
        units: Sequence[Unit],
        lane: int,
        dealing: Dealing,
    ) -> None:
        self.source = source
        self.shard_set = shard_set
        self.units = units
        self.lane = lane
        self.dealing = dealing
        self.epoch, self.offset = 0, 0
        self._window: Window | None = None
        self._dealt: tuple[int, list[Unit], list[int]] | None = None

    def seek(self, epoch: int, offset: int) -> None:
        self.epoch, self.offset, self._window = epoch, offset, None

    def window(self) -> Window:
        """The window that holds the next sample; read when the lane enters it."""
        units, ends = self._epoch_units()
        if self.offset >= ends[-1]:
            self.epoch, self.offset, self._window = self.epoch + 1, 0, None
            units, ends = self._epoch_units()
        window = self._window
        if window is None or not window.start <= self.offset < window.start + len(window.keys):
            window = self._window = self._read_window(units, ends)
        return window

    def _epoch_units(self) -> tuple[list[Unit], list[int]]:
        """This lane's units in the current epoch, and the offset at which each ends."""
        if self._dealt is None or self._dealt[0] != self.epoch:
            seed, lanes = self.dealing.seed, self.dealing.lanes
            order = generator(seed, PERMUTE, self.source, self.epoch).permutation(len(self.units))
            mine = [self.units[number] for number in order[self.lane :: lanes]]
            ends = list(accumulate(unit.last - unit.first for unit in mine))
            self._dealt = (self.epoch, mine, ends)
        return self._dealt[1], self._dealt[2]

    def _read_window(self, units: list[Unit], ends: list[int]) -> Window:
        of_unit = int(np.searchsorted(ends, self.offset, side="right"))
        size = self.dealing.window_units
        number = of_unit // size
        first = number * size
        raws = [
            (self.shard_set.shards[unit.shard].name, raw)
            for unit in units[first : first + size]
            for raw in read_raw(self.shard_set, unit.shard, unit.first, unit.last)
        ]
        rng = generator(
            self.dealing.seed, SHUFFLE, self.source, self.lane, self.epoch, number
        )  # fmt: skip
        raws = [raws[position] for position in rng.permutation(len(raws))]
        records: list[Record | BadSample | None] = []
        for _, raw in raws:
            try:
                records.append(parse_record(raw, len(self.shard_set.categories)))
            except BadSample as bad:
                records.append(bad)
        return Window(
            start=ends[first - 1] if first else 0,
            shards=[shard for shard, _ in raws],
            keys=[raw.key for _, raw in raws],
            records=records,
            captions=[r.caption for r in records if isinstance(r, Record) and r.caption],
        )
