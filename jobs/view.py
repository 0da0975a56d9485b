"""glipv2 view: one static page that shows a shard set: boxes, masks, coloured phrases, figures."""

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from glipv2.jobs.audit import write_boxes
from glipv2.jobs.card_text import plain_text
from glipv2.jobs.comparison import comparison
from glipv2.jobs.labelled import making_of
from glipv2.jobs.page import (
    Card,
    LegendLine,
    frame_ratio,
    record_card,
    render,
    score_text,
    source_group,
)
from glipv2.jobs.sampling import (
    EVERYTHING,
    BoxPlace,
    Place,
    Scan,
    Wanted,
    find_keys,
    record_at,
    scattered,
    stretches_of,
)
from glipv2.jobs.survey import region_name
from glipv2.jobs.view_figures import facts, phrase_section, plots, rankings, scanned_note
from glipv2.pipeline import storage
from glipv2.pipeline.errors import ConfigError, DataError
from glipv2.pipeline.progress import progress
from glipv2.pipeline.records import Record, Region
from glipv2.pipeline.shard_format import ShardSet
from glipv2.pipeline.shard_reader import check_shard_sizes, open_shard_set

MAX_OPTIONS = 12
SCORES = {10: "1 (given)"} | {n: f"{n / 10:.1f} to {(n + 1) / 10:.1f}" for n in range(9, -1, -1)}
"""What the filter of the page calls each tenth of the scores."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `glipv2 view`."""
    parser.add_argument("shards", help="folder URL of a shard set (holds dataset.json)")
    parser.add_argument("--out", required=True, help="the HTML file to write")
    parser.add_argument(
        "--count", type=int, default=48, help="pictures to show, boxes with --csv (default 48)"
    )
    parser.add_argument("--seed", type=int, default=0, help="another seed, another sample")
    parser.add_argument("--keys", nargs="+", help="show exactly these samples instead")
    parser.add_argument("--source", nargs="+", help="only samples whose provenance names these")
    score = "only samples with a box of at {} this score, other boxes drawn faintly"
    parser.add_argument("--min-score", type=float, default=0.0, help=score.format("least"))
    parser.add_argument("--max-score", type=float, default=1.0, help=score.format("most"))
    parser.add_argument(
        "--compare",
        metavar="SHARDS",
        help="another labelled set of the same pairs: where the two disagree",
    )
    parser.add_argument(
        "--csv",
        metavar="FILE",
        help="show boxes by lot, numbered, and write them there too, to be checked by hand and "
        "read by `glipv2 label audit FILE`",
    )


def run(args: argparse.Namespace) -> int:
    """Write the page and say where it is."""
    wanted = Wanted(
        sources=tuple(args.source or ()), min_score=args.min_score, max_score=args.max_score
    )
    path = view(
        args.shards, args.out, args.count, args.seed, args.keys, wanted, args.compare, args.csv
    )
    if args.csv:
        print(f"boxes: {args.csv}")  # noqa: T201 - the answer of the command
    print(f"page: {path}")  # noqa: T201
    return 0


def view(
    shards_url: str,
    out_html: str,
    count: int,
    seed: int,
    keys: Sequence[str] | None = None,
    wanted: Wanted = EVERYTHING,
    compare: str | None = None,
    csv: str | None = None,
) -> str:
    """Write a page with `count` samples drawn by `seed`, or with the samples named in `keys`.

    With `csv` it shows `count` boxes, each of the set's with the same chance, and writes them there
    too. `compare` is another set of the same pairs. One self-contained file: no script, nothing
    loaded from elsewhere. Returns `out_html`.
    """
    _check(count, keys, wanted, csv)
    shard_set = open_shard_set(shards_url)
    check_shard_sizes(shard_set)
    making = making_of(shard_set)
    rng = np.random.default_rng(seed)
    stretches = stretches_of([shard.samples for shard in shard_set.shards], rng)
    if keys:
        stretches = find_keys(shard_set, keys)
    elif csv:
        stretches = scattered(shard_set, rng)
    many = csv or wanted != EVERYTHING
    shown = progress(stretches, len(stretches), "look for samples") if many else stretches
    scan = Scan(samples=len(keys or ()) or count, boxes=count if csv else 0, seed=seed)
    scan.through(shard_set, shown, wanted, making.find)
    if wanted.by_score and not scan.scored:
        raise DataError(
            f"{shards_url} has no scores to choose by: none of the {scan.read:,} samples read has "
            "a box from a model (boxes that people drew have none); leave --min-score and "
            "--max-score out"
        )
    if wanted != EVERYTHING and not scan.survey.samples:
        listed = ", ".join(plain_text(name) for name, _ in scan.sources.top(10))
        raise DataError(f"{shards_url} has no sample with {wanted.text}; its sources: {listed}")
    unsure = list[Card]()
    if csv:
        cards = _boxes_to_check(shard_set, sorted(scan.boxes.items), csv)
        heading = "Boxes to check"
        sample_note = (
            f"{len(cards)} boxes, one a card, drawn with seed {seed}, numbered as in {csv}. Fill "
            "in its last column: 1 if the box shows what the phrase names, 0 if not, nothing where "
            f"you can't tell. Then: glipv2 label audit {csv}"
        )
    else:
        cards = list(_cards(shard_set, sorted(scan.samples.items), wanted))
        heading = "Samples asked for" if keys else "A random sample"
        sample_note = f"{len(cards)} samples" + ("." if keys else f", drawn with seed {seed}.")
        if not shard_set.samples:
            heading, sample_note = "Nothing to show", "The set has no samples."
        if not scan.samples.complete:  # else they are among the cards
            unsure = list(_unsure_cards(shard_set, scan.unsure))
    page = render(
        "view.html",
        name=shards_url.rstrip("/").rsplit("/", 1)[-1],
        url=shards_url,
        total=f"{shard_set.samples:,}",
        facts=facts(shard_set, scan.survey, making),
        plots=plots(scan.survey),
        rankings=rankings(scan.survey),
        scanned_note=scanned_note(shard_set, scan, wanted),
        phrases=phrase_section(shard_set, scan.survey, making),
        comparison=comparison(shard_set, compare, seed) if compare else None,
        unsure=unsure,
        categories=shard_set.categories,
        skipped=scan.survey.unreadable.most_common(),
        heading=heading,
        sample_note=sample_note,
        filters=[] if csv else _filters(cards),
        to_check=csv is not None,
        cards=cards,
        ratio=frame_ratio([card.picture for card in cards]),
    )
    storage.write_bytes(out_html, page)
    return out_html


