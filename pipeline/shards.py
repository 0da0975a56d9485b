"""Writing shard sets, and the one place to import everything about them from.

A shard is committed like this, and every step may be cut off or happen twice, on any machine:
build the tar locally -> upload it as an attempt under a name of its own -> read it back -> create
the commit record, which exactly one writer can do -> rename the winner's attempt to its final name
-> the losers delete theirs. Whoever comes next finishes a rename that was cut off.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any
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
        attempt = _upload_attempt(url, name, tar)
        record = _commit_record(name, tar, stats or {})
    mine = storage.canonical_json({**record, "attempt": attempt})
    storage.create_once(commit_url(url, name), mine)
    committed, winner = read_commit(url, name)
    if winner != attempt:
        log.info("%s: another writer committed %s first", url, name)
        storage.delete(_attempt_url(url, attempt))
    _finish(url, committed, winner)
    return committed


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
    try:
        committed, winner = read_commit(url, name)
    except storage.MissingFileError:
        return None
    _finish(url, committed, winner)
    return committed


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


def remove_attempts(url: str) -> int:
    """Delete what killed writers left in a set's folder; how many files that were.

    A writer that is still at work then fails and can be run again.
    """
    attempts = storage.join(url, "attempts")
    cut_off = [name for name in storage.list_names(url) if name.startswith(storage.ATTEMPT)]
    leftovers = [
        *(storage.join(attempts, name) for name in storage.list_names(attempts)),
        *(storage.join(url, name) for name in cut_off),
    ]
    for leftover in leftovers:
        storage.delete(leftover)
    return len(leftovers)


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


def _upload_attempt(url: str, name: str, tar: Path) -> str:
    attempt = f"{name}-{uuid4().hex}"
    target = _attempt_url(url, attempt)
    storage.upload(tar, target)
    sent, arrived = storage.file_crc32c(str(tar)), storage.file_crc32c(target)
    if sent != arrived:
        raise DataError(f"{target} reads back with crc32c {arrived} instead of {sent}; try again")
    return attempt


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


def _finish(url: str, committed: ShardInfo, winner: str) -> None:
    """Bring the committed attempt to its final name; any number of callers may do it at once."""
    final, attempt = shard_url(url, committed.name), _attempt_url(url, winner)
    if not storage.exists(final):
        try:
            storage.move(attempt, final)
        except storage.MissingFileError as error:
            if not storage.exists(final):  # not just another caller who was faster
                raise DataError(
                    f"{final}: its commit record exists, but the shard and its attempt are gone; "
                    f"delete {commit_url(url, committed.name)} and run the same command again"
                ) from error
    storage.delete(attempt)
