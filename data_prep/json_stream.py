"""Large JSON files in flat memory: the items of a list one by one, and lookups kept on disk.

`json`'s own scanner reads the items, where a streaming parser would refuse the NaN that annotation
files hold in practice and with it the whole file; a box with NaN is for `boxes_cleaning` to judge.
"""

import codecs
import json
import re
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from glipv2.pipeline import storage
from glipv2.pipeline.errors import DataError

CHUNK = 1 << 20
MAX_ITEM = 8 << 20
"""Characters of one item; a record could not hold the annotation of one image that is as long."""
SPACE = re.compile(r"[ \t\r\n]*")
NUMBER = re.compile(r"[-+.0-9eE]*")
"""What may go on after the part of a number that was read."""
_scan = json.JSONDecoder().raw_decode


def sections(url: str) -> Iterator[tuple[str, Iterator[Any]]]:
    """Each list of a JSON object with its key, in the file's order; other values are passed over.

    The items are read as the caller takes them; what it leaves is skipped. DataError when the file
    is no JSON object.
    """
    with storage.open_read(url) as file:
        text = _Text(url, file)
        text.skip("{")
        while text.peek() != "}":
            name = text.value()
            if not isinstance(name, str):
                raise text.broken(f"{name!r} is no key")
            text.skip(":")
            if text.peek() == "[":
                values = _list(text)
                yield name, values
                for _ in values:
                    pass
            else:
                text.value()
            text.separator("}")
        text.skip("}")
        text.end()


def items(url: str, section: str = "") -> Iterator[Any]:
    """The items of one list of a JSON object, or of a file that is a list itself.

    DataError when there is no such list.
    """
    if not section:
        with storage.open_read(url) as file:
            text = _Text(url, file)
            if text.peek() != "[":
                raise DataError(f"{url} is no JSON list; check that it is the right file")
            yield from _list(text)
            text.end()
        return
    for name, values in sections(url):
        if name == section:
            yield from values
            return
    raise DataError(f"{url} lacks the list {section!r}; check that it is the right file")


def _list(text: "_Text") -> Iterator[Any]:
    text.skip("[")
    while text.peek() != "]":
        yield text.value()
        text.separator("]")
    text.skip("]")


class _Text:
    """A file's text, of which only what is being read is in memory."""

    def __init__(self, url: str, file: BinaryIO) -> None:
        self.url, self.file = url, file
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.buffer, self.start, self.ended = "", 0, False
        self.dropped = 0
        """Characters of the file before the buffer."""

    def broken(self, why: str, at: int | None = None) -> DataError:
        """`at` is a place in the buffer; None where reading stands."""
        place = self.dropped + (self.start if at is None else at)
        return DataError(
            f"{self.url} is not valid JSON near character {place}: {why}; fetch it again"
        )

    def more(self) -> bool:
        """Read on; False at the end of the file."""
        if self.ended:
            return False
        unread = len(self.buffer) - self.start
        data = self.file.read(max(CHUNK, min(3 * unread, MAX_ITEM - unread)))
        try:
            text = self.decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            raise self.broken(f"no UTF-8 ({error.reason})", len(self.buffer)) from error
        self.dropped += self.start
        self.buffer, self.start, self.ended = self.buffer[self.start :] + text, 0, not data
        return True

    def peek(self) -> str:
        """The next character that is no white space."""
        if not self.goes_on():
            raise self.broken("it ends too early")
        return self.buffer[self.start]

    def goes_on(self) -> bool:
        """Passes over white space; False at the end of the file."""
        while True:
            self.start = SPACE.match(self.buffer, self.start).end()  # type: ignore[union-attr]
            if self.start < len(self.buffer):
                return True
            if not self.more():
                return False

    def skip(self, expected: str) -> None:
        found = self.peek()
        if found != expected:
            raise self.broken(f"{found!r} stands where {expected!r} should")
        self.start += 1

    def separator(self, closing: str) -> None:
        """A comma with something after it, unless `closing` follows."""
        if self.peek() != closing:
            self.skip(",")
            if self.peek() == closing:
                raise self.broken("a value is missing")

    def end(self) -> None:
        """Nothing but white space may follow."""
        if self.goes_on():
            raise self.broken("text follows its end")

    def value(self) -> Any:
        """The next value; a number at the buffer's end may go on in the next chunk."""
        self.peek()
        while True:
            try:
                value, end = _scan(self.buffer, self.start)
                rest = NUMBER.match(self.buffer, end)
                if self.ended or rest.end() < len(self.buffer):  # type: ignore[union-attr]
                    self.start = end
                    return value
                error, place = "", end
            except json.JSONDecodeError as failed:
                error, place = failed.msg, failed.pos  # itself it would keep its buffer alive
            except (ValueError, RecursionError) as failed:
                error, place = str(failed), self.start
            if error and len(self.buffer) - self.start >= MAX_ITEM:
                raise self.broken(error, place)
            if not self.more() and error:
                raise self.broken(error, place)


class Lookup:
    """Objects by one of their fields, kept in a temporary file and not in memory."""

    def __init__(self, objects: Iterable[Any], field: str) -> None:
        """Takes the objects that have the field; others are passed over."""
        self._folder = tempfile.TemporaryDirectory(prefix="glipv2-")
        path = Path(self._folder.name) / "lookup.sqlite"
        self._rows = sqlite3.connect(path, isolation_level=None)
        self._rows.execute("PRAGMA journal_mode = OFF")
        self._rows.execute("PRAGMA synchronous = OFF")
        self._rows.execute("CREATE TABLE objects (field, object)")
        self._rows.execute("BEGIN")
        self._rows.executemany(
            "INSERT INTO objects VALUES (?, ?)",
            (
                (json.dumps(item[field]), json.dumps(item))
                for item in objects
                if isinstance(item, dict) and isinstance(item.get(field), int | str)
            ),
        )
        self._rows.execute("COMMIT")
        self._rows.execute("CREATE INDEX by_field ON objects (field)")

    def get(self, value: Any) -> list[dict[str, Any]]:
        """The objects whose field is `value`, in the file's order."""
        query = "SELECT object FROM objects WHERE field = ? ORDER BY rowid"
        rows = self._rows.execute(query, (json.dumps(value),))
        return [json.loads(text) for (text,) in rows]

    def values(self) -> Iterator[Any]:
        """Each value of the field once, in the order of its first object."""
        query = "SELECT field FROM objects GROUP BY field ORDER BY MIN(rowid)"
        for (text,) in self._rows.execute(query):
            yield json.loads(text)

    def __len__(self) -> int:
        return int(self._rows.execute("SELECT COUNT(*) FROM objects").fetchone()[0])
