"""The files that one YAML of GLIP's names, and lines of them by their byte offsets."""

import base64
import binascii
import json
from array import array
from collections.abc import Iterable
from typing import Any

import yaml

from glipv2.data_prep.image_files import ImageFile, check_file, image_file, parent
from glipv2.pipeline import storage
from glipv2.pipeline.errors import BadSample, DataError
from glipv2.pipeline.images import MAX_BYTES, image_format

PARTS = ("img", "label", "hw", "linelist", "labelmap", "jsondict", "imageid2idx")
MAX_LINE = MAX_BYTES * 4 // 3 + 2**20
"""Bytes: the largest image in base64, and its key."""
CHUNK = 16 * 2**20
Part = tuple[int, int]
"""First byte of a line and the byte after it."""


def open_tsv_set(url: str) -> dict[str, str]:
    """Part of the set -> its file, all of them there; paths are relative to the YAML's folder."""
    check_file(url, "YAML file")
    try:
        named = yaml.safe_load(storage.read_bytes(url))
    except (yaml.YAMLError, ValueError) as error:
        raise DataError(f"{url} is not valid YAML: {error}") from error
    if not isinstance(named, dict) or not {"img", "label"} <= set(named):
        raise DataError(f"{url} must name the files `img` and `label`; give the YAML of a TSV set")
    files = {}
    for part in PARTS:
        name = named.get(part)
        if name is None:
            continue
        if not isinstance(name, str) or not name:
            raise DataError(f"{url}: {part} must be the path of one file, not {str(name)[:80]}")
        is_whole = name.startswith("/") or "://" in name
        files[part] = name if is_whole else storage.join(parent(url), name)
        check_file(files[part], f"file {part} of {url}:")
    return files


class Lines:
    """Where the lines of a TSV file are."""

    def __init__(self, url: str) -> None:
        """From the .lineidx beside it, or by reading it through; DataError if that doesn't fit."""
        self.size = storage.size(url)
        index = url.rsplit(".", 1)[0] + ".lineidx"
        self.starts = _indexed(index) if storage.exists(index) else _scanned(url)
        ascending = all(a < b for a, b in zip(self.starts, self.starts[1:], strict=False))
        if self.starts and not (ascending and self.starts[0] == 0 and self.starts[-1] < self.size):
            raise DataError(
                f"{index} does not fit {url}: its offsets don't go up from 0 to less than "
                f"{self.size}; delete it, and the lines are found without it"
            )

    def __len__(self) -> int:
        return len(self.starts)

    def part(self, line: int) -> Part:
        end = self.starts[line + 1] if line + 1 < len(self) else self.size
        return self.starts[line], end


def _indexed(index: str) -> "array[int]":
    try:
        return array("q", map(int, storage.read_bytes(index).split()))
    except (ValueError, OverflowError) as error:
        raise DataError(
            f"{index} must hold one byte offset per line: {error}; delete it, and the lines are "
            "found without it"
        ) from error


def _scanned(url: str) -> "array[int]":
    starts, position = array("q"), 0
    with storage.open_read(url) as file:
        at_start = True
        while chunk := file.read(CHUNK):
            if at_start:
                starts.append(position)
            found = chunk.find(b"\n")
            while 0 <= found < len(chunk) - 1:
                starts.append(position + found + 1)
                found = chunk.find(b"\n", found + 1)
            at_start = chunk.endswith(b"\n")
            position += len(chunk)
    return starts


def listed_lines(url: str, total: int) -> "array[int]":
    """The line numbers of a linelist; DataError when one is none of the `total` lines."""
    try:
        lines = array("q", map(int, storage.read_bytes(url).split()))
    except (ValueError, OverflowError) as error:
        raise DataError(f"{url} must hold one line number per line: {error}") from error
    if lines and not 0 <= min(lines) <= max(lines) < total:
        raise DataError(
            f"{url} names lines up to {max(lines)}, the label file has {total}; "
            "give the list that belongs to it"
        )
    return lines


def columns(url: str, part: Part) -> list[bytes]:
    """The columns of one line; BadSample when `part` is no line with at least two."""
    start, end = part
    if end - start > MAX_LINE:
        raise BadSample("row_unreadable", f"{url}: {end - start} bytes in a line")
    line = storage.read_bytes(url, start, end)
    values = [value.strip() for value in line.split(b"\t")]
    if line.rstrip(b"\r\n").count(b"\n") or len(values) < 2:
        raise BadSample("row_unreadable", f"{url}: no line with columns at byte {start}")
    return values


def json_of(value: bytes) -> Any:
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BadSample("row_unreadable", str(error)[:200]) from error


def image_of(value: bytes, key: str) -> ImageFile:
    """The image that is written in base64."""
    try:
        data = base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadSample("row_unreadable", f"{key}: no base64") from error
    return image_file(data, f"{key}.{image_format(data)}")


def size_of(value: bytes) -> tuple[Any, Any]:
    """(width, height) as a line of the `hw` file states them: JSON, or height and width."""
    words = value.split()
    if len(words) == 2 and all(word.isdigit() for word in words):
        return int(words[1]), int(words[0])
    stated = json_of(value)
    stated = stated[0] if isinstance(stated, list) and stated else stated
    if not isinstance(stated, dict):
        raise BadSample("row_unreadable", "no height and width")
    return stated.get("width"), stated.get("height")


def image_lines_of(url: str) -> dict[str, Any]:
    """Image id -> line of the image, as an `imageid2idx` file has it."""
    try:
        lines = json.loads(storage.read_bytes(url))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{url} is not valid JSON: {error}; fetch it again") from error
    if not isinstance(lines, dict):
        raise DataError(f"{url} must map image ids to line numbers; check the path")
    return lines


def class_names(url: str) -> tuple[str, ...]:
    """The classes of a label map in the order of their numbers, without the background."""
    if ".tsv" in url.rsplit("/", 1)[-1]:
        lines = storage.read_bytes(url).decode("utf-8", "replace").splitlines()
        return _without_background(line.split("\t")[0].strip() for line in lines)
    try:
        numbers = json.loads(storage.read_bytes(url))
        numbers = numbers.get("label_to_idx", numbers)
        named = sorted((int(number), str(name)) for name, number in numbers.items())
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise DataError(f"{url} must map class names to numbers: {error!r}") from error
    return _without_background(name for _, name in named)


def _without_background(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(name for name in names if name and name != "__background__")
