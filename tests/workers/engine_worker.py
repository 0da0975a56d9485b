"""Run under torchrun: train a small network, save, load into a new engine, compare losses.

Prints one JSON line on rank 0. Usage: engine_worker.py STAGE FOLDER
With FOLDER/state.safetensors present it starts from that state, whoever wrote it.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from glipv2.model.config import LossWeights
from glipv2.pipeline import dist
from glipv2.pipeline.engine import build_engine, init_distributed, train_step
from glipv2.pipeline.optimizer_state import full_state, load_full_state
from glipv2.pipeline.train_config import TrainConfig

GLOBAL_BATCH, SAVED, LAST = 4, 5, 10


class Network(nn.Module):
    """Named like the real model, so that it gets several parameter groups; odd sizes on purpose."""

    def __init__(self) -> None:
        super().__init__()
        self.image_encoder = nn.Linear(16, 31)
        self.text_encoder = nn.Linear(31, 33)
        self.head = nn.Sequential(nn.Linear(33, 7), nn.Tanh(), nn.Linear(7, 3))

    def forward(self, x_BD: Tensor, *ignored: object) -> dict[str, Tensor]:
        hidden = torch.tanh(self.text_encoder(torch.tanh(self.image_encoder(x_BD))))
        return {"box": self.head(hidden).square().mean(), "mlm": (hidden - 1).square().mean()}


def batch(step: int) -> Tensor:
    whole = torch.randn(GLOBAL_BATCH, 16, generator=torch.Generator().manual_seed(step))
    return whole[dist.rank() :: dist.world_size()]


def main(stage: int, folder: Path) -> None:
    dist.die_with_parent()
    torch.set_num_threads(1)
    train = TrainConfig(
        steps=20, global_batch=GLOBAL_BATCH, zero_stage=stage, precision="fp32",  # type: ignore[arg-type]
        learning_rate=1e-2, text_learning_rate=1e-3, head_learning_rate=2e-2, warmup_steps=2,
    )  # fmt: skip
    init_distributed()

    def engine(weights: dict[str, Tensor] | None = None) -> object:
        torch.manual_seed(0)
        network = Network()
        if weights is not None:
            network.load_state_dict(weights)
        return build_engine(network, train, GLOBAL_BATCH // dist.world_size())

    def steps(own: object, first: int, last: int) -> list[float]:
        return [
            train_step(own, batch(s), s, train, LossWeights(), dist.collectives())["loss"]  # type: ignore[arg-type]
            for s in range(first, last)
        ]

    state_file = folder / "state.safetensors"
    whole = steps(engine(), 0, LAST)
    if state_file.exists():
        tensors = load_file(state_file)
        weights = {k[2:]: v for k, v in tensors.items() if k.startswith("w.")}
        moments = {k[2:]: v for k, v in tensors.items() if k.startswith("m.")}
    else:
        first = engine()
        steps(first, 0, SAVED)
        weights, moments = full_state(first)
        if dist.is_main():
            named = {f"w.{k}": v for k, v in weights.items()}
            save_file(named | {f"m.{k}": v for k, v in moments.items()}, state_file)
    resumed = engine(weights)
    load_full_state(resumed, weights, moments, SAVED)
    tail = steps(resumed, SAVED, LAST)
    if dist.is_main():
        print(json.dumps({"whole": whole, "resumed": tail}))  # noqa: T201


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
