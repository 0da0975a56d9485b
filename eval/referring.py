"""Referring expressions (RefCOCO, RefCOCO+, RefCOCOg): is the best box the one that is meant?

An expression is right if its best-scored box overlaps the true one with IoU >= 0.5 (facts I),
whatever the box was called. An expression without any box is wrong.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from glipv2.eval.detection import box_iou
from glipv2.eval.predictions import Found, found_in
from glipv2.pipeline.errors import DataError
from glipv2.pipeline.records import Record

MIN_IOU = 0.5


@dataclass(frozen=True, kw_only=True)
class ReferringAccuracy:
    """Share of the expressions whose object was found, in [0, 1]."""

    accuracy: float
    expressions: int
    by_split: dict[str, float]
    """val, testA, ... where the records say so: their shares."""
    without_box: int
    """Expressions for which nothing was found."""
    dropped: int
    """Boxes with a NaN or infinite number, left out."""

    def to_dict(self) -> dict[str, float]:
        return {
            "accuracy": self.accuracy,
            "expressions": float(self.expressions),
            "without_box": float(self.without_box),
            "dropped": float(self.dropped),
            **{f"accuracy_{split}": share for split, share in self.by_split.items()},
        }


def referring_accuracy(
    records: Sequence[Record], detections_by_key: Mapping[str, Found], min_iou: float = MIN_IOU
) -> ReferringAccuracy:
    """P@1 over expressions, each a record with one region; of equal scores the first box counts.

    DataError for a record with no region or several: nobody could say which is meant.
    """
    if not records:
        raise DataError("no expressions: accuracy is undefined")
    right: list[bool] = []
    right_of: dict[str, list[bool]] = defaultdict(list)
    without_box = dropped = 0
    for record in records:
        if len(record.regions) != 1:
            raise DataError(
                f"{record.key}: an expression means one box, and this one has {len(record.regions)}"
            )
        found = found_in(record.key, detections_by_key)
        scores_K = np.asarray(found.scores, dtype=np.float64)
        boxes_K4 = np.asarray(found.boxes, dtype=np.float64).reshape(-1, 4)
        finite_K = np.isfinite(scores_K) & np.isfinite(boxes_K4).all(axis=1)
        dropped += int((~finite_K).sum())
        hit = False
        if finite_K.any():
            best = np.where(finite_K, scores_K, -np.inf).argmax()
            hit = bool(box_iou(boxes_K4[best], record.regions[0].box)[0, 0] >= min_iou)
        else:
            without_box += 1
        right.append(hit)
        if "split" in record.provenance:
            right_of[str(record.provenance["split"])].append(hit)
    return ReferringAccuracy(
        accuracy=fmean(right),
        expressions=len(right),
        by_split={split: fmean(hits) for split, hits in sorted(right_of.items())},
        without_box=without_box,
        dropped=dropped,
    )
