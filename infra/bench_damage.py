"""Damaged shards, ours against webdataset's reader: what is noticed, and what is used all the same.

Not a speed: 500 truncations and 500 flipped bits at seeded places of one shard.
"""

import random
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import webdataset
from bench_measure import note

from glipv2.data_prep.toy import toy_records
from glipv2.pipeline import storage
from glipv2.pipeline.errors import BadSample, DataError
from glipv2.pipeline.record_json import parse_record
from glipv2.pipeline.records import Record
from glipv2.pipeline.shards import ShardSet, open_shard_set, read_raw, write_shard_set

SAMPLES = 16
DAMAGES = 500


def bench_damage() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for kind, counts in damage_figures(folder).items():
            for reader in ("ours", "webdataset"):
                found = counts[reader]
                said = f"{found['noticed']:5d} noticed {found['used']:5d} with wrong samples used"
                note(f"{DAMAGES} {kind}: {reader}", said)


def damage_figures(folder: str, count: int = DAMAGES) -> dict[str, dict[str, Counter[str]]]:
    """For both kinds of damage and both readers: how often it was noticed, and how often a sample
    came out that is not one of the originals.
    """
    records = list(toy_records("toy_grounding", SAMPLES, seed=1, size=64))
    write_shard_set(folder, records, (), {}, samples_per_shard=SAMPLES)
    path = Path(folder) / "shard-000000.tar"
    whole = path.read_bytes()
    originals = {record.key: record for record in records}
    members = {sample["__key__"]: _plain(sample) for sample in _peer_samples(str(path))}
    figures: dict[str, dict[str, Counter[str]]] = {}
    for kind, damaged in (("truncations", _truncated), ("flipped bits", _flipped)):
        counts = {"ours": Counter[str](), "webdataset": Counter[str]()}
        for data in damaged(whole, count):
            path.write_bytes(data)
            counts["ours"].update(_ours(folder, originals))
            counts["webdataset"].update(_peer(str(path), members))
        figures[kind] = counts
    path.write_bytes(whole)
    return figures


def _truncated(whole: bytes, count: int) -> Iterator[bytes]:
    draw = random.Random(1)
    for _ in range(count):
        yield whole[: draw.randrange(len(whole))]


def _flipped(whole: bytes, count: int) -> Iterator[bytes]:
    draw = random.Random(2)
    for _ in range(count):
        data = bytearray(whole)
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        yield bytes(data)


def _ours(folder: str, originals: dict[str, Record]) -> list[str]:
    """Any of "noticed" and "used"."""
    shard_set = open_shard_set(folder)
    noticed, good = _verified(shard_set), []
    try:
        for raw in read_raw(shard_set, 0, 0, SAMPLES):
            try:
                good.append(parse_record(raw))
            except BadSample:
                noticed = True
    except DataError:
        noticed = True
    used = any(originals.get(record.key) != record for record in good)
    return ["noticed"] * noticed + ["used"] * used


def _verified(shard_set: ShardSet) -> bool:
    """Whether `glipv2 check` would object to the file, samples or not."""
    shard, url = shard_set.shards[0], shard_set.shard_url(0)
    return storage.size(url) != shard.bytes or storage.file_crc32c(url) != shard.crc32c


def _peer_samples(path: str) -> Any:
    return webdataset.WebDataset([path], shardshuffle=False, empty_check=False)


def _plain(sample: dict[str, Any]) -> dict[str, bytes]:
    return {name: value for name, value in sample.items() if not name.startswith("__")}


def _peer(path: str, members: dict[str, dict[str, bytes]]) -> list[str]:
    """webdataset with its default handler: an exception is its way to notice."""
    noticed, seen = False, []
    try:
        seen += [(sample["__key__"], _plain(sample)) for sample in _peer_samples(path)]
    except Exception:
        noticed = True
    used = any(members.get(key) != found for key, found in seen)
    return ["noticed"] * noticed + ["used"] * used


if __name__ == "__main__":
    bench_damage()
