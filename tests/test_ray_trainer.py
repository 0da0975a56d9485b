"""Pretraining on a Ray cluster that loses nodes: with how many ranks it goes on, and from where.

The slow ones run Ray's own processes for two nodes on this machine.
"""

import errno
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))
from commands import (  # noqa: E402
    ROOT,
    command_line,
    descendants,
    finish,
    small_training,
    start,
    wait_for,
)

from glipv2.jobs.cli import CAN_BE_RUN_AGAIN, main  # noqa: E402
from glipv2.jobs.pretrain import check_ranks  # noqa: E402
from glipv2.model.folders import step_url  # noqa: E402
from glipv2.pipeline import ray_trainer, trainer  # noqa: E402
from glipv2.pipeline.checkpoint import committed_steps, write_folder  # noqa: E402
from glipv2.pipeline.config import DataConfig, RunConfig  # noqa: E402
from glipv2.pipeline.errors import DISK_FULL, ConfigError, DataError  # noqa: E402
from glipv2.pipeline.ray_trainer import scaling_policy, world_sizes  # noqa: E402
from glipv2.pipeline.runlog import read_losses  # noqa: E402
from glipv2.pipeline.train_config import SuperviseConfig, TrainConfig  # noqa: E402

Train = Callable[[Callable[[RunConfig], None]], int]


def config(processes: int, least: int, lanes: int = 0, **train: Any) -> RunConfig:
    return RunConfig(
        run_dir="run",
        data=DataConfig(mixture={"gold": 1}, lanes=lanes or None),
        train=TrainConfig(processes=processes, precision="fp32", **train),
        supervise=SuperviseConfig(min_processes=least),
    )


@pytest.mark.parametrize(
    ("run", "sizes"),
    [
        (config(32, 16), [32, 16]),
        (config(32, 1), [32, 16, 8, 4, 2, 1]),
        (config(32, 0), [32]),
        (config(16, 3, accumulation=4), [16, 8, 4]),
        (config(12, 2, global_batch=48, lanes=24), [12, 8, 6, 4, 3, 2]),
    ],
)
def test_the_run_is_not_refused_and_has_sizes_that_share_batch_and_lanes(
    run: RunConfig, sizes: list[int]
) -> None:
    check_ranks(run)
    assert world_sizes(run) == sizes


def test_the_full_number_must_fit() -> None:
    with pytest.raises(ConfigError, match="24 ranks"):
        check_ranks(config(24, 16, global_batch=48, lanes=16))


@pytest.mark.parametrize(
    ("nodes", "ranks"), [([8, 8, 8, 8], 32), ([8, 8, 8], 16), ([8, 8, 7], 16), ([8, 7], 0), ([], 0)]
)
def test_with_nodes_missing_so_many_ranks_start_as_fit(nodes: list[int], ranks: int) -> None:
    """17 to 31 ranks can't share a batch of 64; below 16 the run waits for nodes."""
    from ray.train import ScalingConfig

    scaling = ScalingConfig(
        num_workers=(16, 32), use_gpu=True, resources_per_worker={"CPU": 1, "GPU": 1}
    )
    policy = scaling_policy(scaling, world_sizes(config(32, 16)))
    reserved = {str(n): {"CPU": 96.0, "GPU": float(gpus)} for n, gpus in enumerate(nodes)}
    assert policy._count_possible_workers(reserved) == ranks


class Here:
    """An actor, in this process."""

    def __init__(self, of: type) -> None:
        self.held = of()

    def __getattr__(self, method: str) -> SimpleNamespace:
        return SimpleNamespace(remote=getattr(self.held, method))


class Job:
    """A rank of ours, tried as often as Ray Train would."""

    def __init__(self, config: RunConfig, ends: Here, folder: str) -> None:
        self.rank = {"config": config, "ends": ends, "folder": os.getcwd()}
        self.tries = config.supervise.max_restarts + 1

    def fit(self) -> None:
        from ray.train import WorkerGroupError

        for _ in range(self.tries):
            try:
                return ray_trainer._rank(self.rank)
            except Exception as error:
                failure = error
        raise WorkerGroupError(str(failure), {1: failure})


