"""Pieces of the static pages: pictures with boxes, captions with coloured phrases.

Here records become plain numbers and text; `pieces.html` turns these into markup, so that all that
came from data passes through jinja2's escaping. A phrase has one number and one colour, shared by
its words in the caption, its boxes and its legend line; the number serves who can't tell colours.
"""

import base64
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from glipv2.jobs.card_text import MAX_SAID, Note, Said, notes_of, plain_text, said_of
from glipv2.jobs.mask_overlay import MAX_MASKS, Overlay, mask_overlay
from glipv2.jobs.survey import region_name, source_name
from glipv2.pipeline import storage
from glipv2.pipeline.errors import BadSample
from glipv2.pipeline.images import decode_image, encode_jpeg
from glipv2.pipeline.records import Record, Region

PALETTE = (
    ("#00897b", "#ffffff"),
    ("#d6249f", "#ffffff"),
    ("#f57c00", "#1a1a1a"),
    ("#5b5bd6", "#ffffff"),
    ("#84b000", "#1a1a1a"),
    ("#0288d1", "#ffffff"),
    ("#d32f2f", "#ffffff"),
    ("#8d6e63", "#ffffff"),
    ("#f2b400", "#1a1a1a"),
    ("#37474f", "#ffffff"),
)
"""(box, text on it): told apart on photographs, each box also gets a white rim."""
LONG_SIDE = 480
"""Pictures are shrunk to this many pixels: twice the width of a card."""
TAG_SHARE = 0.062
"""Height of the number on a box relative to the picture's longer side."""
TAG_ROWS, TAG_COLUMNS = 3, 4
"""Places near a box's corner that are tried, so that boxes of one place show all their numbers."""
CROWD, CROWD_TAG_SHARE = 10, 0.044
"""With more boxes than this the tags get smaller."""
MAX_LISTED_SCORES = 3


@dataclass(frozen=True, kw_only=True)
class Mark:
    """One box on a picture, in pixels of the stored image."""

    x: float
    y: float
    width: float
    height: float
    tag: str
    """What stands in the box's corner: the number of its phrase."""
    color: str
    ink: str
    """Readable on `color`."""
    title: str
    dashed: bool = False
    """For boxes that are wrong or only hinted at."""
    score: float = 1.0
    dim: bool = False
    """Hardly visible: a box that was not asked for."""
    mask: Overlay | None = None

    @property
    def group(self) -> str:
        """What the page's filter knows it by: a tenth of the scores, or those that are 1."""
        return f"score-{int(self.score * 10)}"


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An image and the boxes over it."""

    uri: str
    """data: URI, or empty with the reason in `problem`."""
    width: int
    height: int
    alt: str
    marks: tuple[Mark, ...]
    problem: str = ""
    tag_share: float = TAG_SHARE

    @property
    def tag(self) -> float:
        """Height of a tag, in pixels of the stored image."""
        return round(self.tag_share * max(self.width, self.height), 2)

    @property
    def tags(self) -> tuple["Tag", ...]:
        """The marks' tags: above the box's corner, or beside another number that stands there."""
        placed: list[Tag] = []
        for mark in sorted(self.marks, key=lambda mark: mark.dim):  # the others make room
            spots = list(self._spots(mark))
            placed.append(next((tag for tag in spots if not any(map(tag.hides, placed))), spots[0]))
        return tuple(placed)

    def _spots(self, mark: Mark) -> Iterator["Tag"]:
        """Where its tag may stand, the best first."""
        wide = round(self.tag * (0.45 + 0.55 * len(mark.tag)), 2)
        left = max(min(mark.x, self.width - wide), 0.0)
        top = mark.y - self.tag if mark.y >= self.tag else mark.y
        for row in range(TAG_ROWS):
            for column in range(TAG_COLUMNS):
                x, y = round(left + column * wide, 2), round(top + row * self.tag, 2)
                if (row, column) == (0, 0) or (x + wide <= self.width and y < self.height):
                    yield Tag(mark=mark, x=x, y=y, width=wide, height=self.tag)


@dataclass(frozen=True, kw_only=True)
class Tag:
    """The number of a box and its place, in pixels of the stored image."""

    mark: Mark
    x: float
    y: float
    width: float
    height: float

    def hides(self, other: "Tag") -> bool:
        """Whether they overlap and say different things."""
        across = self.x < other.x + other.width - 0.1 and other.x < self.x + self.width - 0.1
        along = abs(self.y - other.y) < self.height - 0.1
        return across and along and self.mark.tag != other.mark.tag


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A stretch of a caption that belongs to one phrase or to none (color empty)."""

    text: str
    color: str = ""
    number: str = ""
    """Set on the last piece of a phrase."""


