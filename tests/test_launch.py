"""The launcher: what it does when ranks die, hang or are told to stop. Ranks are small scripts."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from commands import SMOKE, command_line  # noqa: E402

from glipv2.pipeline import storage  # noqa: E402
from glipv2.pipeline.checkpoint import write_folder  # noqa: E402
from glipv2.pipeline.config import RunConfig  # noqa: E402
from glipv2.pipeline.config_loader import load_config  # noqa: E402
from glipv2.pipeline.errors import (  # noqa: E402
    ConfigError,
    PreemptedError,
    RankFailedError,
    UserError,
)
from glipv2.pipeline.launch import RESTARTS, launch_ranks  # noqa: E402
from glipv2.pipeline.train_config import SuperviseConfig, TrainConfig  # noqa: E402

BEGIN = """
import os, signal, sys, time
from pathlib import Path
rank, attempt = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
folder = Path(sys.argv[1])
(folder / f"{attempt}-{rank}").write_text(str(os.getpid()))
"""


def launch(folder: Path, script: str, processes: int = 2, **supervise: Any) -> None:
    config = RunConfig(
        run_dir=str(folder / "run"),
        train=TrainConfig(processes=processes, global_batch=processes),
        supervise=SuperviseConfig(**supervise),
    )
    launch_ranks([sys.executable, "-c", BEGIN + script, str(folder)], config)


def attempts(folder: Path) -> int:
    return len(list(folder.glob("*-0")))


def living(folder: Path) -> list[int]:
    pids = [int(path.read_text()) for path in folder.glob("*-*")]
    return [pid for pid in pids if command_line(pid)]


def told_when(folder: Path, *numbers: signal.Signals) -> None:
    """Send this process signals once both ranks are ready for them, half a second apart."""

    def send() -> None:
        while len(list(folder.glob("ready.*"))) < 2:
            time.sleep(0.02)
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(0.5)

    threading.Thread(target=send, daemon=True).start()


def test_a_dead_rank_is_told_and_all_are_started_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    script = """
if attempt == 0 and rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
if attempt == 0:
    time.sleep(60)
"""
    started = time.monotonic()
    launch(tmp_path, script)
    assert time.monotonic() - started < 20
    assert attempts(tmp_path) == 2
    assert "rank 1 was killed by SIGKILL; starting all ranks again from step 0" in caplog.text
    [entry] = storage.read_json_lines(str(tmp_path / "run" / RESTARTS))
    assert (entry["rank"], entry["code"], entry["step"]) == (1, -9, 0)
    assert not living(tmp_path)


def test_a_crash_loop_ends_and_says_where_to_look(tmp_path: Path) -> None:
    with pytest.raises(RankFailedError) as raised:
        launch(tmp_path, "sys.exit(9 if rank else 71)", max_restarts=2)
    assert attempts(tmp_path) == 3
    said = str(raised.value)  # 71: rank 0 only lost rank 1
    assert "rank 1 ended with exit code 9, for the third time since the checkpoint of" in said
    assert str(tmp_path / "run" / RESTARTS) in said


def test_progress_forgives_earlier_deaths(tmp_path: Path) -> None:
    script = """
sys.path.insert(0, "")
from glipv2.pipeline.checkpoint import write_folder  # noqa: E402
if attempt < 4:
    if attempt % 2:
        write_folder(str(folder / "run" / "checkpoints" / f"step-{attempt:06d}"), {}, attempt)
    sys.exit(9)
"""
    launch(tmp_path, script, processes=1, max_restarts=2)
    entries = storage.read_json_lines(str(tmp_path / "run" / RESTARTS))
    assert [entry["step"] for entry in entries] == [0, 1, 1, 3]


@pytest.mark.parametrize("code", [2, 3])
def test_what_would_only_happen_again_is_not_tried_again(tmp_path: Path, code: int) -> None:
    with pytest.raises(UserError if code == 2 else RankFailedError, match="is printed above"):
        launch(tmp_path, f"time.sleep(rank * 0.5); sys.exit({code} if rank else 1)")
    assert attempts(tmp_path) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_stop_it_tells_the_ranks_and_waits(tmp_path: Path, number: signal.Signals) -> None:
    script = """
