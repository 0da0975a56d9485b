"""One trainer per run folder: by a lock on a local disk, by a lease on an object store."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from uuid import uuid4

import pytest
from s3fs import S3FileSystem

from glipv2.pipeline import lease as module
from glipv2.pipeline import storage
from glipv2.pipeline.errors import UserError
from glipv2.pipeline.lease import Lease, only_trainer

HOLDS = """
import sys, time
from glipv2.pipeline import lease
with lease.only_trainer(sys.argv[1], expires=2.0, beats=0.3):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def folder() -> str:
    return f"memory://{uuid4().hex}/run/lease"


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every lease looks as if its holder were on another machine."""
    monkeypatch.setattr(module, "lives_here", lambda holder: None)


def short(folder: str) -> Lease:
    return Lease(folder, expires=1.0, beats=0.1)


def holder(url: str) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, url],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_the_second_on_a_local_disk_is_told_who_holds_it(tmp_path: Path) -> None:
    process = holder(str(tmp_path))
    try:
        with pytest.raises(UserError, match=rf"process {process.pid} on .* since 2\d\d\d-"):
            only_trainer(str(tmp_path)).__enter__()
    finally:
        process.kill()
        process.communicate()
    with only_trainer(str(tmp_path)):
        pass


def test_a_holder_that_lives_is_left_alone_and_named(folder: str, elsewhere: None) -> None:
    first = short(folder)
    first.take()
    with pytest.raises(UserError, match=rf"run is in use .*process {os.getpid()} on "):
        short(folder).take()
    first.release()
    second = short(folder)
    started = time.monotonic()
    second.take()
    assert time.monotonic() - started < 0.5  # what was given back need not expire
    second.release()
    assert storage.list_names(folder) == []


def test_a_dead_holders_lease_expires_whatever_the_clocks_say(
    folder: str, elsewhere: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = short(folder)
    dead.take()
    dead.ended.set()  # no more beats, and nothing given back
    dead.thread.join()
    monkeypatch.setattr(time, "time", lambda: 0.0)  # a clock decades behind
    started = time.monotonic()
    new = short(folder)
    new.take()
    assert 1.0 <= time.monotonic() - started < 3.0
    assert storage.list_names(folder)[-1] == "000002.json"
    new.release()


def test_a_dead_holder_on_this_machine_need_not_expire(folder: str) -> None:
    dead = Lease(folder, expires=60.0, beats=0.1)
    dead.me["started"] = "1"  # the process number is another process's now
    dead.take()
    dead.ended.set()
    dead.thread.join()
    new = short(folder)
    new.take()
    new.release()


def test_of_many_that_find_a_dead_holder_one_becomes_the_next(folder: str, elsewhere: None) -> None:
    dead = short(folder)
    dead.take()
    dead.ended.set()
    dead.thread.join()
    won: list[Lease] = []
    refused: list[UserError] = []

    def challenge() -> None:
        challenger = short(folder)
        try:
            challenger.take()
        except UserError as error:
            refused.append(error)
        else:
            won.append(challenger)

    threads = [threading.Thread(target=challenge) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(refused)) == (1, 5)
    won[0].release()


def test_a_holder_that_was_stopped_and_wakes_up_ends_at_once(
    s3_folder: str, s3_bare: S3FileSystem, elsewhere: None
) -> None:
    process = holder(s3_folder)
    os.kill(process.pid, signal.SIGSTOP)
    with only_trainer(s3_folder, expires=2.0, beats=0.3):
        os.kill(process.pid, signal.SIGCONT)
        said = process.communicate(timeout=20)[1]
        assert process.returncode == 2
        assert "was taken over by another trainer" in said
    assert [path for path in s3_bare.find(s3_folder) if path.endswith(".json")] == []
