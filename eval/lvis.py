"""LVIS average precision of boxes or masks: "fixed" (GLIP's tables, glip_facts I) and classic.

LVIS is federated: of each image only some categories are known. Those with an annotation, and the
image's verified negatives, are judged; detections of any other category are left out, and so are
unmatched ones of a category whose objects were not all drawn. The two figures differ in the cap
alone: fixed AP keeps the best 10,000 detections of each category in the whole set and none per
image, classic AP the best 300 of each image. Figures equal those of the package `lvis` 0.5.3.

Shape suffixes: K detections, N annotations, I images, C categories, A area ranges, T overlaps.
A pair is one category in one image, the unit of matching, as the number category x I + image.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pycocotools import mask as coco_mask

from glipv2.eval.coco import CategoryAP
from glipv2.eval.masks import mask_area, run_lengths
from glipv2.pipeline.errors import DataError

IOUS_T = np.linspace(0.5, 0.95, 10)
IOU_75 = 5
"""Index of 0.75 in IOUS_T."""
RECALLS = np.linspace(0, 1, 101)
AREAS_A2 = np.array([[0, 1e10], [0, 32**2], [32**2, 96**2], [96**2, 1e10]])
"""All, small, medium, large, in square pixels; both ends count as inside."""


@dataclass(frozen=True, kw_only=True)
class Cap:
    """Only the best `count` detections per image, over all its categories, or per category of the
    whole set enter the score. Of equal scores the earlier detection stays."""

    per: Literal["image", "category"]
    count: int


FIXED = Cap(per="category", count=10_000)
CLASSIC = Cap(per="image", count=300)


@dataclass(frozen=True, kw_only=True)
class LvisTruth:
    """An LVIS annotation file in columns; made by `lvis_truth`."""

    image_ids_I: np.ndarray
    """int64, ascending. Ranking breaks ties between images in this order."""
    sizes_I2: np.ndarray
    """(height, width) in pixels."""
    category_ids_C: np.ndarray
    """int64, ascending."""
    frequency_C: np.ndarray
    """"r", "c" or "f": in less than 10, less than 100 or more images of the training set."""
    judged: np.ndarray
    """The pairs whose detections are scored."""
    not_exhaustive: np.ndarray
    """The pairs in which objects may be missing from the annotations."""
    pairs_N: np.ndarray
    """Ascending; within a pair the order of the file."""
    areas_N: np.ndarray
    """As the file says, so that of the mask, in square pixels."""
    boxes_N4: np.ndarray
    """x, y, width, height in pixels."""
    masks_N: list[Any]
    """Polygons or run lengths as in the file, None where it has none."""


@dataclass(frozen=True, kw_only=True)
class LvisDetections:
    """What was found in all images together, in any order."""

    image_ids_K: np.ndarray
    category_ids_K: np.ndarray
    """LVIS' own ids."""
    scores_K: np.ndarray
    """Higher is better; a NaN ranks last."""
    boxes_K4: np.ndarray
    """xyxy in pixels of the image."""
    masks_K: Sequence[Mapping[str, Any]] | None = None
    """COCO run lengths {"size": [h, w], "counts": str}, needed to score masks."""
    dropped: int = 0
    """Detections with a NaN or infinite number that were left out before."""

    def __post_init__(self) -> None:
        columns = [self.image_ids_K, self.category_ids_K, self.scores_K, self.boxes_K4]
        lengths = {len(column) for column in columns}
        assert lengths == {len(self.scores_K if self.masks_K is None else self.masks_K)}, lengths


@dataclass(frozen=True, kw_only=True)
class LvisAP:
    """Average precision in [0, 1]: means over the categories that have ground truth (of that
    size), None where there is none."""

    ap: float
    """Mean over IoU .50:.95."""
    ap50: float
    ap75: float
    ap_small: float | None
    """Objects up to 32 x 32 pixels of area; medium up to 96 x 96."""
    ap_medium: float | None
    ap_large: float | None
    ap_rare: float | None
    ap_common: float | None
    ap_frequent: float | None
    per_category: dict[int, CategoryAP]
    """By LVIS category id."""
    nan_scores: int
    """Detections with a NaN as score; they are ranked below all others."""
    empty: int
    """Judged detections left out because their area is zero, negative or not finite."""
    dropped: int = 0
    """Detections left out before, `LvisDetections.dropped`."""

    def to_dict(self) -> dict[str, float]:
        """The nine figures, as far as they are defined, and how many detections were left out."""
        numbers = {name: value for name, value in vars(self).items() if name != "per_category"}
        return {name: float(value) for name, value in numbers.items() if value is not None}


