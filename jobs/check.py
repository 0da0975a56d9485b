"""glipv2 check: is a whole shard set as its manifest says, and would training take every sample?"""

import argparse
import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial

import numpy as np

from glipv2.jobs.card_text import plain_text
from glipv2.jobs.every_shard import add_workers_argument, every_shard
from glipv2.jobs.prepare_plan import is_in_place
from glipv2.jobs.stats import counted
from glipv2.pipeline import storage
from glipv2.pipeline.errors import BadSample, ConfigError, DataError
from glipv2.pipeline.images import decode_image
from glipv2.pipeline.record_json import parse_record
from glipv2.pipeline.region_masks import decode_mask
from glipv2.pipeline.shard_format import MANIFEST, RawSample, ShardSet, commit_url
from glipv2.pipeline.shard_reader import SLICE, open_shard_set, read_commit, read_index, read_raw

COPY = "copy the file again"
REMAKE = (
    "delete {shard}.tar, commits/{shard}.json and dataset.json, as far as they are there, and run "
    "the command that made the set again: the other shards stay"
)
INDEX = (
    "if it is meant to be another now, delete dataset.json, prepare.json and the folder commits, "
    "but no tar, and run the command with --index-only again"
)
"""For a set whose tars are the user's own, indexed where they are."""
WRITTEN = (
    "it was written like this: mend its source and make the set again in a new folder; training "
    "passes it over"
)
CURES = {
    "manifest_invalid": "copy dataset.json again, or delete it and run the command that made the "
    "set again",
    "commit_missing": f"{COPY}, or {REMAKE}",
    "commit_damaged": f"{COPY}, or {REMAKE}",
    "commit_other": f"copy dataset.json, commit record and tar from one place, or {REMAKE}",
    "shard_missing": f"{COPY}, or {REMAKE}",
    "shard_size": f"{COPY}, or {REMAKE}",
    "shard_crc": f"{COPY}, or {REMAKE}",
    "read_failed": "check again; if it stays, copy the file again",
    "crc_mismatch": f"{COPY}, or {REMAKE}",
    "tar_invalid": f"{COPY}, or {REMAKE}",
    "key_twice": "rename the sample in its source and make the set again in a new folder",
}
"""What to do about each reason; the others are of single samples (WRITTEN)."""
CURES_IN_PLACE = {
    **dict.fromkeys(
        ("commit_missing", "commit_damaged", "commit_other"),
        "delete dataset.json, prepare.json and the folder commits, but no tar, and run the command "
        "with --index-only again",
    ),
    **dict.fromkeys(
        ("shard_missing", "shard_size", "shard_crc", "crc_mismatch", "tar_invalid"),
        f"copy {{shard}}.tar again from where it came from; {INDEX}",
    ),
}
LIMIT = 50


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong."""

    file: str
    key: str = ""
    offset: int | None = None
    """Where the sample begins in its tar."""
    reason: str
    detail: str = ""
    in_place: bool = False
    """Whether the set is an index of tars that are not ours."""

    @property
    def cure(self) -> str:
        """What to do about it."""
        cures = CURES | CURES_IN_PLACE if self.in_place else CURES
        shard = self.file.rsplit("/", 1)[-1].rsplit(".", 1)[0]
        return cures.get(self.reason, WRITTEN).format(shard=shard)

    def line(self) -> str:
        """One line for a terminal."""
        where = f" {self.key} at byte {self.offset}" if self.key else ""
        detail = f" ({self.detail})" if self.detail else ""
        text = f"{self.file}{where}: {self.reason}{detail} -> {self.cure}"
        return plain_text(text).replace("\n", " ")


@dataclass(kw_only=True)
class Checked:
    """What the check of a shard found."""

    problems: list[Problem] = field(default_factory=list)
    key_hashes_N: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    """Of each sample in the order of the index; empty where there is no reading it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `glipv2 check`."""
    parser.add_argument("shards", help="folder URL of a shard set (holds dataset.json)")
    parser.add_argument(
        "--decode", action="store_true", help="decode every image, not just its header (slow)"
    )
    parser.add_argument(
        "--limit", type=int, default=LIMIT, help=f"problems to print (default {LIMIT})"
    )
    parser.add_argument("--json", metavar="FILE", help="write all problems there too")
    add_workers_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Print what is wrong; 1 if anything is."""
    if args.limit < 0:
        raise ConfigError(f"--limit must not be negative, got {args.limit}")
    problems = check(args.shards, args.decode, args.workers)
    if args.json:
        found = [{**asdict(problem), "cure": problem.cure} for problem in problems]
        storage.write_json(args.json, {"url": args.shards, "problems": found})
    lines = [problem.line() for problem in problems[: args.limit]]
    if len(problems) > args.limit:
        full = f"all are in {args.json}" if args.json else "--json FILE lists all"
        lines.append(f"... and {len(problems) - args.limit:,} more; {full}")
    print("\n".join([*lines, f"{args.shards}: {_verdict(args.shards, problems)}"]))  # noqa: T201
    return 1 if problems else 0


def _verdict(url: str, problems: Sequence[Problem]) -> str:
    if not problems:
        shard_set = open_shard_set(url)
        shards = counted(len(shard_set.shards), "shard")
        return f"ok, {counted(shard_set.samples, 'sample')} in {shards}"
    reasons = Counter(problem.reason for problem in problems).most_common()
    listed = ", ".join(f"{reason} {count:,}" for reason, count in reasons)
    return f"{counted(len(problems), 'problem')}: {listed}"