@pytest.fixture
def trained(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    """Exit code of a pretraining on Ray whose ranks do what they are given."""
    import ray

    monkeypatch.setenv("RAY_ADDRESS", "")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(ray, "get", lambda value: value)
    monkeypatch.setattr(ray_trainer, "start_ray", lambda *_, **__: None)
    monkeypatch.setattr(ray_trainer, "actor_here", Here)
    monkeypatch.setattr(ray_trainer, "_job", Job)

    def train(rank: Callable[[RunConfig], None]) -> int:
        monkeypatch.setattr(trainer, "train", rank)
        return main(["pretrain", str(recipe), f"run_dir={tmp_path}", "--address", "local"])

    return train


def test_ranks_that_fail_too_often_end_with_the_code_that_says_try_again(
    trained: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The number of tries counts from the newest checkpoint."""
    tries: list[int] = []

    def crashes(config: RunConfig) -> None:
        tries.append(1)
        if len(tries) == 2:
            write_folder(step_url(config.run_dir, 3), {}, 3)
        raise RuntimeError("its memory is broken")

    assert trained(crashes) == CAN_BE_RUN_AGAIN
    assert len(tries) == 2 * (SuperviseConfig().max_restarts + 1)
    said = capsys.readouterr().err
    assert "the ranks failed more than 3 times since step 3 (supervise.max_restarts)" in said
    assert "its memory is broken. Run the same command again to go on" in said


@pytest.mark.parametrize("code", [2, DISK_FULL])
def test_a_mistake_of_the_user_and_a_full_disk_are_not_tried_again(
    trained: Train, capsys: pytest.CaptureFixture[str], code: int
) -> None:
    tries: list[int] = []

    def mistaken(config: RunConfig) -> None:
        tries.append(1)
        if code == DISK_FULL:
            raise OSError(errno.ENOSPC, "No space left on device")
        raise DataError("there is no such set")

    assert trained(mistaken) == code
    assert len(tries) == 1
    said = capsys.readouterr().err
    assert ("No space left on device" if code == DISK_FULL else "there is no such set") in said


STEPS = 30


class Nodes:
    """A Ray cluster of a head without CPUs and nodes of one CPU each."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
        self.nodes = [self.cluster.add_node(num_cpus=1) for _ in range(2)]
        self.address = self.cluster.address


@pytest.fixture
def two_nodes() -> Iterator[Nodes]:
    nodes = Nodes()
    yield nodes
    nodes.cluster.shutdown()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ray")
    return small_training(
        folder,
        train={"steps": STEPS, "checkpoint_every": 3, "processes": 2},
        supervise={"min_processes": 1},
    )


@pytest.fixture(scope="module")
def expected(recipe: Path) -> list[dict[str, Any]]:
    finish("pretrain", recipe, timeout=900)
    return read_losses(str(recipe.parent / "undisturbed"))


def assert_the_same(run: Path, expected: list[dict[str, Any]]) -> None:
    """To what rounding makes of another order of sums in so many steps."""
    found = read_losses(str(run))
    assert [entry["step"] for entry in found] == list(range(STEPS))
    for want, got in zip(expected, found, strict=True):
        assert got["loss"] == pytest.approx(want["loss"], rel=1e-3), want["step"]


def made(run: Path) -> int:
    return len(read_losses(str(run)))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_when_a_node_is_lost_it_goes_on_with_the_other(
    recipe: Path, expected: list[dict[str, Any]], two_nodes: Nodes
) -> None:
    run = recipe.parent / "lost"
    process = start("pretrain", recipe, f"run_dir={run}", "--address", two_nodes.address)
    wait_for(process, lambda: made(run) >= 4)
    two_nodes.cluster.remove_node(two_nodes.nodes[1], allow_graceful=False)
    said = process.communicate(timeout=900)
    assert process.returncode == 0, said
    assert_the_same(run, expected)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_node_that_is_to_go_costs_no_step(
    recipe: Path, expected: list[dict[str, Any]], two_nodes: Nodes
) -> None:
    """The command is the manifest's. No step is made twice: the ranks save before they stop, and
    resume from there on the node that is left, whether Ray starts them again or we do."""
    run = recipe.parent / "drained"
    arguments = (recipe, f"run_dir={run}", "train.checkpoint_every=1000")
    process = start("pretrain", *arguments, "--address", two_nodes.address)
    wait_for(process, lambda: made(run) >= 4)
    with held_ranks():  # they must not end while the command starts
        drain(two_nodes, two_nodes.nodes[1])
    wait_for(process, lambda: bool(committed_steps(str(run))))
    saved = committed_steps(str(run))[-1]
    assert saved >= made(run) - 1 and saved < STEPS
    two_nodes.cluster.remove_node(two_nodes.nodes[1], allow_graceful=False)
    said = process.communicate(timeout=900)
    assert process.returncode == 0, said
    assert_the_same(run, expected)


@contextmanager
def held_ranks() -> Iterator[None]:
    workers = [pid for pid in descendants(os.getpid()) if "RayTrainWorker" in command_line(pid)]
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)
    yield
    for worker in workers:
        os.kill(worker, signal.SIGCONT)


def drain(nodes: Nodes, node: Any) -> None:
    manifest = yaml.safe_load((ROOT / "infra/cluster/kubernetes/pretrain.yaml").read_text())
    [workers] = manifest["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    [container] = workers["template"]["spec"]["containers"]
    script = container["lifecycle"]["preStop"]["exec"]["command"][2].partition(";")[0]
    words = [*shlex.split(script), "--node-id", node.node_id, "--address", nodes.address]
    subprocess.run(
        [sys.executable, "-m", "ray.scripts.scripts", *words[1:]], check=True, capture_output=True
    )
