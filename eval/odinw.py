"""ODinW-13 and -35: which sets they are, how their categories are asked for, and their average.

The sets, splits and prompts are data: odinw.yaml. Each set is scored by COCO AP; the suite is the
unweighted mean over its sets (facts I), and its median where a few sets decide the mean.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from statistics import fmean, median
from typing import Any

import yaml

from glipv2.pipeline.errors import DataError
from glipv2.pipeline.eval_config import PromptConfig


@dataclass(frozen=True, kw_only=True)
class OdinwSet:
    """One of the sets."""

    name: str
    prompts: dict[str, PromptConfig]
    """Category -> what stands for it in the prompt; the others are asked for by their names."""


@dataclass(frozen=True, kw_only=True)
class OdinwScore:
    mean: float
    median: float
    sets: int

    def to_dict(self) -> dict[str, float]:
        return {"ap": self.mean, "ap_median": self.median, "sets": float(self.sets)}


def odinw_sets(count: int) -> tuple[OdinwSet, ...]:
    """The sets of ODinW-13 or -35."""
    if count not in (13, 35):
        raise ValueError(f"ODinW has suites of 13 and of 35 sets, not of {count}")
    chosen = tuple(_set(entry) for entry in _data()["sets"] if count == 35 or "suite13" in entry)
    assert len(chosen) == count, len(chosen)
    return chosen


def odinw_mean(ap_by_name: Mapping[str, float], count: int) -> OdinwScore:
    """Mean and median over a suite; DataError unless it is given the AP of just its sets."""
    expected = {own.name for own in odinw_sets(count)}
    if wrong := expected ^ set(ap_by_name):
        raise DataError(
            f"ODinW-{count} is the mean over all its sets; missing or unknown: "
            f"{', '.join(sorted(wrong))}"
        )
    values = list(ap_by_name.values())
    return OdinwScore(mean=fmean(values), median=median(values), sets=count)


@lru_cache(maxsize=1)
def _data() -> dict[str, Any]:
    return yaml.safe_load(files("glipv2.eval").joinpath("odinw.yaml").read_text("utf-8"))


def _set(entry: Mapping[str, Any]) -> OdinwSet:
    return OdinwSet(
        name=entry["name"],
        prompts={
            category: PromptConfig(**prompt)
            for category, prompt in entry.get("prompts", {}).items()
        },
    )
