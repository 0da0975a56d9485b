"""A shard set that was cut, altered or mixed up since it was written: who notices, what is told."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from sample_shards import records, set_on_store, write_set  # noqa: E402

from glipv2.pipeline import shard_reader, shards, storage  # noqa: E402
from glipv2.pipeline.errors import BadSample, DataError  # noqa: E402


@pytest.fixture(params=["local", "memory"])
def folder(request, tmp_path):
    return set_on_store(request.param, tmp_path)


def test_a_truncated_shard_is_an_error_with_file_and_sizes_before_any_sample(folder):
    shard_set = write_set(folder)
    url = storage.join(folder, "shard-000001.tar")
    whole = storage.read_bytes(url)
    storage.write_bytes(url, whole[:-5000])
    message = rf"shard-000001\.tar holds {len(whole) - 5000} bytes instead of {len(whole)}"
    with pytest.raises(DataError, match=message):
        shards.check_shard_sizes(shard_set)
    with pytest.raises(DataError, match=message):
        shards.read_raw(shard_set, 1, 0, 1)


def test_a_shard_truncated_while_it_is_being_read_is_an_error(folder):
    shard_set = write_set(folder)
    shards.read_raw(shard_set, 0, 0, 4)
    url = storage.join(folder, "shard-000000.tar")
    storage.write_bytes(url, storage.read_bytes(url)[:3000])
    with pytest.raises(DataError, match=r"shard-000000\.tar holds 3000 bytes instead of"):
        shards.read_raw(shard_set, 0, 0, 4)


def test_a_missing_shard_is_named(folder):
    shard_set = write_set(folder)
    storage.delete(storage.join(folder, "shard-000002.tar"))
    with pytest.raises(DataError, match=r"shard-000002\.tar is missing"):
        shards.check_shard_sizes(shard_set)


@pytest.mark.parametrize("where", [0, 600, 1100, 2000])
def test_an_altered_byte_condemns_its_own_sample_only(folder, where):
    shard_set = write_set(folder)
    entry = shards.read_index(shard_set, 0)[1]
    url = storage.join(folder, "shard-000000.tar")
    data = bytearray(storage.read_bytes(url))
    data[entry.offset + where] ^= 1
    storage.write_bytes(url, bytes(data))
    raws = shards.read_raw(shard_set, 0, 0, 4)
    assert [raw.error and raw.error.reason for raw in raws] == [None, "crc_mismatch", None, None]
    with pytest.raises(BadSample, match="crc_mismatch"):
        shards.parse_record(raws[1])


def test_bad_samples_are_reported_and_the_others_still_come(folder):
    shard_set = write_set(folder)
    entry = shards.read_index(shard_set, 1)[2]
    url = storage.join(folder, "shard-000001.tar")
    data = bytearray(storage.read_bytes(url))
    data[entry.offset + 700] ^= 1
    storage.write_bytes(url, bytes(data))
    bad = []
    keys = [r.key for r in shards.iterate_records(folder, lambda *args: bad.append(args))]
    assert keys == [f"key{n:04d}" for n in range(10) if n != 6]
    assert [(name, key, why.reason) for name, key, why in bad] == [
        ("shard-000001", "key0006", "crc_mismatch")
    ]
    with pytest.raises(DataError, match="key0006: crc_mismatch"):
        list(shards.iterate_records(folder))


def test_an_edited_manifest_is_refused(folder):
    write_set(folder)
    url = storage.join(folder, "dataset.json")
    storage.write_bytes(url, storage.read_bytes(url).replace(b"red square", b"red sphere"))
    with pytest.raises(DataError, match="altered after it was written"):
        shards.open_shard_set(folder)


@pytest.mark.parametrize("content", [b"<html>404</html>", b"[]", b"{}", b'{"schema": 99}', b"\xff"])
def test_a_file_that_is_no_manifest_is_refused(folder, content):
    storage.write_bytes(storage.join(folder, "dataset.json"), content)
    with pytest.raises(DataError, match=r"dataset\.json is no shard set manifest"):
        shards.open_shard_set(folder)


def test_an_incomplete_set_names_the_command_that_completes_it(folder):
    shards.write_shard(folder, "shard-000000", records(2))
    with pytest.raises(DataError, match="no complete shard set; make it with `glipv2 prepare`"):
        shards.open_shard_set(folder)


def test_another_commit_record_than_the_manifest_knows_is_refused(folder):
    shard_set = write_set(folder)
    url = storage.join(folder, "commits", "shard-000000.json")
    storage.write_bytes(url, storage.read_bytes(url).replace(b"key0001", b"key9999"))
    shard_reader._indexes.clear()
    with pytest.raises(DataError, match="not the commit record"):
        shards.read_index(shard_set, 0)
