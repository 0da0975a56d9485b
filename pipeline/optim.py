"""Parameter groups and the rates at a step: pure functions of model and configuration."""

import math

import torch
from torch import nn

from glipv2.pipeline.errors import ConfigError
from glipv2.pipeline.train_config import TrainConfig


def parameter_groups(model: nn.Module, train: TrainConfig) -> list[dict[str, object]]:
    """Split the trainable parameters by learning rate and weight decay.

    The text encoder has its own rate, the image encoder and pyramid the base rate, all that comes
    after them the head rate; biases learn faster, and not everything is decayed (facts G.1).
    Each group carries `base_lr` and `base_decay`, which `set_rates` multiplies by the schedules.
    """
    _check_names(model, train)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        rate = _base_rate(name, train) * (train.bias_rate_factor if _is_bias(name) else 1)
        decayed = parameter.ndim > 1 if train.decayed == "matrices" else not _is_bias(name)
        decay = train.weight_decay if decayed else 0.0
        groups.setdefault((rate, decay), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": rate,
            "base_lr": rate,
            "weight_decay": decay,
            "base_decay": decay,
        }
        for (rate, decay), parameters in groups.items()
    ]


def _check_names(model: nn.Module, train: TrainConfig) -> None:
    names = [name for name, _ in model.named_parameters()]
    for key in ("rate_factors", "frozen"):
        for beginning in getattr(train, key):
            if not any(name.startswith(beginning) for name in names):
                raise ConfigError(f"train.{key}: no parameter's name begins with {beginning!r}")


def _base_rate(name: str, train: TrainConfig) -> float:
    factors = (f for beginning, f in train.rate_factors.items() if name.startswith(beginning))
    return _part_rate(name.split(".", 1)[0], train) * math.prod(factors)


def _part_rate(part: str, train: TrainConfig) -> float:
    if part == "text_encoder":
        return train.text_learning_rate
    if part in ("image_encoder", "pyramid"):
        return train.learning_rate
    return train.head_learning_rate


def _is_bias(name: str) -> bool:
    """As GLIP tells them: `bias0`, `bias_text` and `relative_position_bias_table` are biases."""
    return "bias" in name


def build_optimizer(model: nn.Module, train: TrainConfig) -> torch.optim.Optimizer:
    # torch's own AdamW: DeepSpeed's would compile an extension at the first start
    groups = parameter_groups(model, train)
    return torch.optim.AdamW(
        groups, lr=train.learning_rate, betas=train.betas, eps=train.eps, fused=True
    )


def schedule_factor(step: int, train: TrainConfig) -> float:
    """What the base rates are multiplied by at optimiser step `step` (counted from 0)."""
    if step < train.warmup_steps:
        if train.warmup_factor is None:
            return (step + 1) / train.warmup_steps
        done = step / train.warmup_steps
        return train.warmup_factor * (1 - done) + done
    if train.schedule == "steps":
        return _steps_down(step, train.milestones, train)
    share = step / train.steps
    if share < train.flat_share:
        return 1.0
    done = (share - train.flat_share) / max(1e-9, 1 - train.flat_share)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def decay_factor(step: int, train: TrainConfig) -> float:
    """What the weight decays are multiplied by at optimiser step `step`."""
    return _steps_down(step, train.weight_decay_milestones, train)


def _steps_down(step: int, milestones: tuple[float, ...], train: TrainConfig) -> float:
    return float(0.1 ** sum(step / train.steps >= share for share in milestones))


def set_rates(optimizer: torch.optim.Optimizer, step: int, train: TrainConfig) -> None:
    """Give every group its learning rate and weight decay for optimiser step `step`."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * schedule_factor(step, train)
        group["weight_decay"] = group["base_decay"] * decay_factor(step, train)
