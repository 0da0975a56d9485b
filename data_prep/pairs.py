"""Image-text pairs as people have them: three layouts, recognised by what the root is.

- a `.jsonl` file (or a folder with exactly one): one object per line with an image path and a text
- a `.csv` or `.tsv` file (or a folder with exactly one): a header row names the columns
- a folder of images with a `.txt` file of the same name beside each: every line is one caption

Image paths are relative to the file's folder, or to an `images`/`Images` folder inside it. One
record per caption, so an image with five captions comes five times.
"""

import csv
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from glipv2.data_prep.image_files import images_by_stem, inside, load_image, record_key
from glipv2.data_prep.reasons import Dropped
from glipv2.data_prep.text_cleaning import clean_text, cut_text, has_letters
from glipv2.pipeline.errors import BadSample, DataError
from glipv2.pipeline.records import Record

IMAGE_FIELDS = ("image", "image_path", "file_name", "filename", "file", "path")
CAPTION_FIELDS = ("alt", "caption", "text", "description", "title")
"""In order of preference: alt text says what can be seen, captions often what it means."""
TABLES = {".jsonl": "", ".csv": ",", ".tsv": "\t"}
"""File suffix -> column delimiter."""
IMAGE_FOLDERS = ("", "images", "Images")
MAX_CAPTION = 1_000
"""Characters; far more than a prompt takes in."""
MAX_LINE = 1_000_000


class Row(NamedTuple):
    image: str
    caption: str
    source: str
    """Free text on where it comes from; may be empty."""


def read_pairs(root: Path, dropped: Dropped, caption_field: str | None = None) -> Iterator[Record]:
    """One `pairs` record per caption, in the file's order; `dropped` takes what is left out."""
    table = pairs_table(root)
    if table is None:
        rows, folder = _rows_of_folder(root, dropped), root
    else:
        rows, folder = _rows_of_table(table, dropped, caption_field), table.parent
    for number, row in enumerate(rows):
        try:
            yield _record(row, folder, number, dropped)
        except BadSample as error:
            dropped.note(error.reason, clean_text(row.image))


def pairs_table(root: Path) -> Path | None:
    """The table that holds the pairs, or None for a folder of images with .txt files."""
    if root.is_file():
        if root.suffix.lower() not in TABLES and root.name != "captions.txt":
            raise DataError(f"{root} is none of {', '.join(TABLES)}; convert it to one of them")
        return root
    if not root.is_dir():
        raise DataError(f"{root} does not exist; give a folder or a table of image-text pairs")
    tables = [path for path in sorted(root.iterdir()) if path.suffix.lower() in TABLES]
    if not tables and (root / "captions.txt").is_file():
        return root / "captions.txt"  # the layout of Flickr8k: a CSV file in disguise
    if len(tables) > 1:
        names = ", ".join(path.name for path in tables)
        raise DataError(f"{root} holds several tables ({names}); name the one to read")
    return tables[0] if tables else None


def _record(row: Row, folder: Path, number: int, dropped: Dropped) -> Record:
    caption = clean_text(row.caption)
    if not has_letters(caption):
        raise BadSample("caption_empty", row.image)
    path = _image_path(folder, row.image)
    if caption in (path.name, path.stem):
        raise BadSample("caption_is_filename", row.image)
    image = load_image(path)
    if len(caption) > MAX_CAPTION:
        caption = cut_text(caption, MAX_CAPTION)
        dropped.note("caption_cut", clean_text(row.image))
    provenance = {"source": "pairs", "file": clean_text(row.image)}
    if row.source:
        provenance["origin"] = clean_text(row.source)[:MAX_CAPTION]
    return Record(
        key=record_key(path.stem, number),
        image=image.data,
        image_format=image.format,
        width=image.width,
        height=image.height,
        task="pairs",
        caption=caption,
        provenance=provenance,
    )


def _image_path(folder: Path, name: str) -> Path:
    for subfolder in IMAGE_FOLDERS:
        path = inside(folder, f"{subfolder}/{name}" if subfolder else name)
        with suppress(OSError):  # a name longer than any file's
            if path.is_file():
                return path
    raise BadSample("image_missing", f"{folder}: {name}")


def _rows_of_folder(root: Path, dropped: Dropped) -> Iterator[Row]:
    images = images_by_stem(root)
    texts = sorted(root.glob("*.txt"))
    if not texts:
        raise DataError(
            f"{root} holds no .jsonl, .csv or .tsv table and no .txt file beside its images; "
            "give a folder with one of these"
        )
    for path in texts:
        if path.stem not in images:
            dropped.note("image_missing", clean_text(path.name))
            continue
        try:
            text = path.read_bytes()[:MAX_LINE].decode("utf-8-sig")
        except (ValueError, OSError):
            dropped.note("row_unreadable", clean_text(path.name))
            continue
        lines = [line for line in text.splitlines() if line.strip()]
        for line in lines or [""]:
            yield Row(images[path.stem].name, line, "")


def _rows_of_table(table: Path, dropped: Dropped, caption_field: str | None) -> Iterator[Row]:
    if table.suffix.lower() == ".jsonl":
        objects = _json_objects(table, dropped)
    else:
        objects = _csv_objects(table, dropped)
    captions = (caption_field,) if caption_field else CAPTION_FIELDS
    for item in objects:
        image = _first_text(item, IMAGE_FIELDS)
        caption = _first_text(item, captions)
        if image is None or caption is None:
            dropped.note("row_unreadable", clean_text(str(item))[:80])
            continue
        yield Row(image, caption, _first_text(item, ("source", "url", "credit")) or "")


def _first_text(item: dict[str, Any], names: tuple[str, ...]) -> str | None:
    """The first field that holds text; an empty one only if no other has any."""
    found = [item[name] for name in names if isinstance(item.get(name), str)]
    return next((text for text in found if text.strip()), found[0] if found else None)


def _json_objects(table: Path, dropped: Dropped) -> Iterator[dict[str, Any]]:
    with open(table, "rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE), b""), start=1):
            if not line.strip():
                continue
            try:
                item = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError):
                item = None
            if isinstance(item, dict):
                yield item
            else:
                dropped.note("row_unreadable", f"line {number}")


def _csv_objects(table: Path, dropped: Dropped) -> Iterator[dict[str, Any]]:
    delimiter = TABLES.get(table.suffix.lower(), ",")
    with open(table, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = csv.reader(file, delimiter=delimiter)
        header = [name.strip().lower() for name in next(rows, [])]
        if not set(header) & set(IMAGE_FIELDS):
            raise DataError(
                f"{table}: the first row must name the columns, one of them "
                f"{'/'.join(IMAGE_FIELDS)}; found {', '.join(header)[:100] or 'nothing'}"
            )
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error:
                dropped.note("row_unreadable", f"line {rows.line_num}")
                continue
            try:
                "".join(row).encode("utf-8")
                if row:
                    yield dict(zip(header, row, strict=True))
            except ValueError:  # bytes that are no UTF-8, or another number of columns
                dropped.note("row_unreadable", f"line {rows.line_num}")
