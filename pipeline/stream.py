"""The stream: batch t follows from (seed, data, mixture, global batch, t) and nothing else.

A run has a fixed number of lanes, whatever its world size and number of workers. Every global
batch takes the same number of samples from each lane; rank r serves lanes r, r + W, r + 2W, ...
So any world size that divides the lanes sees the same global batches, and a position is, per lane
and source, the epoch and the number of samples consumed in it.
"""

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np

from glipv2.pipeline.cache import RangeCache
from glipv2.pipeline.errors import BadSample, ConfigError, DataError
from glipv2.pipeline.lanes import (
    ASPECT,
    CHOOSE,
    SAMPLE,
    Dealing,
    LaneReader,
    Window,
    cut_into_units,
    generator,
)
from glipv2.pipeline.position import Position, check_digest, merge_positions
from glipv2.pipeline.records import Record
from glipv2.pipeline.shard_format import ShardSet
from glipv2.pipeline.shard_reader import read_raw
from glipv2.pipeline.storage import digest

__all__ = ["OnBad", "Position", "Slot", "Stream", "StreamConfig", "merge_positions"]
OnBad = Callable[[str, str, str, BadSample], None]
"""Called with source, shard name, key and the reason."""
MIN_SEEN = 100
"""Samples read before the share of bad ones counts."""
Prepared = TypeVar("Prepared")
USUAL_TALL_SHARE = 0.25
"""Of photographs, where a set does not say."""
READ_THREADS = 8
"""Windows that are read ahead at once from an object store."""
REMOTE = ("s3:", "gs:", "az:", "http:", "https:")
"""What has a latency worth hiding."""
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Slot:
    """One place in a batch: a record and the randomness that belongs to it."""

    record: Record
    rng: np.random.Generator
    """Depends on (seed, source, lane, epoch, offset) only: augment and mask with this."""
    source: str
    lane: int
    neighbours: Sequence[str]
    """Captions of other samples of the same source, for negative captions."""


def _as_is(slot: Any) -> Any:
    return slot


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    seed: int
    global_batch: int
    lanes: int
    unit_samples: int = 256
    window_units: int = 2
    max_bad_share: float = 0.01
    group_by_aspect: bool = False
    """Batches of pictures that are all tall or all not, as far as each lane's window has them."""
    cache: RangeCache | None = None
    """Where what was read from an object store is kept."""


class Stream:
    """The samples of one rank.

    `sets` and `weights` have the same names; a weight is a source's share of the samples.
    """

    def __init__(
        self,
        sets: Mapping[str, ShardSet],
        weights: Mapping[str, float],
        config: StreamConfig,
        rank: int = 0,
        world_size: int = 1,
        on_bad: OnBad | None = None,
    ) -> None:
        _check(sets, weights, config, world_size)
        self.sets = {name: sets[name] for name in sorted(sets)}
        self.config = config
        self.lanes = list(range(rank, config.lanes, world_size))
        self.on_bad = on_bad
        total = sum(weights.values())
        shares = [weights[name] / total for name in self.sets]
        self._thresholds = np.cumsum(shares)[:-1]
        self._tall_share = sum(
            share * tall_share(self.sets[name])
            for name, share in zip(self.sets, shares, strict=True)
        )
        self.units = {
            name: cut_into_units(name, shard_set, config.lanes, config.unit_samples)
            for name, shard_set in self.sets.items()
        }
        parts = {
            "seed": config.seed,
            "data": {name: shard_set.digest for name, shard_set in self.sets.items()},
            "mixture": dict(zip(self.sets, shares, strict=True)),
            "global_batch": config.global_batch,
            "lanes": config.lanes,
            "units": [config.unit_samples, config.window_units, config.group_by_aspect],
        }
        self.digest = ";".join(f"{name}={digest(value)[:8]}" for name, value in parts.items())

    def start(self) -> Position:
        """The beginning, for all lanes."""
        lanes = tuple((0, 0, 0) for _ in range(self.config.lanes))
        return Position(step=0, digest=self.digest, lanes={name: lanes for name in self.sets})

    def part(self, number: int, parts: int) -> "Stream":
        """The same stream for every `parts`-th of this rank's lanes: what one worker serves."""
        stream = copy.copy(self)
        stream.lanes = self.lanes[number::parts]
        return stream

    def batches(
        self, position: Position, prepare: Callable[[Slot], Prepared] = _as_is
    ) -> Iterator[tuple[list[Prepared], Position]]:
        """From `position` on: this rank's samples of each global batch in lane order, and the
        position after it. Never ends.

        `prepare` is applied to each slot; a sample that it refuses with BadSample counts as bad
        like one that doesn't parse, and the lane goes on to its next sample.
        """
        check_digest(position, self.digest)
        remote = any(shard_set.url.startswith(REMOTE) for shard_set in self.sets.values())
        with ThreadPoolExecutor(READ_THREADS) if remote else nullcontext() as ahead:
            readers = {lane: self._readers(lane, position, ahead) for lane in self.lanes}
            budget = Budget(self.config.max_bad_share)
            step = position.step
            while True:
                tall = self._wants_tall(step)
                batch = [
                    self._take(readers[lane][source], tall, prepare, budget)
                    for lane in self.lanes
                    for source in self._choose(step, lane)
                ]
                step += 1
                yield batch, self._position(step, readers)

    def _readers(
        self, lane: int, position: Position, ahead: ThreadPoolExecutor | None
    ) -> dict[str, LaneReader]:
        dealing = Dealing(
            seed=self.config.seed, lanes=self.config.lanes, window_units=self.config.window_units
        )
        readers = {}
        for source, shard_set in self.sets.items():
            entry = position.lanes[source][lane]
            if entry is None:
                raise DataError(f"the position doesn't cover lane {lane}: merge those of all ranks")
            read = partial(read_raw, cache=self.config.cache)
            readers[source] = LaneReader(
                source, shard_set, self.units[source], lane, dealing, read, ahead
            )
            readers[source].seek(entry)
        return readers

    def _choose(self, step: int, lane: int) -> list[str]:
        """The source of each of the lane's samples in a step."""
        per_lane = self.config.global_batch // self.config.lanes
        draws = generator(self.config.seed, CHOOSE, "", step, lane).random(per_lane)
        names = list(self.sets)
        return [names[number] for number in np.searchsorted(self._thresholds, draws, side="right")]

    def _wants_tall(self, step: int) -> bool | None:
        """Whether the pictures of a step should be tall; None when it doesn't matter."""
        if not self.config.group_by_aspect:
            return None
        return bool(generator(self.config.seed, ASPECT, "", step).random() < self._tall_share)

    def _take(
        self,
        reader: LaneReader,
        tall: bool | None,
        prepare: Callable[[Slot], Prepared],
        budget: "Budget",
    ) -> Prepared:
        while True:
            window, place = reader.next(tall)
            place_in_run = (reader.lane, reader.epoch, reader.offset - 1)
            budget.seen += 1
            found = window.take(place)
            try:
                if not isinstance(found, Record):
                    raise found
                rng = generator(self.config.seed, SAMPLE, reader.source, *place_in_run)
                slot = Slot(
                    record=found,
                    rng=rng,
                    source=reader.source,
                    lane=reader.lane,
                    neighbours=_without(window.captions, found.caption),
                )
                return prepare(slot)
            except BadSample as bad:
                self._report(reader.source, window, place, bad)
                budget.spend(bad)

    def _report(self, source: str, window: Window, place: int, bad: BadSample) -> None:
        shard, key = window.shards[place], window.keys[place]
        if self.on_bad is None:
            log.warning("skipped %s/%s in %s: %s", source, key, shard, bad)
        else:
            self.on_bad(source, shard, key, bad)

    def _position(self, step: int, readers: dict[int, dict[str, LaneReader]]) -> Position:
        return Position(
            step=step,
            digest=self.digest,
            lanes={
                source: tuple(
                    readers[lane][source].position if lane in readers else None
                    for lane in range(self.config.lanes)
                )
                for source in self.sets
            },
        )


