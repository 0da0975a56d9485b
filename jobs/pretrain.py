"""glipv2 pretrain RECIPE: shards -> batches -> losses -> checkpoints; run again, it resumes."""

import argparse
import json
import logging
import os
import time
from typing import Any

import yaml

from glipv2.jobs.stages import add_recipe_arguments, recipe_config, stage
from glipv2.pipeline import storage
from glipv2.pipeline.config import RunConfig
from glipv2.pipeline.config_loader import as_tree, dump_config
from glipv2.pipeline.errors import ConfigError
from glipv2.pipeline.launch import exclusive, launch_ranks, under_launcher

log = logging.getLogger(__name__)

CONFIG = "config.yaml"
MAY_CHANGE = {
    "data.root", "data.workers", "data.max_bad_share", "train.steps", "train.processes",
    "train.threads", "train.zero_stage", "train.compile", "train.checkpoint_every",
    "train.keep_checkpoints",
}  # fmt: skip
"""Settings that a run may be resumed with in another value."""
Saved = tuple[str, dict[str, bytes]]
"""URL and files of a checkpoint."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_arguments(parser, phase="a phase of the recipe, for example teacher")


def run(arguments: argparse.Namespace) -> int:
    config = recipe_config(arguments, arguments.phase)
    if under_launcher():
        train(config)
    elif arguments.phase:
        with stage(recipe_config(arguments).run_dir, arguments.phase):
            pretrain(config)
    else:
        pretrain(config)
    return 0


def pretrain(config: RunConfig) -> str:
    """Train to the last step, on ranks of this machine; returns the run folder.

    A finished run returns at once; an interrupted one goes on from its newest checkpoint.
    """
    check_mixture(config)
    with exclusive(config.run_dir):
        resolved = note_settings(config)
        if not is_finished(config):
            arguments = ["pretrain", resolved]
            launch_ranks(arguments, config.train.processes, config.train.threads)
    return config.run_dir


def is_finished(config: RunConfig) -> bool:
    from glipv2.pipeline.checkpoint import committed_steps

    return committed_steps(config.run_dir)[-1:] == [config.train.steps]


def note_settings(config: RunConfig) -> str:
    """Write RUN/config.yaml, unless it holds the same already; refuses to make it another run's."""
    check_same_run(config)
    url, resolved = storage.join(config.run_dir, CONFIG), dump_config(config).encode()
    if not storage.exists(url) or storage.read_bytes(url) != resolved:
        storage.write_bytes(url, resolved)
    return url


def check_same_run(config: RunConfig) -> None:
    """Refuse to go on with a run under settings that would have made it another run."""
    from glipv2.pipeline.checkpoint import committed_steps

    steps = committed_steps(config.run_dir)
    url = storage.join(config.run_dir, CONFIG)
    if not steps or not storage.exists(url):
        return
    if steps[-1] > config.train.steps:
        raise ConfigError(
            f"{config.run_dir} is at step {steps[-1]} already, beyond train.steps="
            f"{config.train.steps}; raise it, or choose another run_dir"
        )
    old, new = _decisive(yaml.safe_load(storage.read_bytes(url))), _decisive(as_tree(config))
    changed = [
        f"{key}: {_shown(old.get(key))} there, {_shown(new.get(key))} now"
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key)
    ]
    if changed:
        raise ConfigError(
            f"{config.run_dir} was begun with other settings:\n  " + "\n  ".join(changed) +
            "\ngive those again to go on with it, or choose another run_dir"
        )  # fmt: skip


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."  # thousands of answers, say


def _decisive(tree: dict[str, Any]) -> dict[str, Any]:
    """`section.key` -> value of what decides the weights; speed and length may change."""
    flat = {"seed": tree["seed"]}
    for section in ("model", "losses", "data", "train"):
        flat |= {f"{section}.{key}": value for key, value in tree[section].items()}
    return {key: value for key, value in flat.items() if key not in MAY_CHANGE}


def check_mixture(config: RunConfig) -> None:
    """Everything that can be refused before a process is started is refused here."""
    if not config.data.mixture:
        raise ConfigError(
            "data.mixture is empty: name at least one shard set and its share, or choose a phase "
            "of the recipe with --phase"
        )
    from glipv2.pipeline.checkpoint import resolve_checkpoint
    from glipv2.pipeline.loader import lane_count
    from glipv2.pipeline.shard_reader import check_shard_sizes, open_shard_set
    from glipv2.pipeline.tasks import mixture_task

    lane_count(config.data, config.train.global_batch, config.train.processes)
    if config.train.init:
        resolve_checkpoint(config.run_url(config.train.init))
    sets = {name: open_shard_set(config.set_url(name)) for name in config.data.mixture}
    for shard_set in sets.values():
        check_shard_sizes(shard_set)
    mixture_task(sets, config.model.answers, config.model.captions)


