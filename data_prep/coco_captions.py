"""COCO captions: the official captions_*.json, or Karpathy's dataset_*.json with its splits.

Karpathy's files for Flickr8k and Flickr30k have the same layout and are read too.
"""

from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

from glipv2.data_prep.coco import coco_rows
from glipv2.data_prep.coco_images import load_coco
from glipv2.data_prep.grounded import clean_caption
from glipv2.data_prep.image_files import (
    ImageFile,
    ImageFolders,
    files_digest,
    licence_of,
    parent,
    record_key,
)
from glipv2.data_prep.json_kinds import FileKind, recognise
from glipv2.data_prep.json_stream import items
from glipv2.data_prep.reasons import Dropped
from glipv2.data_prep.source import Row, Source
from glipv2.data_prep.text_cleaning import clean_text
from glipv2.pipeline.config import PrepareConfig
from glipv2.pipeline.errors import BadSample, ConfigError, DataError
from glipv2.pipeline.records import Record

KINDS = {
    "karpathy": FileKind("images", ("sentences",)),
    "official": FileKind("images", ("file_name",)),
}
TOGETHER = {"trainrestval": ("train", "restval")}
"""What is trained on: `restval` is the part of COCO's val2014 that is in neither val nor test."""
MAX_CAPTIONS = 1_000


def coco_captions_source(options: PrepareConfig) -> Source:
    """One captioning record per image, in the file's order."""
    ((kind, url),) = recognise(options.annotations, KINDS).items()
    images = ImageFolders(options.images)
    images.check()
    if kind == "official" and options.split:
        raise ConfigError(f"{url} has no splits, as Karpathy's file has; leave out split")
    if kind == "official":
        rows, total = partial(coco_rows, url), sum(1 for _ in items(url, "images"))
    else:
        splits = TOGETHER.get(options.split, (options.split,) if options.split else ())
        rows, total = partial(_karpathy_rows, url, splits), _count(url, splits)
    return Source(
        rows=rows,
        record=partial(_record, images),
        total=total,
        licence=licence_of(parent(url)),
        content={
            "annotations": files_digest([url]),
            "images": images.digest(),
            **({"split": options.split} if options.split else {}),
        },
    )


def _count(url: str, splits: tuple[str, ...]) -> int:
    """Images of the splits; DataError when the file lacks one of them."""
    counts = Counter(str(_field(entry, "split")) for entry in items(url, "images"))
    if absent := [split for split in splits if split not in counts]:
        raise DataError(f"{url} has no split {absent[0]!r}, but {', '.join(sorted(counts))}")
    return sum(counts[split] for split in splits) if splits else counts.total()


def _karpathy_rows(url: str, splits: tuple[str, ...], dropped: Dropped) -> Iterator[Row]:
    """Entries and captions in the official file's form."""
    seen = set()
    for number, item in enumerate(items(url, "images")):
        if splits and _field(item, "split") not in splits:
            continue
        name, folder = _field(item, "filename"), _field(item, "filepath")
        image_id = next((i for f in ("cocoid", "imgid") if (i := _field(item, f)) is not None), "")
        where = clean_text(name) if isinstance(name, str) else f"image entry {number}"
        if not isinstance(image_id, int | str) or not isinstance(name, str):
            dropped.note("row_unreadable", where)
        elif str(image_id) in seen:
            dropped.note("image_repeated", where)
        else:
            seen.add(str(image_id))
            entry = {"id": image_id, "file_name": name, "split": _field(item, "split")}
            entry |= {"folder": folder} if isinstance(folder, str) else {}
            found = _field(item, "sentences")
            sentences = found if isinstance(found, list) else []
            yield Row(where, (entry, [{"caption": _field(s, "raw")} for s in sentences]))


def _record(images: ImageFolders, row: Row, dropped: Dropped) -> Record:
    entry, annotations = row.item
    name = entry.get("file_name")
    if not isinstance(name, str) or not name:
        raise BadSample("row_unreadable", f"image entry {str(entry)[:100]}")
    if len(annotations) > MAX_CAPTIONS:
        raise BadSample("texts_too_many", f"{len(annotations)} captions")
    captions = []
    for item in annotations:
        try:
            captions.append(clean_caption(item.get("caption"), dropped, row.where).text)
        except BadSample:
            dropped.note("caption_unreadable", row.where)
    if not captions:
        raise BadSample("text_missing", row.where)
    image = _load(images, name, entry)
    split = entry.get("split")
    return Record(
        key=record_key(str(entry["id"])),
        image=image.data,
        image_format=image.format,
        width=image.width,
        height=image.height,
        task="captioning",
        caption=captions[0],
        captions=tuple(captions),
        provenance={
            "source": "coco-captions",
            "file": row.where,
            "image_id": entry["id"],
            **({"split": clean_text(split)} if isinstance(split, str) else {}),
        },
    )


def _load(images: ImageFolders, name: str, entry: dict[str, Any]) -> ImageFile:
    """Karpathy's file names the folder too; it is one of the image folders, or below one."""
    if "folder" in entry:
        try:
            return images.load(f"{entry['folder']}/{name}")
        except BadSample as error:
            if error.reason != "image_missing":
                raise
    return load_coco(images, name, entry)


def _field(item: Any, name: str) -> Any:
    return item.get(name) if isinstance(item, dict) else None