def tall_share(shard_set: ShardSet) -> float:
    """The share of pictures that are taller than wide, where the writer of the set counted."""
    counted = [shard.stats["tall"] for shard in shard_set.shards if "tall" in shard.stats]
    return sum(counted) / shard_set.samples if counted else USUAL_TALL_SHARE


class Budget:
    """How many bad samples a run bears before it stops."""

    def __init__(self, max_bad_share: float) -> None:
        self.max_bad_share = max_bad_share
        self.seen = 0
        self.bad = 0

    def spend(self, latest: BadSample) -> None:
        """Count one; DataError when there are more than the share allows.

        Three standard deviations on top keep chance alone from stopping a run early on.
        """
        self.bad += 1
        allowed = self.max_bad_share * self.seen
        if self.seen >= MIN_SEEN and self.bad > allowed + 3 * allowed**0.5:
            raise DataError(
                f"{self.bad} of {self.seen} samples could not be used, more than "
                f"data.max_bad_share = {self.max_bad_share:g}; the latest: {latest}. The "
                "quarantine file lists them: repair or replace the shard set, or raise that share"
            )


def _without(captions: list[str], own: str) -> list[str]:
    return [caption for caption in captions if caption != own]


def _check(
    sets: Mapping[str, ShardSet],
    weights: Mapping[str, float],
    config: StreamConfig,
    world_size: int,
) -> None:
    if not sets or set(sets) != set(weights):
        raise ConfigError(
            f"data.mixture names {sorted(weights)}, the shard sets are {sorted(sets)}"
        )
    if any(not weight > 0 for weight in weights.values()):
        raise ConfigError(f"every weight in data.mixture must be positive: {dict(weights)}")
    check_lanes(config.lanes, config.global_batch, world_size)


def check_lanes(lanes: int, batch: int, world_size: int) -> None:
    """ConfigError with the cure unless lanes divide the batch, and ranks the lanes."""
    if lanes < 1 or batch % lanes:
        raise ConfigError(
            f"data.lanes ({lanes}) must divide train.global_batch ({batch}): set data.lanes to "
            f"{largest_divisor(batch, lanes)} or change the batch"
        )
    if lanes % world_size:
        raise ConfigError(
            f"{world_size} ranks can't share {lanes} lanes equally: start "
            f"{largest_divisor(lanes, world_size)} ranks, or set data.lanes (and "
            f"train.global_batch) to a multiple of {world_size} in a new run"
        )


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` that is at most `limit`."""
    return next(d for d in range(max(1, min(number, limit)), 0, -1) if number % d == 0)
