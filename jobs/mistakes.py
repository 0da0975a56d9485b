"""What a model got right and wrong on each validation image, for the pictures of the report.

Reads `eval/predictions-<model>.json`: a list of {"key", "truth": [{"box", "name"}], "predicted":
[{"box", "name", "score"}]}, boxes xyxy in pixels of the stored image.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from glipv2.eval.detection import box_iou, greedy_match

MIN_IOU = 0.5
SAME_PLACE = 0.3
"""Overlap from which a wrong box is said to be about a true object."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """A predicted box above the model's display threshold."""

    box: tuple[float, ...]
    name: str
    score: float
    right: bool
    why: str = ""
    """What is wrong with it."""


@dataclass(frozen=True, kw_only=True)
class Missed:
    """A true object that no shown box found."""

    box: tuple[float, ...]
    name: str
    best_score: float
    """Of the boxes with this name and place below the threshold; 0 if there is none."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One image as one model saw it."""

    key: str
    truth: tuple[tuple[tuple[float, ...], str], ...]
    found: tuple[Found, ...]
    missed: tuple[Missed, ...]

    @property
    def right(self) -> int:
        return sum(found.right for found in self.found)

    @property
    def f1(self) -> float:
        """2 right / (shown + true); 1 for an image with neither."""
        both = len(self.found) + len(self.truth)
        return 2 * self.right / both if both else 1.0


def outcomes(predictions: Sequence[dict[str, Any]]) -> tuple[float, dict[str, Outcome]]:
    """(display threshold, key -> outcome); the threshold is the model's own best F1."""
    threshold = best_threshold(predictions)
    return threshold, {entry["key"]: judge(entry, threshold) for entry in predictions}


def best_threshold(predictions: Sequence[dict[str, Any]]) -> float:
    """The score on a grid of 0.01 with the highest F1 over all images; of equals the lowest."""
    scores: list[float] = []
    right: list[bool] = []
    objects = 0
    for entry in predictions:
        own = [p["score"] for p in entry["predicted"]]
        match = greedy_match(own, _same_name_iou(entry["predicted"], entry["truth"]), MIN_IOU)
        scores += own
        right += [index >= 0 for index in match]
        objects += len(entry["truth"])
    scores_K, right_K = np.asarray(scores), np.asarray(right, dtype=bool)
    best, chosen = -1.0, 0.5
    for threshold in np.round(np.arange(0, 1, 0.01), 2):
        kept_K = scores_K >= threshold
        f1 = 2 * right_K[kept_K].sum() / max(kept_K.sum() + objects, 1)
        if f1 > best:
            best, chosen = f1, float(threshold)
    return chosen


def judge(entry: dict[str, Any], threshold: float) -> Outcome:
    """Match the boxes scored `threshold` or more one-to-one with the truth of the same name."""
    truth, everything = entry["truth"], entry["predicted"]
    shown = sorted((p for p in everything if p["score"] >= threshold), key=lambda p: -p["score"])
    match = greedy_match([p["score"] for p in shown], _same_name_iou(shown, truth), MIN_IOU)
    found = tuple(
        Found(
            box=tuple(p["box"]),
            name=p["name"],
            score=p["score"],
            right=index >= 0,
            why="" if index >= 0 else _why_wrong(p, truth),
        )
        for p, index in zip(shown, match, strict=True)
    )
    iou_KN = _same_name_iou(everything, truth)
    missed = tuple(
        Missed(
            box=tuple(true["box"]),
            name=true["name"],
            best_score=max(
                (p["score"] for p, iou in zip(everything, iou_KN[:, n], strict=True)
                 if iou >= MIN_IOU and p["score"] < threshold),
                default=0.0,
            ),
        )
        for n, true in enumerate(truth)
        if n not in match
    )  # fmt: skip
    pairs = tuple((tuple(true["box"]), true["name"]) for true in truth)
    return Outcome(key=entry["key"], truth=pairs, found=found, missed=missed)


def telling_keys(
    before: dict[str, Outcome], after: dict[str, Outcome], gains: int, losses: int
) -> list[str]:
    """Images where `after` improves most on `before`, then those where it falls back most."""
    change = {key: after[key].f1 - before[key].f1 for key in before if key in after}
    better = sorted((key for key in change if change[key] > 0), key=lambda k: -change[k])
    worse = sorted((key for key in change if change[key] < 0), key=lambda k: change[k])
    return better[:gains] + worse[:losses]


def worst_false(seen: dict[str, Outcome], count: int) -> list[tuple[Outcome, Found]]:
    """The wrong boxes with the highest scores, one an image."""
    wrong = {
        key: max((f for f in outcome.found if not f.right), key=lambda f: f.score)
        for key, outcome in seen.items()
        if outcome.right < len(outcome.found)
    }
    ranked = sorted(wrong, key=lambda key: -wrong[key].score)
    return [(seen[key], wrong[key]) for key in ranked[:count]]


def worst_missed(seen: dict[str, Outcome], count: int) -> list[tuple[Outcome, Missed]]:
    """The objects the model came least near to finding, larger first among equals, one an image."""
    least = {
        key: min(outcome.missed, key=lambda m: (m.best_score, -_area(m.box)))
        for key, outcome in seen.items()
        if outcome.missed
    }
    ranked = sorted(least, key=lambda key: (least[key].best_score, -_area(least[key].box)))
    return [(seen[key], least[key]) for key in ranked[:count]]


def _same_name_iou(predicted: Sequence[dict[str, Any]], truth: Sequence[dict[str, Any]]) -> Any:
    """(K, N) overlap, 0 where the names differ."""
    iou_KN = box_iou([p["box"] for p in predicted], [t["box"] for t in truth])
    same_KN = [[p["name"] == t["name"] for t in truth] for p in predicted]
    return iou_KN * np.asarray(same_KN, dtype=np.float64).reshape(iou_KN.shape)


def _why_wrong(predicted: dict[str, Any], truth: Sequence[dict[str, Any]]) -> str:
    iou_N = box_iou([predicted["box"]], [t["box"] for t in truth])[0]
    if not len(iou_N) or iou_N.max() < SAME_PLACE:
        return "no object of the truth is here"
    same = [iou for iou, t in zip(iou_N, truth, strict=True) if t["name"] == predicted["name"]]
    if max(same, default=0.0) >= MIN_IOU:
        return "this object was found already"
    nearest = truth[int(iou_N.argmax())]["name"]
    if nearest != predicted["name"]:
        return f"the truth here is “{nearest}”"
    return f"right name, but the box fits badly (IoU {iou_N.max():.2f})"


def _area(box: Sequence[float]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])
