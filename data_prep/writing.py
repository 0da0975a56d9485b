"""From a source to shards: rows are cut into chunks, and every chunk becomes one shard by itself.

Shard n holds what is usable of the rows [n * size, (n + 1) * size), so processes and repeated
attempts agree on it without talking to each other, and a committed shard is never made again.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

from glipv2.data_prep.cleaning import Repeats, write_looks
from glipv2.data_prep.reasons import Dropped
from glipv2.data_prep.source import Row, Source
from glipv2.pipeline import storage
from glipv2.pipeline.errors import BadSample
from glipv2.pipeline.records import Record
from glipv2.pipeline.shards import ShardInfo, shard_name, write_shard

LOOKS = "looks"
"""Folder of what duplicates are found by, while a set is being made."""
ToRecord = Callable[[Row, Dropped], Record]


class Chunk(NamedTuple):
    """The rows of one shard."""

    number: int
    rows: list[Row]
    dropped: Dropped
    """What was left out among these rows before they came to be rows."""
    repeated: dict[int, str] = {}  # noqa: RUF012 - never changed
    """Rows (by their place here) to leave out as duplicates, and the reason."""

    def __str__(self) -> str:
        return f"{shard_name(self.number)} (from {self.rows[0].where if self.rows else 'no row'})"


def chunks(source: Source, size: int) -> Iterator[Chunk]:
    """All rows of a source, `size` to a chunk."""
    dropped = Dropped()
    rows = source.rows(dropped)
    number = 0
    while taken := list(islice(rows, size)):
        yield Chunk(number, taken, dropped.take())
        number += 1
    if dropped:
        yield Chunk(number, [], dropped)


def chunk_writer(url: str, record: ToRecord) -> Callable[[Chunk], ShardInfo]:
    """What turns chunks into committed shards of the set at `url`."""
    return partial(write_chunk, url, record)


def write_chunk(url: str, record: ToRecord, chunk: Chunk) -> ShardInfo:
    """The chunk's shard, written unless it is committed already.

    Its stats say how many samples, boxes and phrases it has and what was dropped how often and
    where first; drops are lines in dropped/SHARD.jsonl, so none is final.
    """
    name = shard_name(chunk.number)
    dropped = Dropped(chunk.dropped, chunk.dropped.notes)
    stats: dict[str, Any] = {}
    return write_shard(url, name, _records(url, name, record, chunk, dropped, stats), stats)


def _records(
    url: str,
    name: str,
    record: ToRecord,
    chunk: Chunk,
    dropped: Dropped,
    stats: dict[str, Any],
) -> Iterator[Record]:
    totals, tall = Counter(samples=0, boxes=0, phrases=0), 0
    for place, row in enumerate(chunk.rows):
        if place in chunk.repeated:
            dropped.note(chunk.repeated[place], row.where)
            continue
        try:
            made = record(row, dropped)
        except BadSample as error:
            dropped.note(error.reason, row.where)
            continue
        totals["samples"] += 1
        totals["boxes"] += len(made.regions)
        tall += made.height > made.width
        totals["phrases"] += len({region.spans for region in made.regions if region.spans})
        yield made
    stats |= {
        "totals": dict(totals),
        "tall": tall,
        "dropped": dict(dropped),
        "first": dropped.first,
    }
    note_dropped(url, name, dropped)


def note_dropped(url: str, name: str, dropped: Dropped) -> None:
    """Keep the list of what was left out of a shard in dropped/SHARD.jsonl."""
    if dropped.notes:
        more = ((reason, f"and {count} more") for reason, count in dropped.unlisted.items())
        notes = [*dropped.notes, *more]
        lines = (json.dumps({"reason": reason, "where": where}) for reason, where in notes)
        text = "".join(f"{line}\n" for line in lines)
        storage.write_bytes(storage.join(url, "dropped", f"{name}.jsonl"), text.encode())


def looks_noter(url: str, record: ToRecord) -> Callable[[Chunk], None]:
    """What keeps the looks of a chunk's rows in the set's folder."""
    return partial(_note_looks, url, record)


def _note_looks(url: str, record: ToRecord, chunk: Chunk) -> None:
    write_looks(_looks_url(url, chunk), record, chunk.rows)


def without_repeated(url: str, todo: Iterable[Chunk], distance: int) -> Iterator[Chunk]:
    """The chunks with what `looks_noter` shows to be repeated."""
    repeats = Repeats(distance)
    for chunk in todo:
        yield chunk._replace(repeated=dict(repeats.find(_looks_url(url, chunk))))


def forget_looks(url: str) -> None:
    """Remove what was kept for comparing, once the set is complete."""
    folder = storage.join(url, LOOKS)
    for name in storage.list_names(folder):
        storage.delete(storage.join(folder, name))


def _looks_url(url: str, chunk: Chunk) -> str:
    return storage.join(url, LOOKS, f"{shard_name(chunk.number)}.json")


def summed(shards: list[ShardInfo]) -> dict[str, Any]:
    """The stats of all shards together, in the order of the shards."""
    totals, counts = Counter(samples=0, boxes=0, phrases=0), Counter[str]()
    first: dict[str, str] = {}
    for shard in shards:
        totals.update(shard.stats["totals"])
        counts.update(shard.stats["dropped"])
        first = shard.stats["first"] | first
    return {"totals": dict(totals), "counts": dict(counts), "first": first}
