"""MDETR's grounding JSON that GLIP trains on: Flickr30k Entities, the mixed set, GQA (facts E.3).

COCO's layout with one image entry per caption; `tokens_positive` of an annotation are the spans of
the caption that its box stands for. Several image folders can be given, as the mixed set takes
its images from COCO and from Visual Genome.
"""

from functools import partial
from typing import Any

from glipv2.data_prep.boxes_cleaning import check_box_count, clean_box
from glipv2.data_prep.coco import clean_mask, coco_outline, coco_rows, corners
from glipv2.data_prep.coco_images import load_coco
from glipv2.data_prep.grounded import Caption, clean_caption, grounded_record, kept_fields
from glipv2.data_prep.image_files import (
    ImageFolders,
    check_file,
    files_digest,
    licence_of,
    parent,
    record_key,
)
from glipv2.data_prep.reasons import Dropped
from glipv2.data_prep.source import Row, Source
from glipv2.pipeline.config import PrepareConfig
from glipv2.pipeline.errors import BadSample
from glipv2.pipeline.records import Record, Region, Task

KEPT = ("dataset_name", "data_source", "original_img_id", "original_id", "sentence_id", "task_id")
"""Fields of the image entry that say where it comes from."""


def mdetr_source(options: PrepareConfig) -> Source:
    """One grounding record per image entry, in the file's order."""
    return caption_source(options.source, "grounding", options.annotations[0], options.images)


def caption_source(name: str, task: Task, annotations: str, folders: tuple[str, ...]) -> Source:
    """A file of this layout, for any source that comes in it."""
    images = ImageFolders(folders)
    check_file(annotations, "MDETR annotation file")
    images.check()
    total, _ = coco_outline(annotations)
    return Source(
        rows=partial(coco_rows, annotations),
        record=partial(_record, name, task, images),
        total=total,
        licence=licence_of(parent(annotations)),
        content={"annotations": files_digest([annotations]), "images": images.digest()},
    )


def _record(source: str, task: Task, images: ImageFolders, row: Row, dropped: Dropped) -> Record:
    entry, annotations = row.item
    name = entry.get("file_name")
    if not isinstance(name, str) or not name:
        raise BadSample("row_unreadable", f"image entry {str(entry)[:100]}")
    caption = clean_caption(entry.get("caption"), dropped, row.where)
    image = load_coco(images, name, entry)
    check_box_count(annotations, row.where)
    regions = [_region(item, caption, image.size, dropped, row.where) for item in annotations]
    provenance = {"source": source, "file": row.where, "image_id": entry["id"]}
    provenance |= kept_fields(entry, KEPT)
    if "tokens_positive_eval" in entry:
        phrases = _phrases(entry["tokens_positive_eval"], caption, dropped, row.where)
        provenance["tokens_positive_eval"] = phrases
    return grounded_record(
        key=record_key(str(entry["id"])),
        image=image,
        task=task,
        caption=caption.text,
        regions=[region for region in regions if region is not None],
        provenance=provenance,
    )


def _region(
    item: dict[str, Any], caption: Caption, size: tuple[int, int], dropped: Dropped, where: str
) -> Region | None:
    spans = caption.spans(item.get("tokens_positive"), dropped, where)
    if not spans:
        dropped.note("span_missing", where)
        return None
    box = clean_box(corners(item.get("bbox")), size, dropped, where)
    if box is None:
        return None
    return Region(
        box=box,
        spans=spans,
        phrase=caption.phrase(spans),
        mask=clean_mask(item.get("segmentation"), size, dropped, where),
        crowd=bool(item.get("iscrowd")),
    )


def _phrases(raw: Any, caption: Caption, dropped: Dropped, where: str) -> list[list[list[int]]]:
    """The spans of each phrase that evaluation asks for."""
    phrases = raw if isinstance(raw, list) else []
    spans = [caption.spans(phrase, dropped, where) for phrase in phrases]
    return [[list(span) for span in phrase] for phrase in spans if phrase]