@dataclass(frozen=True, kw_only=True)
class LegendLine:
    """One phrase or category under the picture."""

    number: str
    name: str
    color: str
    detail: str
    """Scores and how many boxes."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """All that a page shows of one record."""

    key: str
    picture: Picture
    caption: tuple[Piece, ...]
    legend: tuple[LegendLine, ...]
    notes: tuple[Note, ...]
    source: str = ""
    said: tuple[Said, ...] = ()
    unsaid: int = 0
    """Questions and captions for which there is no room."""

    @property
    def groups(self) -> tuple[str, ...]:
        """Its classes for the page's filters: its source and the scores of its boxes."""
        scores = dict.fromkeys(mark.group for mark in self.picture.marks)
        return (source_group(self.source), *scores)


def source_group(source: str) -> str:
    """The class of a source: letters and digits, whatever its name."""
    return f"source-{storage.crc32c(source.encode(errors='replace'))}"


def record_card(record: Record, categories: Sequence[str] = (), brief: bool = False) -> Card:
    """The card of a record; `brief` keeps only the origin of its provenance."""
    numbers = _phrase_numbers(record, categories)
    names = [region_name(region, record, categories) for region in record.regions]
    marks = tuple(
        box_mark(region.box, name, numbers[_phrase_id(region)], region.score)
        for region, name in zip(record.regions, names, strict=True)
    )
    marks, mask_notes = _with_masks(marks, record)
    said = said_of(record)
    alt = plain_text(record.caption) or ", ".join(dict.fromkeys(names)) or "no caption"
    uri, problem = picture_uri(record.image)
    return Card(
        key=record.key,
        picture=Picture(
            uri=uri,
            width=record.width,
            height=record.height,
            alt=alt,
            marks=marks,
            problem=problem,
            tag_share=TAG_SHARE if len(marks) <= CROWD else CROWD_TAG_SHARE,
        ),
        caption=caption_pieces(record, numbers),
        legend=_legend(record, names, numbers),
        notes=notes_of(record, brief) + mask_notes,
        source=source_name(record),
        said=said[:MAX_SAID],
        unsaid=max(0, len(said) - MAX_SAID),
    )


def box_mark(
    box: Sequence[float], name: str, number: int, score: float = 1.0, dashed: bool = False
) -> Mark:
    """A box in the colour of phrase `number` (from 0); box is xyxy in pixels of the image."""
    x0, y0, x1, y1 = box
    color, ink = PALETTE[number % len(PALETTE)]
    return Mark(
        x=round(x0, 2),
        y=round(y0, 2),
        width=round(x1 - x0, 2),
        height=round(y1 - y0, 2),
        tag=str(number + 1),
        color=color,
        ink=ink,
        title=plain_text(name) if score == 1 else f"{plain_text(name)} {score:.2f}",
        dashed=dashed,
        score=score,
    )


def _with_masks(
    marks: tuple[Mark, ...], record: Record
) -> tuple[tuple[Mark, ...], tuple[Note, ...]]:
    """The marks with their regions' masks, largest boxes first; notes on masks left out."""
    rows = [row for row, region in enumerate(record.regions) if region.mask is not None]
    rows.sort(key=lambda row: -marks[row].width * marks[row].height)
    drawn, unreadable = list(marks), 0
    for row in rows[:MAX_MASKS]:
        try:
            mask = mask_overlay(record, record.regions[row].mask or {}, marks[row].color, LONG_SIDE)
        except BadSample:
            unreadable += 1
        else:
            drawn[row] = replace(marks[row], mask=mask)
    notes = []
    if unreadable:
        notes.append(Note(name="unreadable masks", value=str(unreadable)))
    if len(rows) > MAX_MASKS:
        note = f"the {MAX_MASKS} largest of {len(rows)} are drawn"
        notes.append(Note(name="masks", value=note))
    return tuple(drawn), tuple(notes)


