"""COCO instance annotations: one JSON file, boxes as x, y, width, height, masks of three kinds.

Also what Objects365, OpenImages and ODinW come in. Crowd regions are kept as such: training passes
over them, evaluation forgives boxes inside them.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from pycocotools import mask as coco_mask

from glipv2.data_prep.boxes_cleaning import check_box_count, clean_box
from glipv2.data_prep.image_files import (
    ImageFile,
    ImageFolders,
    check_file,
    files_digest,
    licence_of,
    parent,
    record_key,
)
from glipv2.data_prep.json_stream import Lookup, items, sections
from glipv2.data_prep.reasons import Dropped
from glipv2.data_prep.source import Row, Source
from glipv2.data_prep.text_cleaning import clean_text
from glipv2.pipeline.config import PrepareConfig
from glipv2.pipeline.errors import BadSample, DataError
from glipv2.pipeline.records import Box, Record, Region
from glipv2.pipeline.region_masks import uncompress_runs

MAX_COORDINATE = 1e5
"""Pixels: polygons that reach further are broken."""


@dataclass(frozen=True)
class CocoCategories:
    names: tuple[str, ...]
    """In the order of their ids: what Region.category counts."""
    numbers: dict[Any, int]
    """COCO's category id -> index into `names`."""


def coco_source(options: PrepareConfig) -> Source:
    """One detection record per image of an instances file, in the file's order."""
    (annotations,), images = options.annotations, ImageFolders(options.images)
    check_file(annotations, "COCO annotation file")
    images.check()
    total, categories = coco_outline(annotations)
    return Source(
        rows=partial(coco_rows, annotations),
        record=partial(_record, categories, images),
        categories=categories.names,
        total=total,
        licence=licence_of(parent(annotations)),
        content={"annotations": files_digest([annotations]), "images": images.digest()},
    )


def coco_outline(annotations: str) -> tuple[int, CocoCategories]:
    """Number of images, and the categories; DataError when it is no instances file."""
    listed: list[Any] = []
    found, total = set(), 0
    for name, values in sections(annotations):
        found.add(name)
        if name == "images":
            total = sum(1 for _ in values)
        elif name == "categories":
            listed = list(values)
    if lacking := sorted({"images", "annotations", "categories"} - found):
        raise DataError(
            f"{annotations} lacks the list {' and '.join(lacking)}; give an instances file"
        )
    try:
        named = sorted((int(item["id"]), clean_text(str(item["name"]))) for item in listed)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{annotations}: a category lacks its id or name ({error!r})") from error
    if len({number for number, _ in named}) < len(named):
        raise DataError(f"{annotations}: two categories have the same id; give each its own")
    return total, CocoCategories(
        names=tuple(name for _, name in named),
        numbers={number: index for index, (number, _) in enumerate(named)},
    )


def coco_rows(annotations: str, dropped: Dropped) -> Iterator[Row]:
    """Each image's entry together with its annotations; an id that occurs twice is noted."""
    lookup = Lookup(items(annotations, "annotations"), "image_id")
    seen = set()
    for number, entry in enumerate(items(annotations, "images")):
        entry = entry if isinstance(entry, dict) else {}
        name, image_id = entry.get("file_name"), entry.get("id")
        where = clean_text(name) if isinstance(name, str) else f"image entry {number}"
        if not isinstance(image_id, int | str) or image_id == "":
            dropped.note("row_unreadable", where)
        elif str(image_id) in seen:  # 1 and "1" would be one key
            dropped.note("image_repeated", where)
        else:
            seen.add(str(image_id))
            yield Row(where, (entry, lookup.get(image_id)))


def _record(categories: CocoCategories, images: ImageFolders, row: Row, dropped: Dropped) -> Record:
    entry, annotations = row.item
    name = entry.get("file_name")
    if not isinstance(name, str) or not name:
        raise BadSample("row_unreadable", f"image entry {str(entry)[:100]}")
    image = load_stated(images, name, entry)
    check_box_count(annotations, row.where)
    regions = coco_regions(annotations, categories, image.size, dropped, row.where)
    if not regions:
        dropped.note("no_boxes", row.where)
    return Record(
        key=record_key(str(entry["id"])),
        image=image.data,
        image_format=image.format,
        width=image.width,
        height=image.height,
        task="detection",
        regions=regions,
        provenance={"source": "coco", "file": row.where, "image_id": entry["id"]},
    )


def load_stated(images: ImageFolders, name: str, entry: dict[str, Any]) -> ImageFile:
    """The image, whose size must be the entry's `width` and `height` where it states them."""
    image = images.load(name)
    stated = (entry.get("width"), entry.get("height"))
    if any(side not in (None, 0, actual) for side, actual in zip(stated, image.size, strict=True)):
        raise BadSample("size_mismatch", f"{name}: {stated}, the image is {image.size}")
    return image


def coco_regions(
    annotations: list[dict[str, Any]],
    categories: CocoCategories,
    size: tuple[int, int],
    dropped: Dropped,
    where: str,
) -> tuple[Region, ...]:
    """The usable ones of an image's annotations."""
    regions = (_region(item, categories, size, dropped, where) for item in annotations)
    return tuple(region for region in regions if region is not None)


def _region(
    item: dict[str, Any],
    categories: CocoCategories,
    size: tuple[int, int],
    dropped: Dropped,
    where: str,
) -> Region | None:
    category = categories.numbers.get(_hashable(item.get("category_id")))
    if category is None:
        dropped.note("category_unknown", where)
        return None
    box = clean_box(corners(item.get("bbox")), size, dropped, where)
    if box is None:
        return None
    mask = clean_mask(item.get("segmentation"), size, dropped, where)
    return Region(
        box=box,
        phrase=categories.names[category],
        category=category,
        mask=mask,
        crowd=bool(item.get("iscrowd")),
        area=_stated_area(item.get("area"), mask, box),
    )


def _stated_area(area: Any, mask: dict[str, Any] | None, box: Box) -> float | None:
    """The file's, where it is one and the mask, or the box, has another."""
    if not _is_number(area) or not 0 <= area <= MAX_COORDINATE**2:
        return None
    x0, y0, x1, y1 = box
    own = (x1 - x0) * (y1 - y0) if mask is None else float(coco_mask.area(mask))
    return None if area == own else float(area)


def clean_mask(
    segmentation: Any, size: tuple[int, int], dropped: Dropped, where: str
) -> dict[str, Any] | None:
    """COCO's polygons or run lengths as compressed run lengths; None, and noted, if not valid."""
    mask = run_lengths(segmentation, *size) if segmentation else None
    if segmentation and mask is None:
        dropped.note("mask_unreadable", where)
    return mask


def corners(bbox: Any) -> list[float]:
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