def lvis_truth(document: Mapping[str, Any]) -> LvisTruth:
    """Columns of a parsed LVIS JSON; DataError if it is not one.

    A category needs its `frequency` or its `image_count`. Annotations without area are left out.
    """
    try:
        images = {int(image["id"]): image for image in document["images"]}
        categories = {int(category["id"]): category for category in document["categories"]}
        image_ids, category_ids = sorted(images), sorted(categories)
        column = {number: index for index, number in enumerate(image_ids)}
        first_pair = {number: index * len(images) for index, number in enumerate(category_ids)}
        listed: dict[str, list[int]] = {}
        for name in ("neg_category_ids", "not_exhaustive_category_ids"):
            listed[name] = [
                first_pair[number] + column[image]
                for image in images
                for number in images[image][name]
                if number in first_pair  # of a file cut down to fewer categories
            ]
        annotations = [a for a in document["annotations"] if 0 < a["area"] < np.inf]
        pairs = [first_pair[a["category_id"]] + column[a["image_id"]] for a in annotations]
        order_N = np.argsort(np.array(pairs, dtype=np.int64), kind="stable")
        boxes_N4 = np.array([a["bbox"] for a in annotations], dtype=np.float64).reshape(-1, 4)
        if not np.isfinite(boxes_N4).all():
            raise ValueError("a box that is not finite")
        return LvisTruth(
            image_ids_I=np.array(image_ids, dtype=np.int64),
            sizes_I2=np.array([[images[i]["height"], images[i]["width"]] for i in image_ids]),
            category_ids_C=np.array(category_ids, dtype=np.int64),
            frequency_C=np.array([_frequency(categories[number]) for number in category_ids]),
            judged=np.unique(np.array(pairs + listed["neg_category_ids"], dtype=np.int64)),
            not_exhaustive=np.unique(
                np.array(listed["not_exhaustive_category_ids"], dtype=np.int64)
            ),
            pairs_N=np.array(pairs, dtype=np.int64)[order_N],
            areas_N=np.array([a["area"] for a in annotations], dtype=np.float64)[order_N],
            boxes_N4=boxes_N4[order_N],
            masks_N=[annotations[row].get("segmentation") for row in order_N],
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"this is not an LVIS annotation file: {error!r}") from error


