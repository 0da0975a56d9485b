import os
import threading
import uuid

import pytest

from glipv2.pipeline import storage
from glipv2.pipeline.errors import ConfigError, DataError


@pytest.fixture(params=["local", "memory", "s3"])
def folder(request, tmp_path):
    if request.param == "s3":
        return request.getfixturevalue("s3_folder")
    return str(tmp_path) if request.param == "local" else f"memory://{uuid.uuid4().hex}"


def test_a_file_reads_back_whole_and_by_range(folder):
    url = storage.join(folder, "a", "b.bin")
    storage.write_bytes(url, b"0123456789")
    assert storage.read_bytes(url) == b"0123456789"
    assert storage.read_bytes(url, 2, 5) == b"234"
    assert storage.read_bytes(url, 8, 50) == b"89"
    assert storage.read_bytes(url, 10, 50) == b""
    with storage.open_read(url) as file:
        assert (file.read(3), file.read()) == (b"012", b"3456789")
    assert storage.size(url) == 10
    assert storage.exists(url)


def test_writing_again_replaces_the_whole_file(folder):
    url = storage.join(folder, "x")
    storage.write_bytes(url, b"a long first version")
    storage.write_bytes(url, b"short")
    assert storage.read_bytes(url) == b"short"
    assert storage.list_names(folder) == ["x"]


def test_a_write_that_fails_midway_leaves_the_old_file(tmp_path, monkeypatch):
    url = str(tmp_path / "x")
    storage.write_bytes(url, b"old")

    def fail(*_):
        raise OSError("disk gone")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk gone"):
        storage.write_bytes(url, b"new")
    assert storage.read_bytes(url) == b"old"
    assert storage.list_names(str(tmp_path)) == ["x"]


def test_of_many_creators_at_once_exactly_one_wins(folder):
    url = storage.join(folder, "commits", "one.json")
    barrier, won = threading.Barrier(8), []

    def create(number):
        barrier.wait()
        if storage.create_once(url, f"writer {number}".encode()):
            won.append(number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert storage.read_bytes(url) == f"writer {won[0]}".encode()


def test_upload_move_and_delete(folder, tmp_path):
    (tmp_path / "source").write_bytes(b"tar")
    attempt, final = storage.join(folder, "attempts", "a"), storage.join(folder, "final")
    storage.upload(tmp_path / "source", attempt)
    storage.move(attempt, final)
    assert not storage.exists(attempt)
    assert storage.read_bytes(final) == b"tar"
    storage.delete(final)
    storage.delete(final)
    assert not storage.exists(final)


def test_a_file_knows_its_age(folder):
    url = storage.join(folder, "x")
    storage.write_bytes(url, b"1")
    assert -1.5 < storage.age(url) < 60  # stores count whole seconds
    with pytest.raises(storage.MissingFileError):
        storage.age(storage.join(folder, "y"))


def test_a_missing_file_is_named(folder):
    url = storage.join(folder, "nowhere", "x.tar")
    with pytest.raises(DataError, match=r"nowhere/x\.tar doesn't exist"):
        storage.read_bytes(url)
    with pytest.raises(DataError, match="doesn't exist"):
        storage.size(url)
    with pytest.raises(DataError, match="doesn't exist"):
        storage.move(url, storage.join(folder, "y"))


def test_folders_list_their_names_and_sizes_and_absent_ones_are_empty(folder):
    assert storage.list_names(storage.join(folder, "absent")) == []
    assert storage.sizes(storage.join(folder, "absent")) == {}
    storage.write_bytes(storage.join(folder, "b"), b"12")
    storage.write_bytes(storage.join(folder, "a"), b"1")
    storage.write_bytes(storage.join(folder, "sub", "c"), b"1")
    assert storage.list_names(folder) == ["a", "b", "sub"]
    assert storage.sizes(folder) == {"a": 1, "b": 2}


@pytest.mark.parametrize(
    "url",
    ["pipe:touch canary", "pipe://x", "ftp://h/x", "simplecache::memory://x", "file:x", "shell:ls"],
)
def test_other_schemes_are_refused_and_run_nothing(url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for act in (storage.read_bytes, storage.exists, storage.list_names):
        with pytest.raises(ConfigError, match="not a place"):
            act(url)
    assert list(tmp_path.iterdir()) == []


def test_file_urls_and_paths_are_the_same_place(tmp_path):
    storage.write_bytes(f"file://{tmp_path}/x", b"1")
    assert storage.read_bytes(str(tmp_path / "x")) == b"1"
    assert storage.local_path(f"file://{tmp_path}/x") == str(tmp_path / "x")


def test_checksums_are_crc32c_and_pieces_add_up(folder, monkeypatch):
    assert storage.crc32c(b"123456789") == "e3069283"  # the check value of the CRC catalogue
    monkeypatch.setattr(storage, "CHUNK", 4)
    storage.write_bytes(storage.join(folder, "x"), b"123456789")
    assert storage.file_crc32c(storage.join(folder, "x")) == "e3069283"


def test_a_digest_depends_on_content_not_on_spelling():
    assert storage.digest({"a": 1, "b": [1.5]}) == storage.digest({"b": [1.5], "a": 1})
    assert storage.digest({"a": 1}) != storage.digest({"a": 2})
    with pytest.raises(ValueError, match="not JSON compliant"):
        storage.digest(float("nan"))
