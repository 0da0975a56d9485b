"""DeepSpeed around the model: one optimiser step, and the derived ZeRO configuration."""

import atexit
import io
import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from glipv2.model.batch import Batch, Collectives
from glipv2.model.config import LossWeights
from glipv2.pipeline import dist
from glipv2.pipeline.errors import ConfigError, NonFiniteLossError
from glipv2.pipeline.optim import build_optimizer, schedule_factor, set_rates
from glipv2.pipeline.train_config import TrainConfig


def init_distributed() -> None:
    """Join the process group that the launcher's environment describes (one process: a group of 1).

    gloo on the CPU, NCCL on CUDA, where the rank's GPU is chosen first: collectives of objects take
    the current one, which is the first of the host until then.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    for key, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        os.environ.setdefault(key, value)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "0" if os.environ["WORLD_SIZE"] == "1" else "29500")
    import deepspeed
    import deepspeed.ops

    # its shared-memory collective is compiled for minutes at first use and only serves inference
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(dist.local_device())
    dist.join_launched_group(backend)
    deepspeed.init_distributed(
        dist_backend=backend,
        timeout=dist.COLLECTIVE_TIMEOUT,
        auto_mpi_discovery=False,
        verbose=False,
    )
    if backend == "gloo":
        atexit.register(_leave_group)


LETTING_GO = 0.5
"""Seconds, of which gloo's threads need far less, even on a busy machine."""


def _leave_group() -> None:
    """Let gloo's threads drop the tensors of the last collectives while there is an interpreter.

    They need it for that, and abort the process where it has begun to end (pytorch issue 190489).
    Destroying the group would wait for them if DeepSpeed held no reference to it.
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    time.sleep(LETTING_GO)


BUCKET = 5 * 10**7
"""Gradients that are reduced together: DeepSpeed's own 5e8 never fill up before the backward pass
of these models ends, so that nothing overlaps, and are a gigabyte of buffer."""

MIN_LOSS_SCALE = 1.0
"""Of fp16: a gradient that overflows even so is not finite in itself."""


def check_engine(train: TrainConfig, world_size: int, cuda: bool) -> None:
    """ConfigError for what this many ranks on such devices can't run."""
    train.micro_batch(world_size)
    if train.precision == "fp16" and not cuda:
        raise ConfigError(
            "train.precision=fp16 needs a GPU, and there is none here: set train.precision=fp32, "
            "or bf16"
        )


def zero_config(train: TrainConfig, world_size: int, cuda: bool) -> dict[str, Any]:
    """DeepSpeed's configuration, derived from ours so that no second file can disagree."""
    zero: dict[str, Any] = {
        "stage": train.zero_stage,
        "overlap_comm": cuda,  # a CPU has no stream to overlap with
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": BUCKET,
    }
    if train.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": cuda}
    if train.offload == "optimizer_and_parameters":
        zero["offload_param"] = {"device": "cpu", "pin_memory": cuda}
    derived = {
        "train_micro_batch_size_per_gpu": train.micro_batch(world_size),
        "gradient_accumulation_steps": train.accumulation,
        # without ZeRO, in fp32, we clip: DeepSpeed would use gradients that are not finite
        "gradient_clipping": 0.0 if _is_bare(train) else train.max_grad_norm,
        "zero_optimization": zero,
        # our optimiser is torch's AdamW; without these DeepSpeed compiles one of its own
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "communication_data_type": "fp32",
        "bf16": {"enabled": train.precision == "bf16"},
        "fp16": {
            "enabled": train.precision == "fp16",
            "loss_scale": 0,  # dynamic: halved at an overflow, doubled after a window without
            "initial_scale_power": 16,
            "loss_scale_window": 1000,
            "hysteresis": 2,
            "min_loss_scale": MIN_LOSS_SCALE,
        },
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
    if train.accumulation > 1 and train.precision != "fp32" and train.zero_stage > 0:
        derived["data_types"] = {"grad_accum_dtype": "fp32"}  # without ZeRO it has no such choice
    return derived


def _is_bare(train: TrainConfig) -> bool:
    """Whether DeepSpeed leaves the optimiser as it is, gradients unchecked."""
    return train.zero_stage == 0 and train.precision == "fp32"


def build_engine(model: nn.Module, train: TrainConfig) -> Any:
    """A DeepSpeed engine for `model`; the process group must exist."""
    import deepspeed

    with redirect_stdout(io.StringIO()):  # one of its optimisers prints memory, group by group
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=build_optimizer(model, train),
            config=zero_config(train, dist.world_size(), torch.cuda.is_available()),
        )
    if hasattr(loss_scaler(engine), "raise_error_at_min_scale"):
        loss_scaler(engine).raise_error_at_min_scale = False  # train_step says more, and may go on
    return engine