def lvis_ap(
    truth: LvisTruth,
    found: LvisDetections,
    cap: Cap = FIXED,
    by: Literal["box", "mask"] = "box",
) -> LvisAP:
    """LVIS AP of the detections, overlaps being those of boxes or of masks.

    DataError for an image or category that the truth does not list, a mask that is missing or of
    another size than its image, and a truth without annotations.
    """
    if not len(truth.pairs_N):
        raise DataError("no annotations in the truth: average precision is undefined")
    objects = _Objects(
        pairs=truth.pairs_N,
        areas=truth.areas_N,
        shapes=truth.boxes_N4 if by == "box" else _masks(truth, truth.pairs_N, truth.masks_N),
        scores=np.ones(len(truth.pairs_N)),
    )
    detections, empty = _detections(truth, found, cap, by)
    images = len(truth.image_ids_I)
    ap_CAT = np.full((len(truth.category_ids_C), len(AREAS_A2), len(IOUS_T)), np.nan)
    per_category = {}
    for category in np.unique(truth.pairs_N // images):
        its_pairs = category * images, (category + 1) * images
        precision_ATR = _category_precision(
            objects.part(objects.rows(*its_pairs)),
            detections.part(detections.rows(*its_pairs)),
            truth.not_exhaustive,
        )
        ap_CAT[category] = ap_AT = precision_ATR.mean(axis=-1)
        if not np.isnan(ap_AT[0, 0]):
            per_category[int(truth.category_ids_C[category])] = CategoryAP(
                ap=float(ap_AT[0].mean()),
                ap50=float(ap_AT[0, 0]),
                precision_R=tuple(precision_ATR[0, 0].tolist()),
            )
    ap_C = ap_CAT[:, 0].mean(axis=-1)
    known_C = ~np.isnan(ap_C)
    by_area = [_mean(ap_CAT[:, area]) for area in (1, 2, 3)]
    by_frequency = [_mean(ap_C[truth.frequency_C == letter]) for letter in "rcf"]
    return LvisAP(
        ap=float(ap_C[known_C].mean()),
        ap50=float(ap_CAT[known_C, 0, 0].mean()),
        ap75=float(ap_CAT[known_C, 0, IOU_75].mean()),
        ap_small=by_area[0],
        ap_medium=by_area[1],
        ap_large=by_area[2],
        ap_rare=by_frequency[0],
        ap_common=by_frequency[1],
        ap_frequent=by_frequency[2],
        per_category=per_category,
        nan_scores=int(np.isnan(found.scores_K).sum()),
        empty=empty,
        dropped=found.dropped,
    )


@dataclass(frozen=True, kw_only=True)
class _Objects:
    """Annotations or detections, ordered by pair and in it by falling score."""

    pairs: np.ndarray
    areas: np.ndarray
    shapes: np.ndarray
    """float64 (N, 4) boxes x, y, width, height, or an object array of run lengths."""
    scores: np.ndarray

    def rows(self, low: int, high: int) -> slice:
        """Where the pairs from low up to, not including, high are."""
        start, stop = np.searchsorted(self.pairs, (low, high))
        return slice(int(start), int(stop))

    def part(self, rows: slice) -> "_Objects":
        return _Objects(
            pairs=self.pairs[rows],
            areas=self.areas[rows],
            shapes=self.shapes[rows],
            scores=self.scores[rows],
        )


def _frequency(category: Mapping[str, Any]) -> str:
    if "frequency" not in category:
        images = category["image_count"]
        return "r" if images < 10 else "c" if images < 100 else "f"
    if category["frequency"] not in ("r", "c", "f"):
        raise ValueError(f"category {category['id']} has frequency {category['frequency']!r}")
    return str(category["frequency"])


def _detections(
    truth: LvisTruth, found: LvisDetections, cap: Cap, by: Literal["box", "mask"]
) -> tuple[_Objects, int]:
    """The detections that are scored, and how many were left out for want of an area."""
    image_K = _columns(truth.image_ids_I, found.image_ids_K, "image")
    category_K = _columns(truth.category_ids_C, found.category_ids_K, "category")
    scores_K = np.asarray(found.scores_K, dtype=np.float64)
    scores_K = np.where(np.isnan(scores_K), -np.inf, scores_K)
    pairs_K = category_K * len(truth.image_ids_I) + image_K
    kept = _best(image_K if cap.per == "image" else category_K, scores_K, cap.count)
    kept &= np.isin(pairs_K, truth.judged)
    row_K = np.flatnonzero(kept)
    row_K = row_K[np.lexsort((-scores_K[row_K], pairs_K[row_K]))]
    if by == "box":
        corners_K4 = np.asarray(found.boxes_K4, dtype=np.float64).reshape(-1, 4)[row_K]
        sides_K2 = corners_K4[:, 2:] - corners_K4[:, :2]
        shapes_K = np.concatenate([corners_K4[:, :2], sides_K2], axis=1)
        areas_K = sides_K2.prod(axis=1)
    else:
        if found.masks_K is None:
            raise DataError("the detections have no masks to score")
        shapes_K = _masks(truth, pairs_K[row_K], [found.masks_K[row] for row in row_K.tolist()])
        areas_K = np.array([mask_area(mask) for mask in shapes_K], dtype=np.float64)
    solid_K = (areas_K > 0) & (areas_K < np.inf)
    objects = _Objects(
        pairs=pairs_K[row_K][solid_K],
        areas=areas_K[solid_K],
        shapes=shapes_K[solid_K],
        scores=scores_K[row_K][solid_K],
    )
    return objects, int((~solid_K).sum())


def _columns(known: np.ndarray, ids_K: np.ndarray, what: str) -> np.ndarray:
    """Place of each id among the known ones, which ascend."""
    ids_K = np.asarray(ids_K, dtype=np.int64)
    place_K = np.searchsorted(known, ids_K).clip(max=len(known) - 1)
    strange_K = known[place_K] != ids_K
    if strange_K.any():
        raise DataError(f"detection in {what} {ids_K[strange_K][0]}, which the truth does not list")
    return place_K


def _best(groups_K: np.ndarray, scores_K: np.ndarray, count: int) -> np.ndarray:
    """bool (K,): among the `count` highest scores of its group."""
    order_K = np.lexsort((-scores_K, groups_K))
    sorted_K = groups_K[order_K]
    rank_K = np.arange(len(order_K)) - np.searchsorted(sorted_K, sorted_K)
    best_K = np.zeros(len(order_K), dtype=bool)
    best_K[order_K[rank_K < count]] = True
    return best_K


def _masks(truth: LvisTruth, pairs_N: np.ndarray, masks: Sequence[Any]) -> np.ndarray:
    """Object array (N,) of compressed run lengths, each of its image's size."""
    images_N = pairs_N % len(truth.image_ids_I)
    encoded = np.empty(len(masks), dtype=object)
    for row, (image, mask) in enumerate(zip(images_N, masks, strict=True)):
        where = f"image {truth.image_ids_I[image]}"
        encoded[row] = run_lengths(mask, truth.sizes_I2[image], where)
    return encoded


def _category_precision(
    truths: _Objects, found: _Objects, not_exhaustive: np.ndarray
) -> np.ndarray:
    """Precision of one category, (A, T, R); NaN in the area ranges without an annotation."""
    outside_AN = _outside(truths.areas)
    spared_AK = _outside(found.areas) | np.isin(found.pairs, not_exhaustive)
    ignored_ATK = np.repeat(spared_AK[:, None], len(IOUS_T), axis=1)
    hit_ATK = np.zeros_like(ignored_ATK)
    for pair in np.unique(truths.pairs):
        there, here = truths.rows(pair, pair + 1), found.rows(pair, pair + 1)
        if here.start == here.stop:
            continue
        iou_KN = _iou(found.shapes[here], truths.shapes[there])
        match_ATK = _match(iou_KN, outside_AN[:, there])
        matched_ATK = match_ATK >= 0
        aside_ATK = np.take_along_axis(outside_AN[:, None, there], match_ATK, axis=-1)
        hit_ATK[..., here] = matched_ATK & ~aside_ATK
        ignored_ATK[..., here] = np.where(matched_ATK, aside_ATK, ignored_ATK[..., here])
    rank_K = np.argsort(-found.scores, kind="stable")
    return _precision(hit_ATK[..., rank_K], ignored_ATK[..., rank_K], (~outside_AN).sum(axis=-1))


def _outside(areas_N: np.ndarray) -> np.ndarray:
    """bool (A, N)."""
    return (areas_N < AREAS_A2[:, :1]) | (areas_N > AREAS_A2[:, 1:])


def _iou(found: np.ndarray, truths: np.ndarray) -> np.ndarray:
    crowd = np.zeros(len(truths), dtype=np.uint8)
    if found.dtype == object:
        return coco_mask.iou(found.tolist(), truths.tolist(), crowd)
    return coco_mask.iou(found, truths, crowd)


def _match(iou_KN: np.ndarray, outside_AN: np.ndarray) -> np.ndarray:
    """(A, T, K): the annotation of each detection of a pair, best score first, or -1.

    Each takes of the free annotations that it overlaps enough one inside the area range before one
    outside, then the one it overlaps most, then the last.
    """
    near_J = np.flatnonzero(iou_KN.max(axis=1) >= IOUS_T[0])
    match_ATK = np.full((len(AREAS_A2), len(IOUS_T), len(iou_KN)), -1)
    keys = np.broadcast_arrays(iou_KN[None, near_J], ~outside_AN[:, None])
    preference_AJN = np.lexsort(keys, axis=-1).argsort(axis=-1)
    free_ATN = np.ones((*match_ATK.shape[:2], iou_KN.shape[1]), dtype=bool)
    for row, detection in enumerate(near_J):
        open_ATN = free_ATN & (iou_KN[detection] >= IOUS_T[:, None])
        choice_ATN = np.where(open_ATN, preference_AJN[:, row, None], -1)
        best_AT = choice_ATN.argmax(axis=-1)
        area, overlap = (choice_ATN.max(axis=-1) >= 0).nonzero()
        match_ATK[area, overlap, detection] = best_AT[area, overlap]
        free_ATN[area, overlap, best_AT[area, overlap]] = False
    return match_ATK


def _precision(hit_ATK: np.ndarray, ignored_ATK: np.ndarray, truths_A: np.ndarray) -> np.ndarray:
    """(A, T, R) interpolated precision at the recalls, of detections in falling order."""
    right_ATK = hit_ATK.cumsum(axis=-1)
    wrong_ATK = (~hit_ATK & ~ignored_ATK).cumsum(axis=-1)
    precision_ATK = right_ATK / (right_ATK + wrong_ATK + np.spacing(1))
    best_after_ATK = np.maximum.accumulate(precision_ATK[..., ::-1], axis=-1)[..., ::-1]
    precision_ATR = np.zeros((*hit_ATK.shape[:2], len(RECALLS)))
    precision_ATR[truths_A == 0] = np.nan
    for area, overlap in np.ndindex(*hit_ATK.shape[:2]):
        if truths_A[area]:
            first_R = np.searchsorted(right_ATK[area, overlap] / truths_A[area], RECALLS)
            reached_R = first_R[first_R < hit_ATK.shape[-1]]
            best_after_R = best_after_ATK[area, overlap, reached_R]
            precision_ATR[area, overlap, : len(reached_R)] = best_after_R
    return precision_ATR


def _mean(ap: np.ndarray) -> float | None:
    known = ap[~np.isnan(ap)]
    return float(known.mean()) if len(known) else None
