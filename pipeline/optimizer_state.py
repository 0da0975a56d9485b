"""Weights and optimiser state by parameter name, whole: the same for any ZeRO stage and world size.

DeepSpeed's own checkpoint files are pickles that fit one world size only; ours are plain named
tensors, so a run resumes on any number of ranks without a conversion step.
"""

from typing import Any

import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")


def full_state(engine: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(fp32 weights by name, AdamW moments as `name/moment`), both on the CPU.

    Every rank must call it, after at least one optimiser step; with ZeRO it gathers. Buffers are
    part of the weights.
    """
    _link_moments(engine.optimizer)
    weights: dict[str, Tensor] = {
        name: buffer.detach().cpu().clone() for name, buffer in _persistent_buffers(engine.module)
    }
    moments: dict[str, Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            weights[name] = parameter.detach().cpu().clone()
            continue
        weights[name] = _get(engine, parameter, None)
        for moment in MOMENTS:
            moments[f"{name}/{moment}"] = _get(engine, parameter, moment)
    return weights, moments


def load_full_state(
    engine: Any, weights: dict[str, Tensor], moments: dict[str, Tensor], step: int
) -> None:
    """Put back what `full_state` returned; every rank must call it, before its first step.

    The engine must have been built around a model that already holds `weights`: here only the fp32
    masters and the moments behind them are set.
    """
    _create_moments(engine, step)
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        _set(engine, parameter, weights[name], None)
        for moment in MOMENTS:
            _set(engine, parameter, moments[f"{name}/{moment}"], moment)


def _persistent_buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    parameters = {name for name, _ in module.named_parameters()}
    return [(name, t) for name, t in module.state_dict().items() if name not in parameters]


def _is_plain(engine: Any) -> bool:
    """Stage 0 in fp32: DeepSpeed leaves torch's optimiser as it is."""
    return isinstance(engine.optimizer, torch.optim.AdamW)


def _get(engine: Any, parameter: nn.Parameter, moment: str | None) -> Tensor:
    if _is_plain(engine):
        source = parameter if moment is None else engine.optimizer.state[parameter][moment]
        return source.detach().float().cpu().clone()
    if moment is None:
        return safe_get_full_fp32_param(parameter).detach().cpu().clone()
    return safe_get_full_optimizer_state(parameter, moment).detach().cpu().clone()


def _set(engine: Any, parameter: nn.Parameter, value: Tensor, moment: str | None) -> None:
    value = value.to(parameter.device)
    if _is_plain(engine):
        target = parameter.data if moment is None else engine.optimizer.state[parameter][moment]
        target.copy_(value)
    elif hasattr(parameter, "ds_id"):
        _set_stage3(engine.optimizer, parameter, value, moment)
    elif moment is None:
        safe_set_full_fp32_param(parameter, value)
    else:
        safe_set_full_optimizer_state(parameter, value, moment)


def _set_stage3(wrapped: Any, parameter: nn.Parameter, value: Tensor, moment: str | None) -> None:
    """DeepSpeed's own setter fails where the last rank's partition is padded."""
    part, _ = wrapped._get_fp32_opt_state_partition(
        parameter, release_swap_buffers=False, optim_state_key=moment
    )
    start = part.numel() * wrapped._get_param_partition_rank(parameter)
    own = value.flatten()[start : start + part.numel()]
    part.data[: own.numel()].copy_(own)


def _create_moments(engine: Any, step: int) -> None:
    """Give the inner optimiser the state that it would have after `step` steps, all zero."""
    wrapped = engine.optimizer
    inner = wrapped if _is_plain(engine) else wrapped.optimizer
    own = [tensor for group in inner.param_groups for tensor in group["params"]]
    for tensor in getattr(wrapped, "fp32_partitioned_groups_flat", own):  # the former: stage 3
        state = inner.state[tensor]
        state["step"] = torch.tensor(float(step), device=tensor.device)
        for moment in MOMENTS:
            state[moment] = torch.zeros_like(tensor)
    _link_moments(wrapped)


def _link_moments(wrapped: Any) -> None:
    """Let DeepSpeed find the moments of every parameter in ZeRO's flat buffers.

    Its own linking happens after the first group's first step and misses all other groups.
    """
    if hasattr(wrapped, "_lazy_init_hp_params_optimizer_state"):
        wrapped._hp_optimizer_states_linked = False
        wrapped._lazy_init_hp_params_optimizer_state()
