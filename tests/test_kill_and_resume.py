"""Kill -9 at any moment, run the same command again: nothing is lost and nothing differs."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from commands import (  # noqa: E402
    TIMEOUT,
    command_line,
    descendants,
    finish,
    kill_when,
    rank_process,
    saved_state,
    smoke_recipe,
    start,
    wait_for,
)

from glipv2.jobs.cli import main  # noqa: E402
from glipv2.jobs.prepare import prepare_set  # noqa: E402
from glipv2.model.folders import COMMIT, step_url  # noqa: E402
from glipv2.pipeline import preemption, storage  # noqa: E402
from glipv2.pipeline.checkpoint import committed_steps  # noqa: E402
from glipv2.pipeline.config import PrepareConfig  # noqa: E402
from glipv2.pipeline.launch import LAUNCHER  # noqa: E402
from glipv2.pipeline.runlog import SAMPLES, read_losses  # noqa: E402

STEPS = 12
SETS = {"toy_detection": 40, "toy_grounding": 40}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kill")
    for name, count in SETS.items():
        options = PrepareConfig(source="toy", set=name, count=count, size=64, seed=1)
        prepare_set(str(folder / "data" / name), options)
    options = PrepareConfig(source="toy", set="toy_pairs", count=24, size=64, seed=1)
    prepare_set(str(folder / "data" / "toy_pairs"), options, samples_per_shard=4)
    return folder


@pytest.fixture(scope="module")
def recipe(folder: Path) -> Path:
    written = smoke_recipe(
        folder,
        run_dir=str(folder / "undisturbed"),
        data={"root": str(folder / "data"), "mixture": {"toy_detection": 1, "toy_grounding": 1}},
        train={"steps": STEPS, "checkpoint_every": 3},
        log={"samples": True},
    )
    return written.rename(folder / "pretrain.yaml")  # other tests write recipes here as well


@pytest.fixture(scope="module")
def undisturbed(recipe: Path, folder: Path) -> Path:
    finish("pretrain", recipe)
    return folder / "undisturbed"


def step_logged(run: Path, step: int) -> Callable[[], bool]:
    return lambda: any(entry["step"] >= step for entry in read_losses(str(run)))


def checkpoint_committed(run: Path, step: int) -> Callable[[], bool]:
    return lambda: step in committed_steps(str(run))


def test_killed_stopped_and_hanging_it_ends_with_the_same_losses_and_weights_bit_for_bit(
    recipe: Path, undisturbed: Path, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = folder / "killed"
    command = ("pretrain", recipe, f"run_dir={run}")
    process = start(*command)
    wait_for(process, (run / ".lock").exists)
    assert main([str(argument) for argument in command]) == 2
    assert "in use by another process" in capfd.readouterr().err
    hit(process, 1, signal.SIGKILL, step_logged(run, 1))  # before there is a checkpoint
    wait_for(process, checkpoint_committed(run, 3))
    process.terminate()
    said = process.communicate(timeout=TIMEOUT)[1]
    assert process.returncode == preemption.EXIT_CODE, said
    assert "rank 1 was killed by SIGKILL; starting all ranks again from step 0" in said
    assert "stopped as told to; the checkpoint of the last step is committed" in said
    made = len(read_losses(str(run)))
    assert 3 <= made < STEPS - 3 and committed_steps(str(run))[-1] == made

    process = start(*command, "supervise.step_seconds=6", "supervise.data_seconds=6")
    # not in the first step, which counts as set-up, and not where a checkpoint is saved
    hit(process, 1, signal.SIGSTOP, step_logged(run, made // 3 * 3 + 3))
    said = process.communicate(timeout=TIMEOUT)[1]
    assert process.returncode == 0, said
    assert "ended with exit code 70 (it hung); starting all ranks again" in said
    killed, hung = storage.read_json_lines(str(run / "restarts.jsonl"))
    assert (killed["rank"], killed["step"]) == (1, 0) and hung["step"] >= made
    stacks = [path.name for path in (run / "stacks").iterdir()]
    assert {name[: len("rank-0")] for name in stacks} == {"rank-0", "rank-1"}
    for name in ("losses.jsonl", SAMPLES, "checkpoints/step-000012/model.safetensors"):
        assert (run / name).read_bytes() == (undisturbed / name).read_bytes(), name
    assert saved_state(run, 12) == saved_state(undisturbed, 12)


def hit(
    process: "subprocess.Popen[str]", rank: int, number: signal.Signals, when: Callable[[], bool]
) -> None:
    """Send a rank of a running pretraining a signal as soon as the condition holds.

    The rank is looked for before: on a busy machine that takes as long as many steps.
    """
    wait_for(process, lambda: rank_process(process.pid, rank) is not None)
    pid = rank_process(process.pid, rank)
    wait_for(process, when)
    assert pid is not None
    os.kill(pid, number)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_compiled_run_has_the_same_losses(recipe: Path, undisturbed: Path, folder: Path) -> None:
    run = folder / "compiled"
    settings = ["train.compile=true", "train.steps=2", f"run_dir={run}"]  # still in the warm-up
    finish("pretrain", recipe, *settings, timeout=2900)
    plain = read_losses(str(undisturbed))[:2]
    for expected, compiled in zip(plain, read_losses(str(run)), strict=True):
        assert compiled["loss"] == pytest.approx(expected["loss"], rel=1e-4)


def test_world_size_2_then_1_then_2_in_one_epoch_gives_the_same_losses(
    recipe: Path, undisturbed: Path, folder: Path
) -> None:
    run = folder / "elastic"
    command = ("pretrain", recipe, f"run_dir={run}")
    process = start(*command)
    wait_for(process, checkpoint_committed(run, 3))
    ranks = [p for p in descendants(process.pid) if "pretrain" in command_line(p)]
    assert len(ranks) >= 2
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 20
    while any(command_line(p) for p in ranks):  # none is left behind
        assert time.monotonic() < deadline
        time.sleep(0.05)
    kill_when(checkpoint_committed(run, 6), *command, "train.processes=1")
    finish(*command)
    assert (run / SAMPLES).read_bytes() == (undisturbed / SAMPLES).read_bytes()
    used = [key for step in storage.read_json_lines(str(run / SAMPLES)) for key in step["samples"]]
    assert len(used) == len(set(used)) == 4 * STEPS  # within an epoch
    expected, found = read_losses(str(undisturbed)), read_losses(str(run))
    assert [entry["step"] for entry in found] == list(range(STEPS))
    for want, got in zip(expected, found, strict=True):
        assert got == pytest.approx(want, rel=1e-6, abs=1e-7), want["step"]


@pytest.mark.slow
def test_two_resumes_that_make_no_step_leave_the_ledger_as_it_is(
    recipe: Path, undisturbed: Path, folder: Path
) -> None:
    run = folder / "resumed"
    command = ("pretrain", recipe, f"run_dir={run}")
    kill_when(checkpoint_committed(run, 3), *command)
    made = committed_steps(str(run))
    for _ in range(2):
        before = (run / SAMPLES).stat().st_ino
        kill_when(lambda before=before: (run / SAMPLES).stat().st_ino != before, *command)
        assert committed_steps(str(run)) == made  # it was cut back, and no more
    finish(*command)
    for name in ("losses.jsonl", SAMPLES):
        assert (run / name).read_bytes() == (undisturbed / name).read_bytes(), name


DIES_IN_A_SAVE = """
import glob, os, signal, time
real = os.replace
def replace(source, target, **more):
    own = os.environ.get("RANK") == "1" and os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
    if own and "step-000006/state-" in str(target):
        while not glob.glob(os.path.dirname(target) + "/state-*-00000.safetensors"):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    real(source, target, **more)
