"""What hangs outside a step: a save and its background thread, and a process that loads data.

Hangs in a step are in `test_kill_and_resume`.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from commands import (  # noqa: E402
    ROOT,
    TIMEOUT,
    command_line,
    descendants,
    finish,
    rank_process,
    small_training,
    start,
    wait_for,
)

from glipv2.model.folders import step_url  # noqa: E402
from glipv2.pipeline import storage  # noqa: E402
from glipv2.pipeline.checkpoint import committed_steps  # noqa: E402
from glipv2.pipeline.runlog import read_losses  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hangs")
    return small_training(
        folder,
        train={"steps": 12, "checkpoint_every": 3},
    )


@pytest.fixture(scope="module")
def expected(recipe: Path) -> bytes:
    finish("pretrain", recipe)
    return (recipe.parent / "undisturbed" / "losses.jsonl").read_bytes()


def stacks(run: Path, rank: int) -> str:
    return "\n".join(path.read_text() for path in (run / "stacks").glob(f"rank-{rank}-*.txt"))


def assert_went_on(process: "subprocess.Popen[str]", run: Path, expected: bytes) -> None:
    said = process.communicate(timeout=TIMEOUT)[1]
    assert process.returncode == 0, said
    assert "(it hung); starting all ranks again" in said
    [restart] = storage.read_json_lines(str(run / "restarts.jsonl"))
    assert restart["code"] == 70
    assert (run / "losses.jsonl").read_bytes() == expected


def test_a_rank_whose_write_hangs_beside_training_leaves_its_own_stacks(
    recipe: Path, expected: bytes
) -> None:
    """Its disk answers nothing for the second checkpoint, while its steps go on."""
    run, site = recipe.parent / "write", recipe.parent / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "import os, threading, time\n"
        "real, hung = os.fsync, os.environ['HUNG_ONCE']\n"
        "def fsync(file):\n"
        "    second = os.path.isdir(os.environ['SECOND'])\n"
        "    saves = threading.current_thread().name == 'saver'\n"
        "    if saves and second and os.environ.get('RANK') == '1' and not os.path.exists(hung):\n"
        "        open(hung, 'w').close()\n"
        "        time.sleep(600)\n"
        "    real(file)\n"
        "os.fsync = fsync\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "glipv2.jobs.cli", "pretrain", str(recipe), f"run_dir={run}",
         "supervise.save_seconds=20"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(site), "SECOND": step_url(str(run), 6),
                          "HUNG_ONCE": str(run / "hung")},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    assert_went_on(process, run, expected)
    told = stacks(run, 1)
    assert "rank 1: save takes more than supervise.save_seconds=20" in told
    assert "sitecustomize.py" in told and "in write_pieces" in told


def test_a_rank_that_stops_in_a_save(recipe: Path, expected: bytes) -> None:
    run = recipe.parent / "save"
    bounds = ("supervise.step_seconds=20", "supervise.data_seconds=40", "supervise.save_seconds=20")
    process = start("pretrain", recipe, f"run_dir={run}", *bounds)
    wait_for(process, lambda: rank_process(process.pid, 1) is not None)
    victim = rank_process(process.pid, 1)
    assert victim is not None
    wait_for(process, lambda: Path(step_url(str(run), 6)).is_dir())
    os.kill(victim, signal.SIGSTOP)
    assert 6 not in committed_steps(str(run))
    assert_went_on(process, run, expected)


def test_a_process_that_loads_data_and_stops(recipe: Path, expected: bytes) -> None:
    run = recipe.parent / "loader"
    process = start(
        "pretrain", recipe, f"run_dir={run}", "data.workers=1", "supervise.data_seconds=40"
    )
    wait_for(process, lambda: len(read_losses(str(run))) >= 2)
    rank = rank_process(process.pid, 1)
    assert rank is not None
    [loader] = [pid for pid in descendants(rank) if "spawn_main" in command_line(pid)]
    os.kill(loader, signal.SIGSTOP)
    assert_went_on(process, run, expected)
    assert "rank 1: data takes more than supervise.data_seconds=40" in stacks(run, 1)
