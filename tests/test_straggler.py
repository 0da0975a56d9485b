"""The rank that the others wait for is named."""

import sys
from pathlib import Path

import pytest

from glipv2.pipeline.config import RunConfig
from glipv2.pipeline.launch import launch_ranks
from glipv2.pipeline.straggler import slow_ranks
from glipv2.pipeline.train_config import SuperviseConfig, TrainConfig

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


@pytest.mark.parametrize("kind", ["slow", "even"])
def test_the_slow_rank_is_named_at_every_look(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: str
) -> None:
    config = RunConfig(
        run_dir=str(tmp_path),
        train=TrainConfig(processes=2, global_batch=2),
        supervise=SuperviseConfig(max_restarts=0),
    )
    launch_ranks([sys.executable, "-c", STEPS, kind], config)
    said = [line for line in capfd.readouterr().err.splitlines() if "wait for rank" in line]
    named = ["step 11: the others wait for rank 1", "step 23: the others wait for rank 1"]
    assert [line.split(" on ")[0] for line in said] == (named if kind == "slow" else [])


def test_a_rank_is_compared_with_the_others() -> None:
    told = [(0.30, "a"), (0.10, "a"), (0.14, "b"), (0.10, "b")]
    assert slow_ranks(told, 1.5) == [
        "the others wait for rank 0 on a: its own part of a step takes 0.300 s, theirs 0.100 s"
    ]
    assert slow_ranks([(0.001, "a"), (0.009, "b")], 1.5) == []  # too little to matter
