"""One rank of a pretraining that notes which of its settings reached the model.

Usage: trainer_worker.py RECIPE NOTES [section.key=value ...]; NOTES is a folder, which gets a file
of each rank. Rank 0 waits a little for every batch, rank 1 is slow in its forward pass.
"""

import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from glipv2.jobs.cli import main as command
from glipv2.model.glip import GLIPv2
from glipv2.pipeline import dist
from glipv2.pipeline.ema import Ema
from glipv2.pipeline.loader import Loader

DATA, FORWARD = 0.05, 0.3
"""Seconds."""


def main(recipe: str, folder: str, settings: list[str]) -> int:
    recomputed: list[list[str]] = []
    calls: Counter[str] = Counter()
    recompute, update, forward, steps = (
        GLIPv2.recompute, Ema.update, GLIPv2.forward, Loader.steps,
    )  # fmt: skip

    def noted_recompute(self: GLIPv2, parts: Any) -> None:
        recomputed.append(list(parts))
        recompute(self, parts)

    def noted_compile(self: GLIPv2) -> None:
        calls["compile"] += 1

    def noted_update(self: Ema) -> None:
        calls["update"] += 1
        update(self)

    def slow_forward(self: GLIPv2, *inputs: Any, **named: Any) -> Any:
        time.sleep(FORWARD * dist.rank())
        return forward(self, *inputs, **named)

    def slow_steps(self: Loader, *begin: Any) -> Any:
        for step in steps(self, *begin):
            time.sleep(DATA * (dist.rank() == 0))
            yield step

    GLIPv2.recompute, GLIPv2.compile = noted_recompute, noted_compile  # type: ignore[method-assign]
    GLIPv2.forward, Loader.steps = slow_forward, slow_steps  # type: ignore[method-assign]
    Ema.update = noted_update  # type: ignore[method-assign]
    code = command(["pretrain", recipe, *settings])
    told = {"recomputed": recomputed, **calls}
    Path(folder, f"rank-{dist.rank()}.json").write_text(json.dumps(told))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[3:]))
