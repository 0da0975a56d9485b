"""A run goes on from what any ranks saved, at any world size and ZeRO stage."""

import json
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from glipv2.model.folders import COMMIT, step_url
from glipv2.pipeline import dist, storage
from glipv2.pipeline.checkpoint import Checkpoint, committed_steps, newest_checkpoint
from glipv2.pipeline.ema import Ema
from glipv2.pipeline.engine import loss_scaler
from glipv2.pipeline.errors import DataError
from glipv2.pipeline.fragments import WEIGHT, create_moments, held_fragments
from glipv2.pipeline.health import Skip
from glipv2.pipeline.position import Position
from glipv2.pipeline.saver import TRAINER, state_files, whole_tensors
from glipv2.pipeline.state_file import copy_saved

log = logging.getLogger(__name__)


def checkpoint_to_resume(run_dir: str, skips: Sequence[Skip]) -> Checkpoint | None:
    """The newest checkpoint that verifies and is from no stretch that was rolled back.

    Every rank must call it: each reads a part of the files. Later steps, which are damaged or
    rolled back, are made to exist no more, so that they can be saved again. DataError if none is
    left of those that there were.
    """

    def problems_of(checkpoint: Checkpoint) -> list[str]:
        own = sorted(checkpoint.files)[dist.rank() :: dist.world_size()]
        found = [
            problem for told in dist.gather_objects(checkpoint.verify(own)) for problem in told
        ]
        return found or _rolled_back(checkpoint, skips)

    found = newest_checkpoint(run_dir, problems_of)
    if found and dist.is_main():
        for step in committed_steps(run_dir):
            if step > found.step:
                storage.delete(storage.join(step_url(run_dir, step), COMMIT))
    dist.barrier()
    return found


def _rolled_back(checkpoint: Checkpoint, skips: Sequence[Skip]) -> list[str]:
    known = trainer_state(checkpoint)["skips"]
    if any(skip.step < checkpoint.step for skip in skips[known:]):
        return [f"{checkpoint.url} is of a stretch that was rolled back after a loss spike"]
    return []


def trainer_state(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a checkpoint knows beside tensors: step, stream position, updates, skips, loss scale."""
    state: dict[str, Any] = json.loads(checkpoint.read(TRAINER))
    return state


def load_trained(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Give a model the weights of training itself, where its file holds their average."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    shapes = {name: parameter.shape for name, parameter in named.items()}
    whole = whole_tensors(_state_urls(checkpoint), shapes, WEIGHT)
    model.load_state_dict(whole, strict=False)


def restore(checkpoint: Checkpoint, engine: Any, ema: Ema | None) -> Position:
    """Put weights, moments and average back where they were; where the stream goes on.

    The engine must have been built around the weights of the checkpoint. Every rank reads what it
    holds, from the files of any number of ranks. Raises DataError when they don't fit the model.
    """
    state = trainer_state(checkpoint)
    try:
        create_moments(engine, state["updates"])
        copy_saved(_state_urls(checkpoint), held_fragments(engine))
        if ema:
            copy_saved(_state_urls(checkpoint), ema.shares)
        _set_loss_scale(engine, state["loss_scale"])
    except KeyError as error:
        raise DataError(f"{checkpoint.file(TRAINER)} lacks {error}; use another step") from error
    log.info("resumed from %s", checkpoint.url)
    return Position.from_dict(state["position"])


def engine_state(engine: Any) -> dict[str, Any]:
    """What of an engine is no tensor: updates applied, loss scale."""
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    steps = [state["step"] for state in inner.state.values() if "step" in state]
    updates = int(torch.as_tensor(steps[0])) if steps else 0
    return {"updates": updates, "loss_scale": _loss_scale(engine)}


LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def _loss_scale(engine: Any) -> dict[str, float]:
    scaler = loss_scaler(engine)
    return {key: getattr(scaler, key) for key in LOSS_SCALE if hasattr(scaler, key)}


def _set_loss_scale(engine: Any, saved: dict[str, float]) -> None:
    scaler = loss_scaler(engine)
    for key, value in saved.items():
        if hasattr(scaler, key):
            setattr(scaler, key, value)


def _state_urls(checkpoint: Checkpoint) -> list[str]:
    return [checkpoint.file(name) for name in state_files(sorted(checkpoint.files))]
