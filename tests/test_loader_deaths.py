"""A loader process that is killed costs its run nothing but the time."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from commands import TIMEOUT, command_line, descendants, finish, smoke_recipe, start  # noqa: E402

from glipv2.jobs.prepare import prepare_set  # noqa: E402
from glipv2.pipeline import storage  # noqa: E402
from glipv2.pipeline.config import PrepareConfig  # noqa: E402
from glipv2.pipeline.runlog import read_losses  # noqa: E402


def loader_process(launcher: int) -> int | None:
    """A process that a rank spawned to load data."""
    for pid in descendants(launcher):
        if "spawn_main" in command_line(pid):
            return pid
    return None


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_loader_processes_leave_the_losses_as_they_are_and_no_shared_memory(
    tmp_path: Path,
) -> None:
    options = PrepareConfig(source="toy", set="toy_detection", count=40, size=64, seed=1)
    prepare_set(str(tmp_path / "data" / "toy_detection"), options)
    recipe = smoke_recipe(
        tmp_path,
        run_dir=str(tmp_path / "undisturbed"),
        data={"root": str(tmp_path / "data"), "mixture": {"toy_detection": 1}, "workers": 2},
        train={"steps": 12, "checkpoint_every": 2, "processes": 1},
    )
    finish("pretrain", recipe)
    run = tmp_path / "killed"
    before = set(os.listdir("/dev/shm"))
    process = start("pretrain", recipe, f"run_dir={run}", "supervise.max_restarts=9")
    for step in (1, 4, 7):
        deadline = time.monotonic() + TIMEOUT
        while not any(entry["step"] >= step for entry in read_losses(str(run))):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        victim = loader_process(process.pid)
        assert victim is not None
        os.kill(victim, signal.SIGKILL)
    said = process.communicate(timeout=TIMEOUT)[1]
    assert process.returncode == 0, said
    restarts = storage.read_json_lines(str(run / "restarts.jsonl"))
    assert restarts  # a rank may have got all its batches before its loader died
    assert (run / "losses.jsonl").read_bytes() == (
        tmp_path / "undisturbed" / "losses.jsonl"
    ).read_bytes()
    left = {name for name in set(os.listdir("/dev/shm")) - before if name.startswith("torch_")}
    assert not left