def loss_scaler(engine: Any) -> Any:
    """DeepSpeed's dynamic loss scaler: with ZeRO an object of its own."""
    found = getattr(engine.optimizer, "loss_scaler", None)
    return found or getattr(engine.optimizer, "loss_scale_config", None)


LEFT_OUT = "left_out"
"""fp16: 1 where the gradient of a step overflowed, so that it changed nothing."""


def train_step(
    engine: Any,
    micro_batches: Sequence[Batch],
    step: int,
    train: TrainConfig,
    weights: LossWeights,
    collectives: Collectives,
    before_update: Callable[[], None] = lambda: None,
    after_update: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Forward and backward of each micro-batch, and one update; returns the losses, averaged over
    micro-batches and ranks. `before_update` is called when weights and moments are about to change,
    `after_update` when they have.

    Raises NonFiniteLossError on all ranks together if a loss or the gradient is not finite, with
    weights and optimiser untouched and gradients dropped, so that the next step can follow. fp16
    leaves out a step whose gradient overflows instead, and lowers its loss scale, as long as there
    is a lower one; it returns the scale of the step too, and whether it was left out.
    """
    set_rates(engine.optimizer, step, train)
    if len(micro_batches) > 1:
        counts = torch.stack([engine.module.counts(batch) for batch in micro_batches])
        step_counts = dist.mean_over_ranks(counts.mean(dim=0), ends_own_part=False)
        collectives = replace(collectives, step_counts=step_counts)
    taken: list[Tensor] = []
    for number, batch in enumerate(micro_batches, start=1):
        last = number == len(micro_batches)
        engine.set_gradient_accumulation_boundary(last)
        losses: dict[str, Tensor] = engine(batch, collectives, weights)
        total = torch.stack([getattr(weights, name) * loss for name, loss in losses.items()]).sum()
        taken.append(torch.stack([total, *losses.values()]).detach().float())
        if last:
            mean = dist.mean_over_ranks(torch.stack(taken).mean(dim=0))
            # A loss that is not finite on one rank makes no gradient finite on any: the update is
            # left out below, without waiting for the loss here.
            total = total * torch.where(mean.isfinite().all(), 1.0, math.nan)
        engine.backward(total)
    before_update()
    fp16 = train.precision == "fp16"
    scale = float(loss_scaler(engine).cur_scale) if fp16 else MIN_LOSS_SCALE
    updated = _update(engine, train)
    named = dict(zip(("loss", *losses), mean.tolist(), strict=True))
    check_finite(named, step, micro_batches)
    if updated:
        after_update()
    elif scale <= MIN_LOSS_SCALE:
        raise _not_finite("the gradient is not finite", step, micro_batches)
    if fp16:
        named |= {"loss_scale": scale, LEFT_OUT: float(not updated)}
    return {"lr": train.learning_rate * schedule_factor(step, train), **named}


def _update(engine: Any, train: TrainConfig) -> bool:
    """Clip the gradient and step, or drop it if it is not finite; all ranks do the same."""
    if _is_bare(train):
        most = train.max_grad_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(engine.module.parameters(), most)
        if not norm.isfinite():
            engine.zero_grad()
            return False
    engine.step()
    applied = bool(engine.was_step_applied())
    if not applied and train.offload != "none" and train.zero_stage < 3:
        # With offloading DeepSpeed 0.19 keeps the gradient of a step that it left out, and adds the
        # next one to it.
        for group in engine.optimizer.averaged_gradients:
            engine.optimizer.averaged_gradients[group] = None
    return applied


def check_finite(losses: dict[str, float], step: int, micro_batches: Sequence[Batch]) -> None:
    """All ranks see the same averages, so all raise or none does."""
    for name, value in losses.items():
        if not math.isfinite(value):
            what = f"loss {name!r} is {value} on at least one rank"
            raise _not_finite(what, step, micro_batches)


def _not_finite(what: str, step: int, micro_batches: Sequence[Batch]) -> NonFiniteLossError:
    keys = ", ".join(key for batch in micro_batches for key in batch.keys)
    return NonFiniteLossError(
        f"step {step}: {what}; this rank's samples were {keys}. Weights are unchanged. Look at "
        "those samples, or lower train.learning_rate"
    )
