"""What of a shard set `glipv2 view` reads and shows: what is asked for, and what lots decide."""

import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np

from glipv2.jobs.survey import Frequent, Survey, records_of, source_name
from glipv2.pipeline.errors import BadSample, DataError
from glipv2.pipeline.records import Record
from glipv2.pipeline.shard_format import ShardSet
from glipv2.pipeline.shard_reader import read_index

if TYPE_CHECKING:
    from glipv2.data_prep.phrase_filters import PhrasesFound

STRETCH = 256
"""Samples read at once: one ranged read."""
MAX_STRETCHES = 16
"""Of a larger set this many stretches, drawn by the seed, stand for the whole."""
UNSURE = 12
"""Boxes of the lowest scores that are kept."""

Item = TypeVar("Item")
Place = tuple[int, int]
"""Shard number, sample number."""
BoxPlace = tuple[Place, int]
"""A sample and the number of its region."""
Stretch = tuple[int, int, int]
"""Shard number, first sample, end (exclusive)."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Which samples are shown and counted."""

    sources: tuple[str, ...] = ()
    """As the provenance names them; empty for all."""
    min_score: float = 0.0
    max_score: float = 1.0
    """Some box must have a score from one to the other; the other boxes are drawn faintly."""

    @property
    def by_score(self) -> bool:
        return self.min_score > 0 or self.max_score < 1

    @property
    def text(self) -> str:
        """What was asked for, empty for everything."""
        parts = [f"source {' or '.join(self.sources)}"] if self.sources else []
        if self.by_score:
            parts.append(f"a score from {self.min_score:g} to {self.max_score:g}")
        return ", ".join(parts)

    def score_fits(self, score: float) -> bool:
        return self.min_score <= score <= self.max_score

    def fits(self, record: Record) -> bool:
        if self.sources and source_name(record) not in self.sources:
            return False
        return not self.by_score or any(self.score_fits(r.score) for r in record.regions)


EVERYTHING = Wanted()


@dataclass
class Lot(Generic[Item]):
    """`size` of any number of items, each with the same chance."""

    size: int
    rng: np.random.Generator
    items: list[Item] = field(default_factory=list)
    offered: int = 0

    @property
    def full(self) -> bool:
        return len(self.items) >= self.size

    @property
    def complete(self) -> bool:
        """Whether nothing that was offered is left out."""
        return self.offered == len(self.items)

    def offer(self, item: Item) -> None:
        self.offered += 1
        if not self.full:
            self.items.append(item)
        elif (place := int(self.rng.integers(self.offered))) < self.size:
            self.items[place] = item


class Scan:
    """What was read of a set, and which of it is to be shown."""

    def __init__(self, samples: int, boxes: int, seed: int) -> None:
        """How many of each are drawn by lot."""
        self.samples: Lot[Place] = Lot(samples, np.random.default_rng([seed, 0]))
        self.boxes: Lot[BoxPlace] = Lot(boxes, np.random.default_rng([seed, 1]))
        self.survey = Survey()
        """Of the samples that fit."""
        self.read = 0
        self.sources = Frequent()
        """Of all that was read."""
        self.scored = 0
        """Samples of these with a box that a model scored."""
        self._unsure: list[tuple[float, float, BoxPlace]] = []
        self._ties = np.random.default_rng([seed, 2])

    @property
    def unsure(self) -> list[BoxPlace]:
        """The boxes of the lowest scores, one a sample, the lowest first; equals by lot."""
        return [place for *_, place in sorted(self._unsure, reverse=True)]

    def through(
        self,
        shard_set: ShardSet,
        stretches: Iterable[Stretch],
        wanted: Wanted = EVERYTHING,
        find: "Callable[[str], PhrasesFound] | None" = None,
    ) -> None:
        """Read the stretches, or as many of a large set as it takes."""
        for shard, first, end in stretches:
            if self.samples.full and self.boxes.full and enough(self.read):
                break
            for number, sample in enumerate(records_of(shard_set, shard, first, end), start=first):
                self.read += 1
                if isinstance(sample, BadSample):
                    self.survey.unreadable[sample.reason] += 1
                    continue
                self.sources.add(source_name(sample))
                self.scored += any(region.score < 1 for region in sample.regions)
                if wanted.fits(sample):
                    self.survey.add(sample, shard_set.categories, find)
                    self._choose(sample, (shard, number), wanted)

    def _choose(self, record: Record, place: Place, wanted: Wanted) -> None:
        self.samples.offer(place)
        scores = {n: r.score for n, r in enumerate(record.regions) if wanted.score_fits(r.score)}
        for number in scores:
            self.boxes.offer((place, number))
        if scores and (lowest := min(scores.values())) < 1:
            number = next(n for n, score in scores.items() if score == lowest)
            heapq.heappush(self._unsure, (-lowest, float(self._ties.random()), (place, number)))
            if len(self._unsure) > UNSURE:
                heapq.heappop(self._unsure)


def enough(read: int) -> bool:
    """Whether so many samples can stand for a whole set."""
    return read >= MAX_STRETCHES * STRETCH


def stretches_of(samples: Sequence[int], rng: np.random.Generator) -> list[Stretch]:
    """Shards of so many samples in pieces, in random order."""
    stretches = [
        (number, first, min(first + STRETCH, count))
        for number, count in enumerate(samples)
        for first in range(0, count, STRETCH)
    ]
    return [stretches[i] for i in rng.permutation(len(stretches))]


def scattered(shard_set: ShardSet, rng: np.random.Generator) -> list[Stretch]:
    """As many samples as MAX_STRETCHES hold, each by itself, so that they say most of the set."""
    ends = np.cumsum([shard.samples for shard in shard_set.shards])
    number = min(shard_set.samples, MAX_STRETCHES * STRETCH)
    found = np.sort(rng.choice(shard_set.samples, number, replace=False))
    shards = np.searchsorted(ends, found, side="right")
    firsts = found - np.append(0, ends)[shards]
    places = zip(shards.tolist(), firsts.tolist(), strict=True)
    return [(shard, first, first + 1) for shard, first in places]


def find_keys(shard_set: ShardSet, keys: Sequence[str]) -> list[Stretch]:
    """Each key as a stretch of one sample; an unknown one is an error."""
    missing, places = set(keys), []
    for shard in range(len(shard_set.shards)):
        for number, entry in enumerate(read_index(shard_set, shard)):
            if entry.key in missing:
                missing.discard(entry.key)
                places.append((shard, number, number + 1))
    if missing:
        raise DataError(f"{shard_set.url} has no sample with key {', '.join(sorted(missing))}")
    return places


def record_at(shard_set: ShardSet, place: Place) -> Record | None:
    """One sample, None when it can't be read."""
    shard, number = place
    [sample] = records_of(shard_set, shard, number, number + 1)
    return None if isinstance(sample, BadSample) else sample
