"""VGPhraseCut: phrases that each name some objects of a Visual Genome image, with their masks.

The official refer_SPLIT.json holds for every phrase `instance_boxes` (x, y, width, height) and
`Polygons`, of each instance a list of polygons, all of which make its mask. image_data_split.json
may be given too; its sizes are then checked. MDETR's finetune_phrasecut_*.json is read as well, but
keeps only the last polygon of each instance (facts E.3): take the official file for masks.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

from glipv2.data_prep.boxes_cleaning import check_box_count, clean_box
from glipv2.data_prep.coco import clean_mask, corners, load_stated
from glipv2.data_prep.grounded import clean_caption, grounded_record, kept_fields
from glipv2.data_prep.image_files import (
    ImageFolders,
    files_digest,
    licence_of,
    parent,
    record_key,
)
from glipv2.data_prep.json_kinds import FileKind, recognise
from glipv2.data_prep.json_stream import Lookup, items
from glipv2.data_prep.mdetr import caption_source
from glipv2.data_prep.reasons import Dropped
from glipv2.data_prep.source import Row, Source
from glipv2.data_prep.visual_genome import genome_folders
from glipv2.pipeline.config import PrepareConfig
from glipv2.pipeline.errors import BadSample, DataError
from glipv2.pipeline.records import Record, Region

KINDS = {
    "mdetr": FileKind("images", ("caption",)),
    "phrases": FileKind("", ("phrase", "instance_boxes")),
    "images": FileKind("", ("image_id", "width", "height")),
}


def phrasecut_source(options: PrepareConfig) -> Source:
    """One referring record per phrase, in the file's order, with all its instances as regions."""
    files = recognise(options.annotations, KINDS)
    if set(files) == {"mdetr"}:
        return caption_source("phrasecut", "referring", files["mdetr"], options.images)
    if "phrases" not in files or "mdetr" in files:
        raise DataError(
            f"{', '.join(files.values())}: give refer_SPLIT.json, with or without "
            "image_data_split.json, or MDETR's file alone"
        )
    ImageFolders(options.images).check()
    return Source(
        rows=partial(_rows, files),
        record=partial(_record, genome_folders(options.images)),
        licence=licence_of(parent(options.annotations[0])),
        content={
            "annotations": files_digest([files[kind] for kind in sorted(files)]),
            "images": ImageFolders(options.images).digest(),
        },
    )


def _rows(files: dict[str, str], dropped: Dropped) -> Iterator[Row]:
    images = Lookup(items(files["images"]) if "images" in files else (), "image_id")
    for number, task in enumerate(items(files["phrases"])):
        image_id = task.get("image_id") if isinstance(task, dict) else None
        where = f"phrase {number} of image {image_id}"
        if type(image_id) is int:
            yield Row(where, (number, task, next(iter(images.get(image_id)), {})))
        else:
            dropped.note("row_unreadable", where)


def _record(images: ImageFolders, row: Row, dropped: Dropped) -> Record:
    number, task, entry = row.item
    boxes, polygons = task.get("instance_boxes"), task.get("Polygons")
    if not isinstance(boxes, list):
        raise BadSample("row_unreadable", f"{row.where}: instance_boxes must be a list")
    caption = clean_caption(task.get("phrase"), dropped, row.where)
    name = f"{task['image_id']}.jpg"
    image = load_stated(images, name, entry)
    check_box_count(boxes, row.where)
    if not isinstance(polygons, list) or len(polygons) != len(boxes):
        if polygons:  # whose they are can't be told
            dropped.note("mask_unreadable", row.where)
        polygons = [None] * len(boxes)
    regions = []
    for bbox, parts in zip(boxes, polygons, strict=True):
        box = clean_box(corners(bbox), image.size, dropped, row.where)
        if box is not None:
            mask = clean_mask(_flat(parts), image.size, dropped, row.where)
            regions.append(Region(box=box, spans=caption.whole, phrase=caption.text, mask=mask))
    return grounded_record(
        key=record_key(str(task["image_id"]), number),
        image=image,
        task="referring",
        caption=caption.text,
        regions=regions,
        provenance={
            "source": "phrasecut",
            "file": name,
            **kept_fields(task, ("image_id", "task_id")),
            **kept_fields(entry, ("coco_id",)),
        },
    )


def _flat(polygons: Any) -> Any:
    """Lists of [x, y] points as COCO writes polygons; what is none goes on as it is, to be judged.

    Polygons of one or two points cover nothing and are left out beside others.
    """
    if not isinstance(polygons, list):
        return polygons
    flat = [
        [side for point in polygon for side in point]
        if isinstance(polygon, list) and all(isinstance(point, list) for point in polygon)
        else polygon
        for polygon in polygons
    ]
    return [part for part in flat if not isinstance(part, list) or len(part) >= 6] or flat
