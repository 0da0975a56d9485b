"""infra/cluster/pretrain.sbatch, with commands in Slurm's place that start its tasks here."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from commands import (  # noqa: E402
    ROOT,
    command_line,
    descendants,
    finish,
    small_training,
    wait_for,
)

from glipv2.pipeline.checkpoint import committed_steps  # noqa: E402
from glipv2.pipeline.runlog import read_losses  # noqa: E402

SCRIPT = ROOT / "infra" / "cluster" / "pretrain.sbatch"
JOB = 12345
TASKS = 2
SRUN = f"""#!/bin/bash
# As srun: its own options first, then a command for every task; it ends with their highest code.
while [[ $1 == --* ]]; do shift; done
for task in $(seq 0 {TASKS - 1}); do
    SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_NTASKS={TASKS} "$@" & pids+=($!)
done
highest=0
for pid in "${{pids[@]}}"; do
    wait "$pid"
    code=$?
    ((code > highest)) && highest=$code
done
exit $highest
"""
SCONTROL = """#!/bin/bash
case "$1 $2" in
    "show hostnames") printf '%s\\n' 127.0.0.1 node-2 ;;
    *) echo "$@" >> "$NOTES/scontrol" ;;
esac
"""
GLIPV2 = """#!/bin/bash
# Notes what it was given, and ends with the next of $CODES.
IFS='|' given="$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $MASTER_PORT $OMP_NUM_THREADS"
echo "$given: $*" >> "$NOTES/$RANK"
attempt=$(wc -l < "$NOTES/$RANK")
exit "$(cut -d' ' -f"$attempt" <<< "$CODES")"
"""

Slurm = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def slurm(tmp_path: Path) -> Slurm:
    """Starts the script; `own` are commands beside Slurm's."""

    def start(*words: object, own: dict[str, str], **environment: str) -> "subprocess.Popen[str]":
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        for name, text in ({"srun": SRUN, "scontrol": SCONTROL} | own).items():
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        given = {"PATH": f"{folder}:{os.environ['PATH']}", "NOTES": str(tmp_path),
                 "SLURM_JOB_ID": str(JOB), "SLURM_JOB_NODELIST": "node-[1-2]"}  # fmt: skip
        return subprocess.Popen(
            ["bash", SCRIPT, *map(str, words)], cwd=ROOT, env=os.environ | given | environment,
            text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    return start


NO_PAUSE = {"glipv2": GLIPV2, "sleep": "#!/bin/bash\n"}


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def test_every_rank_is_told_who_it_is(slurm: Slurm, tmp_path: Path) -> None:
    words = ("my recipe.yaml", "--phase", "teacher", "train.precision=bf16")
    process = slurm(*words, own=NO_PAUSE, CODES="0", OMP_NUM_THREADS="7")
    assert process.wait(60) == 0
    port = 20000 + JOB % 20000
    for rank in range(TASKS):
        assert lines(tmp_path / str(rank)) == [
            f"{rank} {rank} {TASKS} 127.0.0.1 {port} 1: pretrain|{'|'.join(words)}"
        ]


@pytest.mark.parametrize(("codes", "code", "attempts", "queued"), [
    ("2", 2, 1, False),  # a mistake that would only be made again
    ("74", 74, 1, False),  # a full disk
    ("1 70 137 0", 0, 4, False),  # an error, a hang, a kill
    ("1 1 1 1", 1, 3, False),  # RESTARTS of them are enough
    ("1 75", 0, 2, True),  # told to stop
])  # fmt: skip
def test_how_the_ranks_end_decides_what_follows(
    slurm: Slurm, tmp_path: Path, codes: str, code: int, attempts: int, queued: bool
) -> None:
    restarts = "2" if codes == "1 1 1 1" else "10"
    process = slurm("my.yaml", own=NO_PAUSE, CODES=codes, RESTARTS=restarts)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == code, said
    assert len(lines(tmp_path / "0")) == attempts
    assert said.count("starting again from the newest checkpoint") == (
        attempts if code == 1 else attempts - 1
    )
    assert lines(tmp_path / "scontrol") == ([f"requeue {JOB}"] if queued else [])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_preempted_run_is_queued_again_and_goes_on(slurm: Slurm, tmp_path: Path) -> None:
    recipe = small_training(tmp_path, train={"steps": 8, "checkpoint_every": 3})
    finish("pretrain", recipe, timeout=900)
    run = tmp_path / "slurm"
    real = {"glipv2": f'#!/bin/bash\nexec {sys.executable} -m glipv2.jobs.cli "$@"\n'}
    process = slurm(recipe, f"run_dir={run}", own=real)
    wait_for(process, lambda: len(read_losses(str(run))) >= 1)
    for pid in descendants(process.pid):  # as Slurm: all tasks, but not the batch shell
        if "glipv2.jobs.cli" in command_line(pid):
            os.kill(pid, signal.SIGTERM)
    said = process.communicate(timeout=900)[0]
    assert lines(tmp_path / "scontrol") == [f"requeue {JOB}"], said
    assert committed_steps(str(run))[-1] == len(read_losses(str(run))) < 8
    process = slurm(recipe, f"run_dir={run}", own=real)
    said = process.communicate(timeout=900)[0]
    assert process.returncode == 0, said
    assert (run / "losses.jsonl").read_bytes() == (
        tmp_path / "undisturbed" / "losses.jsonl"
    ).read_bytes()
