"""COCO average precision, and the one greedy matcher that every box score here is built on.

Boxes are xyxy in pixels of the stored image. The AP itself is pycocotools' (glip_facts I: IoU
.50:.95, at most 100 boxes per image and category); this file only brings our records to it.
"""

import contextlib
import io
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np

from glipv2.pipeline.errors import DataError
from glipv2.pipeline.records import Record

if TYPE_CHECKING:  # model.batch imports torch, which a reader of AP figures does not need
    from glipv2.model.batch import Detection

AP50_INDEX = 0
"""Row of IoU 0.50 in pycocotools' ten thresholds."""
ALL_AREAS = 0
"""Column of the area range "all" in pycocotools' tables."""


@dataclass(frozen=True, kw_only=True)
class ScoredBoxes:
    """Boxes found in one image, in plain numbers."""

    boxes: Sequence[Sequence[float]]
    """(K, 4) xyxy in pixels of the stored image."""
    scores: Sequence[float]
    """(K,) in [0, 1]."""
    names: Sequence[str]
    """(K,) the category name or phrase of each box."""


@dataclass(frozen=True, kw_only=True)
class APResult:
    """Average precision in [0, 1]; means are over the categories that have ground truth."""

    ap: float
    """Mean over IoU .50:.95."""
    ap50: float
    per_category: dict[str, tuple[float, float]]
    """name -> (ap, ap50), only categories with ground truth."""
    dropped: int = 0
    """Detections with a NaN or infinite number, left out of the scoring."""

    def over(self, group: Collection[str]) -> "APResult":
        """The same result restricted to some categories (seen, unseen): no second matching."""
        chosen = {name: ap for name, ap in self.per_category.items() if name in group}
        if not chosen:
            raise DataError(
                f"no ground truth for any of {sorted(group)}: their average precision is "
                "undefined. Use a validation set that shows these categories."
            )
        return replace(
            self,
            ap=fmean(ap for ap, _ in chosen.values()),
            ap50=fmean(ap50 for _, ap50 in chosen.values()),
            per_category=chosen,
        )


def average_precision(
    records: Sequence[Record],
    detections_by_key: Mapping[str, "Detection | ScoredBoxes"],
    categories: Sequence[str],
    group: Collection[str] | None = None,
) -> APResult:
    """COCO AP of the detections, over all categories or over the names in `group`.

    Every record needs an entry in `detections_by_key` (an empty one if nothing was found), so that
    an image that was never looked at can't pass for one without boxes. Equal scores keep the order
    of `records`, then that of the detection.
    """
    category_ids = {name: number for number, name in enumerate(categories, start=1)}
    truth = _coco_truth(records, category_ids)
    found, dropped = _coco_detections(records, detections_by_key, category_ids)
    if not truth["annotations"]:
        raise DataError("no ground-truth boxes in the records: average precision is undefined")
    precision_TRKAM = _evaluate(truth, found)
    per_category = {}
    for column, name in enumerate(categories):
        precision_TR = precision_TRKAM[:, :, column, ALL_AREAS, -1]
        if precision_TR.max() >= 0:  # -1 everywhere: the category has no ground truth
            ap, ap50 = precision_TR.mean(), precision_TR[AP50_INDEX].mean()
            per_category[name] = (float(ap), float(ap50))
    result = APResult(ap=0.0, ap50=0.0, per_category=per_category, dropped=dropped)
    return result.over(categories if group is None else group)


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


def scored_boxes(detection: "Detection | ScoredBoxes") -> ScoredBoxes:
    """Plain numbers of a detection, one name a box."""
    if isinstance(detection, ScoredBoxes):
        return detection
    return ScoredBoxes(
        boxes=detection.boxes_K4.tolist(),
        scores=detection.scores_K.tolist(),
        names=[detection.names[label] for label in detection.labels_K.tolist()],
    )


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


def _coco_truth(records: Sequence[Record], category_ids: dict[str, int]) -> dict[str, Any]:
    names = list(category_ids)
    annotations: list[dict[str, Any]] = []
    for image_id, record in enumerate(records, start=1):
        for region in record.regions:
            if region.category is None or not 0 <= region.category < len(names):
                raise DataError(
                    f"{record.key}: the region {region.phrase!r} has category {region.category}, "
                    f"but there are {len(names)} categories; only detection data can be scored"
                )
            annotations.append(
                {
                    "id": len(annotations) + 1,  # pycocotools reads id 0 as "unmatched"
                    "image_id": image_id,
                    "category_id": category_ids[names[region.category]],
                    "iscrowd": int(region.crowd),
                    **_coco_box(region.box),
                }
            )
    return {
        "images": [{"id": number} for number in range(1, len(records) + 1)],
        "categories": [{"id": number, "name": name} for name, number in category_ids.items()],
        "annotations": annotations,
    }


def _coco_detections(
    records: Sequence[Record],
    detections_by_key: Mapping[str, "Detection | ScoredBoxes"],
    category_ids: dict[str, int],
) -> tuple[list[dict[str, Any]], int]:
    """Detections as pycocotools wants them, and the number dropped for a non-finite value."""
    found: list[dict[str, Any]] = []
    dropped = 0
    for image_id, record in enumerate(records, start=1):
        if record.key not in detections_by_key:
            raise DataError(f"no detections for image {record.key}: was it evaluated?")
        plain = scored_boxes(detections_by_key[record.key])
        for box, score, name in zip(plain.boxes, plain.scores, plain.names, strict=True):
            if name not in category_ids:
                raise DataError(f"{record.key}: detection of {name!r}, which is no category here")
            if not np.isfinite([*box, score]).all():
                dropped += 1
                continue
            entry = {"image_id": image_id, "category_id": category_ids[name], "score": float(score)}
            found.append({"id": len(found) + 1, "iscrowd": 0, **entry, **_coco_box(box)})
    return found, dropped


def _coco_box(box: Sequence[float]) -> dict[str, Any]:
    x0, y0, x1, y1 = (float(value) for value in box)
    return {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0)}


def _evaluate(truth: dict[str, Any], found: list[dict[str, Any]]) -> np.ndarray:
    """pycocotools' precision table (T IoUs, R recalls, K categories, A areas, M max boxes)."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        coco_truth, coco_found = COCO(), COCO()
        for coco, annotations in ((coco_truth, truth["annotations"]), (coco_found, found)):
            coco.dataset = {**truth, "annotations": annotations}
            coco.createIndex()
        evaluation = COCOeval(coco_truth, coco_found, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation.eval["precision"]
