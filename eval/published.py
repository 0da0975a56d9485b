"""Figures of papers, for reports that show them beside ours, marked as published (facts H).

They are data: published.yaml. All are in percent, so 100 times what our scorers give; CIDEr, which
papers print in hundreds too, likewise.
"""

from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Literal

import yaml


@dataclass(frozen=True, kw_only=True)
class Published:
    """One figure."""

    model: str
    suite: str
    """coco, coco-mask, lvis-minival, lvis-val, flickr30k, odinw13, odinw35, phrasecut, vqav2 or
    coco-captions."""
    setting: str
    """Split, and what the model was tuned on: "zero-shot val", "fine-tuned test-dev"."""
    metric: str
    """As our scorers name it; `ap_K_shot` for few-shot tuning."""
    value: float
    """In percent."""
    source: str
    """Where the facts have it."""
    tag: Literal["paper", "readme", "third-party", "memory", "unstated"]
    """How it is known; what was recalled, or is not said, deserves a question mark."""
    set: str = ""
    """One set of the suite; empty for the suite as a whole."""


def published(suite: str) -> tuple[Published, ...]:
    """All figures of a suite, in the file's order; none for a suite that nobody reports on."""
    return tuple(figure for figure in _figures() if figure.suite == suite)


def suites() -> tuple[str, ...]:
    """Those with figures, in the file's order."""
    return tuple(dict.fromkeys(figure.suite for figure in _figures()))


@lru_cache(maxsize=1)
def _figures() -> tuple[Published, ...]:
    blocks = yaml.safe_load(files("glipv2.eval").joinpath("published.yaml").read_text("utf-8"))
    figures = []
    for block in blocks:
        columns = [(name, one) for name in block["metrics"] for one in block.get("sets", [""])]
        for model, values in block["rows"].items():
            for (metric, one), value in zip(columns, values, strict=True):
                if value is not None:
                    figures.append(
                        Published(
                            model=model,
                            suite=block["suite"],
                            setting=block["setting"],
                            metric=metric,
                            value=float(value),
                            source=block["source"],
                            tag=block["tag"],
                            set=one,
                        )
                    )
    return tuple(figures)
