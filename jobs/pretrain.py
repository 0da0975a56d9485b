"""glipv2 pretrain RECIPE: what is refused before it starts, then ranks that train."""

import argparse
import logging
import sys
from contextlib import nullcontext

from glipv2.jobs.stages import add_recipe_arguments, recipe_config, stage, use_cluster
from glipv2.model.adaptation import check_agreement
from glipv2.model.config import config_from_dict
from glipv2.model.folders import CONFIG, step_url
from glipv2.pipeline import preemption
from glipv2.pipeline.checkpoint import committed_steps, open_checkpoint, resolve_checkpoint
from glipv2.pipeline.config import RunConfig
from glipv2.pipeline.errors import ConfigError, DataError
from glipv2.pipeline.launch import has_our_launcher, is_first_rank, launch_ranks, under_launcher
from glipv2.pipeline.lease import only_trainer
from glipv2.pipeline.progress import say
from glipv2.pipeline.run_settings import note_settings
from glipv2.pipeline.storage import join, read_json
from glipv2.pipeline.watch import LOST_PEER, lost_peer

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_arguments(parser, phase="a phase of the recipe, for example teacher", cluster=True)
    parser.add_argument(
        "--force",
        action="store_true",
        help="go on though rates, schedule, weight decay or loss weights were changed",
    )


def run(arguments: argparse.Namespace) -> int:
    config = recipe_config(arguments, arguments.phase)
    if under_launcher():
        return run_rank(config, arguments.force)
    if arguments.phase:
        with stage(recipe_config(arguments).run_dir, arguments.phase):
            pretrain(config, arguments.address, arguments.force)
    else:
        pretrain(config, arguments.address, arguments.force)
    return 0


def run_rank(config: RunConfig, force: bool = False) -> int:
    """Be the rank that a launcher's environment describes; returns its exit code. For `force` see
    `note_settings`."""
    preemption.listen()
    from glipv2.pipeline.dist import die_with_parent
    from glipv2.pipeline.trainer import train  # with torch and DeepSpeed: seconds

    die_with_parent()
    holds = is_first_rank() and not has_our_launcher()
    try:
        with only_trainer(config.run_dir) if holds else nullcontext():
            train(config, force)
    except RuntimeError as error:
        if not lost_peer(error):
            raise
        print(f"lost the connection to another rank: {error}", file=sys.stderr)  # noqa: T201
        return LOST_PEER
    return 0


def pretrain(config: RunConfig, address: str | None = None, force: bool = False) -> str:
    """Train to the last step, on ranks of this machine or of a Ray cluster; returns the run folder.

    A finished run returns at once; an interrupted one goes on from its newest checkpoint, with
    `force` also under other settings (`note_settings`).
    """
    check_mixture(config)
    with only_trainer(config.run_dir):
        resolved = note_settings(config, force)
        if is_finished(config):
            say(f"{config.run_dir}: all {config.train.steps} steps are done already")
            return config.run_dir
        if address:
            from glipv2.pipeline.ray_trainer import train_on_ray

            use_cluster(address)
            train_on_ray(config)
        else:
            command = [sys.executable, "-m", "glipv2.jobs.cli", "pretrain", resolved]
            launch_ranks(command, config)
    return config.run_dir


def is_finished(config: RunConfig) -> bool:
    """Whether the last step is committed; with a damaged record it is saved again."""
    if committed_steps(config.run_dir)[-1:] != [config.train.steps]:
        return False
    try:
        open_checkpoint(step_url(config.run_dir, config.train.steps))
    except DataError as error:
        log.warning("the last step counts as not saved: %s", error)
        return False
    return True


def check_mixture(config: RunConfig) -> None:
    """Everything that can be refused before a process is started is refused here."""
    check_ranks(config)
    from glipv2.pipeline.shard_reader import check_shard_sizes, open_shard_set
    from glipv2.pipeline.tasks import mixture_task
    from glipv2.pipeline.trackers import check_trackers

    check_trackers(config)
    if config.train.init:
        check_start(config, config.run_url(config.train.init))
    sets = {name: open_shard_set(config.set_url(name)) for name in config.data.mixture}
    for shard_set in sets.values():
        check_shard_sizes(shard_set)
    mixture_task(sets, config.model.answers, config.model.captions)


def check_start(config: RunConfig, init: str) -> None:
    """ConfigError where the model of train.init can't start the recipe's, DataError without one."""
    url = resolve_checkpoint(init)
    if committed_steps(config.run_dir):  # it goes on from there
        return
    try:
        check_agreement(config.model, config_from_dict(read_json(join(url, CONFIG))))
    except ValueError as error:
        raise ConfigError(f"train.init: {init} can't start this recipe: {error}") from error


def check_ranks(config: RunConfig) -> None:
    """What follows from the configuration alone.

    Fewer ranks than train.processes, on Ray, are always as many as fit.
    """
    if not config.data.mixture:
        raise ConfigError(
            "data.mixture is empty: name at least one shard set and its share, or choose a phase "
            "of the recipe with --phase"
        )
    import torch

    from glipv2.pipeline.engine import check_engine
    from glipv2.pipeline.loader import lane_count

    processes = config.train.processes
    cuda = torch.cuda.is_available() or config.supervise.gpus_per_process > 0
    check_engine(config.train, processes, cuda)
    lane_count(config.data, config.train.global_batch, processes)
