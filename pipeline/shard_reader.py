"""Reading shard sets by index: the manifest says what exists, one ranged read fetches a slice."""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence

from glipv2.pipeline import storage
from glipv2.pipeline.cache import RangeCache
from glipv2.pipeline.errors import BadSample, DataError
from glipv2.pipeline.record_json import parse_record
from glipv2.pipeline.records import Record
from glipv2.pipeline.shard_format import (
    MANIFEST,
    NAME,
    RawSample,
    SampleEntry,
    ShardInfo,
    ShardSet,
    commit_url,
    load_json,
    manifest_content,
    shard_url,
)

SLICE = 256
"""Samples of one ranged read when a whole set is walked through."""
INDEXED = 1 << 18
"""Samples whose places a process keeps in mind, about 200 MB: training goes to and fro between
shards, and may have some hundred small ones or some dozen large ones at hand."""


def open_shard_set(url: str) -> ShardSet:
    """The set's manifest, refused when it is missing, of another schema, or edited by hand."""
    where = storage.join(url, MANIFEST)
    try:
        manifest = load_json(where, "shard set manifest")
    except storage.MissingFileError as error:
        raise DataError(
            f"{where} doesn't exist: {url} is no complete shard set; make it with `glipv2 prepare` "
            "(or run the command that was making it again)"
        ) from error
    try:
        shards = tuple(ShardInfo(**shard) for shard in manifest["shards"])
        categories = tuple(str(name) for name in manifest["categories"])
        content = manifest_content(shards, categories, manifest["info"])
        stated, found = manifest["digest"], storage.digest(content)
    except (KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{where} is no shard set manifest: {error!r}") from error
    if set(manifest) != {*content, "digest"} or found != stated:
        raise DataError(
            f"{where} was altered after it was written (its digest {stated!r} doesn't fit); "
            "restore it or make the shard set again"
        )
    if not all(NAME.fullmatch(shard.name) for shard in shards):
        raise DataError(f"{where} names a shard outside its own folder")
    return ShardSet(
        url=url, categories=categories, shards=shards, info=manifest["info"], digest=stated
    )


def check_shard_sizes(shard_set: ShardSet) -> None:
    """DataError on the first shard that is missing or has another size than the manifest says."""
    found = storage.sizes(shard_set.url)
    for shard in shard_set.shards:
        url = shard_url(shard_set.url, shard.name)
        _check_size(url, shard.bytes, found.get(f"{shard.name}.tar"))


def _check_size(url: str, expected: int, found: int | None) -> None:
    if found == expected:
        return
    what = "is missing" if found is None else f"holds {found} bytes instead of {expected}"
    raise DataError(
        f"shard {url} {what}: it was truncated, replaced or removed after it was committed; "
        "copy it again or make the shard set again"
    )


def read_index(shard_set: ShardSet, shard_number: int) -> tuple[SampleEntry, ...]:
    """Where each sample of a shard lies, after checking the commit record and the tar's size."""
    shard = shard_set.shards[shard_number]
    return _indexes.of(shard_set.url, shard.name, shard.bytes, shard.commit_crc32c)


def read_raw(
    shard_set: ShardSet,
    shard_number: int,
    first: int,
    last: int,
    cache: RangeCache | None = None,
) -> list[RawSample]:
    """Samples [first, last) of a shard; see `raw_samples`."""
    return list(raw_samples(shard_set, shard_number, first, last, cache))


def raw_samples(
    shard_set: ShardSet,
    shard_number: int,
    first: int,
    last: int,
    cache: RangeCache | None = None,
) -> Iterator[RawSample]:
    """Samples [first, last) of a shard: one ranged read of an object store, through the cache if
    there is one; one by one from a local disk, where large buffers cost more than calls.

    A sample whose bytes differ from its checksum comes as a RawSample with an error; a shard that
    ends too early is a DataError.
    """
    entries = read_index(shard_set, shard_number)[first:last]
    if not entries:
        return
    shard, url = shard_set.shards[shard_number], shard_set.shard_url(shard_number)
    if storage.is_local(url):
        yield from _from_disk(entries, url, shard)
        return
    start, end = entries[0].offset, entries[-1].offset + entries[-1].length
    if cache is not None:
        data = cache.read(url, start, end, shard.crc32c)
        samples = list(_cut(entries, data, start))
        if len(data) == end - start and not any(sample.error for sample in samples):
            yield from samples
            return
        cache.forget(url, start, end, shard.crc32c)  # the store has the last word
    data = storage.read_bytes(url, start, end)
    _check_length(url, shard, start, end, len(data))
    yield from _cut(entries, data, start)


def _from_disk(entries: Sequence[SampleEntry], url: str, shard: ShardInfo) -> Iterator[RawSample]:
    with storage.open_read(url) as file:
        for entry in entries:
            data = os.pread(file.fileno(), entry.length, entry.offset)
            _check_length(url, shard, entry.offset, entry.offset + entry.length, len(data))
            yield _raw_sample(entry, data)


def _cut(entries: Sequence[SampleEntry], data: bytes, start: int) -> Iterator[RawSample]:
    """The samples out of bytes of their tar from `start` on."""
    for entry in entries:
        begin = entry.offset - start
        yield _raw_sample(entry, data[begin : begin + entry.length])


def _raw_sample(entry: SampleEntry, data: bytes) -> RawSample:
    found = storage.crc32c(data)
    if found != entry.crc32c:
        bad = BadSample("crc_mismatch", f"crc32c {found}, expected {entry.crc32c}")
        return RawSample(key=entry.key, error=bad)
    members = {name: data[start : start + size] for name, (start, size) in entry.members.items()}
    if entry.document:
        members["json"] = entry.document.encode()
    return RawSample(key=entry.key, members=members)


def _check_length(url: str, shard: ShardInfo, start: int, end: int, found: int) -> None:
    if found != end - start:
        _check_size(url, shard.bytes, storage.size(url))
        raise DataError(f"{url}: bytes {start} to {end} came back as {found} bytes; try again")


def iterate_records(
    url: str, on_bad: Callable[[str, str, BadSample], None] | None = None
) -> Iterator[Record]:
    """All records of a set in order.

    A bad sample goes to `on_bad(shard name, key, why)` and is skipped; without it, it is a
    DataError.
    """
    shard_set = open_shard_set(url)
    for number, shard in enumerate(shard_set.shards):
        for first in range(0, shard.samples, SLICE):
            for raw in read_raw(shard_set, number, first, first + SLICE):
                try:
                    record = parse_record(raw, len(shard_set.categories))
                except BadSample as bad:
                    if on_bad is None:
                        where = shard_url(url, shard.name)
                        raise DataError(f"{where}: sample {raw.key}: {bad}") from bad
                    on_bad(shard.name, raw.key, bad)
                else:
                    yield record


def read_commit(url: str, name: str) -> tuple[ShardInfo, str]:
    """The committed shard, and the attempt that won; storage.MissingFileError without a commit."""
    where = commit_url(url, name)
    record = load_json(where, "commit record")
    attempt = record.pop("attempt", None)
    try:
        info = ShardInfo(
            name=name,
            samples=len(record["index"]),
            bytes=record["bytes"],
            crc32c=record["crc32c"],
            commit_crc32c=storage.crc32c(storage.canonical_json(record)),
            stats=record["stats"],
        )
    except (KeyError, TypeError) as error:
        raise DataError(f"{where} is no commit record: {error!r}") from error
    if not isinstance(attempt, str) or not NAME.fullmatch(attempt):
        raise DataError(f"{where} names no attempt")
    return info, attempt


class _Indexes:
    """Those used last, of INDEXED samples altogether or a single larger one; for any threads."""

    def __init__(self) -> None:
        self.kept = OrderedDict[tuple[str, str, int, str], tuple[SampleEntry, ...]]()
        self.samples = 0
        self.lock = threading.Lock()

    def of(self, url: str, name: str, size: int, crc: str) -> tuple[SampleEntry, ...]:
        key = (url, name, size, crc)
        with self.lock:
            if key in self.kept:
                self.kept.move_to_end(key)
                return self.kept[key]
        index = _read_index(*key)
        with self.lock:
            if key not in self.kept:
                self.kept[key] = index
                self.samples += len(index)
            while self.samples > INDEXED and len(self.kept) > 1:
                self.samples -= len(self.kept.popitem(last=False)[1])
        return index

    def clear(self) -> None:
        with self.lock:
            self.kept.clear()
            self.samples = 0


_indexes = _Indexes()


def _read_index(url: str, name: str, size: int, crc: str) -> tuple[SampleEntry, ...]:
    where = commit_url(url, name)
    record = load_json(where, "commit record")
    record.pop("attempt", None)
    found = storage.crc32c(storage.canonical_json(record))
    if found != crc:
        raise DataError(
            f"{where} is not the commit record that the manifest was written for (crc32c {found}, "
            f"expected {crc}); make the shard set again"
        )
    tar = shard_url(url, name)
    _check_size(tar, size, storage.size(tar) if storage.exists(tar) else None)
    names = ("key", "offset", "length", "crc32c", "members", "document")
    return tuple(
        SampleEntry(**dict(zip(names, values, strict=False))) for values in record["index"]
    )
