"""Commits, files of many parts and commands on a real S3 server that fails in every way."""

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import s3_server
from commands import error_line, finish
from fault_proxy import DEAF, FAULTS, Proxy, Rule
from s3_server import watched, without_attempt
from s3fs import S3FileSystem

from glipv2.data_prep.toy import toy_categories, toy_records
from glipv2.jobs.cli import main
from glipv2.pipeline import object_store, retries, shards, storage
from glipv2.pipeline.errors import ConfigError, DataError, StoreError
from glipv2.pipeline.shards import (
    committed_shard,
    iterate_records,
    open_shard_set,
    remove_attempts,
    write_shard_set,
)

TOY = ["toy", "--set", "toy_val", "--count", "24", "--size", "64", "--seed", "3"]
RECORDS = list(toy_records("toy_val", 4, 3, 64))
MB = 2**20


def stall(monkeypatch: pytest.MonkeyPatch, proxy: Proxy) -> None:
    """Cut off after 0.3 s what the proxy holds up for longer."""
    monkeypatch.setattr(retries, "READ_TIMEOUT", 0.3)
    monkeypatch.setattr(proxy, "delay", 0.5)


@pytest.mark.usefixtures("quick")
def test_a_creation_whose_answer_was_lost_still_has_one_winner(
    s3_folder: str, s3_proxy: Proxy
) -> None:
    for number in range(3):  # the same content: only the owner tells the two apart
        url = storage.join(s3_folder, f"{number}.json")
        s3_proxy.set(Rule("lost_answer", "PUT", times=2))
        assert storage.create_once(url, b"same")
        assert s3_proxy.hits == 2
        s3_proxy.set(Rule("lost_answer", "PUT", times=2), Rule("503", "HEAD"))
        assert not storage.create_once(url, b"same")
        assert s3_proxy.hits == 3