def check(url: str, decode: bool = False, workers: int | None = None) -> list[Problem]:
    """All that is wrong with a set, in the order of its files; DataError if there is none.

    Holds 8 bytes a sample, to find keys that occur twice.
    """
    manifest = storage.join(url, MANIFEST)
    there = storage.exists(manifest)
    try:
        shard_set = open_shard_set(url)
    except (DataError, TypeError, ValueError) as error:
        if not there:
            raise
        return [Problem(file=manifest, reason="manifest_invalid", detail=str(error))]
    found = dict(every_shard(shard_set, partial(check_shard, decode=decode), "check", workers))
    problems = [problem for checked in found.values() for problem in checked.problems]
    hashes = {number: found[number].key_hashes_N for number in sorted(found)}
    problems += _keys_twice(shard_set, hashes)
    if is_in_place(shard_set.info.get("plan")):
        problems = [replace(problem, in_place=True) for problem in problems]
    return sorted(problems, key=lambda p: (p.file, -1 if p.offset is None else p.offset))


def check_shard(shard_set: ShardSet, number: int, decode: bool = False) -> Checked:
    """One shard: its files against the manifest, then each sample."""
    problems = [*_commit_problems(shard_set, number), *_tar_problems(shard_set, number)]
    if {problem.reason for problem in problems} - {"shard_crc"}:
        return Checked(problems=problems)  # samples can't be found, or not all of them
    try:
        keys = [entry.key for entry in read_index(shard_set, number)]
        problems += _sample_problems(shard_set, number, decode)
    except DataError as error:
        url = shard_set.shard_url(number)
        problems.append(Problem(file=url, reason="read_failed", detail=str(error)))
        return Checked(problems=problems)
    return Checked(problems=problems, key_hashes_N=_hashes(keys))


def _commit_problems(shard_set: ShardSet, number: int) -> Iterator[Problem]:
    shard = shard_set.shards[number]
    url = commit_url(shard_set.url, shard.name)
    try:
        committed, _ = read_commit(shard_set.url, shard.name)
    except storage.MissingFileError as error:
        yield Problem(file=url, reason="commit_missing", detail=str(error))
    except (DataError, TypeError, ValueError) as error:
        yield Problem(file=url, reason="commit_damaged", detail=str(error))
    else:
        stated, found = vars(shard), vars(committed)
        if other := [name for name in stated if stated[name] != found[name]]:
            detail = f"the manifest has another {', '.join(other)}"
            yield Problem(file=url, reason="commit_other", detail=detail)


def _tar_problems(shard_set: ShardSet, number: int) -> Iterator[Problem]:
    shard, url = shard_set.shards[number], shard_set.shard_url(number)
    try:
        size = storage.size(url)
        found = storage.file_crc32c(url) if size == shard.bytes else ""
    except storage.MissingFileError as error:
        yield Problem(file=url, reason="shard_missing", detail=str(error))
        return
    if size != shard.bytes:
        detail = f"{size} bytes instead of {shard.bytes}"
        yield Problem(file=url, reason="shard_size", detail=detail)
    elif found != shard.crc32c:
        detail = f"crc32c {found}, expected {shard.crc32c}"
        yield Problem(file=url, reason="shard_crc", detail=detail)


def _sample_problems(shard_set: ShardSet, number: int, decode: bool) -> Iterator[Problem]:
    url = shard_set.shard_url(number)
    entries = read_index(shard_set, number)
    for first in range(0, len(entries), SLICE):
        raws = read_raw(shard_set, number, first, first + SLICE)
        for entry, raw in zip(entries[first : first + SLICE], raws, strict=True):
            try:
                _check_sample(raw, len(shard_set.categories), decode)
            except BadSample as bad:
                yield Problem(
                    file=url,
                    key=entry.key,
                    offset=entry.offset,
                    reason=bad.reason,
                    detail=bad.detail,
                )


def _check_sample(raw: RawSample, category_count: int, decode: bool) -> None:
    """BadSample if training would refuse the sample."""
    record = parse_record(raw, category_count)
    for region in record.regions:
        if region.mask is not None:
            decode_mask(region.mask, record.width, record.height)
    if decode:
        decode_image(record.image)


def _hashes(keys: Sequence[str]) -> np.ndarray:
    """uint64 (N,)."""
    digests = b"".join(hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys)
    return np.frombuffer(digests, np.uint64)


def _keys_twice(shard_set: ShardSet, hashes: dict[int, np.ndarray]) -> Iterator[Problem]:
    """Every occurrence of a key but its first. Equal hashes of different keys are no problem."""
    all_hashes = np.concatenate([_hashes(()), *hashes.values()])
    values, counts = np.unique(all_hashes, return_counts=True)
    places: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
    for number, own_N in hashes.items():
        for row in np.flatnonzero(np.isin(own_N, values[counts > 1])):
            entry = read_index(shard_set, number)[row]
            places[entry.key].append((number, entry.offset))
    for key, (first, *others) in places.items():
        detail = f"it is also in {shard_set.shards[first[0]].name} at byte {first[1]}"
        for number, offset in others:
            url = shard_set.shard_url(number)
            yield Problem(file=url, key=key, offset=offset, reason="key_twice", detail=detail)
