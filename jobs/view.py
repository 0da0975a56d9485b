"""glipv2 view: one static page that shows a shard set: boxes, masks, coloured phrases, figures."""

import argparse
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from glipv2.jobs.page import Card, frame_ratio, plain_text, record_card, render, source_group
from glipv2.jobs.plots import Plot, Ranking, histogram, ranking
from glipv2.jobs.stats import byte_text, set_size
from glipv2.jobs.survey import Frequent, Survey, Tally, records_of, source_name
from glipv2.pipeline import storage
from glipv2.pipeline.errors import BadSample, DataError
from glipv2.pipeline.progress import progress
from glipv2.pipeline.records import Record
from glipv2.pipeline.shard_format import ShardSet
from glipv2.pipeline.shard_reader import check_shard_sizes, open_shard_set, read_index

STRETCH = 256
"""Samples read at once: one ranged read."""
MAX_STRETCHES = 16
"""Of a larger set this many stretches, drawn by the seed, stand for the whole."""
TOP_NAMES = 12
MAX_OPTIONS = 12
SCORES = {10: "1 (given)"} | {n: f"{n / 10:.1f} to {(n + 1) / 10:.1f}" for n in range(9, -1, -1)}
"""What the filter of the page calls each tenth of the scores."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Which samples are shown and counted."""

    sources: tuple[str, ...] = ()
    """As the provenance names them; empty for all."""
    min_score: float = 0.0
    max_score: float = 1.0
    """Some box must have a score from one to the other; the other boxes are drawn faintly."""

    @property
    def by_score(self) -> bool:
        return self.min_score > 0 or self.max_score < 1

    @property
    def text(self) -> str:
        """What was asked for, empty for everything."""
        parts = [f"source {' or '.join(self.sources)}"] if self.sources else []
        if self.by_score:
            parts.append(f"a score from {self.min_score:g} to {self.max_score:g}")
        return ", ".join(parts)

    def score_fits(self, score: float) -> bool:
        return self.min_score <= score <= self.max_score

    def fits(self, record: Record) -> bool:
        if self.sources and source_name(record) not in self.sources:
            return False
        return not self.by_score or any(self.score_fits(r.score) for r in record.regions)


