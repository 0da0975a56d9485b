"""The cache of an object store's bytes: right whatever happens to it, bounded, and shared."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from glipv2.data_prep.toy import toy_categories, toy_records
from glipv2.model.tokenizer import Tokenizer, tiny_vocab
from glipv2.pipeline import storage
from glipv2.pipeline.cache import RangeCache
from glipv2.pipeline.config import DataConfig
from glipv2.pipeline.errors import ConfigError
from glipv2.pipeline.loader import build_loader
from glipv2.pipeline.shards import ShardSet, read_raw, write_shard_set

SIZE, PART = 100_000, 10_000
MANY = """
import os, random, sys
from glipv2.pipeline.cache import RangeCache
url, folder, limit, seed, rounds = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
cache, draw = RangeCache(folder, limit), random.Random(seed)
whole = open(url, "rb").read()
for _ in range(rounds):
    start = draw.randrange(len(whole) - 10_000)
    end = start + draw.randrange(1, 10_000)
    assert cache.read(url, start, end, "1") == whole[start:end]
"""


@pytest.fixture
def url(tmp_path: Path) -> str:
    data = np.random.default_rng(0).bytes(SIZE)
    (tmp_path / "shard.tar").write_bytes(data)
    return str(tmp_path / "shard.tar")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """Ranges that the store was asked for."""
    ranges: list[tuple[str, int, int]] = []
    read = storage.read_bytes

    def noted(url: str, *part: int) -> bytes:
        if part:
            start, end = part
            ranges.append((url, start, end))
        return read(url, *part)

    monkeypatch.setattr(storage, "read_bytes", noted)
    return ranges


def held(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def test_a_range_is_asked_for_once_and_anew_for_another_version(
    url: str, tmp_path: Path, asked: list[tuple[str, int, int]]
) -> None:
    cache = RangeCache(str(tmp_path / "cache"), SIZE)
    whole = Path(url).read_bytes()
    for version in ("1", "1", "2"):
        assert cache.read(url, 5, 500, version) == whole[5:500]
    assert asked == [(url, 5, 500)] * 2
    assert RangeCache(str(tmp_path / "cache"), SIZE).read(url, 5, 500, "2") == whole[5:500]
    assert len(asked) == 2  # another process finds it as well


def test_what_was_not_used_for_longest_goes_first(
    url: str, tmp_path: Path, asked: list[tuple[str, int, int]]
) -> None:
    folder = tmp_path / "cache"
    cache = RangeCache(str(folder), 5 * PART)
    parts = [(first, first + PART) for first in range(0, SIZE, PART)]
    for number, part in enumerate(parts):
        cache.read(url, *part, "1")
        assert held(folder) <= 5 * PART
        cache.read(url, *parts[0], "1")  # which stays because of it
        for moment, path in enumerate(sorted(folder.iterdir(), key=lambda p: p.stat().st_mtime_ns)):
            os.utime(path, (number + moment / 100,) * 2)  # file systems' clocks are coarse
    cache.read(url, *parts[-1], "1")
    assert asked == [(url, *part) for part in parts]
    cache.read(url, *parts[1], "1")
    assert asked[len(parts) :] == [(url, *parts[1])]


def test_on_a_full_disk_old_entries_make_room_for_new_ones(
    url: str,
    tmp_path: Path,
    asked: list[tuple[str, int, int]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={6 * PART}", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")
    try:
        cache = RangeCache(str(disk), 10**9)
        whole = Path(url).read_bytes()
        for first in [*range(0, SIZE, PART), *[SIZE - PART, SIZE - 2 * PART] * 2]:
            assert cache.read(url, first, first + PART, "1") == whole[first : first + PART]
        asked.clear()
        for first in (SIZE - PART, SIZE - 2 * PART):  # more room than that was made
            cache.read(url, first, first + PART, "1")
        assert asked == []
        assert held(disk) >= 2 * PART
        assert len(caplog.records) == 1 and "No space left" in caplog.text
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_processes_that_share_it_and_one_that_is_killed_leave_it_right_and_bounded(
    url: str, tmp_path: Path
) -> None:
    folder, limit = tmp_path / "cache", 4 * PART
    folder.mkdir()
    (folder / ".attempt-old").write_bytes(bytes(3 * limit))  # of a killed process
    start = [sys.executable, "-c", MANY, url, str(folder), str(limit)]
    killed = subprocess.Popen([*start, "0", "1000000"])
    others = [subprocess.Popen([*start, str(seed), "300"]) for seed in (1, 2)]
    while killed.poll() is None and len(list(folder.iterdir())) < 5:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert [other.wait() for other in others] == [0, 0] and killed.wait() == -signal.SIGKILL
    assert not (folder / ".attempt-old").exists()
    subprocess.run([*start, "3", "300"], check=True)
    assert 0 < held(folder) <= limit + 2 * PART


@pytest.fixture
def shard_set() -> ShardSet:
    records = toy_records("toy_detection", 24, 1, 64)
    return write_shard_set("memory://cached", records, toy_categories("toy_detection"), {}, 8)


@pytest.mark.parametrize("harm", ["altered", "cut", "folder lost"])
def test_a_harmed_cache_harms_nothing(shard_set: ShardSet, tmp_path: Path, harm: str) -> None:
    folder = tmp_path / "cache"
    cache = RangeCache(str(folder), 10**9)
    expected = read_raw(shard_set, 0, 0, 8)
    assert read_raw(shard_set, 0, 0, 8, cache) == expected
    [entry] = folder.iterdir()
    data = entry.read_bytes()
    if harm == "folder lost":
        entry.unlink()
        folder.rmdir()
    else:
        half = len(data) // 2
        entry.write_bytes(data[:half] + (b"" if harm == "cut" else b"?" + data[half + 1 :]))
    for _ in range(2):
        assert read_raw(shard_set, 0, 0, 8, cache) == expected
    if harm != "folder lost":
        assert entry.read_bytes() == data


def test_a_second_epoch_is_read_from_the_cache(
    shard_set: ShardSet, tmp_path: Path, asked: list[tuple[str, int, int]]
) -> None:
    tokenizer = Tokenizer.from_vocab(tiny_vocab(), 256)

    def keys(folder: str, batches: int) -> list[tuple[str, ...]]:
        data = DataConfig(mixture={"toy": 1.0}, short_sides=(64,), long_side=64, pad_to=(64, 64),
                          unit_samples=8, cache=folder, cache_gb=0.01)  # fmt: skip
        loader = build_loader(data, 4, {"toy": shard_set}, tokenizer)
        asked.clear()  # what was asked to know the set's task
        made = loader.batches(loader.start())
        return [tuple(next(made)[0].keys) for _ in range(batches)]

    plain = keys("", 12)  # two epochs
    assert keys(str(tmp_path / "cache"), 12) == plain
    assert len(asked) == len(set(asked)) > 0  # each unit once in two epochs
    assert keys(str(tmp_path / "cache"), 12) == plain and asked == []


def test_a_folder_that_can_not_be_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match=r"data.cache=.*shard.tar"):
        RangeCache(url, SIZE)
