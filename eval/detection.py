"""Average precision of detection records, and the one greedy matcher that box scores build on.

Boxes are xyxy in pixels of the stored image. The AP is that of `eval.coco`.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from glipv2.eval.coco import APResult, coco_ap, coco_truth
from glipv2.eval.predictions import Found, ScoredBoxes, scored_boxes
from glipv2.pipeline.errors import DataError
from glipv2.pipeline.records import Record

__all__ = [
    "APResult",
    "ScoredBoxes",
    "average_precision",
    "box_iou",
    "category_groups",
    "greedy_match",
    "scored_boxes",
]


def average_precision(
    records: Sequence[Record],
    detections_by_key: Mapping[str, Found],
    categories: Sequence[str],
    group: Collection[str] | None = None,
) -> APResult:
    """COCO AP of the detections, over all categories or over the names in `group`.

    Every record needs an entry in `detections_by_key` (an empty one if nothing was found), so that
    an image that was never looked at can't pass for one without boxes. Equal scores keep the order
    of `records`, then that of the detection.
    """
    scored = coco_ap(coco_truth(records, categories), detections_by_key)
    return scored.over(categories if group is None else group)


def category_groups(records: Sequence[Record], categories: Sequence[str]) -> dict[str, set[str]]:
    """Group name ("seen", "unseen", ...) -> category names, from `provenance["groups"]`."""
    group_of: dict[str, str] = {}
    for record in records:
        groups = record.provenance.get("groups", [])
        for region, group in zip(record.regions, groups, strict=bool(groups)):
            if region.category is None:
                continue
            name = categories[region.category]
            known = group_of.setdefault(name, group)
            if known != group:
                raise DataError(f"{record.key}: {name!r} is {group!r}, elsewhere {known!r}")
    return {g: {n for n, own in group_of.items() if own == g} for g in group_of.values()}


def box_iou(boxes_K4: Any, others_N4: Any) -> np.ndarray:
    """Intersection over union, (K, N) float64; an empty or inverted box overlaps nothing."""
    boxes = np.asarray(boxes_K4, dtype=np.float64).reshape(-1, 1, 4)
    others = np.asarray(others_N4, dtype=np.float64).reshape(1, -1, 4)
    low = np.maximum(boxes[..., :2], others[..., :2])
    high = np.minimum(boxes[..., 2:], others[..., 2:])
    overlap_KN = np.clip(high - low, 0, None).prod(-1)
    areas = [np.clip(b[..., 2:] - b[..., :2], 0, None).prod(-1) for b in (boxes, others)]
    union_KN = areas[0] + areas[1] - overlap_KN
    return np.divide(overlap_KN, union_KN, out=np.zeros_like(union_KN), where=union_KN > 0)


def greedy_match(scores_K: Sequence[float], iou_KN: np.ndarray, min_iou: float = 0.5) -> list[int]:
    """One-to-one: boxes in order of score each take the free truth they overlap most.

    Returns for each of the K boxes the index of its truth, or -1. Pairs that must not match have
    an overlap of 0 in `iou_KN`. Because a box never yields to a lower-scoring one, the match of the
    boxes above a threshold does not depend on those below it.
    """
    free_KN = np.where(iou_KN >= min_iou, iou_KN, -1.0)
    match = [-1] * len(scores_K)
    for box in np.argsort(-np.asarray(scores_K, dtype=np.float64), kind="stable"):
        if not free_KN.shape[1] or free_KN[box].max() < 0:
            continue
        match[box] = int(free_KN[box].argmax())
        free_KN[:, match[box]] = -1.0
    return match
