"""Run under torchrun: the losses of the real model on real toy shards, for several settings.

Prints a line on rank 0 for each setting: `losses` and a JSON list of them, step by step.
Usage: equality_worker.py FOLDER STEPS SETTINGS, the latter a JSON list of changes of `train`.
With `boxless` among the changes rank 1 has no boxes at all.
"""

import dataclasses
import json
import sys
from itertools import islice
from typing import Any

import torch

from glipv2.model.batch import Batch
from glipv2.model.config import InputConfig, LossWeights, preset
from glipv2.model.glip import build_model
from glipv2.model.tokenizer import Tokenizer, tiny_vocab
from glipv2.pipeline import dist
from glipv2.pipeline.config import DataConfig
from glipv2.pipeline.engine import build_engine, init_distributed, train_step
from glipv2.pipeline.loader import Loader, build_loader
from glipv2.pipeline.shard_reader import open_shard_set
from glipv2.pipeline.train_config import TrainConfig

SETS = ("toy_detection", "toy_grounding")
MODEL = dataclasses.replace(
    preset("tiny"), input=InputConfig(short_side=64, long_side=64, pad_to=(64, 64))
)
DATA = DataConfig(
    mixture=dict.fromkeys(SETS, 1.0), short_sides=(64,), long_side=64, pad_to=(64, 64),
    max_negatives=5, unit_samples=8,
)  # fmt: skip
TRAIN = TrainConfig(
    steps=50, global_batch=8, precision="fp32", warmup_steps=5, warmup_factor=0.001,
    bias_rate_factor=2.0, decayed="all_but_biases", weight_decay=100.0,
    weight_decay_milestones=(0.45, 0.59), learning_rate=1e-6, head_learning_rate=1e-6,
    text_learning_rate=1e-7, eps=1e-5,
)  # fmt: skip
"""The rules of GLIP-L (facts G.1) in little, at a hundredth of its rates and with a larger eps:
where rounding turns a unit on or off, or moves a sampling point past a pixel, gradients jump, and
AdamW makes a whole step of that. At ten times these rates a change of 1e-6 in the plain loop's own
clipping can move its loss by 2e-5 within fifty steps; at these by 3e-7. Weight decay is large, so
that it would be noticed if it were wrong."""


def losses_of(train: TrainConfig) -> LossWeights:
    """The contrast is within a micro-batch: with several, it is not that of the whole batch."""
    return LossWeights(inter_image=1.0 if train.accumulation == 1 else 0.0)


def loader(folder: str, train: TrainConfig) -> Loader:
    sets = {name: open_shard_set(f"{folder}/{name}") for name in SETS}
    tokenizer = Tokenizer.from_vocab(tiny_vocab(), MODEL.text_encoder.max_tokens)
    return build_loader(
        DATA, train.global_batch, sets, tokenizer, rank=dist.rank(), world_size=dist.world_size(),
        seed=3, accumulation=train.accumulation,
    )  # fmt: skip


def without_boxes(batch: Batch) -> Batch:
    return dataclasses.replace(
        batch,
        boxes_BN4=batch.boxes_BN4[:, :0],
        box_mask_BN=batch.box_mask_BN[:, :0],
        positive_BNT=batch.positive_BNT[:, :0],
        box_category_BN=batch.box_category_BN[:, :0],
    )


def run(folder: str, steps: int, changes: dict[str, Any]) -> list[float]:
    boxless = changes.pop("boxless", False) and dist.rank() == 1
    train = dataclasses.replace(TRAIN, **changes)
    model = build_model(MODEL, seed=3).train()
    model.recompute(train.checkpoint_activations)
    engine = build_engine(model, train)
    data = loader(folder, train)
    own = islice(data.steps(data.start()), steps)
    return [
        train_step(
            engine,
            [without_boxes(b) if boxless else b for b in batches],
            step,
            train,
            losses_of(train),
            dist.collectives(),
        )["loss"]
        for step, (batches, _) in enumerate(own)
    ]


def main() -> None:
    dist.die_with_parent()
    torch.set_num_threads(1)
    init_distributed()
    folder, steps, settings = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
    for changes in settings:
        found = run(folder, steps, changes)
        if dist.is_main():
            print("losses", json.dumps(found), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
