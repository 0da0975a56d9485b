"""Parameter groups and the learning rate at a step: pure functions of model and configuration."""

import math

import torch
from torch import nn

from glipv2.pipeline.train_config import TrainConfig


def parameter_groups(model: nn.Module, train: TrainConfig) -> list[dict[str, object]]:
    """Split the trainable parameters by learning rate and weight decay.

    The text encoder has its own rate, the image encoder and pyramid the base rate, all that comes
    after them the head rate (glip_facts G.1). Vectors (biases, norms, scales) are not decayed.
    Each group carries `base_lr`, which `set_learning_rate` multiplies by the schedule.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decay = train.weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((_base_rate(name, train), decay), []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "base_lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]


def _base_rate(name: str, train: TrainConfig) -> float:
    part = name.split(".", 1)[0]
    if part == "text_encoder":
        return train.text_learning_rate
    if part in ("image_encoder", "pyramid"):
        return train.learning_rate
    return train.head_learning_rate


def build_optimizer(model: nn.Module, train: TrainConfig) -> torch.optim.Optimizer:
    # torch's own AdamW: DeepSpeed's would compile an extension at the first start
    groups = parameter_groups(model, train)
    return torch.optim.AdamW(groups, lr=train.learning_rate, betas=train.betas, fused=True)


def schedule_factor(step: int, train: TrainConfig) -> float:
    """What the base rates are multiplied by at optimiser step `step` (counted from 0)."""
    if step < train.warmup_steps:
        return max(0.001, (step + 1) / train.warmup_steps)  # GLIP starts at x 0.001
    share = step / train.steps
    if train.schedule == "steps":
        return 0.1 ** ((share >= 0.67) + (share >= 0.89))
    if share < train.flat_share:
        return 1.0
    done = (share - train.flat_share) / max(1e-9, 1 - train.flat_share)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
