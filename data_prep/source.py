"""What every reader gives: cheap rows, and a function that makes one row a record.

Rows come from the annotations alone, in a fixed order, so a set can be cut into shards before an
image is read; making records is the work that processes share. A reader's keys are unique by
construction (a row number, or an id that the annotations hold once).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from glipv2.data_prep.reasons import Dropped
from glipv2.pipeline.errors import BadSample
from glipv2.pipeline.records import Record


class Row(NamedTuple):
    """One sample before its image is read."""

    where: str
    """File or line that the user can look up."""
    item: Any
    """What the source's `record` needs; small, and sent between processes."""


@dataclass(frozen=True, kw_only=True)
class Source:
    rows: Callable[[Dropped], Iterator[Row]]
    """From the start, in the same order every time; notes rows that can't be read."""
    record: Callable[[Row, Dropped], Record]
    """Reads the image and cleans the annotations of one row; BadSample when nothing is left.

    A function of a module (perhaps a `functools.partial`), as processes get it sent."""
    categories: tuple[str, ...] = ()
    total: int | None = None
    """Rows, where their number is known without reading."""
    licence: str
    content: dict[str, object]
    """What decides the records: equal content, equal records. Paths are not in it."""
    info: dict[str, Any] = field(default_factory=dict)
    """More for dataset.json, such as how frequent LVIS finds each category."""

    def records(self, dropped: Dropped) -> Iterator[Record]:
        """All records in this process; `dropped` takes what is left out."""
        for row in self.rows(dropped):
            record = record_or_none(self, row, dropped)
            if record is not None:
                yield record


def record_or_none(source: Source, row: Row, dropped: Dropped) -> Record | None:
    """The row's record; None, with the reason noted, when it can't be used."""
    try:
        return source.record(row, dropped)
    except BadSample as error:
        dropped.note(error.reason, row.where)
        return None
