"""An index for existing webdataset tars: they become a shard set where they are, without a copy.

Beside the tars come a commit record for each, which holds where every usable sample lies and what
its text says, and the manifest. The tars themselves are never changed.
"""

from collections import Counter
from functools import partial
from typing import Any

from glipv2.data_prep.reasons import Dropped
from glipv2.data_prep.source import Row
from glipv2.data_prep.webdataset import Member, list_tars, tar_record, tar_rows
from glipv2.data_prep.writing import note_dropped
from glipv2.pipeline import storage
from glipv2.pipeline.errors import BadSample, DataError
from glipv2.pipeline.record_json import record_members
from glipv2.pipeline.shard_format import NAME, TAR_BLOCK, ShardInfo, padded
from glipv2.pipeline.shards import commit_in_place, committed_shard
from glipv2.pipeline.worker_notes import noting


def tars_to_index(root: str) -> list[tuple[str, int]]:
    """(name without .tar, bytes) of each tar in a folder; DataError when a name can't stay."""
    if root.endswith(".tar"):
        raise DataError(f"{root} is one tar; an index is made of a folder of tars")
    tars = [(name.removesuffix(".tar"), size) for name, size in list_tars(root)[1].items()]
    for name, _ in tars:
        if not NAME.fullmatch(name):
            raise DataError(
                f"{root}/{name}.tar: rename it to letters, digits, - and _ to index it in place, "
                "or make a copy with --out"
            )
    return tars


def tar_indexer(root: str, caption_field: str, plan: str) -> Any:
    """What commits one of `tars_to_index`; `plan` goes into its stats."""
    return partial(_index_tar, root, caption_field, plan)


def _index_tar(root: str, caption_field: str, plan: str, tar: tuple[str, int]) -> ShardInfo:
    name, size = tar
    done = committed_shard(root, name)
    if done is not None:
        return done
    dropped, totals, tall = Dropped(), Counter(samples=0, boxes=0, phrases=0), 0
    index = []
    rows = tar_rows(root, {f"{name}.tar": size}, dropped)
    for row in noting(name, rows, lambda _, row: _extent(row)[0]):
        try:
            record = tar_record(root, caption_field, row, dropped)
        except BadSample as error:
            dropped.note(error.reason, row.where)
            continue
        place = _image_of(row, record.image)
        start, end = _extent(row)
        crc32c = storage.crc32c(storage.read_bytes(storage.join(root, f"{name}.tar"), start, end))
        members = {record.image_format: [place.start - start, place.size]}
        document = record_members(record)["json"].decode()
        index.append([record.key, start, end - start, crc32c, members, document])
        totals["samples"] += 1
        tall += record.height > record.width
    note_dropped(root, name, dropped)
    stats = {"plan": plan, "totals": dict(totals), "tall": tall, "dropped": dict(dropped)}
    return commit_in_place(root, name, index, {**stats, "first": dropped.first})


def _extent(row: Row) -> tuple[int, int]:
    """First byte of the sample's first header, and the end of its last member."""
    members: list[Member] = row.item[2]
    first, last = members[0], members[-1]
    return first.start - TAR_BLOCK, last.start + padded(last.size)


def _image_of(row: Row, image: bytes) -> Member:
    members: list[Member] = row.item[2]
    return next(m for m in members if m.kind not in ("txt", "json") and m.size == len(image))