def caption_pieces(record: Record, numbers: dict[Hashable, int]) -> tuple[Piece, ...]:
    """The caption cut where phrases begin and end; of nested phrases the shortest colours."""
    spans = [(s, e, numbers[r.spans]) for r in record.regions for s, e in r.spans]
    edges = sorted({0, len(record.caption), *(edge for s, e, _ in spans for edge in (s, e))})
    pieces = []
    for start, end in zip(edges, edges[1:], strict=False):
        covering = [span for span in spans if span[0] <= start and end <= span[1]]
        text = plain_text(record.caption[start:end])
        if not covering:
            pieces.append(Piece(text=text))
            continue
        _, stop, number = min(covering, key=lambda span: (span[1] - span[0], span))
        ends = str(number + 1) if stop == end else ""
        pieces.append(Piece(text=text, color=palette_color(number), number=ends))
    return tuple(pieces)


def picture_uri(image: bytes, long_side: int = LONG_SIDE) -> tuple[str, str]:
    """(data URI of a JPEG at most `long_side` pixels long, problem if it can't be decoded)."""
    from PIL import Image

    try:
        image_3HW = decode_image(image)
    except BadSample as bad:
        return "", bad.reason
    height, width = image_3HW.shape[1:]
    if max(height, width) <= long_side:
        jpeg = encode_jpeg(image_3HW, 88)
    else:
        small = Image.fromarray(image_3HW.permute(1, 2, 0).numpy())
        small.thumbnail((long_side, long_side), Image.Resampling.LANCZOS)
        jpeg = _jpeg(small)
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode(), ""


def palette_color(number: int) -> str:
    """Colour of phrase `number` (from 0)."""
    return PALETTE[number % len(PALETTE)][0]


def render(template: str, **values: Any) -> bytes:
    """A page from a template of this folder, escaped by default, as UTF-8."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["plain"] = plain_text
    return environment.get_template(template).render(**values).encode()


def frame_ratio(pictures: Sequence[Picture]) -> float:
    """Width / height of the frames of a gallery: the middle one of its pictures, within reason."""
    ratios = sorted(picture.width / picture.height for picture in pictures) or [1.0]
    return round(min(max(ratios[len(ratios) // 2], 0.8), 1.6), 3)


def _jpeg(image: Any) -> bytes:
    import io

    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=82, optimize=True)
    return buffer.getvalue()


def _phrase_id(region: Region) -> Hashable:
    """What makes two regions the same phrase: their words, or their category."""
    if region.spans:
        return region.spans
    return region.category if region.category is not None else region.phrase


def _phrase_numbers(record: Record, categories: Sequence[str]) -> dict[Hashable, int]:
    """Numbers from 0 in the order of the caption; a few categories keep theirs on every card."""
    phrases = [_phrase_id(r) for r in sorted(record.regions, key=lambda r: r.spans or ((0, 0),))]
    distinct = list(dict.fromkeys(phrases))
    own = sorted(p for p in distinct if isinstance(p, int))
    if len(own) == len(distinct) and len(categories) <= len(PALETTE):
        return {category: category for category in own}
    return {phrase: number for number, phrase in enumerate(distinct)}


def _legend(
    record: Record, names: Sequence[str], numbers: dict[Hashable, int]
) -> tuple[LegendLine, ...]:
    """One line a phrase with its boxes' scores; for gold phrases the caption is enough."""
    if record.caption and all(region.score == 1 and region.spans for region in record.regions):
        return ()
    lines = []
    for phrase, number in numbers.items():
        own = [i for i, region in enumerate(record.regions) if _phrase_id(region) == phrase]
        scores = sorted((record.regions[i].score for i in own), reverse=True)
        lines.append(
            LegendLine(
                number=str(number + 1),
                name=plain_text(names[own[0]]),
                color=palette_color(number),
                detail=score_text(scores),
            )
        )
    return tuple(lines)


def score_text(scores: Sequence[float]) -> str:
    """`0.91, 0.87`, `12 × 0.40–0.93`, or `× 3` for human labels (all 1)."""
    if all(score == 1 for score in scores):
        return f"× {len(scores)}" if len(scores) > 1 else ""
    if len(scores) <= MAX_LISTED_SCORES:
        return ", ".join(f"{score:.2f}" for score in scores)
    return f"{len(scores)} × {min(scores):.2f}–{max(scores):.2f}"
