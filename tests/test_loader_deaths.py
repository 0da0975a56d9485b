"""A loader process that is killed costs its run nothing but the time."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from commands import ROOT, TIMEOUT, command_line, descendants, finish, smoke_recipe  # noqa: E402

from glipv2.jobs.prepare import prepare_set  # noqa: E402
from glipv2.pipeline import storage  # noqa: E402
from glipv2.pipeline.config import PrepareConfig  # noqa: E402
from glipv2.pipeline.runlog import LOSSES, SAMPLES, read_losses  # noqa: E402

KILLS = 20
GLIPV2 = (sys.executable, "-m", "glipv2.jobs.cli")


def loader_process(launcher: int, besides: set[int]) -> int | None:
    """A process that a rank spawned to load data."""
    for pid in descendants(launcher):
        if pid not in besides and "spawn_main" in command_line(pid):
            return pid
    return None


def kill_loaders(process: "subprocess.Popen[bytes]", run: Path) -> None:
    """One after every second step."""
    killed: set[int] = set()
    for step in range(1, 2 * KILLS, 2):
        deadline = time.monotonic() + TIMEOUT
        victim = None
        while victim is None:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
            if any(entry["step"] >= step for entry in read_losses(str(run))):
                victim = loader_process(process.pid, killed)
        os.kill(victim, signal.SIGKILL)
        killed.add(victim)


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_twenty_killed_loader_processes_change_no_loss_and_no_sample_and_leave_no_shared_memory(
    tmp_path: Path,
) -> None:
    options = PrepareConfig(source="toy", set="toy_detection", count=40, size=64, seed=1)
    prepare_set(str(tmp_path / "data" / "toy_detection"), options)
    recipe = smoke_recipe(
        tmp_path,
        run_dir=str(tmp_path / "undisturbed"),
        data={"root": str(tmp_path / "data"), "mixture": {"toy_detection": 1}, "workers": 2},
        train={"steps": 2 * KILLS + 4, "checkpoint_every": 2, "processes": 1},
        log={"samples": True},
    )
    finish("pretrain", recipe)
    run = tmp_path / "killed"
    before = set(os.listdir("/dev/shm"))
    said = tmp_path / "said.txt"  # a pipe that nobody reads would be full after some restarts
    with said.open("w") as file:
        process = subprocess.Popen(
            [*GLIPV2, "pretrain", str(recipe), f"run_dir={run}", "supervise.max_restarts=9"],
            cwd=ROOT,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    try:
        kill_loaders(process, run)
        assert process.wait(TIMEOUT) == 0, said.read_text()
    finally:
        process.kill()
    restarts = storage.read_json_lines(str(run / "restarts.jsonl"))
    assert restarts  # a rank may have got all its batches before its loader died
    for name in (LOSSES, SAMPLES):
        assert (run / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes(), name
    left = {name for name in set(os.listdir("/dev/shm")) - before if name.startswith("torch_")}
    assert not left
