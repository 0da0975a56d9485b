"""Referring segmentation as PhraseCut scores it: one mask for all that a phrase names.

Of each phrase all instances are one true mask, and all that was found is one mask too. The IoU of a
phrase with nothing in common is 0, also where both are empty (the rule of PhraseCut's evaluator).
Mean IoU is over phrases, cumulative IoU that of all pixels together, and Pr@t the share of phrases
with an IoU above t (facts I).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from glipv2.eval.masks import overlap, run_lengths, union
from glipv2.eval.predictions import Found, RunLengths, scored_boxes
from glipv2.pipeline.errors import DataError
from glipv2.pipeline.records import Record

THRESHOLDS = (0.5, 0.7, 0.9)


@dataclass(frozen=True, kw_only=True)
class SegmentationScore:
    """All in [0, 1]."""

    mean_iou: float
    cumulative_iou: float
    precision_at: dict[float, float]
    """Of THRESHOLDS."""
    phrases: int

    def to_dict(self) -> dict[str, float]:
        return {
            "mean_iou": self.mean_iou,
            "cumulative_iou": self.cumulative_iou,
            **{f"precision_at_{t * 100:.0f}": share for t, share in self.precision_at.items()},
            "phrases": float(self.phrases),
        }


def referring_segmentation(
    records: Sequence[Record], masks_by_key: Mapping[str, RunLengths]
) -> SegmentationScore:
    """Scores of one mask for each record, against the union of the masks of its regions.

    DataError for a record without an entry, without regions, with a region that has no mask, and
    for a mask of another size than the image.
    """
    if not records:
        raise DataError("no phrases: their IoU is undefined")
    pixels_P2 = np.array([_overlap(record, masks_by_key) for record in records])
    both_P, either_P = pixels_P2.T
    iou_P = np.divide(both_P, either_P, out=np.zeros_like(both_P), where=either_P > 0)
    return SegmentationScore(
        mean_iou=float(iou_P.mean()),
        cumulative_iou=float(both_P.sum() / max(either_P.sum(), 1.0)),
        precision_at={t: float((iou_P > t).mean()) for t in THRESHOLDS},
        phrases=len(iou_P),
    )


def merged_mask(detection: Found, record: Record, min_score: float = 0.0) -> RunLengths:
    """Union of the masks scored `min_score` or more; a NaN score leaves its mask out."""
    plain = scored_boxes(detection)
    if plain.masks is None:
        raise DataError(f"{record.key}: the detection has no masks")
    scored = zip(plain.masks, plain.scores, strict=True)
    return union([mask for mask, score in scored if score >= min_score], _size(record))


def _overlap(record: Record, masks_by_key: Mapping[str, RunLengths]) -> tuple[float, float]:
    if record.key not in masks_by_key:
        raise DataError(f"no mask for {record.key}: was it evaluated?")
    if not record.regions or any(region.mask is None for region in record.regions):
        raise DataError(f"{record.key}: a phrase is scored by the masks of its regions; one lacks")
    true = [run_lengths(region.mask, _size(record), record.key) for region in record.regions]
    found = run_lengths(masks_by_key[record.key], _size(record), f"mask of {record.key}")
    return overlap(union(true, _size(record)), found)


def _size(record: Record) -> tuple[int, int]:
    return record.height, record.width
