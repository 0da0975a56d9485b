"""Which parts of the fp32 weights and of AdamW's moments a rank holds, at any ZeRO stage.

DeepSpeed's own checkpoint files are pickles that fit one stage and one world size. A fragment is a
range of one named parameter instead, so that what any ranks saved can be put together by any
others, without a conversion step.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from glipv2.pipeline import dist

WEIGHT = "fp32"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + len) of a flattened parameter."""

    name: str
    start: int
    values: dict[str, Tensor]
    """`fp32` and each moment: 1-D views of the optimiser's own memory."""

    def part(self, first: int, last: int) -> "Fragment":
        """The elements [first, last) of this fragment."""
        return Fragment(
            self.name,
            self.start + first,
            {kind: value[first:last] for kind, value in self.values.items()},
        )

    def __len__(self) -> int:
        return len(next(iter(self.values.values())))


Holder = Callable[[str, nn.Parameter], Iterator[Fragment]]


def held_fragments(engine: Any) -> list[Fragment]:
    """All that this rank holds of the trained parameters; the moments once they exist."""
    link_moments(engine.optimizer)
    named = (item for item in engine.module.named_parameters() if item[1].requires_grad)
    holds = _holder(engine.optimizer)
    return [fragment for name, p in named for fragment in holds(name, p) if len(fragment)]


def saved_fragments(engine: Any) -> list[Fragment]:
    """What this rank saves: all that it holds, or its share of what every rank holds."""
    held = held_fragments(engine)
    if not _is_replicated(engine.optimizer):
        return held
    rank, world = dist.rank(), dist.world_size()
    shares = (
        fragment.part(len(fragment) * rank // world, len(fragment) * (rank + 1) // world)
        for fragment in held
    )
    return [share for share in shares if len(share)]


def create_moments(engine: Any, step: int) -> None:
    """Give the inner optimiser the state that it would have after `step` steps, all zero."""
    wrapped = engine.optimizer
    inner = _inner(wrapped)
    own = [tensor for group in inner.param_groups for tensor in group["params"]]
    for tensor in getattr(wrapped, "fp32_partitioned_groups_flat", own):  # the former: stage 3
        state = inner.state[tensor]
        state["step"] = torch.tensor(float(step), device=tensor.device)
        for moment in MOMENTS:
            state[moment] = torch.zeros_like(tensor)
    link_moments(wrapped, again=True)


def link_moments(wrapped: Any, again: bool = False) -> None:
    """Let DeepSpeed find the moments of every parameter in ZeRO's flat buffers.

    Its own linking happens after the first group's first step and misses all other groups.
    """
    if not hasattr(wrapped, "_lazy_init_hp_params_optimizer_state"):
        return
    inner = _inner(wrapped)
    exist = all(inner.state.get(t) for group in inner.param_groups for t in group["params"])
    if exist or again:
        wrapped._hp_optimizer_states_linked = False
        wrapped._lazy_init_hp_params_optimizer_state()


def _inner(wrapped: Any) -> torch.optim.Optimizer:
    return wrapped if isinstance(wrapped, torch.optim.Optimizer) else wrapped.optimizer


def _is_replicated(wrapped: Any) -> bool:
    """Stage 0: every rank has everything."""
    return isinstance(wrapped, torch.optim.Optimizer) or hasattr(wrapped, "fp32_groups")


def _holder(wrapped: Any) -> Holder:
    """Fragments of a named parameter, by the kind of DeepSpeed's optimiser."""
    if _is_replicated(wrapped):
        return _whole(wrapped)
    if hasattr(wrapped, "fp32_partitioned_groups_flat"):
        return _partition_of_stage3(wrapped)
    return _partition


def _whole(wrapped: Any) -> Holder:
    masters: dict[nn.Parameter, Tensor] = {}
    if hasattr(wrapped, "fp32_groups"):  # 16 bits: the masters are beside the parameters
        for low, high in zip(wrapped.fp16_groups, wrapped.fp32_groups, strict=True):
            masters |= zip(low, high, strict=True)
    states = _inner(wrapped).state

    def fragments(name: str, parameter: nn.Parameter) -> Iterator[Fragment]:
        master = masters.get(parameter, parameter)
        state = states.get(master, {})
        values = {WEIGHT: master.detach()} | {key: state[key] for key in MOMENTS if key in state}
        yield Fragment(name, 0, {kind: value.view(-1) for kind, value in values.items()})

    return fragments


def _partition(name: str, parameter: nn.Parameter) -> Iterator[Fragment]:
    """Stages 1 and 2: this rank's part of the flat buffer may begin or end within a parameter."""
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:  # wholly in another rank's part
        return
    moments = mapping.optim_fragment or {}
    values = {WEIGHT: mapping.hp_fragment.detach()}
    values |= {key: moments[key] for key in MOMENTS if key in moments}
    yield Fragment(name, mapping.lp_fragment_address.start, values)


def _partition_of_stage3(wrapped: Any) -> Holder:
    """Every parameter is cut into equal parts, the last of them padded."""

    def part(parameter: nn.Parameter, key: str | None) -> Tensor:
        found, _ = wrapped._get_fp32_opt_state_partition(
            parameter, release_swap_buffers=False, optim_state_key=key
        )
        return found.detach()

    states = [wrapped.optimizer.state.get(t, {}) for t in wrapped.fp32_partitioned_groups_flat]
    kinds = [key for key in MOMENTS if all(key in state for state in states)]

    def fragments(name: str, parameter: Any) -> Iterator[Fragment]:
        values = {WEIGHT: part(parameter, None)} | {key: part(parameter, key) for key in kinds}
        padded = values[WEIGHT].numel()
        start = padded * wrapped._get_param_partition_rank(parameter)
        whole = Fragment(name, start, values)
        yield whole.part(0, max(0, min(padded, parameter.ds_numel - start)))

    return fragments
