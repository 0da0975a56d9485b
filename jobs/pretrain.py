"""glipv2 pretrain RECIPE: what is refused before it starts, then ranks that train."""

import argparse

from glipv2.jobs.stages import add_recipe_arguments, recipe_config, stage
from glipv2.pipeline.checkpoint import committed_steps
from glipv2.pipeline.config import RunConfig
from glipv2.pipeline.errors import ConfigError
from glipv2.pipeline.launch import exclusive, launch_ranks, under_launcher
from glipv2.pipeline.run_settings import note_settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_arguments(parser, phase="a phase of the recipe, for example teacher")


def run(arguments: argparse.Namespace) -> int:
    config = recipe_config(arguments, arguments.phase)
    if under_launcher():
        from glipv2.pipeline.trainer import train  # with torch and DeepSpeed: seconds

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
    return committed_steps(config.run_dir)[-1:] == [config.train.steps]


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