EVERYTHING = Wanted()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `glipv2 view`."""
    parser.add_argument("shards", help="folder URL of a shard set (holds dataset.json)")
    parser.add_argument("--out", required=True, help="the HTML file to write")
    parser.add_argument("--count", type=int, default=48, help="pictures to show (default 48)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another sample")
    parser.add_argument("--keys", nargs="+", help="show exactly these samples instead")
    parser.add_argument("--source", nargs="+", help="only samples whose provenance names these")
    score = "only samples with a box of at {} this score, other boxes drawn faintly"
    parser.add_argument("--min-score", type=float, default=0.0, help=score.format("least"))
    parser.add_argument("--max-score", type=float, default=1.0, help=score.format("most"))


def run(args: argparse.Namespace) -> int:
    """Write the page and say where it is."""
    wanted = Wanted(
        sources=tuple(args.source or ()), min_score=args.min_score, max_score=args.max_score
    )
    path = view(args.shards, args.out, args.count, args.seed, args.keys, wanted)
    print(f"page: {path}")  # noqa: T201 - the answer of the command
    return 0


def view(
    shards_url: str,
    out_html: str,
    count: int,
    seed: int,
    keys: Sequence[str] | None = None,
    wanted: Wanted = EVERYTHING,
) -> str:
    """Write a page with `count` samples drawn by `seed`, or with the samples named in `keys`.

    One self-contained file: no script, nothing loaded from elsewhere. Returns `out_html`.
    """
    if count < 1:
        raise DataError(f"--count must be at least 1, got {count}")
    if not 0 <= wanted.min_score <= wanted.max_score <= 1:
        raise DataError("--min-score and --max-score must lie between 0 and 1, in this order")
    if keys and wanted != EVERYTHING:
        raise DataError("--keys shows exactly these samples: leave --source and the scores out")
    shard_set = open_shard_set(shards_url)
    check_shard_sizes(shard_set)
    rng = np.random.default_rng(seed)
    if keys:
        scan = _scan(shard_set, _find_keys(shard_set, keys), len(keys), rng)
    elif wanted == EVERYTHING:
        scan = _scan(shard_set, _stretches(shard_set, rng)[:MAX_STRETCHES], count, rng)
    else:
        stretches = _stretches(shard_set, rng)
        shown = progress(stretches, len(stretches), "look for samples")
        scan = _scan(shard_set, shown, count, rng, wanted)
        if not scan.places:
            listed = ", ".join(plain_text(name) for name, _ in scan.sources.top(10))
            raise DataError(f"{shards_url} has no sample with {wanted.text}; its sources: {listed}")
    cards = list(_cards(shard_set, scan.places, wanted))
    page = render(
        "view.html",
        name=shards_url.rstrip("/").rsplit("/", 1)[-1],
        url=shards_url,
        total=f"{shard_set.samples:,}",
        facts=_facts(shard_set, scan.survey),
        plots=_plots(scan.survey),
        rankings=_rankings(scan.survey),
        scanned_note=_scanned_note(shard_set, scan, wanted),
        categories=shard_set.categories,
        skipped=scan.survey.unreadable.most_common(),
        heading="Samples asked for" if keys else "A random sample",
        sample_note=f"{len(cards)} samples" + ("." if keys else f", drawn with seed {seed}."),
        filters=_filters(cards),
        cards=cards,
        ratio=frame_ratio([card.picture for card in cards]),
    )
    storage.write_bytes(out_html, page)
    return out_html


Place = tuple[int, int]
"""Shard number, sample number."""
Stretch = tuple[int, int, int]
"""Shard number, first sample, end (exclusive)."""


@dataclass
class _Scan:
    """What was read of a set, and which of it is to be shown."""

    survey: Survey = field(default_factory=Survey)
    """Of the samples that fit."""
    read: int = 0
    sources: Frequent = field(default_factory=Frequent)
    """Of all that was read."""
    places: list[Place] = field(default_factory=list)


def _stretches(shard_set: ShardSet, rng: np.random.Generator) -> list[Stretch]:
    """The whole set in pieces, in random order."""
    stretches = [
        (number, first, min(first + STRETCH, shard.samples))
        for number, shard in enumerate(shard_set.shards)
        for first in range(0, shard.samples, STRETCH)
    ]
    return [stretches[i] for i in rng.permutation(len(stretches))]


def _find_keys(shard_set: ShardSet, keys: Sequence[str]) -> list[Stretch]:
    """Each key as a stretch of one sample; an unknown one is an error."""
    missing, places = set(keys), []
    for shard in range(len(shard_set.shards)):
        for number, entry in enumerate(read_index(shard_set, shard)):
            if entry.key in missing:
                missing.discard(entry.key)
                places.append((shard, number, number + 1))
    if missing:
        raise DataError(f"{shard_set.url} has no sample with key {', '.join(sorted(missing))}")
    return places


def _scan(
    shard_set: ShardSet,
    stretches: Iterable[Stretch],
    count: int,
    rng: np.random.Generator,
    wanted: Wanted = EVERYTHING,
) -> _Scan:
    """Count what fits in the stretches and choose `count` samples of it by lot.

    Ends early after MAX_STRETCHES, once there are enough.
    """
    scan = _Scan()
    for turn, (shard, first, end) in enumerate(stretches):
        if turn >= MAX_STRETCHES and len(scan.places) >= count:
            break
        for number, sample in enumerate(records_of(shard_set, shard, first, end), start=first):
            scan.read += 1
            if isinstance(sample, BadSample):
                scan.survey.unreadable[sample.reason] += 1
                continue
            scan.sources.add(source_name(sample))
            if not wanted.fits(sample):
                continue
            scan.survey.add(sample, shard_set.categories)
            if len(scan.places) < count:
                scan.places.append((shard, number))
            elif (lot := int(rng.integers(scan.survey.samples))) < count:  # a fair share for all
                scan.places[lot] = (shard, number)
    return scan


def _cards(shard_set: ShardSet, places: Sequence[Place], wanted: Wanted) -> Iterator[Card]:
    """Read again one by one, so that not all their images are in memory together."""
    for shard, number in sorted(places):
        for record in records_of(shard_set, shard, number, number + 1):
            if not isinstance(record, BadSample):
                card = record_card(record, shard_set.categories)
                marks = tuple(
                    replace(mark, dim=not wanted.score_fits(mark.score))
                    for mark in card.picture.marks
                )
                yield replace(card, picture=replace(card.picture, marks=marks))


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


def _facts(shard_set: ShardSet, survey: Survey) -> list[tuple[str, str, str]]:
    boxes, size = survey.boxes, set_size(shard_set)
    mean = f"{boxes.mean:.1f} a picture" if boxes.total else ""
    tasks = ", ".join(name for name, _ in survey.tasks.most_common())
    facts = [
        ("Samples", f"{shard_set.samples:,}", tasks),
        ("Shards", f"{size['shards']:,}", byte_text(size["bytes"])),
        ("Boxes", f"{boxes.total:,.0f}", mean),
    ]
    if 0 < (empty := boxes.cells[0]) < survey.samples:
        facts.append(("Without boxes", f"{empty:,}", f"{empty / survey.samples:.0%} of those read"))
    if survey.masks:
        facts.append(("Masks", f"{survey.masks:,}", f"{survey.masks / boxes.total:.0%} of boxes"))
    if survey.short_sides.count:
        low, high = survey.short_sides.low, survey.short_sides.high
        sides = f"{low:.0f} to {high:.0f} px" if low < high else "all pictures"
        facts.append(("Median short side", f"{survey.short_sides.quantile(0.5):.0f} px", sides))
    if survey.scores.count:
        median = survey.scores.quantile(0.5)
        facts.append(("Median score", f"{median:.2f}", "of pseudo labels"))
    return facts


def _scanned_note(shard_set: ShardSet, scan: _Scan, wanted: Wanted) -> str:
    all_read = scan.read == shard_set.samples
    if wanted != EVERYTHING:
        of_all = "" if all_read else f", of {shard_set.samples:,} in the set"
        fit = f"the {scan.survey.samples:,} samples with {wanted.text}"
        return f"Figures are of {fit}, among {scan.read:,} that were read{of_all}."
    if all_read:
        return f"All {scan.read:,} samples were read."
    return (
        f"Figures on boxes are of {scan.read:,} samples that were read, of {shard_set.samples:,}."
    )


def _plots(survey: Survey) -> list[Plot]:
    fractions = np.linspace(0, 1, 21).tolist()
    sides = survey.short_sides
    plots = [
        _whole_numbers("Boxes in a picture", survey.boxes, "boxes"),
        _whole_numbers("Length of phrases", survey.phrase_words, "words"),
        _bars("Size of boxes", survey.box_sizes, "√ (share of the picture)", fractions),
        _bars("Scores of boxes", survey.scores, "score", fractions),
    ]
    if sides.low < sides.high:
        edges = np.linspace(sides.low, sides.high, 17).tolist()
        plots.append(_bars("Short side", sides, "pixels", edges))
    return [plot for plot in plots if plot]


def _whole_numbers(title: str, tally: Tally, x_label: str) -> Plot | None:
    """Bars of at most 20 groups of neighbouring numbers; None if all are 0."""
    if not tally.total:
        return None
    step = max(1, -(-int(tally.high + 1) // 20))
    edges = [edge - 0.5 for edge in range(0, int(tally.high) + 1 + step, step)]
    return _bars(title, tally, x_label, edges)


def _bars(title: str, tally: Tally, x_label: str, edges: Sequence[float]) -> Plot | None:
    if not tally.count:
        return None
    return histogram(title, tally.between(edges), x_label, edges, tally.quantile(0.5))


def _rankings(survey: Survey) -> list[Ranking]:
    names, sources = survey.names, survey.sources
    rest = f"the first of {len(names.counts):,}" if len(names.counts) > TOP_NAMES else ""
    error = f"counts up to {names.error:,} too low" if names.error else ""
    note = "; ".join(part for part in (rest, error) if part)
    by_source = sources.top(TOP_NAMES) if len(sources.counts) > 1 else []
    found = [
        ranking("Boxes by name", names.top(TOP_NAMES), note),
        ranking("Pictures by source", by_source),
    ]
    return [rank for rank in found if rank]
