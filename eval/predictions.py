"""Boxes that were found, in plain numbers: what scorers take, and one image or all in columns."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Union

import numpy as np

from glipv2.pipeline.errors import DataError

if TYPE_CHECKING:  # model.batch imports torch, which a reader of figures does not need
    from glipv2.model.batch import Detection

RunLengths = Mapping[str, Any]
"""COCO's compressed form of a mask: {"size": [height, width], "counts": str}."""


@dataclass(frozen=True, kw_only=True)
class ScoredBoxes:
    """Boxes found in one image, in plain numbers."""

    boxes: Sequence[Sequence[float]]
    """(K, 4) xyxy in pixels of the stored image."""
    scores: Sequence[float]
    """(K,) in [0, 1]."""
    names: Sequence[str]
    """(K,) the category name or phrase of each box."""
    masks: Sequence[RunLengths] | None = None
    """(K,) of the stored image's size; None where no masks were asked for."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON, exact; `from_dict` reads it."""
        tree: dict[str, Any] = {
            "boxes": [list(box) for box in self.boxes],
            "scores": list(self.scores),
            "names": list(self.names),
        }
        return tree if self.masks is None else {**tree, "masks": [dict(m) for m in self.masks]}

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> "ScoredBoxes":
        return cls(**tree)


Found = Union["Detection", ScoredBoxes]
"""What was found in one image, either way."""


def scored_boxes(detection: Found) -> ScoredBoxes:
    """Plain numbers of a detection, one name a box."""
    if isinstance(detection, ScoredBoxes):
        return detection
    return ScoredBoxes(
        boxes=detection.boxes_K4.tolist(),
        scores=detection.scores_K.tolist(),
        names=[detection.names[label] for label in detection.labels_K.tolist()],
        masks=detection.run_lengths(),
    )


def found_in(key: str, detections_by_key: Mapping[str, Found]) -> ScoredBoxes:
    """What was found in one image; DataError if nobody looked."""
    if key not in detections_by_key:
        raise DataError(f"no detections for image {key}: was it evaluated?")
    return scored_boxes(detections_by_key[key])


@dataclass(frozen=True, kw_only=True)
class Columns:
    """All that was found in a set, in the order of the images."""

    images_K: np.ndarray
    """int64 index into the keys."""
    categories_K: np.ndarray
    """int64 index into the categories."""
    scores_K: np.ndarray
    boxes_K4: np.ndarray
    """float64 xyxy."""
    masks_K: list[RunLengths] | None
    dropped: int
    """Left out for a NaN or infinite number."""


def columns(
    keys: Collection[str],
    detections_by_key: Mapping[str, Found],
    categories: Sequence[str],
    masks: bool = False,
) -> Columns:
    """DataError for an image without entry, a name that is no category, and for missing masks."""
    number = {name: index for index, name in enumerate(categories)}
    parts: list[list[np.ndarray]] = [[], [], [], []]
    masks_K: list[RunLengths] = []
    dropped = 0
    for image, key in enumerate(keys):
        plain = found_in(key, detections_by_key)
        scores_k = np.asarray(plain.scores, dtype=np.float64)
        boxes_k4 = np.asarray(plain.boxes, dtype=np.float64).reshape(-1, 4)
        if not len(scores_k) == len(boxes_k4) == len(plain.names):
            raise ValueError(f"{key}: there must be one score and one name a box")
        try:
            names_k = np.array([number[name] for name in plain.names], dtype=np.int64)
        except KeyError as error:
            raise DataError(f"{key}: detection of {error}, which is no category here") from None
        finite_k = np.isfinite(scores_k) & np.isfinite(boxes_k4).all(axis=1)
        dropped += int((~finite_k).sum())
        if masks:
            if plain.masks is None or len(plain.masks) != len(scores_k):
                raise DataError(f"{key}: the detections have no masks to score")
            masks_K += [plain.masks[row] for row in np.flatnonzero(finite_k).tolist()]
        images_k = np.full(int(finite_k.sum()), image, dtype=np.int64)
        found = (images_k, names_k[finite_k], scores_k[finite_k], boxes_k4[finite_k])
        for part, column in zip(parts, found, strict=True):
            part.append(column)
    empty = [np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0), np.zeros((0, 4))]
    images_K, categories_K, scores_K, boxes_K4 = (
        np.concatenate([none, *part]) for none, part in zip(empty, parts, strict=True)
    )
    return Columns(
        images_K=images_K,
        categories_K=categories_K,
        scores_K=scores_K,
        boxes_K4=boxes_K4,
        masks_K=masks_K if masks else None,
        dropped=dropped,
    )
