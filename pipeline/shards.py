"""Writing shard sets, and the one place to import everything about them from.

A shard is committed like this, and every step may be cut off or happen twice, on any machine:
build the tar locally -> upload it as an attempt under a name of its own -> read it back -> create
the commit record, which exactly one writer can do -> rename the winner's attempt to its final name
-> the losers delete theirs. Whoever comes next finishes a rename that was cut off. A writer may
sleep for so long that its attempt is taken for a leftover: a commit record whose attempt is gone
counts for nothing until the set is complete, and whoever finds it withdraws it.
"""

import contextlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

from webdataset import TarWriter

from glipv2.pipeline import storage
from glipv2.pipeline.errors import BadSample, DataError
from glipv2.pipeline.record_json import parse_record, record_members
from glipv2.pipeline.records import Record
from glipv2.pipeline.scratch import scratch_folder
from glipv2.pipeline.shard_format import (
    KEY,
    MANIFEST,
    NAME,
    SCHEMA,
    RawSample,
    SampleEntry,
    ShardInfo,
    ShardSet,
    commit_url,
    manifest_content,
    shard_name,
    shard_url,
    walk_samples,
)
from glipv2.pipeline.shard_reader import (
    check_shard_sizes,
    iterate_records,
    open_shard_set,
    raw_samples,
    read_commit,
    read_index,
    read_raw,
)

__all__ = [
    "RawSample",
    "SampleEntry",
    "ShardInfo",
    "ShardSet",
    "check_shard_sizes",
    "commit_in_place",
    "committed_names",
    "committed_shard",
    "iterate_records",
    "open_shard_set",
    "parse_record",
    "raw_samples",
    "read_index",
    "read_raw",
    "record_members",
    "remove_attempts",
    "shard_name",
    "write_manifest",
    "write_raw_shard",
    "write_shard",
    "write_shard_set",
]
log = logging.getLogger(__name__)

SPARED_S = 3600.0
"""Age from which an attempt at a shard is taken for a leftover while its set isn't complete."""
TRIES = 3
"""Attempts that a writer makes when each is taken from it."""


class Swept(NamedTuple):
    """Leftovers of killed writers."""

    removed: int
    spared: int
    """Too young to be sure that nobody is at work on them."""


def write_shard_set(
    url: str,
    records: Iterable[Record],
    categories: Sequence[str],
    info: dict[str, Any],
    samples_per_shard: int = 256,
) -> ShardSet:
    """Write all records as one set; run again after a kill it goes on and ends with equal bytes.

    A folder that holds shards of other records is a DataError, not overwritten.
    """
    shards: list[ShardInfo] = []
    keys: set[str] = set()
    remaining = iter(records)
    while chunk := list(islice(remaining, samples_per_shard)):
        for record in chunk:
            if record.key in keys:
                raise DataError(f"{url}: key {record.key} occurs twice; keys must be unique")
            keys.add(record.key)
        name = shard_name(len(shards))
        done = committed_shard(url, name)
        if done is not None and done.crc32c != _tar_crc32c(chunk):
            raise DataError(
                f"{shard_url(url, name)} was committed from other records than these: "
                "write to a new folder, or delete this one first"
            )
        shards.append(done or write_shard(url, name, chunk))
    if not shards:
        raise DataError(f"{url}: no samples to make a shard set of")
    return write_manifest(url, shards, categories, info)


def write_shard(
    url: str, name: str, records: Iterable[Record], stats: dict[str, Any] | None = None
) -> ShardInfo:
    """Commit one shard, or return the one that is committed already (then `records` isn't touched).

    `stats` goes into the commit record; the iterable may fill it while it is consumed. A record
    that training would refuse is a DataError: readers of sources drop and count such records.
    """
    return write_raw_shard(url, name, map(_checked_members, records), stats)


def write_raw_shard(
    url: str, name: str, samples: Iterable[RawSample], stats: dict[str, Any] | None = None
) -> ShardInfo:
    """`write_shard` for members that are there already; their content isn't checked."""
    done = committed_shard(url, name)
    if done is not None:
        return done
    with scratch_folder() as folder:
        tar = folder / f"{name}.tar"
        _write_tar(tar, samples)
        record = _commit_record(name, tar, stats or {})
        for _ in range(TRIES):
            if (done := _try_to_commit(url, name, tar, record)) is not None:
                return done
    raise DataError(
        f"{url}: {TRIES} attempts to write {name} were removed before they were committed; "
        "let nothing else write or tidy there, and run the same command again"
    )