def _check(count: int, keys: Sequence[str] | None, wanted: Wanted, csv: str | None) -> None:
    """DataError or ConfigError for options that make no sense."""
    if count < 1:
        raise DataError(f"--count must be at least 1, got {count}")
    if not 0 <= wanted.min_score <= wanted.max_score <= 1:
        raise DataError("--min-score and --max-score must lie between 0 and 1, in this order")
    if keys and (wanted != EVERYTHING or csv):
        raise DataError(
            "--keys shows exactly these samples: leave --source, the scores and --csv out"
        )
    if csv and storage.exists(csv):
        raise ConfigError(
            f"{csv} exists, and may hold what somebody filled in: choose another name for --csv"
        )


def _cards(shard_set: ShardSet, places: Sequence[Place], wanted: Wanted) -> Iterator[Card]:
    """Read again one by one, so that not all their images are in memory together."""
    for place in places:
        if record := record_at(shard_set, place):
            fits = [wanted.score_fits(region.score) for region in record.regions]
            yield _with_dim(record_card(record, shard_set.categories), fits)


def _unsure_cards(shard_set: ShardSet, places: Sequence[BoxPlace]) -> Iterator[Card]:
    for place, number in places:
        if record := record_at(shard_set, place):
            only = [region == number for region in range(len(record.regions))]
            yield _with_dim(record_card(record, shard_set.categories), only)


def _with_dim(card: Card, bright: Sequence[bool]) -> Card:
    """Boxes that are not asked for drawn faintly."""
    marks = tuple(
        replace(mark, dim=not shown) for mark, shown in zip(card.picture.marks, bright, strict=True)
    )
    return replace(card, picture=replace(card.picture, marks=marks))


def _boxes_to_check(shard_set: ShardSet, places: Sequence[BoxPlace], csv: str) -> list[Card]:
    """Write them to the file; a card for each, so that no box hides another."""
    cards, rows = [], list[tuple[int, Record, Region, str]]()
    for place, chosen in places:
        record = record_at(shard_set, place)
        if record is None:
            continue
        region, number = record.regions[chosen], len(rows) + 1
        name = region_name(region, record, shard_set.categories)
        rows.append((number, replace(record, image=b""), region, name))
        only = replace(record, regions=(region,))
        card = record_card(only, shard_set.categories, brief=True)
        cards.append(_numbered(card, number, region, name))
    if not rows:
        raise DataError(f"{shard_set.url} has no boxes to check")
    write_boxes(csv, rows)
    return cards


def _numbered(card: Card, number: int, region: Region, name: str) -> Card:
    """The card of one box with its number instead of that of its phrase."""
    [mark] = (replace(mark, tag=str(number)) for mark in card.picture.marks)
    line = LegendLine(
        number=mark.tag,
        name=plain_text(name),
        color=mark.color,
        detail=score_text([region.score]),
    )
    return replace(
        card,
        picture=replace(card.picture, marks=(mark,)),
        caption=tuple(replace(piece, number="") for piece in card.caption),
        legend=(line,),
    )


@dataclass(frozen=True, kw_only=True)
class Option:
    """One thing to choose in a filter of the page."""

    group: str
    """The class of the cards that it leaves."""
    text: str
    cards: int


@dataclass(frozen=True, kw_only=True)
class Filter:
    """A row of radio buttons over the cards."""

    title: str
    options: tuple[Option, ...]
    of_boxes: bool = False
    """Boxes of other groups are dimmed."""


def _filters(cards: Sequence[Card]) -> list[Filter]:
    """By source and by score, where there is a choice."""
    sources = Counter(card.source for card in cards).most_common(MAX_OPTIONS)
    by_source = tuple(
        Option(group=source_group(name), text=name, cards=count) for name, count in sources
    )
    scores = Counter(group for card in cards for group in card.groups[1:])
    by_score = tuple(
        Option(group=f"score-{tenth}", text=text, cards=scores[f"score-{tenth}"])
        for tenth, text in SCORES.items()
        if f"score-{tenth}" in scores
    )
    filters = [
        Filter(title="Source", options=by_source),
        Filter(title="Score of a box", options=by_score, of_boxes=True),
    ]
    return [choice for choice in filters if len(choice.options) > 1]
