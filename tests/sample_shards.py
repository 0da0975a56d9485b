"""A small shard set, and its bytes."""

import sys
import uuid
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from sample_records import CATEGORIES, record  # noqa: E402

from glipv2.pipeline import shards, storage  # noqa: E402


def set_on_store(store, tmp_path):
    """Where a set may be written, on "local" disk or in "memory"."""
    return str(tmp_path / "set") if store == "local" else f"memory://{uuid.uuid4().hex}"


def records(count):
    return [record(number) for number in range(count)]


def write_set(url, count=10, per_shard=4):
    return shards.write_shard_set(url, records(count), CATEGORIES, {"from": "test"}, per_shard)


def contents(url):
    """Every byte of a set but for the name of the winning attempt."""
    names = [f"{s.name}.tar" for s in shards.open_shard_set(url).shards] + ["dataset.json"]
    return {name: storage.read_bytes(storage.join(url, name)) for name in names}
