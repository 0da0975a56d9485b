"""COCO average precision and recall of boxes or masks: the 12 numbers, and each category's.

The protocol is that of pycocotools (facts I: IoU .50:.95, at most 100 detections per image and
category), and so are the numbers, to the last bit; `hotcoco` computes them in a small part of the
time. Detections with a NaN or infinite number are left out and counted here; pycocotools scores
those without a score after all others. Truth comes from our records, or from a COCO annotation file
as it is.

Shape suffixes: T overlaps, R recalls, K categories, A area ranges, M caps; N annotations, I images.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, Literal

import hotcoco
import numpy as np

from glipv2.eval.masks import mask_area, region_area, run_lengths
from glipv2.eval.predictions import Columns, Found, columns
from glipv2.pipeline.errors import DataError
from glipv2.pipeline.records import Record

MAX_DETECTIONS = (1, 10, 100)
"""Of an image and category; precision is that with the last."""
ALL, SMALL, MEDIUM, LARGE = range(4)
"""Places of the area ranges: small up to 32 x 32 pixels, medium up to 96 x 96."""
IOU_50, IOU_75 = 0, 5


@dataclass(frozen=True, kw_only=True)
class CocoTruth:
    """What is to be found; made by `coco_truth` or `coco_document_truth`."""

    keys: tuple[str, ...]
    """Of the images. Ranking breaks ties between images in this order."""
    sizes_I2: np.ndarray
    """(height, width) in pixels."""
    categories: tuple[str, ...]
    images_N: np.ndarray
    """int64 index into `keys`."""
    categories_N: np.ndarray
    """int64 index into `categories`."""
    boxes_N4: np.ndarray
    """x, y, width, height in pixels."""
    areas_N: np.ndarray
    """In square pixels, what the area ranges are of."""
    crowd_N: np.ndarray
    masks_N: list[Any]
    """As found: polygons or run lengths; None where nobody drew one."""


@dataclass(frozen=True, kw_only=True)
class CategoryAP:
    """One category with ground truth."""

    ap: float
    """Mean over IoU .50:.95."""
    ap50: float
    precision_R: tuple[float, ...]
    """Interpolated precision at the recalls 0, .01, ..., 1 and IoU .50."""


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


@dataclass(frozen=True, kw_only=True)
class CocoAP:
    """Means over the categories with ground truth (of that size); None where there is none."""

    ap: float
    """Mean over IoU .50:.95."""
    ap50: float
    ap75: float
    ap_small: float | None
    ap_medium: float | None
    ap_large: float | None
    ar_1: float
    """Highest recall with at most one detection of a category in an image, over IoU .50:.95."""
    ar_10: float
    ar_100: float
    ar_small: float | None
    ar_medium: float | None
    ar_large: float | None
    per_category: dict[str, CategoryAP]
    dropped: int = 0
    """Detections with a NaN or infinite number, left out of the scoring."""

    def to_dict(self) -> dict[str, float]:
        """The 12 numbers and `dropped`."""
        numbers = {name: value for name, value in vars(self).items() if name != "per_category"}
        return {name: float(value) for name, value in numbers.items() if value is not None}

    def over(self, group: Collection[str]) -> APResult:
        """AP of some categories (seen, unseen); DataError if none of them has ground truth."""
        own = {name: (found.ap, found.ap50) for name, found in self.per_category.items()}
        whole = APResult(ap=self.ap, ap50=self.ap50, per_category=own, dropped=self.dropped)
        return whole.over(group)


def coco_truth(records: Sequence[Record], categories: Sequence[str]) -> CocoTruth:
    """Truth of detection records, in their order.

    Areas are those of `region_area`. COCO computes them from polygons, and sets that were prepared
    from its files state them; of others they are counted in pixels, so that an object at the edge
    of an area range may fall to its other side.
    """
    rows: list[tuple[int, int, float, bool]] = []
    boxes, masks = [], []
    for image, record in enumerate(records):
        for region in record.regions:
            if region.category is None or not 0 <= region.category < len(categories):
                raise DataError(
                    f"{record.key}: the region {region.phrase!r} has category {region.category}, "
                    f"but there are {len(categories)} categories; only detection data can be scored"
                )
            x0, y0, x1, y1 = region.box
            boxes.append((x0, y0, x1 - x0, y1 - y0))
            rows.append((image, region.category, region_area(region), region.crowd))
            masks.append(region.mask)
    images, numbers, areas, crowd = zip(*rows, strict=True) if rows else ((), (), (), ())
    return _truth(
        keys=[record.key for record in records],
        sizes=[(record.height, record.width) for record in records],
        categories=categories,
        images_N=np.array(images, dtype=np.int64),
        categories_N=np.array(numbers, dtype=np.int64),
        boxes_N4=np.array(boxes, dtype=np.float64).reshape(-1, 4),
        areas_N=np.array(areas, dtype=np.float64),
        crowd_N=np.array(crowd, dtype=bool),
        masks_N=masks,
    )


def coco_document_truth(
    document: Mapping[str, Any], keys: Mapping[int, str] | None = None
) -> CocoTruth:
    """Truth of a parsed COCO annotation file, images and categories by ascending id.

    `keys` says by which key the detections of an image are found, if not by its id as text.
    DataError for what is no such file.
    """
    try:
        images = sorted(document["images"], key=lambda image: image["id"])
        named = sorted(document["categories"], key=lambda category: category["id"])
        image_number = {image["id"]: place for place, image in enumerate(images)}
        number = {category["id"]: place for place, category in enumerate(named)}
        annotations = document["annotations"]
        return _truth(
            keys=[str(i["id"]) if keys is None else keys[i["id"]] for i in images],
            sizes=[(image.get("height", 0), image.get("width", 0)) for image in images],
            categories=[category["name"] for category in named],
            images_N=np.array([image_number[a["image_id"]] for a in annotations], dtype=np.int64),
            categories_N=np.array([number[a["category_id"]] for a in annotations], dtype=np.int64),
            boxes_N4=np.array([a["bbox"] for a in annotations], dtype=np.float64).reshape(-1, 4),
            areas_N=np.array([a["area"] for a in annotations], dtype=np.float64),
            crowd_N=np.array([a.get("iscrowd", 0) for a in annotations], dtype=bool),
            masks_N=[annotation.get("segmentation") for annotation in annotations],
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"this is not a COCO annotation file: {error!r}") from error


def _truth(
    *, keys: Sequence[str], sizes: Sequence[tuple[int, int]], categories: Sequence[str], **rest: Any
) -> CocoTruth:
    for what, names in (("image", keys), ("category", categories)):
        if len(set(names)) < len(names):
            name, _ = Counter(names).most_common(1)[0]
            raise DataError(f"there are several of the {what} {name!r}: which is meant?")
    sizes_I2 = np.array(sizes, dtype=np.int64).reshape(-1, 2)
    return CocoTruth(keys=tuple(keys), sizes_I2=sizes_I2, categories=tuple(categories), **rest)


def coco_ap(
    truth: CocoTruth, detections_by_key: Mapping[str, Found], by: Literal["box", "mask"] = "box"
) -> CocoAP:
    """AP and AR of the detections, overlaps being those of boxes or of masks.

    Equal scores keep the order of `truth.keys`, then that of the detection. DataError where an
    image has no entry, a name is no category, a mask is missing or of another size than its image,
    and where nothing is to be found.
    """
    if not len(truth.images_N):
        raise DataError("no ground-truth boxes in the records: average precision is undefined")
    found = columns(truth.keys, detections_by_key, truth.categories, masks=by == "mask")
    precision_TRKAM, recall_TKAM = _evaluate(truth, found, by)
    precision_TRKA, cap = precision_TRKAM[..., -1], len(MAX_DETECTIONS) - 1
    if (ap := _mean(precision_TRKA[..., ALL])) is None:
        raise DataError("all ground truth is crowds: average precision is undefined")
    return CocoAP(
        ap=ap,
        ap50=_mean(precision_TRKA[IOU_50, ..., ALL]) or 0.0,
        ap75=_mean(precision_TRKA[IOU_75, ..., ALL]) or 0.0,
        ap_small=_mean(precision_TRKA[..., SMALL]),
        ap_medium=_mean(precision_TRKA[..., MEDIUM]),
        ap_large=_mean(precision_TRKA[..., LARGE]),
        ar_1=_mean(recall_TKAM[..., ALL, 0]) or 0.0,
        ar_10=_mean(recall_TKAM[..., ALL, 1]) or 0.0,
        ar_100=_mean(recall_TKAM[..., ALL, cap]) or 0.0,
        ar_small=_mean(recall_TKAM[..., SMALL, cap]),
        ar_medium=_mean(recall_TKAM[..., MEDIUM, cap]),
        ar_large=_mean(recall_TKAM[..., LARGE, cap]),
        per_category={
            name: CategoryAP(
                ap=float(precision_TR.mean()),
                ap50=float(precision_TR[IOU_50].mean()),
                precision_R=tuple(precision_TR[IOU_50].tolist()),
            )
            for column, name in enumerate(truth.categories)
            for precision_TR in [precision_TRKA[:, :, column, ALL]]
            if precision_TR.max() >= 0
        },
        dropped=found.dropped,
    )


def _mean(table: np.ndarray) -> float | None:
    """Over what is defined: -1 stands for categories without ground truth."""
    known = table[table > -1]
    return float(known.mean()) if known.size else None


def _evaluate(
    truth: CocoTruth, found: Columns, by: Literal["box", "mask"]
) -> tuple[np.ndarray, np.ndarray]:
    """The tables of precision (T, R, K, A, M) and recall (T, K, A, M)."""
    images = [
        {"id": number, "height": height, "width": width}
        for number, (height, width) in enumerate(truth.sizes_I2.tolist())
    ]
    categories = [{"id": number, "name": name} for number, name in enumerate(truth.categories)]
    truth_masks = found_masks = None
    if by == "mask":
        truth_masks = _checked(truth, truth.images_N, truth.masks_N)
        found_masks = _checked(truth, found.images_K, found.masks_K or [])
    expected = hotcoco.COCO.from_arrays(
        images,
        categories,
        truth.images_N,
        truth.categories_N,
        truth.boxes_N4,
        area=truth.areas_N,
        iscrowd=truth.crowd_N.astype(np.int64),
        segmentation=truth_masks,
    )
    x0_K, y0_K, x1_K, y1_K = found.boxes_K4.T
    rows = (
        found.images_K,
        x0_K,
        y0_K,
        x1_K - x0_K,
        y1_K - y0_K,
        found.scores_K,
        found.categories_K,
    )
    seen = expected.load_res(np.stack(rows, axis=1), segmentation=found_masks)
    if found_masks:  # it takes the areas of the boxes
        areas = np.array([mask_area(mask) for mask in found_masks], dtype=np.float64)
        seen.update_anns(ids=np.arange(1, len(areas) + 1), area=areas)
    evaluation = hotcoco.COCOeval(expected, seen, {"box": "bbox", "mask": "segm"}[by])
    evaluation.evaluate()
    evaluation.accumulate()
    tables = evaluation.eval
    assert tables is not None
    return tables["precision"], tables["recall"]


def _checked(truth: CocoTruth, images_N: np.ndarray, masks: Sequence[Any]) -> list[Any]:
    """Compressed run lengths, each of its image's size."""
    return [
        run_lengths(mask, truth.sizes_I2[image], f"image {truth.keys[image]}")
        for image, mask in zip(images_N.tolist(), masks, strict=True)
    ]
