"""DeepSpeed around the model: one optimiser step, and the derived ZeRO configuration."""

import atexit
import math
import os
from typing import Any

import torch
from torch import Tensor, nn

from glipv2.model.batch import Batch, Collectives
from glipv2.model.config import LossWeights
from glipv2.pipeline import dist
from glipv2.pipeline.errors import NonFiniteLossError
from glipv2.pipeline.optim import build_optimizer, schedule_factor, set_learning_rate
from glipv2.pipeline.train_config import TrainConfig


def init_distributed() -> None:
    """Join the process group that the launcher's environment describes (one process: a group of 1).

    gloo on the CPU, NCCL on CUDA.
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
    deepspeed.init_distributed(
        dist_backend=backend,
        timeout=dist.COLLECTIVE_TIMEOUT,
        auto_mpi_discovery=False,
        verbose=False,
    )
    if backend == "gloo":  # its threads, when they outlive the interpreter, may abort the process
        atexit.register(_leave_group)


def _leave_group() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def zero_config(train: TrainConfig, micro_batch: int) -> dict[str, Any]:
    """DeepSpeed's configuration, derived from ours so that no second file can disagree."""
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": train.max_grad_norm,
        "zero_optimization": {"stage": train.zero_stage},
        # our optimiser is torch's AdamW; without these DeepSpeed compiles one of its own
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": train.precision == "bf16"},
        "fp16": {"enabled": train.precision == "fp16"},
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


def build_engine(model: nn.Module, train: TrainConfig, micro_batch: int) -> Any:
    """A DeepSpeed engine for `model`; the process group must exist."""
    import deepspeed

    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=build_optimizer(model, train),
        config=zero_config(train, micro_batch),
    )
    return engine


def train_step(
    engine: Any,
    batch: Batch,
    step: int,
    train: TrainConfig,
    weights: LossWeights,
    collectives: Collectives,
) -> dict[str, float]:
    """Forward, backward and update; returns the losses averaged over ranks.

    Raises NonFiniteLossError on all ranks together, with weights and optimiser untouched.
    """
    factor = schedule_factor(step, train)
    set_learning_rate(engine.optimizer, factor)
    losses: dict[str, Tensor] = engine(batch, collectives, weights)
    total = torch.stack([getattr(weights, name) * loss for name, loss in losses.items()]).sum()
    values = dist.mean_over_ranks(torch.stack([total, *losses.values()]).float()).tolist()
    named = dict(zip(("loss", *losses), values, strict=True))
    check_finite(named, step, batch)
    engine.backward(total)
    engine.step()
    return {"lr": train.learning_rate * factor, **named}


def check_finite(losses: dict[str, float], step: int, batch: Batch) -> None:
    """All ranks see the same averages, so all raise or none does."""
    for name, value in losses.items():
        if not math.isfinite(value):
            raise NonFiniteLossError(
                f"step {step}: loss {name!r} is {value} on at least one rank; this rank's samples "
                f"were {', '.join(batch.keys)}. Weights are unchanged. Look at those samples, or "
                "lower train.learning_rate"
            )
