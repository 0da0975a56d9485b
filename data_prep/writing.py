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
from glipv2.data_prep.reasons import Dropped, Note
from glipv2.data_prep.source import Row, Source
from glipv2.pipeline import storage
from glipv2.pipeline.errors import BadSample
from glipv2.pipeline.records import Record
from glipv2.pipeline.shards import ShardInfo, shard_name, write_shard
from glipv2.pipeline.worker_notes import noting

LOOKS = "looks"
"""Folder of what duplicates are found by, while a set is being made."""
DROPPED = "dropped"
"""Folder of the lists of what was left out."""
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


def chunk_writer(url: str, record: ToRecord, plan: str) -> Callable[[Chunk], ShardInfo]:
    """What turns chunks into committed shards of the set at `url`; `plan` goes into their stats."""
    return partial(write_chunk, url, record, plan)


def write_chunk(url: str, record: ToRecord, plan: str, chunk: Chunk) -> ShardInfo:
    """The chunk's shard, written unless it is committed already.

    Its stats say what it holds and what was dropped how often and where first; drops are lines in
    dropped/SHARD.jsonl, so none is final.
    """
    name = shard_name(chunk.number)
    dropped = Dropped(chunk.dropped, chunk.dropped.notes)
    stats: dict[str, Any] = {"plan": plan}
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
    for place, row in enumerate(noting(chunk.number, chunk.rows)):
        if place in chunk.repeated:
            dropped.note(chunk.repeated[place], row.where)
            continue
        try:
            made = record(row, dropped)
        except BadSample as error:
            like = error.detail if error.reason == "excluded" else ""
            dropped.note(error.reason, row.where, like)
            continue
        totals["samples"] += 1
        totals["boxes"] += len(made.regions)
        tall += made.height > made.width
        totals["phrases"] += len({region.spans for region in made.regions if region.spans})
        totals.update(texts_of(made))
        yield made
    stats |= {
        "totals": dict(totals),
        "tall": tall,
        "dropped": dict(dropped),
        "first": dropped.first,
    }
    note_dropped(url, name, dropped)


def texts_of(record: Record) -> Counter[str]:
    """How many captions, questions and answers a record has, of what it has any."""
    answers = sum(len(question.answers) for question in record.questions)
    counts = {"captions": len(record.captions), "questions": len(record.questions)}
    return +Counter({**counts, "answers": answers})


def note_dropped(url: str, name: str, dropped: Dropped) -> None:
    """Keep the list of what was left out of a shard in dropped/SHARD.jsonl.

    Each line has `reason`, `where` and, of images of an excluded set, `like`: that set's image.
    """
    if dropped.notes:
        more = (Note(reason, f"and {count} more") for reason, count in dropped.unlisted.items())
        listed = (entry._asdict() for entry in [*dropped.notes, *more])
        lines = ({name: text for name, text in entry.items() if text} for entry in listed)
        text = "".join(f"{json.dumps(line)}\n" for line in lines)
        storage.write_bytes(storage.join(url, DROPPED, f"{name}.jsonl"), text.encode())


def looks_noter(url: str, record: ToRecord) -> Callable[[Chunk], None]:
    """What keeps the looks of a chunk's rows in the set's folder."""
    return partial(_note_looks, url, record)


def _note_looks(url: str, record: ToRecord, chunk: Chunk) -> None:
    write_looks(_looks_url(url, chunk), record, noting(chunk.number, chunk.rows))


def without_repeated(url: str, todo: Iterable[Chunk], distance: int) -> Iterator[Chunk]:
    """The chunks with what `looks_noter` shows to be repeated."""
    repeats = Repeats(distance)
    for chunk in todo:
        yield chunk._replace(repeated=dict(repeats.find(_looks_url(url, chunk))))


def forget(url: str, *folders: str) -> None:
    """Remove the files in these folders of a set: LOOKS once it is complete, say."""
    for folder in (storage.join(url, name) for name in folders):
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
