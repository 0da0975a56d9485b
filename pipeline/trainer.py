"""The body of one rank: batches -> losses -> optimiser steps -> checkpoints."""

import logging
import multiprocessing
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from glipv2.model.adaptation import set_trainable
from glipv2.model.batch import Batch, Collectives
from glipv2.model.tokenizer import Tokenizer
from glipv2.model.weights import shape_files
from glipv2.pipeline import dist, preemption, storage
from glipv2.pipeline.config import RunConfig
from glipv2.pipeline.ema import Ema
from glipv2.pipeline.engine import build_engine, check_engine, init_distributed, train_step
from glipv2.pipeline.errors import NonFiniteLossError, PreemptedError
from glipv2.pipeline.health import Health, Skip, read_skips
from glipv2.pipeline.initial_model import initial_model
from glipv2.pipeline.loader import Loader, build_loader
from glipv2.pipeline.position import Position
from glipv2.pipeline.quarantine import Quarantine
from glipv2.pipeline.recorder import Recorder, step_times
from glipv2.pipeline.resume import (
    checkpoint_to_resume,
    engine_state,
    load_trained,
    restore,
)
from glipv2.pipeline.run_settings import note_settings
from glipv2.pipeline.saver import Saver, model_parts
from glipv2.pipeline.shard_reader import open_shard_set
from glipv2.pipeline.straggler import Stragglers
from glipv2.pipeline.watch import Watch

log = logging.getLogger(__name__)

SAYS_SO = 5.0
"""Seconds in which a rank whose write hangs ends by itself, before rank 0 gives it up."""


def train(config: RunConfig, force: bool = False) -> None:
    """Train to the last step; every rank runs this. PreemptedError when told to stop before.

    For `force` see `note_settings`.
    """
    try:
        with Watch(config.run_dir, dist.rank(), config.supervise) as watch:
            watch.begin("setup")
            if dist.is_main():
                note_settings(config, force)  # torchrun starts ranks directly
            torch.set_num_threads(config.train.threads)
            check_engine(config.train, dist.world_size(), torch.cuda.is_available())
            init_distributed()
            while not _train(_set_up(config, watch), watch):
                watch.begin("setup")
    finally:
        for loader in multiprocessing.active_children():
            loader.kill()  # Python would ask with SIGTERM, which they ignore, and wait for ever


@dataclass(frozen=True)
class Setup:
    """What a rank has in its hands from the first step that it runs to the last."""

    config: RunConfig
    engine: Any
    ema: Ema | None
    loader: Loader
    saver: Saver
    recorder: Recorder
    health: Health
    collectives: Collectives
    first_step: int
    position: Position


def _set_up(config: RunConfig, watch: Watch) -> Setup:
    """A run's beginning, or where its newest checkpoint left it."""
    skips = read_skips(config.run_dir)
    saved = checkpoint_to_resume(config.run_dir, skips)
    model, tokenizer = initial_model(config, saved)
    set_trainable(model, config.train.tune, config.train.frozen)
    if saved and config.train.ema_decay:
        load_trained(model, saved)
    parts = model_parts(model, shape_files(model.config, tokenizer))
    model.recompute(config.train.checkpoint_activations)
    if config.train.compile:
        model.compile()
    loader = _build_loader(config, tokenizer)
    engine = build_engine(model.to(dist.local_device()), config.train)
    ema = Ema(engine, config.train.ema_decay) if config.train.ema_decay else None
    position = restore(saved, engine, ema) if saved else loader.start()
    keep, patience = config.train.keep_checkpoints, config.supervise.save_seconds + SAYS_SO
    bounded = partial(watch.beside, "save")
    first_step = saved.step if saved else 0
    return Setup(
        config=config,
        engine=engine,
        ema=ema,
        loader=loader,
        saver=Saver(config.run_dir, engine, ema, parts, keep, patience, bounded),
        recorder=Recorder(config, first_step),
        health=Health(config.run_dir, config.supervise, skips),
        collectives=dist.collectives(),
        first_step=first_step,
        position=position,
    )


def _train(run: Setup, watch: Watch) -> bool:
    """From the first step to the last. False if the run is to go back, after a loss spike."""
    config, train, saver, health = run.config, run.config.train, run.saver, run.health
    batches = run.loader.steps(run.position)
    stragglers = Stragglers(config.supervise)
    for step in range(run.first_step, train.steps):
        for _ in range(health.batches_to_skip(step)):
            watch.begin("data")
            next(batches)
        watch.begin("data")
        stragglers.begin(step)
        began = time.monotonic()
        micro_batches, consumed = next(batches)
        waited = time.monotonic() - began
        watch.begin("setup" if step == run.first_step else "step")  # the first one compiles
        micro_batches = [batch.to(dist.local_device()) for batch in micro_batches]
        if step == run.first_step:
            run.recorder.count_operations(run.engine.module, micro_batches[0], run.collectives)
        torch.manual_seed(config.seed * 1_000_003 + step * 1009 + dist.rank())  # dropout only
        try:
            losses = _update(run, micro_batches, step)
        except NonFiniteLossError as error:
            health.leave_out(step, micro_batches, error)
        else:
            times = step_times(micro_batches, time.monotonic() - began, waited)
            run.recorder.step(step, losses, times)
            if config.log.samples:
                keys = [key for batch in micro_batches for key in batch.keys]
                run.recorder.consumed(step, dist.gather_objects(keys))
            skip = health.spike(step, losses["loss"])
            if skip:
                watch.begin("save")
                _go_back(run, skip)
                return False
        stragglers.end(step)
        last = step + 1 == train.steps
        stop = dist.any_rank(preemption.asked()) and not last
        if stop or last or (step + 1) % train.checkpoint_every == 0:
            watch.begin("save")
            run.recorder.flush()
            state = {"skips": len(health.skips), **engine_state(run.engine)}
            saver.save(step + 1, consumed, state)
        if stop:
            saver.wait()
            dist.barrier()  # launchers may kill what is left when the first rank ends
            run.recorder.close(step + 1)
            raise PreemptedError(f"stopped as told to; step {step + 1} is saved")
    watch.begin("save")
    saver.wait()
    dist.barrier()
    run.recorder.close(train.steps)
    return True


def _update(run: Setup, micro_batches: Sequence[Batch], step: int) -> dict[str, float]:
    """The losses of a step, its update made."""
    config = run.config
    return train_step(
        run.engine, micro_batches, step, config.train, config.losses, run.collectives,
        before_update=run.saver.wait_until_copied,
        after_update=run.ema.update if run.ema else lambda: None,
    )  # fmt: skip


def _go_back(run: Setup, skip: Skip) -> None:
    """Note what is left out, and take the engine down: the next one starts from a checkpoint."""
    run.saver.wait()
    if dist.is_main():
        run.health.note(skip)
    dist.barrier()
    run.recorder.close(skip.spike_step)
    run.engine.destroy()


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
        accumulation=config.train.accumulation,
    )
