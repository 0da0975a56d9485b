"""What a shard set looks like on disk, and the types that describe it.

    URL/shard-000000.tar            KEY.jpg and KEY.json members: plain webdataset
    URL/commits/shard-000000.json   commit record: size, crc32c, stats and the index of its samples
    URL/dataset.json                written last: which shards belong to the set, and its categories
    URL/attempts/                   shards being written; nobody reads here

A shard exists once its commit record does; a set exists once dataset.json does.
"""

import json
import math
import re
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from glipv2.pipeline import storage
from glipv2.pipeline.errors import BadSample, DataError

SCHEMA = 2
"""Of the manifest and the commit records."""
MANIFEST = "dataset.json"
KEY = re.compile(r"[A-Za-z0-9_-]{1,80}")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,79}")
EXTENSIONS = ("jpg", "png", "webp", "json")
"""Members of other kinds (pickles, say) are passed over: their bytes are never interpreted."""
TAR_BLOCK = 512
MAX_MEMBER = 1 << 50
"""Bytes; a header that says more is broken, and no file can be sought that far."""


@dataclass(frozen=True, kw_only=True)
class ShardInfo:
    name: str
    """`shard-000000`; the file adds `.tar`."""
    samples: int
    bytes: int
    crc32c: str
    """Of the tar file."""
    commit_crc32c: str
    """Of the commit record, without the name of the attempt that won."""
    stats: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleEntry:
    """Where one sample lies in its tar: all its members, headers included.

    The index also says where each member's content is, so reading parses no tar header."""

    key: str
    offset: int
    length: int
    crc32c: str
    members: Mapping[str, tuple[int, int]]
    """Extension -> (offset, size) of its content, counted from the sample's first byte."""
    document: str = ""
    """The sample's JSON where the tar has none: foreign tars are indexed, not rewritten."""


@dataclass(frozen=True, kw_only=True)
class ShardSet:
    url: str
    categories: tuple[str, ...]
    shards: tuple[ShardInfo, ...]
    info: dict[str, Any]
    """Who made the set from what: source, settings, licence, prompts."""
    digest: str
    """Of everything above but the URL: two copies of one set have the same digest."""

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    def shard_url(self, shard_number: int) -> str:
        return shard_url(self.url, self.shards[shard_number].name)


@dataclass(frozen=True, kw_only=True)
class RawSample:
    """The members of one sample, not yet interpreted."""

    key: str
    members: Mapping[str, bytes] = field(default_factory=dict)
    """Extension -> content."""
    error: BadSample | None = None
    """Why the members can't be trusted; they are empty then."""


def shard_name(number: int) -> str:
    return f"shard-{number:06d}"


def shard_url(url: str, name: str) -> str:
    return storage.join(url, f"{name}.tar")


def commit_url(url: str, name: str) -> str:
    return storage.join(url, "commits", f"{name}.json")


def walk_tar(file: BinaryIO) -> Iterator[tuple[int, tarfile.TarInfo]]:
    """(offset, header) of each member up to the end mark or the end of the file."""
    while (header := file.read(TAR_BLOCK)).strip(b"\0"):
        offset = file.tell() - len(header)
        member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        if not 0 <= member.size <= MAX_MEMBER:
            raise tarfile.HeaderError(f"member of {member.size} bytes")
        yield offset, member
        file.seek(offset + TAR_BLOCK + padded(member.size))


def walk_samples(file: BinaryIO) -> Iterator[tuple[str, int, int, dict[str, tuple[int, int]]]]:
    """(key, offset, length, members) of each run of members with one stem; `members` holds
    (offset, size) as in SampleEntry. The caller may move the file's position in between.

    HeaderError for members that are no plain files, and for two of one name.
    """
    key, start, end = "", 0, 0
    members: dict[str, tuple[int, int]] = {}
    for offset, member in walk_tar(file):
        stem, _, extension = member.name.partition(".")
        if stem != key:
            if key:
                yield key, start, end - start, members
            key, start, members = stem, offset, {}
        if not member.isreg() or extension in members:
            raise tarfile.HeaderError(f"member {member.name[:100]!r} is no plain file, or a second")
        if extension in EXTENSIONS:
            members[extension] = (offset + TAR_BLOCK - start, member.size)
        end = offset + TAR_BLOCK + padded(member.size)
    if key:
        yield key, start, end - start, members


def padded(size: int) -> int:
    return -(-size // TAR_BLOCK) * TAR_BLOCK


def manifest_content(
    shards: tuple[ShardInfo, ...], categories: tuple[str, ...], info: dict[str, Any]
) -> dict[str, Any]:
    """dataset.json without its digest."""
    return {
        "schema": SCHEMA,
        "categories": list(categories),
        "info": info,
        "shards": [vars(shard) for shard in shards],
    }


def load_json(url: str, what: str) -> dict[str, Any]:
    """A JSON object of ours, or DataError naming the file."""
    try:
        text = storage.read_bytes(url).decode()
        value = json.loads(text, parse_constant=refuse_constant, parse_float=finite)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{url} is no {what}: {error}") from error
    if not isinstance(value, dict) or value.get("schema") != SCHEMA:
        found = value.get("schema") if isinstance(value, dict) else None
        raise DataError(f"{url} is no {what} of schema {SCHEMA} (found {found!r}); make it again")
    return value


def refuse_constant(name: str) -> float:
    """For `json.loads`, which would take NaN and Infinity."""
    raise ValueError(f"{name} is no JSON number")


def finite(text: str) -> float:
    """For `json.loads`, which would make 1e999 infinite."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is too large")
    return value
