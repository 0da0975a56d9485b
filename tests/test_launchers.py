"""The same pretraining under torchrun, DeepSpeed's launcher, Ray Train, and on two hosts."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from commands import (  # noqa: E402
    ROOT,
    command_line,
    descendants,
    finish,
    rank_process,
    small_training,
    start,
    wait_for,
)

from glipv2.pipeline import storage  # noqa: E402
from glipv2.pipeline.checkpoint import committed_steps  # noqa: E402
from glipv2.pipeline.runlog import read_losses  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
STEPS = 12
PATIENCE = 900.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("launchers")


@pytest.fixture(scope="module")
def recipe(folder: Path) -> Path:
    return small_training(
        folder,
        train={"steps": STEPS, "checkpoint_every": 3},
    )


@pytest.fixture(scope="module")
def expected(recipe: Path, folder: Path) -> bytes:
    """The losses of a run that nothing happened to."""
    finish("pretrain", recipe, timeout=PATIENCE)
    return (folder / "undisturbed" / "losses.jsonl").read_bytes()


def by(
    launcher: list[str], *arguments: object, environment: dict[str, object] | None = None
) -> "subprocess.Popen[str]":
    """`glipv2 pretrain` under another launcher, output collected."""
    return subprocess.Popen(
        [sys.executable, "-m", *launcher, "glipv2.jobs.cli", "pretrain", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {name: str(value) for name, value in (environment or {}).items()},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def made(run: Path) -> int:
    return len(read_losses(str(run)))


def ended(process: "subprocess.Popen[str]") -> str:
    said = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 0, said
    return said


def test_a_run_on_an_object_store_has_one_trainer_and_goes_on_by_itself(
    recipe: Path, s3_folder: str, expected: bytes
) -> None:
    run = storage.join(s3_folder, "run")
    process = start("pretrain", recipe, f"run_dir={run}")
    wait_for(process, lambda: committed_steps(run)[-1:] == [3])
    victim = rank_process(process.pid, 1)
    assert victim is not None
    os.kill(victim, signal.SIGSTOP)  # the run must not end before the second trainer has begun
    said = finish("pretrain", recipe, f"run_dir={run}", code=2)
    assert f"is in use by another process (process {process.pid} on " in said
    os.kill(victim, signal.SIGKILL)
    told = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, told
    assert "rank 1 was killed by SIGKILL; starting all ranks again from step 3" in told[1]
    assert storage.read_bytes(storage.join(run, "losses.jsonl")) == expected
    assert storage.list_names(storage.join(run, "lease")) == []


TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=2", "-m"]


def test_torchrun_starts_dead_ranks_again_and_passes_on_that_it_is_told_to_stop(
    recipe: Path, folder: Path, expected: bytes
) -> None:
    run = folder / "torchrun"
    process = by(TORCHRUN, recipe, f"run_dir={run}")
    wait_for(process, lambda: made(run) >= 4)
    victim = rank_process(process.pid, 1)
    assert victim is not None
    os.kill(victim, signal.SIGSTOP)  # the run must not end before the second trainer has begun
    assert "is in use by another process" in finish("pretrain", recipe, f"run_dir={run}", code=2)
    before = made(run)
    os.kill(victim, signal.SIGKILL)
    wait_for(process, lambda: made(run) > before)  # by itself
    process.terminate()
    process.communicate(timeout=PATIENCE)
    assert process.returncode != 0
    assert before < made(run) < STEPS
    assert committed_steps(str(run))[-1] == made(run)  # no step is lost
    ended(by(TORCHRUN, recipe, f"run_dir={run}"))
    assert (run / "losses.jsonl").read_bytes() == expected


def test_two_hosts_that_find_each_other_go_on_when_a_rank_of_one_dies(
    recipe: Path, folder: Path, expected: bytes
) -> None:
    """The agent of the killed rank counts a restart, the other one may not: it only sees that the
    first one came again."""
    run = folder / "c10d"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    agent = [
        "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--max-restarts=2",
        "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=two",
        "--local-addr=127.0.0.1", "-m",
    ]  # fmt: skip
    settings = [f"run_dir={run}", "supervise.setup_seconds=90"]
    agents = [by(agent, recipe, *settings) for _ in range(2)]
    try:
        wait_for(agents[0], lambda: made(run) >= 4)
        victims = [pid for own in agents if (pid := rank_process(own.pid, 1)) is not None]
        os.kill(victims[0], signal.SIGKILL)
        for own in agents:
            ended(own)
    finally:
        for own in agents:
            own.kill()
    assert not (run / "stacks").exists() or not list((run / "stacks").glob("*"))
    assert (run / "losses.jsonl").read_bytes() == expected


def test_ranks_whose_clocks_disagree_make_one_run(
    recipe: Path, folder: Path, expected: bytes
) -> None:
    """Rank 1 begins in another second, and thinks it is two hours ago; in mid-run rank 0 is set
    back by an hour. No name and no decision may follow from that."""
    site, run = folder / "site", folder / "clocks"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "import os, time\n"
        "real, begun = time.time, time.monotonic()\n"
        "first, later = map(float, os.environ['CLOCK_SHIFTS'].split())\n"
        "time.time = lambda: real() + (first if time.monotonic() < begun + 15 else later)\n"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank, shifts in enumerate(("0 -3600", "-7200 -7200")):
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2,
               "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "CLOCK_SHIFTS": shifts,
               "PYTHONPATH": site}  # fmt: skip
        ranks.append(by([], recipe, f"run_dir={run}", environment=own))
        time.sleep(1.2)
    for process in ranks:
        ended(process)
    assert (run / "losses.jsonl").read_bytes() == expected
    assert committed_steps(str(run)) == committed_steps(str(folder / "undisturbed"))
    there, usual = (
        {path.name for path in where.iterdir()} for where in (run, folder / "undisturbed")
    )
    assert there == usual
    assert len(list((run / "tensorboard").iterdir())) == 1


def test_deepspeeds_launcher_ends_with_a_killed_rank_and_the_same_command_goes_on(
    recipe: Path, folder: Path, expected: bytes
) -> None:
    run, hosts = folder / "deepspeed", folder / "hostfile"
    hosts.write_text("127.0.0.1 slots=2\n")
    launcher = [
        "deepspeed.launcher.runner", f"--hostfile={hosts}", "--no_ssh", "--node_rank=0",
        "--master_addr=127.0.0.1", "--no_local_rank", "--module",
    ]  # fmt: skip
    process = by(launcher, recipe, f"run_dir={run}")
    wait_for(process, lambda: made(run) >= 4)
    victim = rank_process(process.pid, 1)
    assert victim is not None
    os.kill(victim, signal.SIGKILL)
    process.communicate(timeout=PATIENCE)
    assert process.returncode != 0
    assert 3 <= committed_steps(str(run))[-1] <= made(run) < STEPS
    ended(by(launcher, recipe, f"run_dir={run}"))
    assert (run / "losses.jsonl").read_bytes() == expected


def test_ray_train_starts_dead_workers_again(recipe: Path, folder: Path, expected: bytes) -> None:
    run = folder / "ray"
    process = start("pretrain", recipe, f"run_dir={run}", "--address", "local")
    wait_for(process, lambda: made(run) >= 4)
    workers = [pid for pid in descendants(process.pid) if "RayTrainWorker" in command_line(pid)]
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, said
    assert "pretrain ray" in "".join(said)  # the bar of the first rank is shown
    assert (run / "losses.jsonl").read_bytes() == expected


def test_a_ray_job_that_is_told_to_stop_loses_no_step(
    recipe: Path, folder: Path, expected: bytes
) -> None:
    run = folder / "ray-stopped"
    process = start("pretrain", recipe, f"run_dir={run}", "--address", "local")
    wait_for(process, lambda: made(run) >= 1)
    process.terminate()
    said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 75, said
    assert committed_steps(str(run))[-1] == made(run) < STEPS
    finish("pretrain", recipe, f"run_dir={run}", timeout=PATIENCE)
    assert (run / "losses.jsonl").read_bytes() == expected


HOSTS = {"a": "10.77.41.1", "b": "10.77.41.2"}
HOST_LOOP = """
for attempt in 1 2 3 4 5 6 7 8 9 10; do
  {python} -m torch.distributed.run --nnodes=2 --node-rank={rank} --nproc-per-node=1 \
    --master-addr={first} --master-port=29611 --max-restarts=0 \
    -m glipv2.jobs.cli pretrain {recipe} run_dir={run} \
    supervise.step_seconds=10 supervise.data_seconds=10 && exit 0
  sleep 1