def make_set(url: str) -> None:
    """Two small shards with all steps of their commits."""
    write_shard_set(url, RECORDS, toy_categories("toy_val"), {}, samples_per_shard=2)
    assert list(iterate_records(url)) == RECORDS
    assert committed_shard(url, "nothing") is None


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, bytes]:
    """Path -> content of the finished set, made on another kind of store."""
    make_set("memory://undisturbed")
    names = storage.tree_sizes("memory://undisturbed")
    return {name: storage.read_bytes(f"memory://undisturbed/{name}") for name in names}


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("fault", FAULTS)
def test_any_fault_at_any_request_ends_with_the_same_shards(
    fault: str,
    s3_folder: str,
    s3_proxy: Proxy,
    s3_bare: S3FileSystem,
    undisturbed: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if fault == "slow_answer":
        stall(monkeypatch, s3_proxy)
    clean = storage.join(s3_folder, "clean")
    make_set(clean)
    needed = len(s3_proxy.seen)
    broken: set[str] = set()
    for skip in range(3):  # together every request of the clean run has its turn
        url = storage.join(s3_folder, f"{skip}")
        s3_proxy.set(Rule(fault, skip=skip, every=3, times=10**6))
        with watched(s3_bare, url, undisturbed) as torn:
            make_set(url)
        assert torn == []
        names = storage.tree_sizes(url)
        assert names.keys() == undisturbed.keys()
        for name, content in undisturbed.items():
            found = storage.read_bytes(storage.join(url, name))
            assert without_attempt(name, found) == without_attempt(name, content)
        assert needed // 4 < s3_proxy.hits
        assert len(s3_proxy.seen) <= 2 * needed + 40
        broken |= {method for method, _ in s3_proxy.seen}
    assert broken == {"GET", "PUT", "HEAD", "DELETE"}


@pytest.mark.usefixtures("quick")
def test_a_move_cut_off_at_any_request_leaves_a_whole_file_and_can_be_repeated(
    s3_folder: str, s3_proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = storage.join(s3_folder, "attempt"), storage.join(s3_folder, "final")
    storage.write_bytes(source, b"whole" * 1000)
    monkeypatch.setenv(retries.PATIENCE, "0")
    for through in range(5):  # so many requests go through, then nothing is answered any more
        s3_proxy.set(Rule("lost_answer", skip=through, times=10**6))
        with pytest.raises(StoreError):
            storage.move(source, target)
        s3_proxy.set()
        found = [url for url in (source, target) if storage.exists(url)]
        assert len(found) == (1 if through < 2 else 2 if through < 4 else 1)
        assert all(storage.read_bytes(url) == b"whole" * 1000 for url in found)
    assert found == [target]
    with pytest.raises(storage.MissingFileError, match="attempt doesn't exist"):
        storage.move(source, target)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "rules",
    [
        [Rule("500", "PUT", "partNumber=2", times=2)],
        [Rule("cut_request", "PUT", "partNumber=3", times=2)],
        [Rule("lost_answer", "POST", "uploadId=", times=2)],
        [Rule("503", "PUT", "partNumber=2"), Rule("503", "DELETE", "uploadId", times=1)],
        [Rule("503", "POST", "uploads", times=2), Rule("reset", "PUT", "partNumber=1", times=2)],
    ],
    ids=["part refused", "part cut", "completion lost", "abort refused", "start refused"],
)
def test_a_file_of_many_parts_arrives_whole_and_leaves_no_parts(
    rules: list[Rule],
    s3_folder: str,
    s3_proxy: Proxy,
    s3_bare: S3FileSystem,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(object_store, "PART", 5 * MB)
    content = bytes(range(256)) * (11 * MB // 256)
    (tmp_path / "large").write_bytes(content)
    url = storage.join(s3_folder, "large")
    s3_proxy.set(*(replace(rule, hits=0, matched=0) for rule in rules))
    storage.upload(tmp_path / "large", url)
    assert all(rule.hits == rule.times for rule in s3_proxy.rules)
    assert storage.crc32c(storage.read_bytes(url)) == storage.crc32c(content)
    assert unfinished(s3_bare, url) == []
    s3_proxy.set(Rule("503", "PUT", "partNumber=2", times=10**6))
    monkeypatch.setenv(retries.PATIENCE, "0.05")
    other = storage.join(s3_folder, "never")
    with pytest.raises(StoreError, match="never can't be written: the store failed"):
        storage.write_bytes(other, content)
    assert unfinished(s3_bare, other) == []
    assert not storage.exists(other)


def unfinished(s3_bare: S3FileSystem, url: str) -> list[str]:
    """Uploads in parts to a name that were neither completed nor removed."""
    bucket, key, _ = s3_bare.split_path(url)
    found = s3_bare.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=key)
    return [upload["UploadId"] for upload in found.get("Uploads", [])]


UPLOADER = """
import sys
from glipv2.pipeline import object_store, storage

object_store.PART = 5 * 2**20
storage.upload(sys.argv[1], sys.argv[2])
"""


def test_parts_of_killed_writers_are_removed_when_they_are_old_or_the_set_is_complete(
    s3_folder: str,
    s3_proxy: Proxy,
    s3_bare: S3FileSystem,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "large").write_bytes(bytes(11 * MB))
    url, other = storage.join(s3_folder, "set"), storage.join(s3_folder, "set_2")
    attempt = storage.join(url, "attempts", "shard-000000-ab.tar")
    s3_proxy.set(Rule("503", "PUT", "partNumber=3", times=10**6))
    writer = subprocess.Popen([sys.executable, "-c", UPLOADER, str(tmp_path / "large"), attempt])
    deadline = time.monotonic() + 60
    while not s3_proxy.hits:
        assert writer.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    writer.kill()
    writer.wait()
    s3_proxy.set()

    def begin(name: str) -> None:
        bucket, key, _ = s3_bare.split_path(name)
        s3_bare.call_s3("create_multipart_upload", Bucket=bucket, Key=key)

    begin(storage.join(other, "attempts", "x.tar"))
    begin(storage.join(url, "nested", "x.tar"))
    kept = len(unfinished(s3_bare, f"{other}/")), len(unfinished(s3_bare, f"{url}/nested/"))
    assert len(unfinished(s3_bare, attempt)) == 1 and kept == (1, 1)
    assert remove_attempts(url) == (0, 1)
    assert len(unfinished(s3_bare, attempt)) == 1
    s3_proxy.set(Rule("503", "GET", "uploads"), Rule("503", "DELETE", "uploadId"))
    with monkeypatch.context() as patch:
        patch.setattr(shards, "SPARED_S", 0.0)
        assert remove_attempts(url) == (1, 0)
    assert s3_proxy.hits == 2
    assert unfinished(s3_bare, attempt) == []
    begin(attempt)
    begin(storage.join(url, "shard-000000.tar"))
    make_set(url)
    assert unfinished(s3_bare, f"{url}/attempts") == unfinished(s3_bare, f"{url}/shard") == []
    assert (
        len(unfinished(s3_bare, f"{other}/")),
        len(unfinished(s3_bare, f"{url}/nested/")),
    ) == kept


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("answer", ["403", "501"])
def test_a_store_that_lists_no_uploads_takes_shard_sets_all_the_same(
    answer: str, s3_folder: str, s3_proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    s3_proxy.set(Rule(answer, "GET", "uploads", times=10**6))
    make_set(storage.join(s3_folder, "set"))
    assert s3_proxy.hits > 0
    assert "set/attempts: parts of uploads that were cut off can't go: " in caplog.text


@pytest.mark.usefixtures("quick")
def test_a_store_that_takes_no_bytes_is_given_up(
    s3_folder: str, s3_proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_store, "upload_limit", lambda size: 4.0)
    monkeypatch.setattr(s3_proxy, "delay", 2.0)
    content = bytes(16 * MB)  # more than the buffers of a connection hold
    s3_proxy.set(Rule(DEAF, "PUT"))
    url = storage.join(s3_folder, "x")
    storage.write_bytes(url, content)
    assert s3_proxy.hits == 1
    assert storage.read_bytes(url) == content


@pytest.mark.usefixtures("quick")
def test_tries_have_growing_pauses_a_warning_each_and_an_end(
    s3_folder: str, s3_proxy: Proxy, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    pauses: list[float] = []
    clock = SimpleNamespace(sleep=pauses.append, monotonic=lambda: 1 + sum(pauses))
    monkeypatch.setattr(retries, "time", clock)
    monkeypatch.setattr(retries, "FIRST_PAUSE", 0.5)
    s3_proxy.set(Rule("503", times=10**6))
    with pytest.raises(
        StoreError, match=r"can't be read: the store failed \d+ times within"
    ) as end:
        storage.read_bytes(storage.join(s3_folder, "x"))
    assert "503" in str(end.value) and "GLIPV2_STORE_PATIENCE" in str(end.value)
    for number, pause in enumerate(pauses):
        assert 0.5 <= pause / min(0.5 * 2**number, 30) <= 1
    assert 240 < sum(pauses) <= 300
    assert len(s3_proxy.seen) == len(pauses) + 1 == len(caplog.records) + 1
    assert "try 2 follows in" in caplog.text


@pytest.mark.usefixtures("quick")
def test_what_the_store_refuses_is_not_tried_again(
    s3_folder: str, s3_proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = storage.join(s3_folder, "x")
    storage.write_bytes(url, b"1")
    s3_proxy.set()
    assert not storage.create_once(url, b"2")
    assert [method for method, _ in s3_proxy.seen].count("PUT") == 1
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    S3FileSystem.clear_instance_cache()
    s3_proxy.set()
    with pytest.raises(DataError, match="x: permission denied"):
        storage.write_bytes(url, b"3")
    assert len(s3_proxy.seen) == 1
    S3FileSystem.clear_instance_cache()


def test_patience_must_be_a_number(s3_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(retries.PATIENCE, "five minutes")
    with pytest.raises(ConfigError, match="GLIPV2_STORE_PATIENCE must be a number"):
        storage.exists(storage.join(s3_folder, "x"))


def test_a_store_that_is_down_ends_a_command_that_then_goes_on(
    s3_folder: str, s3_proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = storage.join(s3_folder, "toy")
    monkeypatch.setenv(retries.PATIENCE, "2")
    s3_proxy.set(Rule("503", "PUT", "attempts", times=10**6))
    said = finish("prepare", *TOY, "--out", url, code=3)
    monkeypatch.delenv(retries.PATIENCE)  # a busy server may need longer for what is to succeed
    told = error_line(said, "prepare")
    assert told.startswith(f"glipv2 prepare: {url}/attempts/") and "503" in told
    assert "the same command goes on from here" in told
    assert s3_server.SECRET_KEY not in said
    assert 3 <= len([m for m, path in s3_proxy.seen if m == "PUT" and "attempts" in path]) <= 30
    assert set(storage.tree_sizes(url)) == {"prepare.json"}
    s3_proxy.set()
    assert main(["prepare", *TOY, "--out", url]) == 0
    assert open_shard_set(url).samples == 24
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another-secret")
    said = finish("view", url, "--out", storage.join(s3_folder, "page.html"), code=2)
    assert "permission denied" in error_line(said, "view")
    assert "another-secret" not in said
