"""What the engine adds to a training step: DeepSpeed at each ZeRO stage against bare DDP.

Two processes with gloo and one thread each, a network of 700 parameter tensors whose arithmetic is
next to nothing, so that what is done for every tensor and every step stands out. Ours is the whole
`train_step`: rates, losses averaged over ranks, finite check, clipping, update. The peer does
forward, backward, clipping and update, in fp32. All take turns in the same processes.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from bench_measure import note, row
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from glipv2.model.config import LossWeights
from glipv2.pipeline import dist
from glipv2.pipeline.engine import build_engine, init_distributed, train_step
from glipv2.pipeline.optim import build_optimizer
from glipv2.pipeline.train_config import TrainConfig

BLOCKS, WIDTH, IMAGES = 175, 64, 4
WORKS = [(precision, stage) for precision in ("fp32", "bf16") for stage in (0, 1, 2, 3)]
STEPS, REPEATS = 5, 5


def bench_engine() -> None:
    """Start the two processes and print what they found."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1",
        "--nproc-per-node", "2", __file__,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    tensors = BLOCKS * 4
    for precision, stage in WORKS:
        wall, cpu = found[f"{precision} {stage}"]
        row(
            f"engine, {precision}, ZeRO {stage}, {tensors} tensors",
            wall,
            found["DDP"][0],
            "bare DDP",
        )
        added = (wall - found["DDP"][0]) / tensors
        ratio = cpu / found["DDP"][1]
        note("  added per tensor", f"{added * 1e6:5.0f} us; processor time {ratio:.2f} x DDP's")


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)) for _ in range(BLOCKS)
        )

    def forward(self, x_BD: Tensor, *_: object) -> dict[str, Tensor]:
        x_BD = x_BD.to(self.blocks[0][1].weight.dtype)  # type: ignore[index]
        target_BD = x_BD.flip(1)
        for block in self.blocks:
            x_BD = x_BD + 0.1 * block(x_BD)
        return {"box": (x_BD - target_BD).square().mean()}


def new_network() -> Blocks:
    torch.manual_seed(0)
    return Blocks()


def settings(precision: Any, stage: Any) -> TrainConfig:
    return TrainConfig(
        global_batch=2 * IMAGES, zero_stage=stage, precision=precision, warmup_steps=0
    )


def our_step(precision: str, stage: int) -> Callable[[Tensor], Any]:
    train = settings(precision, stage)
    engine = build_engine(new_network(), train)
    collectives = dist.collectives()
    return lambda x_BD: train_step(engine, [x_BD], 0, train, LossWeights(), collectives)  # type: ignore[list-item]


def peer_step() -> Callable[[Tensor], Any]:
    network = DistributedDataParallel(new_network(), gradient_as_bucket_view=True)
    optimizer = build_optimizer(network, settings("fp32", 0))

    def step(x_BD: Tensor) -> None:
        loss = 2 * network(x_BD)["box"]
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    dist.die_with_parent()
    torch.set_num_threads(1)
    init_distributed()
    works = {"DDP": peer_step()}
    works |= {f"{precision} {stage}": our_step(precision, stage) for precision, stage in WORKS}
    x_BD = torch.randn(IMAGES, WIDTH, generator=torch.Generator().manual_seed(dist.rank()))
    for work in works.values():
        timed(work, x_BD)
    taken = {name: [] for name in works}
    for _ in range(REPEATS):
        for name, work in works.items():
            taken[name].append(timed(work, x_BD))
    if dist.is_main():
        found = {
            name: [statistics.median(column) for column in zip(*rows, strict=True)]
            for name, rows in taken.items()
        }
        print(json.dumps(found))  # noqa: T201


def timed(work: Callable[[Tensor], Any], x_BD: Tensor) -> tuple[float, float]:
    """Seconds and processor seconds of a step, this rank's."""
    dist.barrier()
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(STEPS):
        work(x_BD)
    dist.barrier()
    return (time.perf_counter() - wall) / STEPS, (time.process_time() - cpu) / STEPS


if __name__ == "__main__":
    main()
