"""Visual Genome: objects.json for detection, region_descriptions.json for grounding.

The phrases of an image's regions are packed into captions "a phrase. another phrase." as in the
data that GLIP trains on (MDETR's mixed set, facts E.3): at most 250 characters, and never two
phrases for one place (IoU above 0.5) in one caption, so that each object is named once in it. All
phrases of an image would be several times longer than a prompt. A phrase that several regions have
is one phrase with several boxes. The span is the whole phrase: that is what the region shows.

image_data.json may be given too; its sizes are then checked and its COCO ids kept, by which images
that evaluation uses can be found. Given objects and regions together, the set has records of both.
"""

from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

from glipv2.data_prep.boxes_cleaning import MAX_BOXES, clean_box
from glipv2.data_prep.coco import corners, load_stated
from glipv2.data_prep.grounded import grounded_record, kept_fields
from glipv2.data_prep.image_files import (
    ImageFile,
    ImageFolders,
    files_digest,
    licence_of,
    parent,
    record_key,
)
from glipv2.data_prep.json_kinds import FileKind, recognise
from glipv2.data_prep.json_stream import Lookup, items
from glipv2.data_prep.reasons import Dropped
from glipv2.data_prep.source import Row, Source
from glipv2.data_prep.text_cleaning import clean_text, cut_text, has_letters
from glipv2.pipeline import storage
from glipv2.pipeline.config import PrepareConfig
from glipv2.pipeline.errors import DataError
from glipv2.pipeline.records import Record, Region

KINDS = {
    "objects": FileKind("", ("objects",)),
    "regions": FileKind("", ("regions",)),
    "images": FileKind("", ("image_id", "width", "height")),
}
FOLDERS = ("", "VG_100K", "VG_100K_2", "images")
"""Where the images are, below the folders given."""
MAX_CAPTION = 250
MAX_IOU = 0.5
Corners = list[float]
"""x0, y0, x1, y1, not cleaned yet; empty when the box is unreadable."""
Phrases = dict[str, list[Corners]]
"""Words -> the boxes they name."""


class GenomeItem(NamedTuple):
    image_id: int
    image: dict[str, Any]
    """Of image_data.json; may be empty."""
    objects: list[Any] | None = None
    """For a detection record; else `phrases` are there."""
    phrases: Phrases | None = None
    number: int | None = None
    """Of the caption, among those of the image."""


def visual_genome_source(options: PrepareConfig) -> Source:
    """One detection record per image of objects.json, one grounding record per packed caption.

    Categories are the names of at least `min_count` objects, sorted.
    """
    files = recognise(options.annotations, KINDS)
    if not {"objects", "regions"} & set(files):
        raise DataError(
            f"{', '.join(files.values())} names no boxes; "
            "give objects.json or region_descriptions.json too"
        )
    ImageFolders(options.images).check()
    names = _names(files["objects"], options.min_count) if "objects" in files else ()
    return Source(
        rows=partial(_rows, files),
        record=partial(
            _record,
            genome_folders(options.images),
            {name: number for number, name in enumerate(names)},
        ),
        categories=names,
        licence=licence_of(parent(options.annotations[0])),
        content={
            "annotations": files_digest([files[kind] for kind in sorted(files)]),
            "images": ImageFolders(options.images).digest(),
            **({"min_count": options.min_count} if "objects" in files else {}),
        },
    )


def genome_folders(urls: tuple[str, ...]) -> ImageFolders:
    """The folders given, and those that Visual Genome's images come in below them."""
    return ImageFolders(tuple(storage.join(url, name) for url in urls for name in FOLDERS))


def pack_phrases(phrases: Phrases) -> list[Phrases]:
    """Captions of at most MAX_CAPTION characters, of phrases for different places.

    Each phrase goes to the first caption that has room for it.
    """
    captions: list[Phrases] = []
    for words, boxes in phrases.items():
        for caption in captions:
            if len(_text([*caption, words])) <= MAX_CAPTION and not any(
                _iou(one, other) > MAX_IOU
                for others in caption.values()
                for other in others
                for one in boxes
            ):
                caption[words] = boxes
                break
        else:
            captions.append({words: boxes})
    return captions


def _names(objects: str, min_count: int) -> tuple[str, ...]:
    entries = (entry for entry in items(objects) if isinstance(entry, dict))
    counts = Counter(
        _name(item)
        for entry in entries
        for item in (entry["objects"] if isinstance(entry.get("objects"), list) else [])
    )
    names = sorted(name for name, count in counts.items() if name and count >= min_count)
    if not names:
        raise DataError(f"{objects}: no name has {min_count} objects; lower min_count")
    return tuple(names)