done
exit 1
"""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def two_hosts() -> Iterator[list[str]]:
    """Two network namespaces, joined by a cable; their names."""
    names = [f"glipv2-{host}-{os.getpid()}" for host in HOSTS]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "cable-a", "netns", names[0], "type", "veth",
           "peer", "name", "cable-b", "netns", names[1])  # fmt: skip
        for name, (host, address) in zip(names, HOSTS.items(), strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", f"cable-{host}")
            ip("-n", name, "link", "set", f"cable-{host}", "up")
            ip("-n", name, "link", "set", "lo", "up")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"network namespaces need root and iproute2: {error}")
    yield names
    for name in names:
        subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def test_a_host_that_is_cut_off_and_comes_back_costs_no_step(
    recipe: Path, folder: Path, expected: bytes, two_hosts: list[str]
) -> None:
    run = folder / "two-hosts"
    hosts = []
    for rank, (name, host) in enumerate(zip(two_hosts, HOSTS, strict=True)):
        loop = HOST_LOOP.format(
            python=sys.executable, rank=rank, first=HOSTS["a"], recipe=recipe, run=run
        )
        hosts.append(
            subprocess.Popen(
                ["ip", "netns", "exec", name, "bash", "-c", loop],
                cwd=ROOT,
                env=os.environ | {"GLOO_SOCKET_IFNAME": f"cable-{host}"},
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        )
    try:
        wait_for(hosts[0], lambda: made(run) >= 4)
        ip("-n", two_hosts[1], "link", "set", "cable-b", "down")
        wait_for(hosts[0], lambda: len(list((run / "stacks").glob("rank-*"))) > 0)
        time.sleep(5)
        ip("-n", two_hosts[1], "link", "set", "cable-b", "up")
        for host in hosts:
            ended(host)
    finally:
        for host in hosts:
            for pid in [*descendants(host.pid), host.pid]:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
    assert (run / "losses.jsonl").read_bytes() == expected


def test_the_kill_drill_finds_nothing(tmp_path: Path) -> None:
    drill = [sys.executable, "infra/kill_drill.py", "--kills", "5", "--out", str(tmp_path)]
    done = subprocess.run(drill, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 kills" in done.stdout and "differing: nothing" in done.stdout
