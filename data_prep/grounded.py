"""Captions whose words have boxes: clean text, spans that still fit it, and records of both."""

from dataclasses import dataclass
from typing import Any

from glipv2.data_prep.image_files import ImageFile
from glipv2.data_prep.pairs import MAX_CAPTION
from glipv2.data_prep.reasons import Dropped
from glipv2.data_prep.text_cleaning import clean_text, clean_with_places, cut_text, has_letters
from glipv2.pipeline.errors import BadSample
from glipv2.pipeline.records import Record, Region, Span, Task


@dataclass(frozen=True)
class Caption:
    text: str
    """Clean, and not longer than MAX_CAPTION."""
    places: list[int]
    """Where each character of the text as it came, and its end, is in `text`."""

    @property
    def whole(self) -> tuple[Span, ...]:
        return ((0, len(self.text)),)

    def phrase(self, spans: tuple[Span, ...]) -> str:
        return " ".join(self.text[start:end] for start, end in spans)

    def spans(self, raw: Any, dropped: Dropped, where: str) -> tuple[Span, ...]:
        """Spans into the text as it came, as spans into `text`: sorted, without outer blanks.

        What is no span of that text, or holds no word, is left out and noted.
        """
        found = set()
        for item in raw if isinstance(raw, list) else []:
            span = self._span(item)
            if span is None:
                dropped.note("span_unusable", where)
            else:
                found.add(span)
        return tuple(sorted(found))

    def _span(self, raw: Any) -> Span | None:
        if not isinstance(raw, list) or len(raw) != 2 or any(type(side) is not int for side in raw):
            return None
        if not 0 <= raw[0] < raw[1] < len(self.places):
            return None
        start, end = (min(self.places[side], len(self.text)) for side in raw)
        words = self.text[start:end]
        start += len(words) - len(words.lstrip())
        end -= len(words) - len(words.rstrip())
        return (start, end) if start < end else None


def clean_caption(raw: Any, dropped: Dropped, where: str) -> Caption:
    """BadSample unless it is text with letters."""
    if not isinstance(raw, str):
        raise BadSample("row_unreadable", f"{where}: no caption")
    text, places = clean_with_places(raw)
    if not has_letters(text):
        raise BadSample("caption_empty", where)
    if len(text) > MAX_CAPTION:
        text = cut_text(text, MAX_CAPTION)
        dropped.note("caption_cut", where)
    return Caption(text, places)


def grounded_record(
    key: str,
    image: ImageFile,
    task: Task,
    caption: str,
    regions: list[Region],
    provenance: dict[str, Any],
) -> Record:
    """BadSample without regions: a caption whose things have no boxes would teach their absence."""
    if not regions:
        raise BadSample("boxes_missing", key)
    return Record(
        key=key,
        image=image.data,
        image_format=image.format,
        width=image.width,
        height=image.height,
        task=task,
        caption=caption,
        regions=tuple(regions),
        provenance=provenance,
    )


def kept_fields(entry: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """The fields that hold a number or a text, for a record's provenance."""
    values = {name: entry.get(name) for name in names}
    texts = {name: clean_text(v)[:MAX_CAPTION] for name, v in values.items() if isinstance(v, str)}
    return texts | {name: v for name, v in values.items() if type(v) is int}
