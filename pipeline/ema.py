"""The exponential moving average of the weights, each rank keeping that of its own share."""

from typing import Any

import torch
from torch import Tensor

from glipv2.pipeline.fragments import WEIGHT, Fragment, saved_fragments

EMA = "ema"


class Ema:
    """average <- decay * average + (1 - decay) * weights, after every step (facts G.1)."""

    def __init__(self, engine: Any, decay: float) -> None:
        self.decay = decay
        shares = saved_fragments(engine)
        self.weights: list[Tensor] = [share.values[WEIGHT] for share in shares]
        self.shares = [
            Fragment(share.name, share.start, {EMA: share.values[WEIGHT].clone()})
            for share in shares
        ]

    def update(self) -> None:
        if self.weights:
            averages = [share.values[EMA] for share in self.shares]
            torch._foreach_lerp_(averages, self.weights, 1 - self.decay)
