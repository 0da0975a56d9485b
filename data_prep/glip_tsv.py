"""GLIP's own format: TSV files read by line offsets, named in a YAML file (facts E.1, E.2).

`img` has the image in base64 as the last column, `label` JSON as the second one; `X.lineidx` beside
X.tsv holds the byte at which each line starts (the file is read through without it). Optional are
`hw` (sizes, which are checked), `linelist` (the lines to take, some perhaps several times) and
`imageid2idx` (the image line of each label's `img_id`). Labels are one of

- detection: objects with `class`, `rect` (x0, y0, x1, y1) and perhaps `conf`; the classes are in
  `labelmap` or `jsondict`
- captions, v1: `bboxes`, `scores` and `tokens_positive` (spans) of every box
- captions, v2: the same of every entity, which has several boxes and scores but one list of spans
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from glipv2.data_prep.boxes_cleaning import check_box_count, clean_box
from glipv2.data_prep.coco import clean_mask
from glipv2.data_prep.grounded import clean_caption, grounded_record
from glipv2.data_prep.image_files import ImageFile, licence_of, parent, record_key
from glipv2.data_prep.reasons import Dropped
from glipv2.data_prep.source import Row, Source
from glipv2.data_prep.text_cleaning import clean_text
from glipv2.data_prep.tsv_files import (
    Lines,
    Part,
    class_names,
    columns,
    image_lines_of,
    image_of,
    json_of,
    listed_lines,
    open_tsv_set,
    size_of,
)
from glipv2.pipeline import storage
from glipv2.pipeline.config import PrepareConfig
from glipv2.pipeline.errors import BadSample, DataError
from glipv2.pipeline.records import Record, Region

LOOKED_AT = 100
"""Labels, to see whether they need classes."""


class TsvItem(NamedTuple):
    number: int
    """Of the row; a linelist may take one line several times."""
    image: Part
    label: Part
    size: Part | None


class CaptionBox(NamedTuple):
    """One box of a caption, as found."""

    corners: Any
    score: Any
    spans: Any


def glip_tsv_source(options: PrepareConfig) -> Source:
    """One detection or grounding record per line that is taken."""
    (url,) = options.annotations
    files = open_tsv_set(url)
    lines = {part: Lines(files[part]) for part in files if part in ("img", "label", "hw")}
    total = len(lines["label"])
    taken = listed_lines(files["linelist"], total) if "linelist" in files else range(total)
    image_lines = image_lines_of(files["imageid2idx"]) if "imageid2idx" in files else None
    labelmap = files.get("labelmap", files.get("jsondict"))
    categories = tuple(map(clean_text, class_names(labelmap))) if labelmap else ()
    if not categories and _needs_classes(files["label"], lines["label"], taken):
        raise DataError(f"{url} names no `labelmap`, which gives the classes of its boxes; add it")
    return Source(
        rows=partial(_rows, files["label"], lines, taken, image_lines),
        record=partial(_record, files, {name: n for n, name in enumerate(categories)}),
        categories=categories,
        total=len(taken),
        licence=licence_of(parent(url)),
        content={
            "files": {
                part: storage.size(file) if part == "img" else storage.file_crc32c(file)
                for part, file in files.items()
            }
        },
    )


def _needs_classes(label: str, lines: Lines, taken: Sequence[int]) -> bool:
    for line in taken[:LOOKED_AT]:
        try:
            return not _is_caption(json_of(columns(label, lines.part(line))[1]))
        except BadSample:
            continue
    return False


def _is_caption(label: Any) -> bool:
    return isinstance(label, dict) and "caption" in label


def _rows(
    labels: str,
    lines: dict[str, Lines],
    taken: Sequence[int],
    image_lines: dict[str, Any] | None,
    dropped: Dropped,
) -> Iterator[Row]:
    for number, line in enumerate(taken):
        where = f"line {line}"
        label, image_line = lines["label"].part(line), line
        try:
            if image_lines is not None:
                image_line = _image_line(columns(labels, label)[1], image_lines)
            if not 0 <= image_line < len(lines["img"]):
                raise BadSample("image_missing", f"{where}: no image line {image_line}")
        except BadSample as error:
            dropped.note(error.reason, where)
            continue
        has_size = "hw" in lines and line < len(lines["hw"])
        size = lines["hw"].part(line) if has_size else None
        yield Row(where, TsvItem(number, lines["img"].part(image_line), label, size))


def _image_line(label: bytes, image_lines: dict[str, Any]) -> int:
    """-1 when the label names no image of the set."""
    value = json_of(label)
    line = image_lines.get(str(value.get("img_id"))) if isinstance(value, dict) else None
    return line if type(line) is int else -1


def _record(files: dict[str, str], numbers: dict[str, int], row: Row, dropped: Dropped) -> Record:
    item: TsvItem = row.item
    label_key, text, *_ = columns(files["label"], item.label)
    image_key, *_, image_text = columns(files["img"], item.image)
    if label_key != image_key and "imageid2idx" not in files:
        raise BadSample("row_mismatch", f"{row.where}: {label_key[:80]!r} {image_key[:80]!r}")
    key = clean_text(image_key.decode("utf-8", "replace"))[:200]
    if not key:
        raise BadSample("row_unreadable", f"{row.where}: the image has no key")
    label = json_of(text)
    image = image_of(image_text, key)
    if item.size is not None:
        _check_size(size_of(columns(files["hw"], item.size)[1]), image, row.where)
    provenance = {"source": "glip-tsv", "file": key, "row": row.where}
    if not _is_caption(label):
        return Record(
            key=record_key(key, item.number),
            image=image.data,
            image_format=image.format,
            width=image.width,
            height=image.height,
            task="detection",
            regions=_detected(label, numbers, image, dropped, row.where),
            provenance=provenance,
        )
    _check_size((label.get("img_w"), label.get("img_h")), image, row.where)
    caption = clean_caption(label["caption"], dropped, row.where)
    boxes = caption_boxes(label)
    check_box_count(boxes, row.where)
    regions = []
    for box in boxes:
        spans = caption.spans(box.spans, dropped, row.where)
        if not spans:
            dropped.note("span_missing", row.where)
        elif region := _region(box.corners, box.score, image, dropped, row.where):
            regions.append(replace(region, spans=spans, phrase=caption.phrase(spans)))
    return grounded_record(
        record_key(key, item.number), image, "grounding", caption.text, regions, provenance
    )


def caption_boxes(label: dict[str, Any]) -> list[CaptionBox]:
    """The boxes of a caption's label, of either version; BadSample when it is of none.

    A score is 1 where the label has no scores at all, and None where one is missing.
    """
    boxes, spans = label.get("bboxes"), label.get("tokens_positive")
    scores = label.get("scores")
    if not isinstance(boxes, list) or not isinstance(spans, list):
        raise BadSample("row_unreadable", "bboxes and tokens_positive must be lists")
    by_entity = any(isinstance(box, list) and box and isinstance(box[0], list) for box in boxes)
    found = []
    for number, entry in enumerate(boxes):
        entry_scores = 1.0 if scores is None else _at(scores, number)
        corners = entry if by_entity and isinstance(entry, list) else [entry]
        for place, box in enumerate(corners):
            score = _at(entry_scores, place) if by_entity and scores is not None else entry_scores
            found.append(CaptionBox(box, score, _at(spans, number)))
    return found


def _at(values: Any, number: int) -> Any:
    return values[number] if isinstance(values, list) and number < len(values) else None


def _detected(
    label: Any, numbers: dict[str, int], image: ImageFile, dropped: Dropped, where: str
) -> tuple[Region, ...]:
    objects = label.get("objects") if isinstance(label, dict) else label
    if not isinstance(objects, list):
        raise BadSample("row_unreadable", f"{where}: neither objects nor a caption")
    check_box_count(objects, where)
    regions = []
    for item in objects:
        item = item if isinstance(item, dict) else {}
        name = clean_text(item["class"]) if isinstance(item.get("class"), str) else ""
        if name not in numbers:
            dropped.note("category_unknown", where)
        elif region := _region(item.get("rect"), item.get("conf", 1.0), image, dropped, where):
            mask = clean_mask(item.get("mask"), image.size, dropped, where)
            crowd = bool(item.get("IsGroupOf"))
            regions.append(
                replace(region, phrase=name, category=numbers[name], mask=mask, crowd=crowd)
            )
    if not regions:
        dropped.note("no_boxes", where)
    return tuple(regions)


def _region(
    corners: Any, score: Any, image: ImageFile, dropped: Dropped, where: str
) -> Region | None:
    """The box and its score, still without a name."""
    box = clean_box(corners if isinstance(corners, list) else [], image.size, dropped, where)
    if box is None:
        return None
    if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= 1:
        dropped.note("score_unreadable", where)
        return None
    return Region(box=box, score=float(score))


def _check_size(stated: tuple[Any, Any], image: ImageFile, where: str) -> None:
    if any(side not in (None, 0, found) for side, found in zip(stated, image.size, strict=True)):
        raise BadSample("size_mismatch", f"{where}: {stated}, the image is {image.size}")
