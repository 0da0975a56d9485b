"""Twenty steps in fp16, one with an overflow, then one more that overflows at the lowest scale.

Prints what each step said, whether weights and average changed in it, and how the last one ended.
Usage: fp16_worker.py ZERO_STAGE. Without a GPU DeepSpeed is told that the CPU can do fp16, which
torch can: its optimisers are the real ones.
"""

import json
import sys

import torch
from engine_worker import Network, micro_batches

from glipv2.model.config import LossWeights
from glipv2.pipeline import dist
from glipv2.pipeline.ema import EMA, Ema
from glipv2.pipeline.engine import build_engine, init_distributed, loss_scaler, train_step
from glipv2.pipeline.errors import NonFiniteLossError
from glipv2.pipeline.train_config import TrainConfig

STEPS, OVERFLOW = 20, 10


def main(stage: int) -> None:
    dist.die_with_parent()
    torch.set_num_threads(1)
    init_distributed()
    if not torch.cuda.is_available():
        from deepspeed.accelerator import get_accelerator

        get_accelerator().is_fp16_supported = lambda: True
    torch.manual_seed(0)
    train = TrainConfig(
        steps=STEPS, global_batch=4, zero_stage=stage, precision="fp16", warmup_steps=2  # type: ignore[arg-type]
    )  # fmt: skip
    engine = build_engine(Network().to(dist.local_device()), train)
    ema = Ema(engine, 0.5)
    loss_scaler(engine).cur_scale = 1024.0

    def state() -> list[float]:
        tensors = [[float(w.double().sum()) for w in ema.weights],
                   [float(share.values[EMA].double().sum()) for share in ema.shares]]  # fmt: skip
        return [sum(own) for own in tensors]

    def one(step: int, poison: float) -> dict[str, float]:
        batches = micro_batches(step, 1, poison)
        for batch in batches:
            batch.x_BD = batch.x_BD.to(dist.local_device())
        return train_step(
            engine, batches, step, train, LossWeights(), dist.collectives(),  # type: ignore[arg-type]
            after_update=ema.update,
        )  # fmt: skip

    told = []
    for step in range(STEPS):
        before = state()
        told.append(one(step, float("inf") if step == OVERFLOW else 0.0))
        told[-1]["changed"] = sum(new != old for new, old in zip(state(), before, strict=True))
    loss_scaler(engine).cur_scale = 1.0
    before, refused = state(), ""
    try:
        one(STEPS, float("inf"))
    except NonFiniteLossError as error:
        refused = str(error)
    print(json.dumps({"told": told, "refused": refused, "kept": state() == before}))  # noqa: T201


if __name__ == "__main__":
    main(int(sys.argv[1]))
