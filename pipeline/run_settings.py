"""What makes a run the run that it is: its settings, which it can't be resumed without."""

from typing import Any

import yaml

from glipv2.pipeline import storage
from glipv2.pipeline.checkpoint import committed_steps
from glipv2.pipeline.config import RunConfig
from glipv2.pipeline.config_loader import as_tree, dump_config
from glipv2.pipeline.errors import ConfigError

CONFIG = "config.yaml"
MAY_CHANGE = {
    "data.root", "data.cache", "data.cache_gb", "data.workers", "data.max_bad_share", "train.steps",
    "train.processes", "train.threads", "train.zero_stage", "train.accumulation",
    "train.checkpoint_activations", "train.offload", "train.compile", "train.checkpoint_every",
    "train.keep_checkpoints",
}  # fmt: skip
"""Settings that a run may be resumed with in another value."""


def note_settings(config: RunConfig) -> str:
    """Write RUN/config.yaml, unless it holds the same already; refuses to make it another run's."""
    check_same_run(config)
    url, resolved = storage.join(config.run_dir, CONFIG), dump_config(config).encode()
    if not storage.exists(url) or storage.read_bytes(url) != resolved:
        storage.write_bytes(url, resolved)
    return url


def check_same_run(config: RunConfig) -> None:
    """Refuse to go on with a run under settings that would have made it another run."""
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
