"""Run under torchrun: train a small network, save, load into a new engine, compare losses.

Prints one JSON line on rank 0. Usage: engine_worker.py FOLDER [train.key=value as JSON ...]
With a checkpoint in FOLDER it starts from that, whoever wrote it.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor, nn

from glipv2.model.config import LossWeights
from glipv2.model.folders import WEIGHTS
from glipv2.pipeline import dist
from glipv2.pipeline.checkpoint import Checkpoint
from glipv2.pipeline.ema import Ema
from glipv2.pipeline.engine import build_engine, init_distributed, train_step
from glipv2.pipeline.errors import NonFiniteLossError
from glipv2.pipeline.position import Position
from glipv2.pipeline.resume import checkpoint_to_resume, engine_state, load_trained, restore
from glipv2.pipeline.saver import Saver, model_parts
from glipv2.pipeline.train_config import TrainConfig

GLOBAL_BATCH, SAVED, LAST = 4, 5, 10
ALL, NONE = LossWeights(), LossWeights(box=0, mlm=0)


class Samples:
    """As much of a Batch as the engine asks for."""

    def __init__(self, x_BD: Tensor, keys: list[str]) -> None:
        self.x_BD = x_BD
        self.keys = keys


class Network(nn.Module):
    """Named like the real model, so that it gets several parameter groups; odd sizes on purpose."""

    def __init__(self) -> None:
        super().__init__()
        self.image_encoder = nn.Linear(16, 31)
        self.text_encoder = nn.Linear(31, 33)
        self.head = nn.Sequential(nn.Linear(33, 7), nn.Tanh(), nn.Linear(7, 3))

    def counts(self, batch: Samples) -> Tensor:
        return torch.tensor(float(len(batch.x_BD)))

    def forward(self, batch: Samples, *ignored: object) -> dict[str, Tensor]:
        x_BD = batch.x_BD.to(self.image_encoder.weight.dtype)
        hidden = torch.tanh(self.text_encoder(torch.tanh(self.image_encoder(x_BD))))
        return {"box": self.head(hidden).square().mean(), "mlm": (hidden - 1).square().mean()}


def micro_batches(step: int, accumulation: int, poison: float = 0.0) -> list[Samples]:
    """`poison` is added to the last rank's last sample, on that rank alone."""
    whole = torch.randn(GLOBAL_BATCH, 16, generator=torch.Generator().manual_seed(step))
    whole[-1, 0] += poison
    own = whole[dist.rank() :: dist.world_size()]
    return [Samples(x_BD, [f"gold/{step}"]) for x_BD in own.chunk(accumulation)]


def main(folder: Path, settings: list[str]) -> None:  # noqa: C901 (one story, told in order)
    dist.die_with_parent()
    torch.set_num_threads(1)
    chosen = {key: json.loads(value) for key, value in (s.split("=") for s in settings)}
    train = TrainConfig(**{
        "steps": 20, "global_batch": GLOBAL_BATCH, "zero_stage": 0, "precision": "fp32",
        "learning_rate": 1e-2, "text_learning_rate": 1e-3, "head_learning_rate": 2e-2,
        "warmup_steps": 2, **chosen,
    })  # fmt: skip
    init_distributed()

    def engine(saved: Checkpoint | None = None) -> tuple[Any, Ema | None, Saver]:
        torch.manual_seed(0)
        network = Network()
        if saved:
            network.load_state_dict(load(saved.read(WEIGHTS)))
            load_trained(network, saved)
        parts = model_parts(network, {})
        own = build_engine(network, train)
        ema = Ema(own, train.ema_decay) if train.ema_decay else None
        if saved:
            restore(saved, own, ema)
        return own, ema, Saver(str(folder), own, ema, parts, keep=9, patience=60)

    def one(
        run: tuple[Any, Ema | None, Saver], step: int, poison: float = 0.0, weights: Any = ALL
    ) -> float:
        own, ema, saver = run
        batches = micro_batches(step, train.accumulation, poison)
        values = train_step(
            own, batches, step, train, weights, dist.collectives(),  # type: ignore[arg-type]
            before_update=saver.wait_until_copied,
            after_update=ema.update if ema else lambda: None,
        )  # fmt: skip
        return values["loss"]

    def steps(run: tuple[Any, Ema | None, Saver], first: int, last: int) -> list[float]:
        return [one(run, step) for step in range(first, last)]

    def save(run: tuple[Any, Ema | None, Saver], step: int) -> None:
        run[2].save(step, Position(step, "", {}), {"skips": 0, **engine_state(run[0])})

    whole = steps(engine(), 0, LAST)
    saved = checkpoint_to_resume(str(folder), [])
    if saved is None:
        first = engine()
        steps(first, 0, SAVED)
        save(first, SAVED)
        steps(first, SAVED, LAST)  # the state that is saved is that of before
        first[2].wait()
        dist.barrier()
        saved = checkpoint_to_resume(str(folder), [])
    resumed = engine(saved)
    refused = []
    for poison in (float("nan"), float("inf")):
        try:
            one(resumed, SAVED, poison)
        except NonFiniteLossError as error:
            refused.append(str(error))
    tail = steps(resumed, SAVED, LAST)
    before = engine_state(resumed[0])["updates"]
    zero = [one(resumed, LAST, weights=NONE), engine_state(resumed[0])["updates"] - before]
    if dist.is_main():
        print(json.dumps({"whole": whole, "resumed": tail, "refused": refused, "zero": zero}))  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
