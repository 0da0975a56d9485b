"""Which rank the others wait for.

Of a step, a rank's own part is the time until it reaches the step's first collective: its batch and
its forward pass. What follows is waiting as well, so it says nothing. With several micro-batches
their counts are averaged before any pass: that ends no own part, and the waiting there is none of
it. Under ZeRO 3 the forward pass itself waits, and stragglers go unseen.
"""

import logging
import socket
from statistics import median

from glipv2.pipeline import dist
from glipv2.pipeline.train_config import SuperviseConfig

log = logging.getLogger(__name__)

SAMPLES = 10
"""Steps before each look that are timed."""
NOTICEABLE = 0.01
"""Seconds of a step below which nobody cares."""


class Stragglers:
    """One for each rank; `begin` before a step's batch is asked for, `end` after the step."""

    def __init__(self, supervise: SuperviseConfig) -> None:
        self.every, self.ratio = supervise.straggler_every, supervise.straggler_ratio
        self.own: list[float] = []

    def begin(self, step: int) -> None:
        if self._is_timed(step):
            dist.begin_own_part()

    def end(self, step: int) -> None:
        """Every rank must call it; the main rank warns of those that are slow."""
        if not self._is_timed(step):
            return
        self.own.append(dist.own_part())
        if (step + 1) % self.every == 0:
            told = dist.gather_objects((median(self.own), socket.gethostname()))
            self.own = []
            if dist.is_main():
                for text in slow_ranks(told, self.ratio):
                    log.warning("step %d: %s", step, text)

    def _is_timed(self, step: int) -> bool:
        several = bool(self.every) and dist.world_size() > 1
        return several and step % self.every >= self.every - SAMPLES


def slow_ranks(told: list[tuple[float, str]], ratio: float) -> list[str]:
    """What to say of (own seconds of a step, host) of all ranks."""
    found = []
    for rank, (seconds, host) in enumerate(told):
        others = median(own for other, (own, _) in enumerate(told) if other != rank)
        if seconds > max(others * ratio, others + NOTICEABLE):
            found.append(
                f"the others wait for rank {rank} on {host}: its own part of a step takes "
                f"{seconds:.3f} s, theirs {others:.3f} s"
            )
    return found