signal.signal(signal.SIGTERM, lambda *_: (time.sleep(rank), sys.exit(75)))
(folder / f"ready.{rank}").touch()
time.sleep(60)
"""
    told_when(tmp_path, number)
    with pytest.raises(PreemptedError):
        launch(tmp_path, script)
    assert attempts(tmp_path) == 1


def test_ranks_that_do_not_save_in_time_are_killed(tmp_path: Path) -> None:
    script = """
signal.signal(signal.SIGTERM, signal.SIG_IGN if rank else lambda *_: sys.exit(75))
(folder / f"ready.{rank}").touch()
time.sleep(60)
"""
    told_when(tmp_path, signal.SIGTERM)
    started = time.monotonic()
    with pytest.raises(RankFailedError, match="SIGTERM before all ranks had saved"):
        launch(tmp_path, script, grace_seconds=1)
    assert time.monotonic() - started < 10
    assert not living(tmp_path)


def test_the_second_ctrl_c_does_not_wait(tmp_path: Path) -> None:
    script = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
(folder / f"ready.{rank}").touch()
time.sleep(60)
"""
    told_when(tmp_path, signal.SIGINT, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        launch(tmp_path, script)
    assert not living(tmp_path)


def test_when_one_rank_hangs_the_others_leave_their_stacks(tmp_path: Path) -> None:
    script = """
signal.signal(signal.SIGUSR1, lambda *_: (folder / "stacks").touch())
(folder / f"ready.{rank}").touch()
if attempt == 0 and rank == 1:
    os.kill(os.getpid(), signal.SIGSTOP)
while not (folder / "ready.1").exists():
    time.sleep(0.02)
if attempt == 0 and rank == 0:
    time.sleep(1)
    sys.exit(70)
if attempt == 0:
    time.sleep(60)
"""
    launch(tmp_path, script)
    assert (tmp_path / "stacks").exists()  # of the stopped one


def test_a_single_rank_that_was_stopped_is_continued(tmp_path: Path) -> None:
    started = time.monotonic()
    launch(tmp_path, "os.kill(os.getpid(), signal.SIGSTOP)", processes=1, step_seconds=0.1)
    assert time.monotonic() - started < 10


def test_what_ranks_say_is_told_apart(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    launch(tmp_path, "print('one'); print('two', file=sys.stderr)")
    captured = capfd.readouterr()
    assert (captured.out, "one" in captured.err.replace("[rank 1] one", "")) == ("one\n", False)
    assert sorted(captured.err.splitlines()) == ["[rank 1] one", "[rank 1] two", "two"]


def test_the_helpers_of_a_killed_rank_end_with_it(tmp_path: Path) -> None:
    script = """
import subprocess
if rank == 1 and attempt == 0:
    helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    (folder / "9-helper").write_text(str(helper.pid))
    os.kill(os.getpid(), signal.SIGKILL)
"""
    launch(tmp_path, script)
    assert not living(tmp_path)


def test_a_finished_checkpoint_of_the_last_step_counts_as_progress(tmp_path: Path) -> None:
    write_folder(str(tmp_path / "run" / "checkpoints" / "step-000004"), {}, 4)
    with pytest.raises(RankFailedError, match="the checkpoint of step 4"):
        launch(tmp_path, "sys.exit(9)", processes=1, max_restarts=0)


def test_signals_have_their_old_meaning_afterwards(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    launch(tmp_path, "")
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("supervise.max_restarts=-1", r"supervise\.max_restarts must be 0 or more"),
        ("supervise.step_seconds=0", r"supervise\.step_seconds must be positive and at most 7200"),
        ("supervise.save_seconds=9000", r"supervise\.save_seconds must be positive and at most"),
        ("supervise.straggler_ratio=1", r"supervise\.straggler_ratio must be above 1"),
        ("supervise.min_processes=3", r"supervise\.min_processes must be at most train\.processes"),
    ],
)
def test_a_wrong_setting_is_refused_by_its_name(override: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        load_config(str(SMOKE), [override])


def test_the_command_line_names_the_exit_code(tmp_path: Path) -> None:
    script = """
import glipv2.jobs.doctor as doctor
from glipv2.jobs.cli import main  # noqa: E402
from glipv2.pipeline.errors import PreemptedError  # noqa: E402
def run(arguments):
    raise PreemptedError("saved")
doctor.run = run
sys.exit(main(["doctor"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", "import sys\n" + script], capture_output=True, text=True
    )
    assert done.returncode == 75
    assert done.stderr == "glipv2 doctor: saved\n"
