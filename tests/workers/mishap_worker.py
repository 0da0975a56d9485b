"""One rank of a pretraining to which something happens, once each.

Usage: mishap_worker.py RECIPE [nan=STEP] [spike=STEP] [section.key=value ...]
nan: a loss weight of that step is NaN. spike: its loss is told to be 50 times what it is. Losses
are compared over the last 5 steps instead of 100.
"""

import dataclasses
import math
import sys
from typing import Any

from glipv2.jobs.cli import main as command
from glipv2.pipeline import engine, health, trainer

real = engine.train_step


def main(recipe: str, settings: list[str]) -> int:
    mishaps = dict(s.split("=") for s in settings if s.startswith(("nan=", "spike=")))

    def train_step(own: Any, batches: Any, step: int, train: Any, weights: Any, *rest: Any,
                   **more: Any) -> dict[str, float]:  # fmt: skip
        if mishaps.get("nan") == str(step):
            del mishaps["nan"]
            weights = dataclasses.replace(weights)
            object.__setattr__(weights, "box", math.nan)  # which no recipe may ask for
        losses = real(own, batches, step, train, weights, *rest, **more)
        if mishaps.get("spike") == str(step):
            del mishaps["spike"]
            losses["loss"] *= 50
        return losses

    health.RECENT = 5
    trainer.train_step = train_step
    others = [s for s in settings if not s.startswith(("nan=", "spike="))]
    return command(["pretrain", recipe, *others])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
