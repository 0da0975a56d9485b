"""What makes a run the run that it is: its settings, which it can't be resumed without."""

import logging
from dataclasses import fields
from typing import Any

import yaml

from glipv2.model.config import LossWeights
from glipv2.pipeline import storage
from glipv2.pipeline.checkpoint import committed_steps, newest_checkpoint
from glipv2.pipeline.config import RunConfig
from glipv2.pipeline.config_loader import as_tree, dump_config
from glipv2.pipeline.errors import ConfigError

log = logging.getLogger(__name__)

CONFIG = "config.yaml"
MAY_CHANGE = {
    "data.root", "data.cache", "data.cache_gb", "data.workers", "data.max_bad_share", "train.steps",
    "train.processes", "train.threads", "train.zero_stage", "train.accumulation",
    "train.checkpoint_activations", "train.offload", "train.compile", "train.checkpoint_every",
    "train.keep_checkpoints",
}  # fmt: skip
"""Settings that a run may be resumed with in another value."""
MAY_BE_FORCED = {f"losses.{field.name}" for field in fields(LossWeights)} | {
    "train.bias_rate_factor", "train.flat_share", "train.head_learning_rate", "train.learning_rate",
    "train.max_grad_norm", "train.milestones", "train.rate_factors", "train.schedule",
    "train.text_learning_rate", "train.warmup_factor", "train.warmup_steps", "train.weight_decay",
    "train.weight_decay_milestones",
}  # fmt: skip
"""Those that a run may go on with in another value if somebody insists: what it learnt before stays
usable, but it is no longer what either settings alone would have given."""


def note_settings(config: RunConfig, force: bool = False) -> str:
    """Write RUN/config.yaml, unless it holds the same already; refuses to make it another run's.

    With `force` those of MAY_BE_FORCED may change too; RUN/config-until-STEP.yaml then keeps what
    the steps so far were trained with.
    """
    url, resolved = storage.join(config.run_dir, CONFIG), dump_config(config).encode()
    step = check_same_run(config, force)
    if step == config.train.steps:
        return url  # and nothing was trained with those of now
    if step is not None:
        log.warning("it goes on from step %d with the settings of now", step)
        until = storage.join(config.run_dir, f"config-until-{step:06d}.yaml")
        storage.create_once(until, storage.read_bytes(url))
    if not storage.exists(url) or storage.read_bytes(url) != resolved:
        storage.write_bytes(url, resolved)
    return url


def check_same_run(config: RunConfig, force: bool = False) -> int | None:
    """Refuse to go on with a run under settings that would have made it another run.

    Returns the step from which on it is one by `force`, else None.
    """
    steps = committed_steps(config.run_dir)
    url = storage.join(config.run_dir, CONFIG)
    if not steps or not storage.exists(url):
        return None
    if steps[-1] > config.train.steps:
        raise ConfigError(
            f"{config.run_dir} is at step {steps[-1]} already, beyond train.steps="
            f"{config.train.steps}; raise it, or choose another run_dir"
        )
    old, new = _decisive(yaml.safe_load(storage.read_bytes(url))), _decisive(as_tree(config))
    changed = {
        key: f"{key}: {_shown(old.get(key))} there, {_shown(new.get(key))} now"
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key)
    }
    if not changed:
        return None
    said = f"{config.run_dir} was begun with other settings:\n  " + "\n  ".join(changed.values())
    forceable = changed.keys() <= MAY_BE_FORCED
    if force and forceable:
        log.warning(said)
        newest = newest_checkpoint(config.run_dir)
        return newest.step if newest else None
    go_on = ", or go on with these by --force" if forceable else ""
    raise ConfigError(
        f"{said}\ngive those again to go on with it, or choose another run_dir{go_on}"
    )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."  # thousands of answers, say


def _decisive(tree: dict[str, Any]) -> dict[str, Any]:
    """`section.key` -> value of what decides the weights; speed and length may change."""
    flat = {"seed": tree["seed"]}
    for section in ("model", "losses", "data", "train"):
        flat |= {f"{section}.{key}": value for key, value in tree[section].items()}
    return {key: value for key, value in flat.items() if key not in MAY_CHANGE}
