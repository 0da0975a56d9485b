"""LVIS: COCO's layout, labelled federatedly.

An image is labelled with all objects of some categories only. Of these, `neg_category_ids` are
known to be absent and `not_exhaustive_category_ids` may have more objects than are marked; every
record keeps both as `neg_categories` and `not_exhaustive_categories` in its provenance. Categories
keep LVIS's names ("bow_(weapon)"), which alone are unique; prompts clean them.
"""

from functools import partial
from typing import Any

from glipv2.data_prep.boxes_cleaning import check_box_count
from glipv2.data_prep.coco import CocoCategories, coco_outline, coco_regions, coco_rows
from glipv2.data_prep.coco_images import load_coco
from glipv2.data_prep.image_files import (
    ImageFolders,
    check_file,
    files_digest,
    licence_of,
    parent,
    record_key,
)
from glipv2.data_prep.json_stream import items
from glipv2.data_prep.reasons import Dropped
from glipv2.data_prep.source import Row, Source
from glipv2.data_prep.text_cleaning import clean_text
from glipv2.pipeline.config import PrepareConfig
from glipv2.pipeline.errors import BadSample, DataError
from glipv2.pipeline.records import Record

FREQUENCIES = ("r", "c", "f")
"""Rare, common, frequent: in up to 10, up to 100 and more images of the training set."""
FEDERATED = {
    "neg_category_ids": "neg_categories",
    "not_exhaustive_category_ids": "not_exhaustive_categories",
}
"""LVIS's field -> ours, which holds indices of categories."""


def lvis_source(options: PrepareConfig) -> Source:
    """One detection record per image, in the file's order.

    `info` has the `frequency` and the `synonyms` of every category, in the categories' order.
    """
    (annotations,), images = options.annotations, ImageFolders(options.images)
    check_file(annotations, "LVIS annotation file")
    images.check()
    total, categories = coco_outline(annotations)
    return Source(
        rows=partial(coco_rows, annotations),
        record=partial(_record, categories, images),
        categories=categories.names,
        total=total,
        licence=licence_of(parent(annotations)),
        content={"annotations": files_digest([annotations]), "images": images.digest()},
        info=_category_info(annotations, categories),
    )


def _category_info(annotations: str, categories: CocoCategories) -> dict[str, Any]:
    frequency, synonyms = {}, {}
    for item in items(annotations, "categories"):
        if item.get("frequency") not in FREQUENCIES:
            raise DataError(
                f"{annotations}: category {item['name']!r} has no frequency r, c or f; "
                "give an LVIS file, or read it as coco"
            )
        number, others = categories.numbers[int(item["id"])], item.get("synonyms")
        frequency[number] = item["frequency"]
        others = others if isinstance(others, list) else []
        synonyms[number] = [clean_text(str(name)) for name in others]
    order = range(len(categories.names))
    return {
        "frequency": [frequency[number] for number in order],
        "synonyms": [synonyms[number] for number in order],
    }


def _record(categories: CocoCategories, images: ImageFolders, row: Row, dropped: Dropped) -> Record:
    entry, annotations = row.item
    name = entry.get("file_name") or entry.get("coco_url")
    if not isinstance(name, str):
        raise BadSample("row_unreadable", f"{row.where} has neither file_name nor coco_url")
    image = load_coco(images, name, entry)
    where = clean_text(name)
    check_box_count(annotations, where)
    federated = {
        ours: _indices(entry.get(theirs), categories, where) for theirs, ours in FEDERATED.items()
    }
    regions = coco_regions(annotations, categories, image.size, dropped, where)
    if not regions:
        dropped.note("no_boxes", where)
    return Record(
        key=record_key(str(entry["id"])),
        image=image.data,
        image_format=image.format,
        width=image.width,
        height=image.height,
        task="detection",
        regions=regions,
        provenance={"source": "lvis", "file": where, "image_id": entry["id"], **federated},
    )


def _indices(ids: Any, categories: CocoCategories, where: str) -> list[int]:
    """BadSample when they are missing: absent and unlabelled would look the same.

    Ids without a category are passed over, as a file may list a part of LVIS's categories.
    """
    if not isinstance(ids, list) or any(type(number) is not int for number in ids):
        raise BadSample("row_unreadable", f"{where}: its federated fields are no lists of ids")
    return sorted(categories.numbers[number] for number in ids if number in categories.numbers)