def train(config: RunConfig) -> None:
    """The body of one rank; all ranks run it."""
    import torch

    from glipv2.model.adaptation import set_trainable
    from glipv2.pipeline import dist
    from glipv2.pipeline.checkpoint import newest_checkpoint
    from glipv2.pipeline.engine import build_engine, init_distributed, train_step

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


def random_model(config: RunConfig) -> tuple[Any, Any]:
    """The recipe's model with random weights from its seed, and the tokenizer of the package."""
    from glipv2.model.glip import build_model
    from glipv2.model.tokenizer import Tokenizer, tiny_vocab

    tokenizer = Tokenizer.from_vocab(tiny_vocab(), config.model.text_encoder.max_tokens)
    return build_model(config.model, config.seed), tokenizer


def initial_model(config: RunConfig, saved: Saved | None) -> tuple[Any, Any]:
    """The model to train and its tokenizer: from the run's own checkpoint, else from `train.init`,
    else with random weights from the seed."""
    from glipv2.model.weights import model_from_files
    from glipv2.pipeline.checkpoint import load_model

    if saved is None and not config.train.init:
        return random_model(config)
    if saved is not None:
        source, (model, tokenizer) = saved[0], model_from_files(saved[1])
    else:
        source = config.run_url(str(config.train.init))
        model, tokenizer = load_model(source)
    if saved is None and model.config != config.model:
        model = _continued(config, model, source)
    return model.train(), tokenizer


def _continued(config: RunConfig, start: Any, source: str) -> Any:
    """The recipe's model with what it shares with another; heads that one lacks are new."""
    from glipv2.model.adaptation import adopt
    from glipv2.model.glip import build_model

    model = build_model(config.model, config.seed)
    try:
        new = adopt(model, start)
    except ValueError as error:
        raise ConfigError(f"train.init: {source} can't start this recipe: {error}") from error
    if new:
        log.warning("%s starts from %s; new: %s", config.run_dir, source, ", ".join(new))
    return model


def _build_loader(config: RunConfig, tokenizer: Any) -> Any:
    from glipv2.pipeline import dist
    from glipv2.pipeline.loader import build_loader
    from glipv2.pipeline.quarantine import Quarantine
    from glipv2.pipeline.shard_reader import open_shard_set

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


def restore(saved: Saved | None, engine: Any, loader: Any) -> tuple[int, Any]:
    """Put optimiser and stream back where a checkpoint left them: (first step to run, position)."""
    from safetensors.torch import load

    from glipv2.pipeline.optimizer_state import load_full_state
    from glipv2.pipeline.stream import Position

    if saved is None:
        return 0, loader.start()
    url, files = saved
    state = json.loads(files["trainer.json"])
    position = Position.from_dict(state["position"])
    weights = load(files["model.safetensors"])
    load_full_state(engine, weights, load(files["optimizer.safetensors"]), state["step"])
    log.info("resumed from %s", url)
    return state["step"], position


class Recorder:
    """What a run leaves behind while it trains: bar, loss log, checkpoints (main rank only)."""

    def __init__(self, config: RunConfig, tokenizer: Any, first_step: int) -> None:
        from glipv2.pipeline import dist
        from glipv2.pipeline.progress import bar
        from glipv2.pipeline.runlog import LossLog

        self.config, self.tokenizer = config, tokenizer
        self.main = dist.is_main()
        if self.main:
            name = os.path.basename(config.run_dir.rstrip("/"))
            self.bar = bar(config.train.steps, f"pretrain {name}", "step", first_step)
            self.losses = LossLog(config.run_dir, first_step)

    def step(self, step: int, values: dict[str, float], seconds: float) -> None:
        if not self.main:
            return
        self.losses.append(step, values)
        rate = self.config.train.global_batch / max(seconds, 1e-9)
        self.bar.set_postfix_str(f"loss {values['loss']:.3f}, {rate:.0f} img/s", refresh=False)
        self.bar.update(1)

    def save(self, engine: Any, step: int, position: Any) -> None:
        """Commit a checkpoint at `step`; every rank must call it."""
        from safetensors.torch import save

        from glipv2.model.weights import model_files
        from glipv2.pipeline import dist
        from glipv2.pipeline.checkpoint import prune_checkpoints, save_checkpoint
        from glipv2.pipeline.optimizer_state import full_state
        from glipv2.pipeline.stream import merge_positions

        weights, moments = full_state(engine)
        positions = dist.gather_objects(position)
        if self.main:
            self.losses.flush()
            trainer = {"step": step, "position": merge_positions(positions).to_dict()}
            files = model_files(engine.module, self.tokenizer)
            files["model.safetensors"] = save(weights)
            files["optimizer.safetensors"] = save(moments)
            files["trainer.json"] = json.dumps(trainer).encode()
            save_checkpoint(self.config.run_dir, step, files)
            prune_checkpoints(self.config.run_dir, self.config.train.keep_checkpoints)
        dist.barrier()

    def close(self) -> None:
        if self.main:
            self.bar.close()