def _rows(files: dict[str, str], dropped: Dropped) -> Iterator[Row]:
    images = Lookup(items(files["images"]) if "images" in files else (), "image_id")
    for kind in sorted({"objects", "regions"} & set(files)):
        seen = set()
        for number, entry in enumerate(items(files[kind])):
            entry = entry if isinstance(entry, dict) else {}
            image_id, found = entry.get("image_id", entry.get("id")), entry.get(kind)
            where = f"{image_id}.jpg" if type(image_id) is int else f"entry {number} of {kind}"
            if type(image_id) is not int or not isinstance(found, list):
                dropped.note("row_unreadable", where)
            elif image_id in seen:
                dropped.note("image_repeated", where)
            elif len(found) > MAX_BOXES:
                dropped.note("boxes_too_many", where)
            else:
                seen.add(image_id)
                image = next(iter(images.get(image_id)), {})
                if kind == "objects":
                    yield Row(where, GenomeItem(image_id, image, objects=found))
                    continue
                for place, phrases in enumerate(pack_phrases(_phrases(found, dropped, where))):
                    yield Row(where, GenomeItem(image_id, image, phrases=phrases, number=place))


def _phrases(regions: list[Any], dropped: Dropped, where: str) -> Phrases:
    phrases: Phrases = {}
    for region in regions:
        region = region if isinstance(region, dict) else {}
        raw = region.get("phrase")
        words = clean_text(raw).rstrip(" .") if isinstance(raw, str) else ""
        if not has_letters(words):
            dropped.note("phrase_empty", where)
            continue
        if len(words) >= MAX_CAPTION:
            words = cut_text(words, MAX_CAPTION - 1)
            dropped.note("caption_cut", where)
        box = corners([region.get(side) for side in ("x", "y", "width", "height")])
        phrases.setdefault(words, []).append(box)
    return phrases


def _record(images: ImageFolders, numbers: dict[str, int], row: Row, dropped: Dropped) -> Record:
    item: GenomeItem = row.item
    image = load_stated(images, f"{item.image_id}.jpg", item.image)
    provenance = {"source": "visual-genome", "file": row.where, "image_id": item.image_id}
    provenance |= kept_fields(item.image, ("coco_id",))
    if item.phrases is not None:
        caption, regions = _grounded(item.phrases, image.size, dropped, row.where)
        key = record_key(str(item.image_id), item.number)
        return grounded_record(key, image, "grounding", caption, regions, provenance)
    return Record(
        key=record_key(str(item.image_id)),
        image=image.data,
        image_format=image.format,
        width=image.width,
        height=image.height,
        task="detection",
        regions=_detected(item.objects or [], numbers, image, dropped, row.where),
        provenance=provenance,
    )


def _grounded(
    phrases: Phrases, size: tuple[int, int], dropped: Dropped, where: str
) -> tuple[str, list[Region]]:
    """The caption of the phrases that have a usable box, and their regions."""
    cleaned = {
        words: [clean_box(box, size, dropped, where) for box in boxes]
        for words, boxes in phrases.items()
    }
    named = [words for words, boxes in cleaned.items() if any(boxes)]
    regions, start = [], 0
    for words in named:
        span = (start, start + len(words))
        boxes = (box for box in cleaned[words] if box is not None)
        regions += [Region(box=box, spans=(span,), phrase=words) for box in boxes]
        start = span[1] + len(". ")
    return _text(named), regions


def _text(phrases: list[str]) -> str:
    return ". ".join(phrases) + "."


def _detected(
    objects: list[Any], numbers: dict[str, int], image: ImageFile, dropped: Dropped, where: str
) -> tuple[Region, ...]:
    regions = []
    for item in objects:
        name = _name(item)
        if name not in numbers:
            dropped.note("category_rare" if name else "category_unknown", where)
            continue
        raw = corners([item.get(side) for side in ("x", "y", "w", "h")])
        box = clean_box(raw, image.size, dropped, where)
        if box is not None:
            regions.append(Region(box=box, phrase=name, category=numbers[name]))
    if not regions:
        dropped.note("no_boxes", where)
    return tuple(regions)


def _name(item: Any) -> str:
    """The first of an object's names, in small letters; empty if it has none."""
    names = item.get("names") if isinstance(item, dict) else None
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        return ""
    return clean_text(names[0]).lower().strip(" .")


def _iou(one: Corners, other: Corners) -> float:
    """Overlap of two boxes, 0 when one has no area."""
    if not one or not other:
        return 0.0
    sides = [min(one[k + 2], other[k + 2]) - max(one[k], other[k]) for k in (0, 1)]
    if min(sides) <= 0:
        return 0.0
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    return sides[0] * sides[1] / (areas - sides[0] * sides[1])