os.replace = replace
"""


@pytest.mark.slow
def test_a_rank_killed_between_the_files_of_a_save_leaves_no_step_and_nothing_of_it(
    recipe: Path, undisturbed: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, site = folder / "half_saved", folder / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(DIES_IN_A_SAVE)
    monkeypatch.setenv("PYTHONPATH", str(site))
    finish("pretrain", recipe, f"run_dir={run}")
    [restart] = storage.read_json_lines(str(run / "restarts.jsonl"))
    assert (restart["rank"], restart["code"], restart["step"]) == (1, -signal.SIGKILL, 3)
    for name in ("losses.jsonl", SAMPLES):
        assert (run / name).read_bytes() == (undisturbed / name).read_bytes(), name
    assert saved_state(run, 12) == saved_state(undisturbed, 12)
    left = {path.name for path in (run / "checkpoints/step-000006").iterdir()}
    listed = storage.read_json(str(run / "checkpoints/step-000006/COMMIT.json"))["files"]
    assert left == {"COMMIT.json", *listed}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_loader_processes_and_the_state_of_the_cache_change_nothing(
    recipe: Path, folder: Path, s3_folder: str
) -> None:
    for name, count in SETS.items():
        options = PrepareConfig(source="toy", set=name, count=count, size=64, seed=1)
        prepare_set(f"{s3_folder}/data/{name}", options)
    remote = [f"data.root={s3_folder}/data", f"data.cache={folder / 'cache'}"]
    logs = []
    for number, settings in enumerate(
        [["data.workers=0"], ["data.workers=1"], ["data.workers=2"],
         ["data.workers=1", *remote], ["data.workers=2", *remote]]
    ):  # fmt: skip
        run = folder / f"same_{number}"
        shared = [f"run_dir={run}", "train.processes=1", "train.steps=6"]
        finish("pretrain", recipe, *shared, *settings)
        logs.append([(run / name).read_bytes() for name in ("losses.jsonl", SAMPLES)])
    assert list((folder / "cache").iterdir())
    assert logs == [logs[0]] * len(logs)


@pytest.mark.slow
def test_a_full_disk_stops_the_run_at_once_and_room_lets_it_go_on(
    recipe: Path, undisturbed: Path, folder: Path
) -> None:
    disk = folder / "disk"
    disk.mkdir()
    one = sum(file.stat().st_size for file in (undisturbed / "checkpoints/step-000003").iterdir())
    mount = ["mount", "-t", "tmpfs", "-o", f"size={one * 3 // 2}", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")
    try:
        said = finish("pretrain", recipe, f"run_dir={disk}/run", code=74)
        assert "No space left on device" in said and "make room" in said
        assert committed_steps(f"{disk}/run") == [3]  # whole, though the next one failed
        assert not (disk / "run" / "restarts.jsonl").exists()
        subprocess.run(["mount", "-o", f"remount,size={one * 8}", str(disk)], check=True)
        finish("pretrain", recipe, f"run_dir={disk}/run")
        for name in ("losses.jsonl", SAMPLES):
            assert (disk / "run" / name).read_bytes() == (undisturbed / name).read_bytes()
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_rank_that_starts_after_its_launcher_died_ends_at_once() -> None:
    """Its launcher was killed while it was still loading: nobody would ever join it."""
    ended = subprocess.run(
        [sys.executable, "-c", "from glipv2.pipeline import dist; dist.die_with_parent()"],
        env=os.environ | {LAUNCHER: "1"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 1
    assert "the launcher, process 1, is gone" in ended.stderr


def test_a_finished_run_is_not_trained_again(recipe: Path, undisturbed: Path) -> None:
    before = (undisturbed / "losses.jsonl").stat().st_mtime_ns
    assert main(["pretrain", str(recipe)]) == 0
    assert (undisturbed / "losses.jsonl").stat().st_mtime_ns == before


@pytest.mark.parametrize("record", ["", '{"step": 12, "fi'])
def test_a_last_step_whose_commit_record_is_damaged_is_saved_again(
    recipe: Path, undisturbed: Path, tmp_path: Path, record: str
) -> None:
    run = Path(shutil.copytree(undisturbed, tmp_path / "run"))
    commit = Path(step_url(str(run), STEPS)) / COMMIT
    whole = commit.read_text()
    commit.write_text(record)
    said = finish("pretrain", recipe, f"run_dir={run}")
    assert "the last step counts as not saved" in said and f"{COMMIT} is damaged" in said
    files = [json.loads(text)["files"]["model.safetensors"] for text in (whole, commit.read_text())]
    assert files[0] == files[1]


def test_a_run_is_not_resumed_as_another_run(
    recipe: Path, undisturbed: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["pretrain", str(recipe), "seed=4", "train.learning_rate=0.5"]) == 2
    said = capfd.readouterr().err
    assert "seed: 3 there, 4 now" in said and "train.learning_rate" in said
    assert main(["pretrain", str(recipe), "train.steps=6"]) == 2
    assert "is at step 12 already" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_world_size_and_zero_stage_change_twice_and_sixty_losses_stay(
    recipe: Path, folder: Path
) -> None:
    """At low rates: at the toy recipe's own, rounding alone grows to 1e-3 by then, as it does in a
    plain loop that sums in another order."""
    rates = [f"train.{part}learning_rate=1e-5" for part in ("", "text_", "head_")]
    settings = ["train.steps=60", "train.checkpoint_every=5", "train.eps=1e-5", *rates]
    finish("pretrain", recipe, f"run_dir={folder / 'steady'}", *settings, "train.zero_stage=1")
    run = folder / "changing"
    command = ("pretrain", recipe, f"run_dir={run}", *settings)
    kill_when(checkpoint_committed(run, 15), *command, "train.zero_stage=1")
    kill_when(checkpoint_committed(run, 35), *command, "train.processes=1", "train.zero_stage=3")
    finish(*command, "train.zero_stage=2")
    expected, found = read_losses(str(folder / "steady")), read_losses(str(run))
    assert [entry["step"] for entry in found] == list(range(60))
    for want, got in zip(expected, found, strict=True):
        assert got["loss"] == pytest.approx(want["loss"], rel=1e-6), want["step"]
