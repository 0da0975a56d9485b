import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
import webdataset

sys.path.insert(0, str(Path(__file__).parent))
from sample_records import CATEGORIES, jpeg, record  # noqa: E402
from sample_shards import contents, records, set_on_store, write_set  # noqa: E402

from glipv2.pipeline import shard_reader, shards, storage  # noqa: E402
from glipv2.pipeline.errors import DataError  # noqa: E402
from glipv2.pipeline.records import Region  # noqa: E402
from glipv2.pipeline.scratch import scratch_folder  # noqa: E402


@pytest.fixture(params=["local", "memory"])
def folder(request, tmp_path):
    return set_on_store(request.param, tmp_path)


def test_records_come_back_equal_and_in_order(folder):
    written = write_set(folder)
    assert [shard.samples for shard in written.shards] == [4, 4, 2]
    assert written.samples == 10
    assert shards.open_shard_set(folder) == written
    assert list(shards.iterate_records(folder)) == records(10)
    assert storage.list_names(storage.join(folder, "attempts")) == []


def test_plain_webdataset_reads_our_shards(tmp_path):
    url = str(tmp_path / "set")
    write_set(url)
    paths = [str(tmp_path / "set" / f"shard-00000{number}.tar") for number in range(3)]
    samples = list(webdataset.WebDataset(paths, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [f"key{n:04d}" for n in range(10)]
    assert samples[3]["jpg"] == jpeg(3)
    assert json.loads(samples[3]["json"])["caption"] == record(3).caption


def test_the_same_records_give_the_same_bytes_anywhere(tmp_path):
    one, two = str(tmp_path / "one"), set_on_store("memory", tmp_path)
    assert write_set(one).digest == write_set(two).digest
    assert contents(one) == contents(two)


def test_one_ranged_read_fetches_a_slice_of_a_shard(folder, monkeypatch):
    shard_set = write_set(folder, 12, 12)
    shards.read_index(shard_set, 0)
    reads = []
    real = storage.read_bytes
    monkeypatch.setattr(storage, "read_bytes", lambda *args: reads.append(args) or real(*args))
    raws = shards.read_raw(shard_set, 0, 5, 8)
    assert [raw.key for raw in raws] == ["key0005", "key0006", "key0007"]
    assert [shards.parse_record(raw) for raw in raws] == records(8)[5:]
    if storage.is_local(folder):
        assert reads == []  # one by one instead
    else:
        assert len(reads) == 1
        assert reads[0][2] - reads[0][1] < storage.size(shard_set.shard_url(0)) / 3


# ---- commits ----


def test_two_writers_racing_on_one_shard_make_one_commit_and_the_loser_cleans_up(
    folder, monkeypatch
):
    barrier = threading.Barrier(2)
    real = storage.create_once

    def create_together(url, data):
        barrier.wait(timeout=20)
        return real(url, data)

    monkeypatch.setattr(storage, "create_once", create_together)
    results, errors = [], []

    def write(first):
        try:
            results.append(shards.write_shard(folder, "shard-000000", records(8)[first:]))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(first,)) for first in (0, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert results[0] == results[1]
    assert storage.list_names(storage.join(folder, "attempts")) == []
    assert storage.list_names(storage.join(folder, "commits")) == ["shard-000000.json"]
    tar = storage.join(folder, "shard-000000.tar")
    assert storage.file_crc32c(tar) == results[0].crc32c


class Killed(BaseException):
    pass


WRITING = ("upload", "create_once", "move", "delete", "write_bytes")


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("act", range(12))
def test_a_kill_around_any_write_and_a_rerun_give_the_same_bytes(tmp_path, monkeypatch, act, when):
    write_set(str(tmp_path / "whole"), 7)
    url, done = str(tmp_path / "killed"), []

    def killing(name):
        real = getattr(storage, name)

        def call(*args):
            done.append(name)
            number = len(done) - 1
            if number == act and when == "before":
                raise Killed
            result = real(*args)
            if number == act:
                raise Killed
            return result

        return call

    with monkeypatch.context() as patch:
        for name in WRITING:
            patch.setattr(storage, name, killing(name))
        if act < 9:
            with pytest.raises(Killed):
                write_set(url, 7)
            assert not storage.exists(f"{url}/dataset.json") or done[-1] == "write_bytes"
        else:
            write_set(url, 7)
            assert done == [*WRITING[:4]] * 2 + ["write_bytes"]
    write_set(url, 7)
    assert contents(url) == contents(str(tmp_path / "whole"))
    assert storage.list_names(f"{url}/attempts") == []


def test_a_committed_shard_is_not_made_again(folder):
    first = shards.write_shard(folder, "shard-000000", records(3))

    def never():
        pytest.fail("asked for records of a committed shard")
        yield

    assert shards.write_shard(folder, "shard-000000", never()) == first
    assert shards.committed_shard(folder, "shard-000000") == first
    assert shards.committed_shard(folder, "shard-000001") is None


def test_stats_filled_while_writing_are_in_the_commit_and_the_manifest(folder):
    stats = {}

    def counted():
        for item in records(3):
            stats["seen"] = stats.get("seen", 0) + 1
            yield item

    shard = shards.write_shard(folder, "shard-000000", counted(), stats)
    assert shard.stats == {"seen": 3}
    assert shards.write_manifest(folder, [shard], CATEGORIES, {}).shards[0].stats == {"seen": 3}


def test_a_shard_may_be_empty_but_a_set_is_not_made_from_nothing(folder):
    with pytest.raises(DataError, match="no samples"):
        shards.write_shard_set(folder, [], CATEGORIES, {})
    empty = shards.write_shard(folder, "shard-000000", [])
    assert empty.samples == 0
    full = shards.write_shard(folder, "shard-000001", records(2))
    shards.write_manifest(folder, [empty, full], CATEGORIES, {})
    assert [item.key for item in shards.iterate_records(folder)] == ["key0000", "key0001"]


def test_a_folder_with_shards_of_other_records_is_not_mixed_into(folder):
    write_set(folder)
    with pytest.raises(DataError, match="committed from other records"):
        shards.write_shard_set(folder, records(9)[1:], CATEGORIES, {}, 4)


def test_a_commit_whose_files_are_gone_is_an_error_with_its_cure(folder):
    write_set(folder)
    storage.delete(storage.join(folder, "shard-000001.tar"))
    with pytest.raises(DataError, match=r"delete .*commits/shard-000001\.json and run"):
        shards.committed_shard(folder, "shard-000001")


def leave(url, *names):
    """What a killed writer leaves, by its path in the set."""
    for name in names:
        storage.write_bytes(storage.join(url, name), b"half")


def test_leftovers_of_a_set_in_the_making_are_removed_when_they_are_old(tmp_path):
    url = str(tmp_path)
    done = shards.write_shard(url, "shard-000000", records(2))
    old = (
        "attempts/shard-000001-ab.tar",
        "attempts/.attempt-a",
        ".attempt-b",
        "commits/.attempt-c",
    )
    young = ("attempts/shard-000001-cd.tar", "commits/.attempt-d")
    leave(url, *old, *young)
    for name in old:
        os.utime(tmp_path / name, (1e9, 1e9))
    assert shards.remove_attempts(url) == (len(old), len(young))
    left = {str(path.relative_to(url)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"shard-000000.tar", "commits/shard-000000.json", *young}
    shards.write_manifest(url, [done], CATEGORIES, {})
    left = {str(path.relative_to(url)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"shard-000000.tar", "commits/shard-000000.json", "dataset.json"}
    leave(url, *young)
    assert shards.remove_attempts(url) == (len(young), 0)


def cut_off_before(monkeypatch, act, url, **writing):
    """A writer of shard-000000 that is killed before its first such act."""

    def killed(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(storage, act, killed)
        with pytest.raises(Killed):
            shards.write_shard(url, "shard-000000", records(3), **writing)


def test_a_commit_that_was_cut_off_is_finished_and_not_swept_away(folder, monkeypatch):
    monkeypatch.setattr(shards, "SPARED_S", 0.0)
    cut_off_before(monkeypatch, "move", folder)
    assert shards.remove_attempts(folder) == (0, 0)
    assert storage.list_names(folder)[-1] == "shard-000000.tar"
    shard = shards.committed_shard(folder, "shard-000000")
    assert shard is not None and shard.samples == 3


def test_a_look_at_what_is_committed_touches_nothing(folder, monkeypatch):
    assert shards.committed_names(folder) == set()
    shards.write_shard(folder, "shard-000001", records(3))
    cut_off_before(monkeypatch, "move", folder)
    leave(folder, "attempts/shard-000002-ab.tar", "commits/.attempt-a")
    before = storage.tree_sizes(folder)
    assert shards.committed_names(folder) == {"shard-000000", "shard-000001"}
    [winner] = [name for name in before if name.startswith("attempts/shard-000000")]
    assert storage.tree_sizes(folder) == before
    storage.delete(storage.join(folder, winner))
    assert shards.committed_names(folder) == {"shard-000001"}
    assert storage.exists(storage.join(folder, "commits", "shard-000000.json"))


def test_a_commit_whose_attempt_was_swept_away_is_made_again(folder, monkeypatch):
    monkeypatch.setattr(shards, "SPARED_S", 0.0)
    whole = shards.write_shard(storage.join(folder, "undisturbed"), "shard-000000", records(3))
    cut_off_before(monkeypatch, "move", folder)
    [attempt] = storage.list_names(storage.join(folder, "attempts"))
    storage.delete(storage.join(folder, "attempts", attempt))
    assert shards.committed_shard(folder, "shard-000000") is None
    assert storage.list_names(storage.join(folder, "commits")) == []
    assert shards.write_shard(folder, "shard-000000", records(3)) == whole


def test_a_file_of_another_size_than_was_committed_is_not_taken_for_the_shard(folder):
    undisturbed = storage.join(folder, "undisturbed")
    whole = shards.write_shard(undisturbed, "shard-000000", records(3))
    url = shards.shard_url(folder, "shard-000000")
    content = storage.read_bytes(shards.shard_url(undisturbed, "shard-000000"))
    storage.write_bytes(url, b"of an earlier making")
    assert shards.write_shard(folder, "shard-000000", records(3)) == whole
    assert storage.read_bytes(url) == content
    storage.write_bytes(url, content[:-100])
    assert shards.committed_shard(folder, "shard-000000") is None
    assert shards.write_shard(folder, "shard-000000", records(3)) == whole
    assert storage.read_bytes(url) == content
    shards.write_manifest(folder, [whole], (), {})
    storage.write_bytes(url, content[:-100])
    with pytest.raises(DataError, match="the shard and its attempt are gone or damaged; delete"):
        shards.committed_shard(folder, "shard-000000")


@pytest.mark.parametrize("act", ["file_crc32c", "create_once"])
@pytest.mark.parametrize("rival", [False, True])
def test_a_writer_that_sleeps_while_its_attempt_is_swept_away_makes_another(
    folder, monkeypatch, act, rival
):
    """A rival commits the same shard meanwhile, or nobody does."""
    monkeypatch.setattr(shards, "SPARED_S", 0.0)
    real, slept, swept = getattr(storage, act), [], []

    def sleep_first(url, *data):
        if not slept and url.startswith(folder):
            slept.append(url)
            if rival:
                shards.write_shard(folder, "shard-000000", records(3))
            swept.append(shards.remove_attempts(folder))
        return real(url, *data)

    monkeypatch.setattr(storage, act, sleep_first)
    shard = shards.write_shard(folder, "shard-000000", records(3))
    assert swept == [(1, 0)]
    assert shards.committed_shard(folder, "shard-000000") == shard
    assert storage.file_crc32c(storage.join(folder, "shard-000000.tar")) == shard.crc32c
    assert set(storage.tree_sizes(folder)) == {"shard-000000.tar", "commits/shard-000000.json"}


def test_a_writer_that_finds_a_dead_commit_replaces_it(folder, monkeypatch):
    """A sleeper wakes after its attempt was swept away, commits, and is killed; a rival is at work
    on the same shard all the while."""
    monkeypatch.setattr(shards, "SPARED_S", 0.0)
    real, woken = storage.create_once, []

    def wake_sleeper(url, data):
        if not woken:
            woken.append(real(url, json.dumps({**json.loads(data), "attempt": "gone"}).encode()))
        return real(url, data)

    monkeypatch.setattr(storage, "create_once", wake_sleeper)
    shard = shards.write_shard(folder, "shard-000000", records(3))
    assert woken == [True]
    assert shards.committed_shard(folder, "shard-000000") == shard
    assert set(storage.tree_sizes(folder)) == {"shard-000000.tar", "commits/shard-000000.json"}


def test_a_writer_whose_every_attempt_is_taken_away_gives_up(folder, monkeypatch):
    monkeypatch.setattr(shards, "SPARED_S", 0.0)
    real = storage.create_once

    def sweep_first(url, data):
        shards.remove_attempts(folder)
        return real(url, data)

    monkeypatch.setattr(storage, "create_once", sweep_first)
    with pytest.raises(DataError, match="3 attempts to write shard-000000 were removed"):
        shards.write_shard(folder, "shard-000000", records(3))
    assert storage.tree_sizes(folder) == {}


def test_keys_that_repeat_or_could_leave_the_folder_are_refused(folder):
    with pytest.raises(DataError, match="occurs twice"):
        shards.write_shard(folder, "shard-000000", [record(1), record(1)])
    with pytest.raises(DataError, match="occurs twice"):
        write_twice = [record(1), record(2), record(1)]
        shards.write_shard_set(folder, write_twice, CATEGORIES, {}, 2)
    with pytest.raises(DataError, match="key_invalid"):
        shards.write_shard(folder, "shard-000009", [record(1, key="../../etc/passwd")])
    with pytest.raises(DataError, match="no shard name"):
        shards.write_shard(folder, "../up", records(1))


WRITER = """
import sys
from glipv2.pipeline import shards
from glipv2.pipeline.errors import BadSample
from glipv2.pipeline.quarantine import Quarantine

folder, writer = sys.argv[1:]
members = {"json": b"{}", "jpg": writer.encode()}
raws = [shards.RawSample(key=f"k{number}", members=members) for number in range(9)]
for number in range(8):
    print(shards.write_raw_shard(folder, shards.shard_name(number), raws).crc32c)
quarantine = Quarantine(f"{folder}/quarantine.jsonl")
for number in range(200):
    quarantine("source", writer, f"k{number}", BadSample("reason", writer * 400))
"""


def test_processes_that_write_the_same_shards_agree_on_one_content(tmp_path):
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(number)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(3)
    ]
    outputs = [writer.communicate(timeout=120)[0].split() for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    assert outputs[0] == outputs[1] == outputs[2]
    on_disk = [storage.file_crc32c(f"{tmp_path}/{shards.shard_name(n)}.tar") for n in range(8)]
    assert outputs[0] == on_disk
    assert storage.list_names(f"{tmp_path}/attempts") == []
    lines = (tmp_path / "quarantine.jsonl").read_text().splitlines()
    assert len([json.loads(line) for line in lines]) == 600


# ---- damage ----


def test_indexes_are_kept_up_to_so_many_samples_the_last_used_the_longest(folder, monkeypatch):
    shard_set = write_set(folder, 20, per_shard=4)
    monkeypatch.setattr(shard_reader, "INDEXED", 13)
    shard_reader._indexes.clear()
    read = []
    real = shard_reader._read_index
    monkeypatch.setattr(shard_reader, "_read_index", lambda *a: read.append(a[1][-1]) or real(*a))
    for number in (0, 1, 2, 0, 3, 0, 2, 1):  # 3 fit; 1 goes for 3
        assert len(shards.read_index(shard_set, number)) == 4
    assert "".join(read) == "01231"
    assert shard_reader._indexes.samples == 12
    monkeypatch.setattr(shard_reader, "INDEXED", 3)  # one that is larger is kept alone
    for _ in range(2):
        shards.read_index(shard_set, 4)
    assert "".join(read) == "012314" and shard_reader._indexes.samples == 4


def test_a_writer_refuses_what_a_reader_would_refuse(folder):
    outside = Region(box=(0.0, 0.0, 90.0, 5.0), spans=((0, 3),))
    with pytest.raises(DataError, match="record key0000 can't be stored: box_outside"):
        shards.write_shard(folder, "shard-000000", [record(regions=(outside,))])
    nan = Region(box=(0.0, 0.0, float("nan"), 5.0), spans=((0, 3),))
    with pytest.raises(DataError, match="json_invalid"):
        shards.write_shard(folder, "shard-000000", [record(regions=(nan,))])


def test_scratch_folders_of_the_dead_are_removed_and_those_of_the_living_stay(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = (
        "import tempfile, sys, time; tempfile.tempdir = sys.argv[1]\n"
        "from glipv2.pipeline.scratch import scratch_folder\n"
        "with scratch_folder() as folder: print(folder, flush=True); time.sleep(100)"
    )
    start = [sys.executable, "-c", code, str(tmp_path)]
    owners = [subprocess.Popen(start, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    killed, living = (Path(owner.stdout.readline().strip()) for owner in owners)
    owners[0].kill()
    owners[0].wait()
    assert killed.is_dir()
    with scratch_folder() as own:
        assert not killed.exists() and living.is_dir() and own.is_dir()
    assert not own.exists()
    owners[1].kill()
    owners[1].wait()