def commit_in_place(
    url: str, name: str, index: list[list[Any]], stats: dict[str, Any]
) -> ShardInfo:
    """Commit a tar that somebody else put into the set's folder, by the index of its samples.

    Entries are [key, offset, length, crc32c, members, document]; `document` stands for the
    sample's JSON member, which such a tar doesn't have.
    """
    tar = shard_url(url, name)
    record = {
        "schema": SCHEMA,
        "shard": name,
        "bytes": storage.size(tar),
        "crc32c": storage.file_crc32c(tar),
        "stats": stats,
        "index": index,
    }
    mine = storage.canonical_json({**record, "attempt": "in-place"})
    storage.create_once(commit_url(url, name), mine)
    return read_commit(url, name)[0]


def committed_shard(url: str, name: str) -> ShardInfo | None:
    """The shard if it is committed, after finishing a commit that was cut off; else None."""
    if not NAME.fullmatch(name):
        raise DataError(f"{name!r} is no shard name (letters, digits, - and _)")
    settled = _settled(url, name)
    return settled[0] if settled else None


def committed_names(url: str) -> set[str]:
    """Names of the committed shards, cut off or not; a look that touches nothing."""
    names = _named(url, "commits", ".json")
    unfinished = names - _named(url, "", ".tar")
    winners = {name: _attempt_url(url, read_commit(url, name)[1]) for name in unfinished}
    return names - {name for name, attempt in winners.items() if not storage.exists(attempt)}


def write_manifest(
    url: str, shards: Sequence[ShardInfo], categories: Sequence[str], info: dict[str, Any]
) -> ShardSet:
    """Declare the set complete; the last act of whoever makes it. Leftover attempts are removed."""
    names = [shard.name for shard in shards]
    if len(set(names)) != len(names) or len(set(categories)) != len(categories):
        raise DataError(f"{url}: shard names and category names must be unique")
    content = manifest_content(tuple(shards), tuple(categories), info)
    manifest = {**content, "digest": storage.digest(content)}
    storage.write_bytes(storage.join(url, MANIFEST), storage.canonical_json(manifest))
    remove_attempts(url)
    return open_shard_set(url)


def remove_attempts(url: str) -> Swept:
    """Delete what killed writers left in a set's folder: files, and unlisted parts on a store.

    In a complete set that is everything. In others a commit that was cut off is finished first, and
    what is younger than SPARED_S stays: its writer may be at work. One that is all the same, after
    a longer sleep, notices and makes another attempt.
    """
    complete = storage.exists(storage.join(url, MANIFEST))
    if not complete:
        for name in _named(url, "commits", ".json") - _named(url, "", ".tar"):
            committed_shard(url, name)
    spare_s, removed, spared = 0.0 if complete else SPARED_S, 0, 0
    for folder in (url, storage.join(url, "attempts"), storage.join(url, "commits")):
        for name in storage.list_names(folder):
            if name.startswith(storage.ATTEMPT) or folder.endswith("/attempts"):
                gone = _remove_old(storage.join(folder, name), spare_s)
                removed, spared = removed + gone, spared + (not gone)
        dropped, left = storage.drop_uploads(folder, spare_s)
        removed, spared = removed + dropped, spared + left
    return Swept(removed, spared)


def _remove_old(url: str, spare_s: float) -> bool:
    """Delete the file unless it is younger; whether it is gone."""
    with contextlib.suppress(storage.MissingFileError):
        if spare_s and storage.age(url) < spare_s:
            return False
    storage.delete(url)
    return True


def _named(url: str, folder: str, extension: str) -> set[str]:
    """What stands before the extension in the names of a folder of the set."""
    names = storage.list_names(storage.join(url, folder) if folder else url)
    stems = {name.removesuffix(extension) for name in names if name.endswith(extension)}
    return {stem for stem in stems if NAME.fullmatch(stem)}


def _checked_members(record: Record) -> RawSample:
    try:
        raw = RawSample(key=record.key, members=record_members(record))
        parse_record(raw)
    except BadSample as bad:
        raise DataError(f"record {record.key} can't be stored: {bad}") from bad
    return raw


