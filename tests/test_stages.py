"""What the stages share: their time over all attempts, a run's settings, a full disk, a bad log."""

import argparse
import importlib.metadata
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))
from commands import start, wait_for

from glipv2.jobs import doctor, stages
from glipv2.jobs.cli import main
from glipv2.jobs.stages import stage, stage_seconds
from glipv2.pipeline import ray_cluster
from glipv2.pipeline.config_loader import load_config
from glipv2.pipeline.errors import DataError
from glipv2.pipeline.run_settings import note_settings
from glipv2.pipeline.runlog import StepLog, read_losses

RECIPE = "infra/recipes/quickstart.yaml"
HANGS = """
import sys, time
from glipv2.jobs import stages
stages.TICK = 0.05
with stages.stage(sys.argv[1], "label"):
    time.sleep(60)
"""


def seconds(folder: Path) -> dict[str, float]:
    return stage_seconds(str(folder), ["prepare", "label"])


def test_a_submitted_job_joins_its_own_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several clusters on its machine; Ray tells the job which one it is of."""
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    stages.use_cluster("auto")
    assert os.environ["RAY_ADDRESS"] == "10.0.0.1:6379"
    stages.use_cluster("head:6379")
    assert os.environ["RAY_ADDRESS"] == "head:6379"
    monkeypatch.setenv("RAY_ADDRESS", "")
    stages.use_cluster("auto")
    assert os.environ["RAY_ADDRESS"] == "auto"


def test_a_dashboards_address_is_told_from_a_clusters() -> None:
    with pytest.raises(OSError, match="that is a dashboard, for `glipv2 submit`"):
        ray_cluster._reach("http://127.0.0.1:8265")


def test_the_time_of_a_stage_is_that_of_all_its_attempts(tmp_path: Path) -> None:
    killed = subprocess.Popen([sys.executable, "-c", HANGS, str(tmp_path)])
    while seconds(tmp_path).get("label", 0.0) < 0.3:
        assert killed.poll() is None
        time.sleep(0.02)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    before = seconds(tmp_path)["label"]
    with pytest.raises(DataError), stage(str(tmp_path), "label"):
        time.sleep(0.3)
        raise DataError("stopped")
    with stage(str(tmp_path), "label"):
        time.sleep(0.3)
    whole = seconds(tmp_path)["label"]
    assert before + 0.5 <= whole < before + 3
    with stage(str(tmp_path), "label"):  # done: what comes now is reuse
        time.sleep(0.3)
    assert seconds(tmp_path) == {"label": whole}


def test_a_running_stage_notes_its_time_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "TICK", 0.02)
    with stage(str(tmp_path), "prepare"):
        while not seconds(tmp_path):
            time.sleep(0.01)
    assert list(seconds(tmp_path)) == ["prepare"]


def test_the_settings_of_a_run_are_written_once(tmp_path: Path) -> None:
    config = load_config(RECIPE, [f"run_dir={tmp_path}"], "student")
    resolved = Path(note_settings(config))
    assert resolved == tmp_path / "student" / "config.yaml"
    assert yaml.safe_load(resolved.read_text())["train"]["steps"] == config.train.steps
    before = resolved.stat().st_ino
    note_settings(load_config(str(resolved), []))  # as a rank reads them
    assert resolved.stat().st_ino == before
    note_settings(load_config(str(resolved), ["train.steps=9999"]))
    assert yaml.safe_load(resolved.read_text())["train"]["steps"] == 9999


def test_a_full_disk_is_said_with_an_exit_code_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fills_the_disk(arguments: argparse.Namespace) -> int:
        return Path("/dev/full").write_bytes(b"x")

    monkeypatch.setattr(doctor, "run", fills_the_disk)
    assert main(["doctor"]) == 74
    said = capsys.readouterr().err
    assert "No space left on device" in said
    assert "make room" in said


def test_other_failures_of_the_system_are_not_taken_for_a_full_disk(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(doctor, "run", lambda arguments: Path("/proc/self/mem").read_bytes())
    with pytest.raises(OSError, match="Input/output error"):
        main(["doctor"])


def test_a_command_that_is_told_to_stop_says_that_it_can_go_on(tmp_path: Path) -> None:
    command = ["prepare", "toy", "--set", "toy_val", "--count", "50000", "--workers", "0"]
    process = start(*command, "--out", tmp_path / "set")
    wait_for(process, (tmp_path / "set").exists)
    process.terminate()
    _, told = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "told to stop; the same command goes on from here" in told and "Traceback" not in told


def test_nothing_of_it_stays_with_who_calls_a_command() -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert main(["doctor"]) in (0, 1)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    "words", [["label", "--help"], ["submit", "evaluate", RECIPE, "run_dir=s3://b/r", "--dry-run"]]
)
def test_who_stops_reading_ends_a_command_quietly(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # then what breaks is the last flush
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "glipv2.jobs.cli", *words],
        stdout=write, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_connection_that_breaks_is_not_taken_for_a_reader_that_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(_: argparse.Namespace) -> int:
        raise BrokenPipeError

    monkeypatch.setattr(doctor, "run", broken)
    with pytest.raises(BrokenPipeError):
        main(["doctor"])


@pytest.mark.parametrize("damaged", [b'{"step": 1, "lo', b"\xff\xfe", b"7", b""])
def test_a_damaged_line_in_the_middle_of_the_losses_is_named(
    tmp_path: Path, damaged: bytes
) -> None:
    log = StepLog(str(tmp_path), 0)
    for step in range(3):
        log.append(step, {"loss": 1.0})
    path = tmp_path / "losses.jsonl"
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], damaged, *lines[2:]]))
    with pytest.raises(DataError, match=r"losses\.jsonl, line 2 .*delete that line"):
        read_losses(str(tmp_path))
    path.write_bytes(b"\n".join([lines[0], *lines[2:]]))  # the cure
    assert [entry["step"] for entry in read_losses(str(tmp_path))] == [0, 2]


def test_doctor_looks_at_every_package_that_is_required() -> None:
    required = importlib.metadata.requires("glipv2") or []
    names = {re.split(r"[\[=<>~ ;]", line)[0] for line in required if "extra ==" not in line}
    assert names == set(doctor.PACKAGES)
