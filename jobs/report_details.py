"""One checkpoint on one suite looked at closely, for the report: categories, curves, pictures."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from glipv2.jobs.plots import Plot, Series, line_plot
from glipv2.jobs.report_examples import SuitePictures, suite_pictures

RECALL = np.linspace(0, 1, 101)


@dataclass(frozen=True, kw_only=True)
class Detail:
    """One set."""

    model: str
    """Run and step."""
    set: str
    """Which of several sets; empty for the only one."""
    categories: list[tuple[str, str, str]]
    """Name, AP and AP50, the best first."""
    plot: Plot | None
    """Precision over recall at IoU 0.5."""
    key: list[tuple[str, str]]
    examples: SuitePictures | None


def details(result: dict[str, Any], run_dir: str, model: str) -> list[Detail]:
    """Of each set with categories or pictures, in the suite's order."""
    every = [_detail(result, name, run_dir, model) for name in result["sets"]]
    return [one for one in every if one.categories or one.examples]


def _detail(result: dict[str, Any], name: str, run_dir: str, model: str) -> Detail:
    own = result["sets"][name]["per_category"]
    per_category = {k: v for k, v in own.items() if v["ap"] is not None}
    ranked = sorted(per_category, key=lambda name: -per_category[name]["ap"])
    series = _curves(per_category, ranked)
    return Detail(
        model=model,
        set=name if len(result["sets"]) > 1 else "",
        categories=[
            (name, _figure(per_category[name].get("ap")), _figure(per_category[name].get("ap50")))
            for name in ranked
        ],
        plot=line_plot("Precision over recall, IoU 0.5", series, "recall", y_range=(0, 1)),
        key=[(one.name, one.style) for one in series],
        examples=suite_pictures(result, name, run_dir),
    )


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _curves(per_category: dict[str, dict[str, Any]], ranked: Sequence[str]) -> list[Series]:
    """The mean over categories, and those of the best and the worst one."""
    curves = {n: per_category[n]["precision"] for n in ranked if "precision" in per_category[n]}
    if not curves:
        return []
    names = list(curves)
    shown = {"all categories": [fmean(column) for column in zip(*curves.values(), strict=True)]}
    if len(names) > 1:
        shown |= {name: curves[name] for name in (names[0], names[-1])}
    styles = ("accent", "second", "teacher")
    return [
        Series(name=name, style=style, points=list(zip(RECALL.tolist(), values, strict=True)))
        for (name, values), style in zip(shown.items(), styles, strict=False)
    ]
