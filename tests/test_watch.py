"""The watch of a rank: what hangs leaves its stacks and ends. Each case is a process of its own."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from commands import TIMEOUT, smoke_recipe  # noqa: E402

from glipv2.pipeline import storage  # noqa: E402
from glipv2.pipeline.errors import DataError  # noqa: E402
from glipv2.pipeline.train_config import SuperviseConfig  # noqa: E402
from glipv2.pipeline.watch import HUNG, Watch  # noqa: E402

BEGIN = """
import sys, time
from glipv2.pipeline import watch as module
from glipv2.pipeline.watch import Watch
from glipv2.pipeline.train_config import SuperviseConfig
module.LINGER, module.BACKUP_SECONDS, module.PUBLISH_SECONDS = 0.1, 0.5, 0.5
watch = Watch(sys.argv[1], 3, SuperviseConfig(step_seconds=0.5, save_seconds=1.5))
"""


def run(script: str, url: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", BEGIN + script, str(url)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def stacks(folder: Path) -> list[str]:
    return [path.read_text() for path in (folder / "stacks").glob("rank-3-*.txt")]


def test_what_hangs_leaves_its_stacks_and_ends(tmp_path: Path) -> None:
    script = """
def waits_for_ever():
    time.sleep(60)
with watch:
    watch.begin("step")
    waits_for_ever()
"""
    started = time.monotonic()
    done = run(script, tmp_path)
    assert done.returncode == HUNG
    assert time.monotonic() - started < 10
    [text] = stacks(tmp_path)
    assert text.startswith("rank 3: step takes more than supervise.step_seconds=0.5\n")
    assert "waits_for_ever" in text and "in _look" in text
    assert str(tmp_path / "stacks" / "rank-3-") in done.stderr


def test_ranks_that_never_find_each_other_end_with_their_stacks(tmp_path: Path) -> None:
    """The second of two ranks never starts."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    recipe = smoke_recipe(tmp_path, data={"mixture": {"toy_detection": 1}})
    done = subprocess.run(
        [sys.executable, "-m", "glipv2.jobs.cli", "pretrain", str(recipe),
         f"run_dir={tmp_path}", "supervise.setup_seconds=3"],
        env=os.environ | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2",
                          "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        capture_output=True, text=True, timeout=TIMEOUT,
    )  # fmt: skip
    assert done.returncode == HUNG, done.stderr[-3000:]
    [text] = [path.read_text() for path in (tmp_path / "stacks").glob("rank-0-*.txt")]
    assert text.startswith("rank 0: setup takes more than supervise.setup_seconds=3\n")
    assert "in init_distributed" in text


def test_c_code_that_keeps_pythons_lock_is_ended_as_well(tmp_path: Path) -> None:
    script = """
import ctypes
def keeps_the_lock():
    ctypes.PyDLL(None).sleep(60)
with watch:
    watch.begin("step")
    keeps_the_lock()
"""
    done = run(script, tmp_path)
    assert done.returncode == 1
    assert "keeps_the_lock" in done.stderr


def test_what_takes_its_usual_time_is_left_alone(tmp_path: Path) -> None:
    script = """
with watch:
    for _ in range(4):
        watch.begin("step")
        time.sleep(0.3)
    watch.begin("save")
    time.sleep(0.8)
time.sleep(2)
"""
    done = run(script, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert not (tmp_path / "stacks").exists()


def test_what_another_thread_does_beside_is_bounded_as_well(tmp_path: Path) -> None:
    script = """
from threading import Thread
def writes(seconds):
    with watch.beside("save"):
        time.sleep(seconds)
with watch:
    for seconds in (0.8, 0.8, 60):  # the time of one is not that of the next
        writer = Thread(target=writes, args=(seconds,), daemon=True)
        writer.start()
        for _ in range(5 if seconds < 60 else 100):
            watch.begin("step")
            time.sleep(0.2)
"""
    done = run(script, tmp_path)
    assert done.returncode == HUNG
    [text] = stacks(tmp_path)
    assert text.startswith("rank 3: save takes more than supervise.save_seconds=1.5\n")
    assert "in writes" in text


def test_an_object_store_gets_the_stacks_too(s3_folder: str) -> None:
    script = """
module.PUBLISH_SECONDS = 20
with watch:
    watch.begin("step")
    time.sleep(60)
"""
    assert run(script, s3_folder).returncode == HUNG
    [name] = storage.list_names(storage.join(s3_folder, "stacks"))
    text = storage.read_bytes(storage.join(s3_folder, "stacks", name))
    assert text.startswith(b"rank 3: step takes") and b"most recent call first" in text


def test_stacks_are_to_be_had_at_any_time(tmp_path: Path) -> None:
    with Watch(str(tmp_path), 3, SuperviseConfig()) as watch:
        watch.begin("step")
        for count in (1, 2):
            os.kill(os.getpid(), signal.SIGUSR1)
            deadline = time.monotonic() + 10
            while len(stacks(tmp_path)) < count and time.monotonic() < deadline:
                time.sleep(0.1)
            assert len(stacks(tmp_path)) == count
    assert all("test_stacks_are_to_be_had_at_any_time" in text for text in stacks(tmp_path))
    assert all(text.startswith("rank 3: asked for by SIGUSR1") for text in stacks(tmp_path))


def test_a_crash_leaves_its_traceback_and_a_users_mistake_none(tmp_path: Path) -> None:
    for error, left in ((DataError("no such set"), 0), (KeyError("a bug"), 1)):
        with pytest.raises(type(error)), Watch(str(tmp_path), 3, SuperviseConfig()):
            raise error
        assert len(stacks(tmp_path)) == left
    assert "KeyError: 'a bug'" in stacks(tmp_path)[0]
