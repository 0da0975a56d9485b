"""YOLO labels: a text file per image, in each line a class number and numbers between 0 and 1.

`class cx cy w h` is a box, `class x1 y1 x2 y2 x3 y3 ...` a polygon: a mask and the box around it.
An image without a label file is a negative.
"""

import math
from collections.abc import Iterator
from functools import partial

from glipv2.data_prep.boxes_cleaning import check_box_count, clean_box
from glipv2.data_prep.coco import clean_mask
from glipv2.data_prep.image_files import (
    ImageFolders,
    licence_of,
    parent,
    read_inside,
    record_key,
)
from glipv2.data_prep.reasons import Dropped
from glipv2.data_prep.source import Row, Source
from glipv2.data_prep.text_cleaning import clean_text
from glipv2.data_prep.yolo_layout import Layout, yolo_layout
from glipv2.pipeline import storage
from glipv2.pipeline.config import PrepareConfig
from glipv2.pipeline.errors import BadSample
from glipv2.pipeline.records import Record, Region

MAX_LABEL_BYTES = 16 * 2**20
ROUNDING = 1e-5
"""Of a side: what lies this little outside is the rounding of the text, and no mistake."""


def yolo_source(options: PrepareConfig) -> Source:
    """One detection record per image, in the order of their names."""
    layout = yolo_layout(options)
    names = sorted(layout.names.items())
    crc_of = {
        clean_text(image): label and storage.file_crc32c(storage.join(layout.labels, label))
        for image, label in layout.label_of.items()
    }
    classes = {number: (index, name) for index, (number, name) in enumerate(names)}
    return Source(
        rows=partial(_rows, layout),
        record=partial(_record, classes, layout.images, layout.labels),
        categories=tuple(name for _, name in names),
        total=len(layout.label_of),
        licence=licence_of(options.root or parent(layout.labels.rstrip("/"))),
        content={
            "labels": storage.digest(crc_of),
            "names": storage.digest(names),
            "images": layout.images.digest(),
        },
    )


def _rows(layout: Layout, dropped: Dropped) -> Iterator[Row]:
    for label in layout.strays:
        dropped.note("image_missing", clean_text(label))
    for number, (image, label) in enumerate(layout.label_of.items()):
        yield Row(clean_text(image), (number, image, label))


def _record(
    classes: dict[int, tuple[int, str]],
    images: ImageFolders,
    labels: str,
    row: Row,
    dropped: Dropped,
) -> Record:
    number, name, label = row.item
    image = images.load(name)
    lines = _lines(labels, label) if label else []
    check_box_count(lines, row.where)
    regions = []
    for category, *texts in lines:
        region = _region(classes.get(_class(category)), texts, image.size, dropped, row.where)
        if region is not None:
            regions.append(region)
    if not regions:
        dropped.note("no_boxes" if label else "label_missing", row.where)
    return Record(
        key=record_key(name.rsplit("/", 1)[-1].rsplit(".", 1)[0], number),
        image=image.data,
        image_format=image.format,
        width=image.width,
        height=image.height,
        task="detection",
        regions=tuple(regions),
        provenance={"source": "yolo", "file": row.where},
    )


def _lines(folder: str, label: str) -> list[list[str]]:
    """The words of each line that has any."""
    data = read_inside(folder, label)
    if data is None or len(data) > MAX_LABEL_BYTES:
        raise BadSample("annotation_unreadable", f"{label}: gone or too large")
    try:
        lines = data.decode("utf-8-sig").splitlines()
    except ValueError as error:
        raise BadSample("annotation_unreadable", f"{label}: {error}") from error
    return [words for words in map(str.split, lines) if words]


def _class(text: str) -> int:
    """Some programs write 3.0; -1 for what is no whole number."""
    try:
        number = float(text)
    except ValueError:
        return -1
    return int(number) if number.is_integer() else -1


def _region(
    named: tuple[int, str] | None,
    texts: list[str],
    size: tuple[int, int],
    dropped: Dropped,
    where: str,
) -> Region | None:
    if named is None:
        dropped.note("category_unknown", where)
        return None
    try:
        numbers = [float(text) for text in texts]
    except ValueError:
        numbers = []
    polygon = numbers if len(numbers) >= 6 and len(numbers) % 2 == 0 else []
    edges = _edges(polygon) if polygon else _box_edges(numbers)
    sides = size * 2
    corners = [_snapped(edge) * side for edge, side in zip(edges, sides, strict=False)]
    box = clean_box(corners, size, dropped, where)
    if box is None:
        return None
    points = [value * side for value, side in zip(polygon, sides * len(polygon), strict=False)]
    mask = clean_mask([points] if points else None, size, dropped, where)
    category, name = named
    return Region(box=box, phrase=name, category=category, mask=mask)


def _box_edges(numbers: list[float]) -> list[float]:
    """Centre and sides -> left, top, right, bottom; empty when they are not four."""
    if len(numbers) != 4:
        return []
    x, y, width, height = numbers
    return [x - width / 2, y - height / 2, x + width / 2, y + height / 2]


def _edges(polygon: list[float]) -> list[float]:
    """Left, top, right, bottom of x, y, x, y, ..."""
    if not all(math.isfinite(value) for value in polygon):
        return [math.nan] * 4
    xs, ys = polygon[::2], polygon[1::2]
    return [min(xs), min(ys), max(xs), max(ys)]


def _snapped(edge: float) -> float:
    """An edge of the image that rounding has moved outwards."""
    if -ROUNDING <= edge < 0:
        return 0.0
    return 1.0 if 1 < edge <= 1 + ROUNDING else edge
