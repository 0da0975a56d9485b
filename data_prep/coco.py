"""COCO instance annotations: one JSON file, boxes as x, y, width, height, masks of three kinds.

The JSON is read whole (COCO train2017 takes about 2 GB of memory), images one by one. Crowd
regions are left out and counted: they name no single object.
"""

import json
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pycocotools import mask as coco_mask

from glipv2.data_prep.boxes_cleaning import MAX_BOXES, clean_box
from glipv2.data_prep.image_files import check_file, check_folder, inside, load_image, record_key
from glipv2.data_prep.reasons import Dropped
from glipv2.data_prep.text_cleaning import clean_text
from glipv2.pipeline.errors import BadSample, DataError
from glipv2.pipeline.records import Record, Region
from glipv2.pipeline.region_masks import uncompress_runs

MAX_COORDINATE = 1e5
"""Pixels: polygons that reach further are broken."""
PARTS = ("images", "annotations", "categories")


@dataclass(frozen=True, kw_only=True)
class CocoFile:
    """The parts of a COCO file that are used, checked for their outer shape."""

    categories: tuple[str, ...]
    """Names in the order of their ids: what Region.category counts."""
    category_numbers: dict[Any, int]
    """COCO's category id -> index into `categories`."""
    images: list[dict[str, Any]]
    annotations: dict[Any, list[dict[str, Any]]]
    """By image id."""


def open_coco(annotations: Path) -> CocoFile:
    """Read the JSON; DataError when it is missing or not an instances file."""
    check_file(annotations, "COCO annotation file")
    try:
        document = json.loads(annotations.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{annotations} is not valid JSON: {error}; fetch it again") from error
    lists = [document.get(part) if isinstance(document, dict) else None for part in PARTS]
    if not all(isinstance(part, list) for part in lists):
        raise DataError(
            f"{annotations} lacks one of the lists {', '.join(PARTS)}; give an instances file"
        )
    images, boxes, classes = (
        [item for item in part or () if isinstance(item, dict)] for part in lists
    )
    try:
        named = sorted((int(item["id"]), clean_text(str(item["name"]))) for item in classes)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{annotations}: a category lacks its id or name ({error!r})") from error
    by_image = defaultdict(list)
    for item in boxes:
        by_image[_hashable(item.get("image_id"))].append(item)
    return CocoFile(
        categories=tuple(name for _, name in named),
        category_numbers={number: index for index, (number, _) in enumerate(named)},
        images=images,
        annotations=dict(by_image),
    )


def read_coco(annotations: Path | CocoFile, images: Path, dropped: Dropped) -> Iterator[Record]:
    """One detection record per image, in the file's order; `dropped` takes what is left out."""
    coco = annotations if isinstance(annotations, CocoFile) else open_coco(annotations)
    check_folder(images, "image")
    for entry in coco.images:
        try:
            yield _record(coco, entry, images, dropped)
        except BadSample as error:
            dropped.note(error.reason, clean_text(str(entry.get("file_name"))))


def _record(coco: CocoFile, entry: dict[str, Any], folder: Path, dropped: Dropped) -> Record:
    name, number = entry.get("file_name"), _hashable(entry.get("id"))
    if not isinstance(name, str) or not name or number is None:
        raise BadSample("row_unreadable", f"image entry {str(entry)[:100]}")
    image = load_image(inside(folder, name))
    stated = (entry.get("width"), entry.get("height"))
    if any(side not in (None, 0, actual) for side, actual in zip(stated, image.size, strict=True)):
        raise BadSample("size_mismatch", f"{name}: {stated}, the image is {image.size}")
    where = clean_text(name)
    items = coco.annotations.get(number, [])
    if len(items) > MAX_BOXES:
        raise BadSample("boxes_too_many", f"{name}: {len(items)}")
    regions = []
    for item in items:
        region = _region(coco, item, image.size, dropped, where)
        if region is not None:
            regions.append(region)
    if not regions:
        dropped.note("no_boxes", where)
    return Record(
        key=record_key(str(number)),
        image=image.data,
        image_format=image.format,
        width=image.width,
        height=image.height,
        task="detection",
        regions=tuple(regions),
        provenance={"source": "coco", "file": where, "image_id": number},
    )


def _region(
    coco: CocoFile, item: dict[str, Any], size: tuple[int, int], dropped: Dropped, where: str
) -> Region | None:
    if item.get("iscrowd"):
        dropped.note("crowd", where)
        return None
    category = coco.category_numbers.get(_hashable(item.get("category_id")))
    if category is None:
        dropped.note("category_unknown", where)
        return None
    box = clean_box(_corners(item.get("bbox")), size, dropped, where)
    if box is None:
        return None
    mask = None
    if item.get("segmentation"):
        mask = run_lengths(item["segmentation"], *size)
        if mask is None:
            dropped.note("mask_unreadable", where)
    return Region(box=box, phrase=coco.categories[category], category=category, mask=mask)


def _corners(bbox: Any) -> list[float]:
    """x, y, width, height -> x0, y0, x1, y1; empty when they are not four numbers."""
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(_is_number(side) for side in bbox):
        return []
    try:
        x, y, width, height = (float(side) for side in bbox)
    except OverflowError:
        return [math.inf] * 4
    return [x, y, x + width, y + height]


def run_lengths(segmentation: Any, width: int, height: int) -> dict[str, Any] | None:
    """Polygons, plain or compressed run lengths -> compressed run lengths; None if not valid.

    Everything is checked here because pycocotools' C code writes past its buffers when the runs
    don't add up to the image.
    """
    if isinstance(segmentation, list):
        polygons = [part for part in segmentation if _is_polygon(part)]
        if not polygons or len(polygons) < len(segmentation):
            return None
        return _as_json(coco_mask.merge(coco_mask.frPyObjects(polygons, height, width)))
    if not isinstance(segmentation, dict) or segmentation.get("size") != [height, width]:
        return None
    counts = segmentation.get("counts")
    runs = uncompress_runs(counts) if isinstance(counts, str) else counts
    if not isinstance(runs, list) or not all(type(run) is int and run >= 0 for run in runs):
        return None
    if sum(runs) != width * height:
        return None
    plain = {"size": [height, width], "counts": runs}
    return _as_json(coco_mask.frPyObjects(plain, height, width))


def _as_json(encoded: dict[str, Any]) -> dict[str, Any]:
    height, width = encoded["size"]
    return {"size": [int(height), int(width)], "counts": encoded["counts"].decode("ascii")}


def _is_polygon(part: Any) -> bool:
    """At least three points, all finite and not absurdly far away."""
    if not isinstance(part, list) or len(part) < 6 or len(part) % 2:
        return False
    return all(_is_number(value) and abs(value) < MAX_COORDINATE for value in part)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _hashable(value: Any) -> Any:
    return value if isinstance(value, int | str) else None
