"""The rank that the others wait for is named."""

import re
import sys
from pathlib import Path

import pytest

from glipv2.pipeline.config import RunConfig
from glipv2.pipeline.launch import launch_ranks
from glipv2.pipeline.straggler import slow_ranks
from glipv2.pipeline.train_config import SuperviseConfig, TrainConfig

WORKERS = Path(__file__).parent / "workers"
STEPS = """
import logging, sys, time
import torch
from glipv2.pipeline import dist
from glipv2.pipeline.straggler import Stragglers
from glipv2.pipeline.train_config import SuperviseConfig
logging.basicConfig(level=logging.WARNING, format="%(message)s")
torch.distributed.init_process_group("gloo")
slow = {1: 0.1}.get(dist.rank(), 0.0) if sys.argv[1] == "slow" else 0.0
stragglers = Stragglers(SuperviseConfig(straggler_every=12))
for step in range(24):
    stragglers.begin(step)
    time.sleep(0.02 + slow)
    dist.mean_over_ranks(torch.ones(1))  # rank 0 waits here, which is no work of its own
    dist.mean_over_ranks(torch.ones(1))
    stragglers.end(step)
torch.distributed.destroy_process_group()
"""

MICRO_BATCHES = """
import logging, sys, time
sys.path.insert(0, sys.argv[1])
import torch
from engine_worker import ALL, Network, micro_batches
from glipv2.pipeline import dist
from glipv2.pipeline.engine import build_engine, init_distributed, train_step
from glipv2.pipeline.straggler import Stragglers
from glipv2.pipeline.train_config import SuperviseConfig, TrainConfig
logging.basicConfig(level=logging.WARNING, format="%(message)s")
torch.set_num_threads(1)
init_distributed()

class Slow(Network):
    def forward(self, *inputs):
        if dist.rank() == 1 and step < 12:
            time.sleep(0.2)
        return super().forward(*inputs)

train = TrainConfig(global_batch=4, accumulation=2, zero_stage=0, precision="fp32")
engine = build_engine(Slow(), train)
stragglers = Stragglers(SuperviseConfig(straggler_every=12))
for step in range(24):
    stragglers.begin(step)
    if dist.rank() == 0 and step >= 12:
        time.sleep(0.2)  # for its batch: rank 1 waits where the micro-batches' counts are averaged
    train_step(engine, micro_batches(step, 2), step, train, ALL, dist.collectives())
    stragglers.end(step)
"""


def slow_ones(
    command: list[str], folder: Path, capfd: pytest.CaptureFixture[str]
) -> list[tuple[str, str]]:
    """Step and rank of what two ranks that run a script report."""
    config = RunConfig(
        run_dir=str(folder),
        train=TrainConfig(processes=2, global_batch=2),
        supervise=SuperviseConfig(max_restarts=0),
    )
    launch_ranks([sys.executable, "-c", *command], config)
    return re.findall(r"step (\d+): the others wait for rank (\d+) on ", capfd.readouterr().err)


@pytest.mark.parametrize("kind", ["slow", "even"])
def test_the_slow_rank_is_named_at_every_look(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: str
) -> None:
    named = [("11", "1"), ("23", "1")] if kind == "slow" else []
    assert slow_ones([STEPS, kind], tmp_path, capfd) == named


def test_with_micro_batches_a_slow_forward_pass_is_seen_and_a_slow_batch_as_well(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    found = slow_ones([MICRO_BATCHES, str(WORKERS)], tmp_path, capfd)
    assert found == [("11", "1"), ("23", "0")]


def test_a_rank_is_compared_with_the_others() -> None:
    told = [(0.30, "a"), (0.10, "a"), (0.14, "b"), (0.10, "b")]
    assert slow_ranks(told, 1.5) == [
        "the others wait for rank 0 on a: its own part of a step takes 0.300 s, theirs 0.100 s"
    ]
    assert slow_ranks([(0.001, "a"), (0.009, "b")], 1.5) == []  # too little to matter
