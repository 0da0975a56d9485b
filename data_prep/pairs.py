"""Image-text pairs as people have them: three layouts, recognised by what `--root` is.

- a `.jsonl` file (or a folder with exactly one): one object per line with an image path and a text
- a `.csv` or `.tsv` file (or a folder with exactly one): a header row names the columns
- a folder of images with a `.txt` file of the same name beside each: every line is one caption

Image paths are relative to the file's folder, or to an `images`/`Images` folder inside it. One
record per caption, so an image with five captions comes five times.
"""

import csv
import io
import json
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from glipv2.data_prep.image_files import ImageFolders, check_file, licence_of, parent, record_key
from glipv2.data_prep.reasons import Dropped
from glipv2.data_prep.source import Row, Source
from glipv2.data_prep.text_cleaning import clean_text, cut_text, has_letters
from glipv2.pipeline import storage
from glipv2.pipeline.config import PrepareConfig
from glipv2.pipeline.errors import BadSample, ConfigError, DataError
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
MAX_FIELDS = 30
"""Names of fields that an error lists."""


class Pair(NamedTuple):
    image: str
    caption: str
    source: str
    """Free text on where it comes from; may be empty."""
    number: int = 0
    """Of the row: makes its key unique."""


def pairs_source(options: PrepareConfig) -> Source:
    """One `pairs` record per caption, in the file's order."""
    table = pairs_table(options.root)
    folder = options.root if table is None else parent(table)
    images = ImageFolders(options.images or tuple(storage.join(folder, f) for f in IMAGE_FOLDERS))
    if options.images:
        images.check()
    if table is None and not _texts(folder):
        raise DataError(
            f"{folder} holds no .jsonl, .csv or .tsv table and no .txt file beside its images; "
            "give a folder with one of these"
        )
    if options.caption_field:
        if table is None:
            raise ConfigError(
                f"{folder} holds .txt files, which have no fields; caption_field is for tables"
            )
        check_field(options.caption_field, _objects(table, Dropped()), table)
    return Source(
        rows=partial(_rows, table, folder, options.caption_field),
        record=partial(_record, images),
        licence=licence_of(folder),
        content={
            "table": storage.file_crc32c(table) if table else "",
            "images": ImageFolders(options.images or (folder,)).digest(),
            **({"caption_field": options.caption_field} if options.caption_field else {}),
        },
    )


def pairs_table(root: str) -> str | None:
    """The table that holds the pairs, or None for a folder of images with .txt files."""
    suffix = Path(root).suffix.lower()
    if suffix in TABLES or root.endswith("captions.txt"):
        check_file(root, "table")
        return root
    names = storage.list_names(root)
    if not names:
        if storage.exists(root) and not (storage.is_local(root) and Path(root).is_dir()):
            raise DataError(f"{root} is none of {', '.join(TABLES)}; convert it to one of them")
        empty = storage.is_local(root) and Path(storage.local_path(root)).is_dir()
        kind = "is empty" if empty else "does not exist"
        raise DataError(f"{root} {kind}; give a folder or a table of image-text pairs")
    tables = [name for name in names if Path(name).suffix.lower() in TABLES]
    if not tables and "captions.txt" in names:
        return storage.join(root, "captions.txt")  # the layout of Flickr8k: a CSV file in disguise
    if len(tables) > 1:
        raise DataError(f"{root} holds several tables ({', '.join(tables)}); name the one to read")
    return storage.join(root, tables[0]) if tables else None


def _rows(table: str | None, folder: str, caption_field: str, dropped: Dropped) -> Iterator[Row]:
    if table is None:
        pairs = _pairs_of_folder(folder, dropped)
    else:
        pairs = _pairs_of_table(table, dropped, caption_field)
    for number, pair in enumerate(pairs):
        yield Row(clean_text(pair.image), pair._replace(number=number))