def _write_tar(path: Path, samples: Iterable[RawSample]) -> None:
    """Plain webdataset layout; the same samples always give the same bytes."""
    keys: set[str] = set()
    with (
        open(path, "wb") as file,
        TarWriter(file, encoder=False, user="glipv2", group="glipv2", mode=0o444, mtime=0) as tar,
    ):
        for sample in samples:
            if not KEY.fullmatch(sample.key) or sample.key in keys:
                raise DataError(f"key {sample.key!r} occurs twice or isn't made of A-Za-z0-9_-")
            keys.add(sample.key)
            tar.write({"__key__": sample.key, **sample.members})


def _tar_crc32c(records: list[Record]) -> str:
    with scratch_folder() as folder:
        tar = folder / "again.tar"
        _write_tar(tar, map(_checked_members, records))
        return storage.file_crc32c(str(tar))


def _try_to_commit(url: str, name: str, tar: Path, record: dict[str, Any]) -> ShardInfo | None:
    """Commit a tar unless another writer was first; None when somebody took the attempt away."""
    attempt = f"{name}-{uuid4().hex}"
    try:
        _upload(tar, _attempt_url(url, attempt))
        mine = storage.canonical_json({**record, "attempt": attempt})
        storage.create_once(commit_url(url, name), mine)
    except storage.MissingFileError as error:
        log.info("%s: an attempt at %s was removed: %s", url, name, error)
    settled = _settled(url, name)
    if settled is None or settled[1] != attempt:
        storage.delete(_attempt_url(url, attempt))
    if settled is None:
        return None
    committed, winner = settled
    if winner != attempt:
        log.info("%s: another writer committed %s first", url, name)
    return committed


def _upload(tar: Path, target: str) -> None:
    storage.upload(tar, target)
    sent, arrived = storage.file_crc32c(str(tar)), storage.file_crc32c(target)
    if sent != arrived:
        raise DataError(f"{target} reads back with crc32c {arrived} instead of {sent}; try again")


def _commit_record(name: str, tar: Path, stats: dict[str, Any]) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "shard": name,
        "bytes": tar.stat().st_size,
        "crc32c": storage.file_crc32c(str(tar)),
        "stats": stats,
        "index": list(_index(tar)),
    }


def _index(tar: Path) -> Iterator[list[Any]]:
    """[key, offset, length, crc32c, members] of each sample, from the tar as it was written."""
    with open(tar, "rb") as file:
        for key, offset, length, members in walk_samples(file):
            file.seek(offset)
            yield [key, offset, length, storage.crc32c(file.read(length)), members]


def _attempt_url(url: str, attempt: str) -> str:
    return storage.join(url, "attempts", f"{attempt}.tar")


def _settled(url: str, name: str) -> tuple[ShardInfo, str] | None:
    """The committed shard under its final name, and the attempt that won; None without a commit.

    A commit whose shard and attempt are both gone is withdrawn. Not from a complete set: there it
    is damage, of which whoever reads the set has to hear.
    """
    try:
        committed, winner = read_commit(url, name)
    except storage.MissingFileError:
        return None
    if _finish(url, committed, winner):
        return committed, winner
    if storage.exists(storage.join(url, MANIFEST)):
        raise DataError(
            f"{shard_url(url, name)}: its commit record exists, but the shard and its attempt are "
            f"gone or damaged; delete {commit_url(url, name)} and run the same command again"
        )
    log.warning("%s: %s was committed, but its file is gone or cut: it is made again", url, name)
    with contextlib.suppress(storage.MissingFileError):
        if read_commit(url, name)[1] == winner:  # else somebody has withdrawn it, and made another
            storage.delete(commit_url(url, name))
    return None


def _finish(url: str, committed: ShardInfo, winner: str) -> bool:
    """Bring the committed attempt to its final name; any number of callers may do it at once.

    False when there is neither: another shard of that name, or the half of one, is none.
    """
    final, attempt = shard_url(url, committed.name), _attempt_url(url, winner)
    if not _is_there(final, committed):
        try:
            storage.move(attempt, final)
        except storage.MissingFileError:
            if not _is_there(final, committed):  # not just another caller who was faster
                return False
    storage.delete(attempt)
    return True


def _is_there(final: str, committed: ShardInfo) -> bool:
    try:
        return storage.size(final) == committed.bytes
    except storage.MissingFileError:
        return False
