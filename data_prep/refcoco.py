"""RefCOCO, RefCOCO+ and RefCOCOg: expressions that each name one object of a COCO image.

Read are, recognised by content and never by name:

- the official refs as a JSON list, together with their instances.json; the official pickle is
  refused, with the line that makes JSON of it
- a JSON list of objects with `phrase`, `box` (x, y, width, height) and `imageName` or `image`
- MDETR's finetune_refcoco*.json, whose spans are the noun that leads the expression

In the first two the span is the whole expression.
"""

import re
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

from glipv2.data_prep.boxes_cleaning import clean_box
from glipv2.data_prep.coco import clean_mask, corners
from glipv2.data_prep.coco_images import load_coco
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
from glipv2.data_prep.text_cleaning import clean_text
from glipv2.pipeline.config import PrepareConfig
from glipv2.pipeline.errors import BadSample, ConfigError, DataError
from glipv2.pipeline.records import Record, Region

KINDS = {
    "mdetr": FileKind("images", ("caption",)),
    "instances": FileKind("images", ("file_name",)),
    "refs": FileKind("", ("sentences",)),
    "phrases": FileKind("", ("phrase", "box")),
}
KEPT = ("image_id", "ref_id", "ann_id", "sent_id", "split", "entity", "phraseId")
"""Fields that say where an expression comes from."""
COCO_ID = re.compile(r"[0-9]{1,12}")


class Expression(NamedTuple):
    number: int
    """In the file."""
    text: Any
    annotation: dict[str, Any] | None
    """With the box (x, y, width, height) and perhaps a mask; None when the file lacks it."""
    image: dict[str, Any] | None
    """With the file name and perhaps the size."""
    kept: dict[str, Any]
    """For the provenance."""


def refcoco_source(options: PrepareConfig) -> Source:
    """One referring record per expression, in the file's order."""
    files = recognise(options.annotations, KINDS)
    if options.split and "refs" not in files:
        raise ConfigError("only refs with their instances.json know splits; leave out split")
    if set(files) == {"mdetr"}:
        return caption_source("refcoco", "referring", files["mdetr"], options.images)
    if set(files) not in ({"refs", "instances"}, {"phrases"}):
        raise DataError(
            f"{', '.join(files.values())}: refs go together with their instances.json; "
            "give these two, or one file of another form alone"
        )
    images = ImageFolders(options.images)
    images.check()
    if "refs" in files:
        total = _count(files["refs"], options.split)
        rows = partial(_ref_rows, files["refs"], files["instances"], options.split)
    else:
        total = None
        rows = partial(_phrase_rows, files["phrases"])
    return Source(
        rows=rows,
        record=partial(_record, images),
        total=total,
        licence=licence_of(parent(options.annotations[0])),
        content={
            "annotations": files_digest([files[kind] for kind in sorted(files)]),
            "images": images.digest(),
            **({"split": options.split} if options.split else {}),
        },
    )


def _count(refs: str, split: str) -> int:
    """Expressions of the split; DataError when the file has no such split."""
    counts: Counter[str] = Counter()
    for ref in items(refs):
        counts[str(_field(ref, "split"))] += len(_sentences(ref))
    if split and split not in counts:
        raise DataError(f"{refs} has no split {split!r}, but {', '.join(sorted(counts))}")
    return counts[split] if split else counts.total()


def _ref_rows(refs: str, instances: str, split: str, dropped: Dropped) -> Iterator[Row]:
    """Rows are numbered before the split is chosen: an expression has one key in all of them."""
    annotations = Lookup(items(instances, "annotations"), "id")
    images = Lookup(items(instances, "images"), "id")
    number = -1
    for place, ref in enumerate(items(refs)):
        where, sentences = f"ref {place}", _sentences(ref)
        taken = not split or str(_field(ref, "split")) == split
        if taken and not sentences:
            dropped.note("row_unreadable", where)
        for sentence in sentences:
            number += 1
            if taken:
                found = Expression(
                    number=number,
                    text=_field(sentence, "sent") or _field(sentence, "raw"),
                    annotation=next(iter(annotations.get(ref.get("ann_id"))), None),
                    image=next(iter(images.get(ref.get("image_id"))), None),
                    kept=kept_fields({**ref, "sent_id": _field(sentence, "sent_id")}, KEPT),
                )
                yield Row(where, found)


def _phrase_rows(phrases: str, dropped: Dropped) -> Iterator[Row]:
    for number, item in enumerate(items(phrases)):
        where = f"expression {number}"
        name, words = _field(item, "imageName"), _field(item, "phrase")
        if not isinstance(name, str) and COCO_ID.fullmatch(str(_field(item, "image"))):
            name = f"{int(item['image']):012d}.jpg"
        if isinstance(words, list):
            words = " ".join(map(str, words))
        if isinstance(item, dict):
            found = Expression(
                number=number,
                text=words,
                annotation={"bbox": item.get("box")},
                image={"file_name": name},
                kept=kept_fields(item, KEPT),
            )
            yield Row(where, found)
        else:
            dropped.note("row_unreadable", where)


def _record(images: ImageFolders, row: Row, dropped: Dropped) -> Record:
    found, where = row.item, row.where
    if found.annotation is None or found.image is None:
        raise BadSample("entry_missing", f"{where}: its annotation or image")
    name = found.image.get("file_name")
    if not isinstance(name, str) or not name:
        raise BadSample("row_unreadable", f"{where}: no name of its image")
    caption = clean_caption(found.text, dropped, where)
    image = load_coco(images, name, found.image)
    box = clean_box(corners(found.annotation.get("bbox")), image.size, dropped, where)
    regions = []
    if box is not None:
        region = Region(
            box=box,
            spans=caption.whole,
            phrase=caption.text,
            mask=clean_mask(found.annotation.get("segmentation"), image.size, dropped, where),
            crowd=bool(found.annotation.get("iscrowd")),
        )
        regions.append(region)
    return grounded_record(
        key=record_key(name.rsplit("/", 1)[-1].split(".")[0], found.number),
        image=image,
        task="referring",
        caption=caption.text,
        regions=regions,
        provenance={"source": "refcoco", "file": clean_text(name), **found.kept},
    )


def _sentences(ref: Any) -> list[Any]:
    found = _field(ref, "sentences")
    return found if isinstance(found, list) else []


def _field(item: Any, name: str) -> Any:
    return item.get(name) if isinstance(item, dict) else None