def _record(images: ImageFolders, row: Row, dropped: Dropped) -> Record:
    pair = row.item
    caption = clean_text(pair.caption)
    if not has_letters(caption):
        raise BadSample("caption_empty", pair.image)
    path = Path(pair.image)
    if caption in (path.name, path.stem):
        raise BadSample("caption_is_filename", pair.image)
    image = images.load(pair.image)
    if len(caption) > MAX_CAPTION:
        caption = cut_text(caption, MAX_CAPTION)
        dropped.note("caption_cut", row.where)
    provenance = {"source": "pairs", "file": row.where}
    if pair.source:
        provenance["origin"] = clean_text(pair.source)[:MAX_CAPTION]
    return Record(
        key=record_key(path.stem, pair.number),
        image=image.data,
        image_format=image.format,
        width=image.width,
        height=image.height,
        task="pairs",
        caption=caption,
        provenance=provenance,
    )


def _texts(folder: str) -> list[str]:
    return [name for name in storage.list_names(folder) if name.endswith(".txt")]


def _pairs_of_folder(folder: str, dropped: Dropped) -> Iterator[Pair]:
    images, texts = ImageFolders((folder,)).by_stem(), _texts(folder)
    for stem in sorted(set(images) - {name.removesuffix(".txt") for name in texts}):
        dropped.note("text_missing", clean_text(images[stem]))
    for name in texts:
        stem = name.removesuffix(".txt")
        if stem not in images:
            dropped.note("image_missing", clean_text(name))
            continue
        try:
            data = storage.read_bytes(storage.join(folder, name), 0, MAX_LINE)
            text = data.decode("utf-8-sig")
        except ValueError:
            dropped.note("row_unreadable", clean_text(name))
            continue
        lines = [line for line in text.splitlines() if line.strip()]
        for line in lines or [""]:
            yield Pair(images[stem], line, "")


def check_field(name: str, objects: Iterable[dict[str, Any]], where: str) -> None:
    """DataError when there are objects, but none has the field; it lists those that they have."""
    number, found = 0, dict[str, None]()
    for item in objects:
        if name in item:
            return
        number += 1
        found = found if len(found) > MAX_FIELDS else found | dict.fromkeys(item)
    if number:
        fields = ", ".join(clean_text(field)[:40] for field in list(found)[:MAX_FIELDS])
        raise DataError(
            f"{where}: none of {number:,} rows has the field {name!r}; "
            f"there {'are ' + fields if fields else 'is none at all'}"
        )


def _objects(table: str, dropped: Dropped) -> Iterator[dict[str, Any]]:
    if table.lower().endswith(".jsonl"):
        return json_objects(table, dropped)
    return csv_objects(table, dropped, IMAGE_FIELDS)


def _pairs_of_table(table: str, dropped: Dropped, caption_field: str) -> Iterator[Pair]:
    captions = (caption_field,) if caption_field else CAPTION_FIELDS
    for item in _objects(table, dropped):
        image = _first_text(item, IMAGE_FIELDS)
        caption = _first_text(item, captions)
        if image is None or caption is None:
            dropped.note("row_unreadable", clean_text(str(item))[:80])
            continue
        yield Pair(image, caption, _first_text(item, ("source", "url", "credit")) or "")


def _first_text(item: dict[str, Any], names: tuple[str, ...]) -> str | None:
    """The first field that holds text; an empty one only if no other has any."""
    found = [item[name] for name in names if isinstance(item.get(name), str)]
    return next((text for text in found if text.strip()), found[0] if found else None)


def json_objects(table: str, dropped: Dropped) -> Iterator[dict[str, Any]]:
    """One object per line; other lines are noted."""
    with storage.open_read(table) as file:
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


def csv_objects(table: str, dropped: Dropped, one_of: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """One object per row, by the names of the header; DataError without a column of `one_of`."""
    delimiter = TABLES.get(Path(table).suffix.lower(), ",")
    with storage.open_read(table) as raw:
        file = io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline="")
        lines = iter(lambda: file.readline(MAX_LINE), "")
        rows = csv.reader(lines, delimiter=delimiter)
        header = [name.strip().lower() for name in next(rows, [])]
        if not set(header) & set(one_of):
            raise DataError(
                f"{table}: the first row must name the columns, one of them "
                f"{'/'.join(one_of)}; found {', '.join(header)[:100] or 'nothing'}"
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
