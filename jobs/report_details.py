"""One checkpoint on one suite looked at closely, for the report: categories, curves, pictures.

Reads the result and the predictions that it was computed from, as long as they and the set's shards
are there.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import numpy as np

from glipv2.jobs.evaluate_predict import (
    Piece,
    as_boxes,
    asked_of,
    missing,
    pieces,
    read_predictions,
    read_records,
)
from glipv2.jobs.mistakes import Outcome, outcomes, worst_false, worst_missed
from glipv2.jobs.plots import Plot, Series, line_plot
from glipv2.jobs.report_pictures import (
    Mistake,
    false_box,
    missed_object,
    picture_of,
    well_found,
)
from glipv2.pipeline import storage
from glipv2.pipeline.config_loader import from_tree
from glipv2.pipeline.errors import DataError
from glipv2.pipeline.eval_config import SuiteConfig
from glipv2.pipeline.records import Record
from glipv2.pipeline.shard_reader import open_shard_set

IMAGES = 500
"""The first ones of a set, among which pictures are chosen."""
PICTURES = 6
RECALL = np.linspace(0, 1, 101)


@dataclass(frozen=True, kw_only=True)
class SuitePictures:
    """Pictures of what was found well and badly."""

    threshold: float
    """Score from which boxes are shown."""
    images: int
    """Among which these were chosen."""
    best: tuple[Mistake, ...]
    false: tuple[Mistake, ...]
    missed: tuple[Mistake, ...]


@dataclass(frozen=True, kw_only=True)
class Detail:
    model: str
    """Run and step."""
    set: str
    """Which of several sets is shown; empty for the only one."""
    categories: list[tuple[str, str, str]]
    """Name, AP and AP50, the best first."""
    plot: Plot | None
    """Precision over recall at IoU 0.5."""
    key: list[tuple[str, str]]
    examples: SuitePictures | None


def detail(result: dict[str, Any], run_dir: str, model: str) -> Detail | None:
    """None for suites that have no categories. Several sets: the first stands for them."""
    name, own = next(iter(result["sets"].items()))
    per_category = {k: v for k, v in own["per_category"].items() if v["ap"] is not None}
    if not per_category:
        return None
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
        examples=_examples(result, own["url"], run_dir),
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


def _examples(result: dict[str, Any], set_url: str, run_dir: str) -> SuitePictures | None:
    """None where predictions or pictures are gone, and for sets whose truth is not complete."""
    settings = dict(result["settings"])
    precision = settings.pop("precision")
    suite: SuiteConfig = from_tree(SuiteConfig, settings)
    if suite.task != "detection" or len(result["sets"]) > 1:
        return None
    with suppress(DataError, storage.MissingFileError):
        data, asked = open_shard_set(set_url), asked_of(suite, precision)
        folder, model = storage.join(run_dir, "eval"), result["checkpoint"]["digest"]
        work = pieces(folder, model, "", data, asked, min(suite.limit or IMAGES, IMAGES))
        whole = pieces(folder, model, "", data, asked, suite.limit)
        # a shard that is shown in part was predicted whole
        work = [replace(few, out=full.out) for few, full in zip(work, whole, strict=False)]
        if missing(work):
            return None
        records = {
            record.key: record
            for piece in work
            for record in read_records(data, piece.shard, 0, piece.images)
        }
        return _chosen(records, list(_entries(records, data.categories, work)))
    return None


def _entries(
    records: dict[str, Record], categories: tuple[str, ...], work: Sequence[Piece]
) -> Iterator[dict[str, Any]]:
    """Truth and predictions of each image, as `mistakes` wants them."""
    for _, images in read_predictions(work):
        for key, entry in images.items():
            if key not in records:
                continue
            found = as_boxes(entry)
            rows = zip(found.boxes, found.names, found.scores, strict=True)
            yield {
                "key": key,
                "truth": [
                    {"box": list(region.box), "name": categories[region.category]}
                    for region in records[key].regions
                    if region.category is not None and not region.crowd
                ],
                "predicted": [{"box": box, "name": n, "score": score} for box, n, score in rows],
            }


def _chosen(records: dict[str, Record], entries: list[dict[str, Any]]) -> SuitePictures:
    threshold, seen = outcomes(entries)
    return SuitePictures(
        threshold=threshold,
        images=len(entries),
        best=tuple(well_found(picture_of(records[o.key]), o) for o in _best(seen)),
        false=tuple(
            false_box(picture_of(records[outcome.key]), outcome, found)
            for outcome, found in worst_false(seen, PICTURES)
        ),
        missed=tuple(
            missed_object(picture_of(records[outcome.key]), outcome, missed)
            for outcome, missed in worst_missed(seen, PICTURES)
        ),
    )


def _best(seen: dict[str, Outcome]) -> list[Outcome]:
    """Images with most objects of those where most is right."""
    found = [outcome for outcome in seen.values() if outcome.right]
    return sorted(found, key=lambda o: (-o.f1, -len(o.truth), o.key))[:PICTURES]
