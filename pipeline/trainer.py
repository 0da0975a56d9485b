"""The body of one rank: batches -> losses -> optimiser steps -> checkpoints."""

import json
import logging
import time
from typing import Any

import torch

from glipv2.model.adaptation import set_trainable
from glipv2.model.tokenizer import Tokenizer
from glipv2.pipeline import dist, storage
from glipv2.pipeline.checkpoint import newest_checkpoint
from glipv2.pipeline.config import RunConfig
from glipv2.pipeline.engine import build_engine, init_distributed, train_step
from glipv2.pipeline.initial_model import Saved, initial_model
from glipv2.pipeline.loader import Loader, build_loader
from glipv2.pipeline.quarantine import Quarantine
from glipv2.pipeline.recorder import Recorder
from glipv2.pipeline.run_settings import note_settings
from glipv2.pipeline.shard_reader import open_shard_set
from glipv2.pipeline.stream import Position

log = logging.getLogger(__name__)


def train(config: RunConfig) -> None:
    """Train to the last step; every rank runs this."""
    dist.die_with_parent()
    if dist.is_main():
        note_settings(config)  # torchrun starts ranks directly
    torch.set_num_threads(config.train.threads)
    init_distributed()
    saved = newest_checkpoint(config.run_dir)
    model, tokenizer = initial_model(config, saved)
    set_trainable(model, config.train.tune)
    if config.train.compile:
        model.compile()
    loader = _build_loader(config, tokenizer)
    engine = build_engine(
        model.to(dist.local_device()), config.train, config.train.global_batch // dist.world_size()
    )
    first_step, position = restore(saved, engine, loader)
    run = Recorder(config, tokenizer, first_step)
    collectives = dist.collectives()
    for step, (batch, consumed) in enumerate(loader.batches(position), start=first_step):
        if step >= config.train.steps:
            break
        waited = time.monotonic()
        torch.manual_seed(config.seed * 1_000_003 + step * 1009 + dist.rank())  # dropout only
        batch = batch.to(dist.local_device())
        values = train_step(engine, batch, step, config.train, config.losses, collectives)
        run.step(step, values, time.monotonic() - waited)
        if (step + 1) % config.train.checkpoint_every == 0 or step + 1 == config.train.steps:
            run.save(engine, step + 1, consumed)
    run.close()


def _build_loader(config: RunConfig, tokenizer: Tokenizer) -> Loader:
    sets = {name: open_shard_set(config.set_url(name)) for name in config.data.mixture}
    return build_loader(
        config.data,
        config.train.global_batch,
        sets,
        tokenizer,
        rank=dist.rank(),
        world_size=dist.world_size(),
        seed=config.seed,
        on_bad=Quarantine(storage.join(config.run_dir, "quarantine.jsonl")),
        masks=config.model.masks,
        answers=config.model.answers,
        captions=config.model.captions,
    )


def restore(saved: Saved | None, engine: Any, loader: Loader) -> tuple[int, Position]:
    """Put optimiser and stream back where a checkpoint left them: (first step to run, position)."""
    from safetensors.torch import load

    from glipv2.pipeline.optimizer_state import load_full_state

    if saved is None:
        return 0, loader.start()
    url, files = saved
    state = json.loads(files["trainer.json"])
    position = Position.from_dict(state["position"])
    weights = load(files["model.safetensors"])
    load_full_state(engine, weights, load(files["optimizer.safetensors"]), state["step"])
    log.info("resumed from %s", url)
    return state["step"], position
