"""Two labelled sets side by side: what the page of glipv2 view shows of their disagreement."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from glipv2.jobs.card_text import plain_text
from glipv2.jobs.disagreement import (
    ALONE,
    ELSEWHERE,
    MIN_IOU,
    SAME,
    Disagreement,
    disagreement,
    numbers_of,
    phrase_of,
    samples_of,
    verdicts_of,
)
from glipv2.jobs.page import (
    LegendLine,
    Mark,
    Picture,
    Piece,
    box_mark,
    caption_pieces,
    picture_uri,
    score_text,
)
from glipv2.jobs.report_pictures import Panel
from glipv2.jobs.survey import spans_text
from glipv2.jobs.view_figures import Fact
from glipv2.pipeline.records import Record, Region
from glipv2.pipeline.shard_format import ShardSet
from glipv2.pipeline.shard_reader import open_shard_set

COLORS = (5, 2)
"""Palette numbers of the two sets: blue, and orange, which is dashed."""
QUIET = "#7a8590"
"""Of the phrases in the text: colours tell the sets."""
TAG_SHARE = 0.08
"""Tags of pictures that stand side by side."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One picture twice, with the boxes of each set."""

    key: str
    caption: tuple[Piece, ...]
    panels: tuple[Panel, ...]
    legend: tuple[LegendLine, ...]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What the page says of another set of the same pairs."""

    name: str
    note: str
    facts: tuple[Fact, ...]
    pairs: tuple[Pair, ...]
    """Those that differ most, first."""


def comparison(mine: ShardSet, url: str, seed: int) -> Comparison:
    """Of the set with another; DataError when they were not labelled from the same pairs."""
    other = open_shard_set(url)
    found = disagreement(mine, other, seed)
    names = tuple(url.rstrip("/").rsplit("/", 1)[-1] for url in (mine.url, url))
    if names[0] == names[1]:
        names = (mine.url, url)
    which = "" if found.complete else f" that were read, drawn with seed {seed}"
    return Comparison(
        name=names[1],
        note=f"Of {found.pairs:,} pairs{which}, which have a box in either set.",
        facts=tuple(_facts(found, names)),
        pairs=tuple(_pairs(mine, other, found, names)),
    )


def _facts(found: Disagreement, names: Sequence[str]) -> Iterator[Fact]:
    if not found.boxes:
        return
    yield "Boxes in both", f"{found.agreement:.0%}", f"of {found.boxes:,}, IoU {MIN_IOU:g} or more"
    moved = found.verdicts[0][ELSEWHERE]
    yield "Elsewhere in the other", f"{moved:,}", f"{2 * moved / found.boxes:.0%} of the boxes"
    for name, verdicts in zip(names, found.verdicts, strict=True):
        alone = verdicts[ALONE]
        yield f"Only in {name}", f"{alone:,}", f"{alone / found.boxes:.0%} of the boxes"
    if found.unreadable:
        yield "Unreadable", f"{found.unreadable:,}", "pairs, left out"


def _pairs(
    mine: ShardSet, other: ShardSet, found: Disagreement, names: Sequence[str]
) -> Iterator[Pair]:
    """Read again one by one."""
    numbers = numbers_of(mine, other)
    for *_, place in sorted(found.most, reverse=True):
        for key, *samples in samples_of(mine, other, numbers, place):
            yield _pair(key, [s if isinstance(s, Record) else None for s in samples], names)


def _pair(key: str, records: Sequence[Record | None], names: Sequence[str]) -> Pair:
    record = next(record for record in records if record is not None)
    regions = [() if r is None else r.regions for r in records]
    merged = replace(record, regions=(*regions[0], *regions[1]))
    phrases = list({phrase_of(r): r for r in merged.regions}.values())
    phrases.sort(key=lambda region: (region.spans, region.phrase))
    numbers = {phrase_of(region): number for number, region in enumerate(phrases)}
    uri, problem = picture_uri(record.image)
    panels = []
    for side, (name, verdicts) in enumerate(zip(names, verdicts_of(*regions), strict=True)):
        picture = Picture(
            uri=uri,
            problem=problem,
            width=record.width,
            height=record.height,
            alt=plain_text(record.caption) or key,
            marks=tuple(
                _mark(region, numbers[phrase_of(region)], side, verdict)
                for region, verdict in zip(regions[side], verdicts, strict=True)
            ),
            tag_share=TAG_SHARE,
        )
        panels.append(Panel(title=plain_text(name), note=_counted(verdicts), picture=picture))
    pieces = caption_pieces(merged, numbers)
    return Pair(
        key=key,
        caption=tuple(replace(p, color=QUIET if p.color else "") for p in pieces),
        panels=tuple(panels),
        legend=tuple(_line(r, numbers[phrase_of(r)], regions, record.caption) for r in phrases),
    )


def _mark(region: Region, number: int, side: int, verdict: str) -> Mark:
    mark = box_mark(region.box, region.phrase, COLORS[side], region.score, dashed=side == 1)
    return replace(mark, tag=str(number + 1), dim=verdict == SAME)


def _line(
    region: Region, number: int, regions: Sequence[Sequence[Region]], caption: str
) -> LegendLine:
    """A phrase with its scores in both sets."""
    scores = [[r.score for r in own if phrase_of(r) == phrase_of(region)] for own in regions]
    found = [(score_text(own) or "1") if own else "no box" for own in scores]
    return LegendLine(
        number=str(number + 1),
        name=plain_text(region.phrase or spans_text(caption, region.spans)),
        color=QUIET,
        detail=" | ".join(found),
    )


def _counted(verdicts: Sequence[str]) -> str:
    counts = Counter(verdicts)
    said = {ALONE: "only here", ELSEWHERE: "elsewhere", SAME: "the same"}
    found = [f"{counts[verdict]} {text}" for verdict, text in said.items() if counts[verdict]]
    return ", ".join(found) or "no box"
