"""Where two labelled sets of the same pairs differ: two rounds, teachers or thresholds."""

import heapq
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from glipv2.eval.detection import box_iou, greedy_match
from glipv2.jobs.sampling import Stretch, enough, stretches_of
from glipv2.jobs.survey import records_of
from glipv2.pipeline.errors import BadSample, DataError
from glipv2.pipeline.records import Record, Region
from glipv2.pipeline.shard_format import ShardSet
from glipv2.pipeline.shard_reader import check_shard_sizes, read_index

MIN_IOU = 0.5
SHOWN = 12
"""Pictures of the pairs that differ most."""
SAME, ELSEWHERE, ALONE = "same", "elsewhere", "alone"
"""What the other set says of a box: there too; the phrase's box is elsewhere; it has none."""
Sample = Record | BadSample | None
"""None where a set doesn't have the pair, since it has no box for it."""
Row = tuple[int | None, int | None]
"""A pair's sample number in each set."""


@dataclass
class Disagreement:
    """What two sets say of each other's boxes, over the pairs that were read."""

    pairs: int = 0
    """Of which either set has a box."""
    unreadable: int = 0
    complete: bool = False
    """Whether all pairs were read."""
    verdicts: tuple[Counter[str], Counter[str]] = field(
        default_factory=lambda: (Counter(), Counter())
    )
    """Of each set: boxes by verdict."""
    most: list[tuple[int, float, float, Stretch]] = field(default_factory=list)
    """Heap of the pairs with most boxes that differ: number, share, lot, place."""

    @property
    def boxes(self) -> int:
        return sum(verdicts.total() for verdicts in self.verdicts)

    @property
    def agreement(self) -> float:
        """Share of the boxes of both sets that are the same; NaN without any."""
        same = sum(verdicts[SAME] for verdicts in self.verdicts)
        return same / self.boxes if self.boxes else float("nan")

    def add(self, verdicts: Sequence[Sequence[str]], place: Stretch, lot: float) -> None:
        self.pairs += 1
        for counted, found in zip(self.verdicts, verdicts, strict=True):
            counted.update(found)
        both = [*verdicts[0], *verdicts[1]]
        if differing := len(both) - both.count(SAME):
            heapq.heappush(self.most, (differing, differing / len(both), lot, place))
            if len(self.most) > SHOWN:
                heapq.heappop(self.most)


def verdicts_of(mine: Sequence[Region], other: Sequence[Region]) -> tuple[list[str], list[str]]:
    """A verdict on each box of either set.

    SAME: the other set has a box of the same phrase, IoU >= 0.5, one for one. What is left of a
    phrase in both sets is ELSEWHERE, one for one; any other box is ALONE.
    """
    phrases = [phrase_of(r) for r in mine], [phrase_of(r) for r in other]
    same_KN = np.array([[a == b for b in phrases[1]] for a in phrases[0]], dtype=np.float64)
    same_KN = same_KN.reshape(len(mine), len(other))
    iou_KN = box_iou([r.box for r in mine], [r.box for r in other])
    found = [ALONE] * len(mine), [ALONE] * len(other)
    # any overlap is enough in the second turn, and none, as long as the phrase is the same
    for verdict, table_KN, least in ((SAME, iou_KN, MIN_IOU), (ELSEWHERE, 1 + iou_KN, 1)):
        match = greedy_match([r.score for r in mine], table_KN * same_KN, least)
        for k, n in enumerate(match):
            if n >= 0:
                found[0][k] = found[1][n] = verdict
                same_KN[k], same_KN[:, n] = 0, 0
    return found


def disagreement(mine: ShardSet, other: ShardSet, seed: int) -> Disagreement:
    """Of all pairs, or of enough of them, drawn by the seed.

    DataError when the two were not labelled from the same pairs.
    """
    check_shard_sizes(other)
    numbers = numbers_of(mine, other)
    rng = np.random.default_rng([seed, 3])
    most = [m.samples + other.shards[numbers[n]].samples for n, m in enumerate(mine.shards)]
    found, read = Disagreement(), 0
    for stretch in stretches_of(most, rng):
        if enough(read):
            break
        for row, (key, *pair) in enumerate(samples_of(mine, other, numbers, stretch), stretch[1]):
            read += 1
            if any(isinstance(sample, BadSample) for sample in pair):
                found.unreadable += 1
                continue
            records = [sample for sample in pair if isinstance(sample, Record)]
            if len({record.caption for record in records}) > 1:
                raise _of_other_pairs(mine, other, f"{key} has another caption there")
            regions = [s.regions if isinstance(s, Record) else () for s in pair]
            if any(regions):
                place = (stretch[0], row, row + 1)
                found.add(verdicts_of(*regions), place, float(rng.random()))
    else:
        found.complete = True
    return found


def phrase_of(region: Region) -> Hashable:
    """What boxes of one record must share to be compared."""
    return region.spans or region.phrase


def samples_of(
    mine: ShardSet, other: ShardSet, numbers: Sequence[int], stretch: Stretch
) -> Iterator[tuple[str, Sample, Sample]]:
    """(key, sample of mine, sample of the other) of a stretch of the pairs that either has.

    `numbers` are those of `numbers_of`.
    """
    shard, first, end = stretch
    keys = [
        [entry.key for entry in read_index(shard_set, number)]
        for shard_set, number in ((mine, shard), (other, numbers[shard]))
    ]
    rows = list(islice(_rows(mine, other, *keys), first, end))
    streams = [
        _from(mine, shard, [i for i, _ in rows]),
        _from(other, numbers[shard], [j for _, j in rows]),
    ]
    for i, j in rows:
        key = keys[0][i] if i is not None else keys[1][j or 0]
        yield (
            key,
            None if i is None else next(streams[0]),
            None if j is None else next(streams[1]),
        )


def _from(
    shard_set: ShardSet, shard: int, places: Sequence[int | None]
) -> Iterator[Record | BadSample]:
    """Those samples, which stand one after the other."""
    known = [place for place in places if place is not None]
    return records_of(shard_set, shard, known[0], known[-1] + 1) if known else iter(())


def _rows(
    mine: ShardSet, other: ShardSet, keys: Sequence[str], others: Sequence[str]
) -> Iterator[Row]:
    """The pairs of a shard of both sets, which have kept the order of what they were made from."""
    places = {key: place for place, key in enumerate(others)}
    next_other = 0
    for number, key in enumerate(keys):
        place = places.get(key)
        if place is None:
            yield number, None
            continue
        if place < next_other:
            raise _of_other_pairs(mine, other, f"{key} stands in another order there")
        yield from ((None, between) for between in range(next_other, place))
        yield number, place
        next_other = place + 1
    yield from ((None, rest) for rest in range(next_other, len(others)))


def numbers_of(mine: ShardSet, other: ShardSet) -> list[int]:
    """The other set's number of each of my shards."""
    by_name = {shard.name: number for number, shard in enumerate(other.shards)}
    if by_name.keys() != {shard.name for shard in mine.shards}:
        raise _of_other_pairs(mine, other, "its shards have other names")
    return [by_name[shard.name] for shard in mine.shards]


def _of_other_pairs(mine: ShardSet, other: ShardSet, why: str) -> DataError:
    return DataError(
        f"{other.url} can't be compared with {mine.url}: {why}; both must be what `glipv2 label` "
        "made of the same pairs"
    )
