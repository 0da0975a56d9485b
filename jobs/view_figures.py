"""The figures of the page of glipv2 view: numbers under the title, plots, rankings, phrases."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from glipv2.jobs.labelled import Making
from glipv2.jobs.plots import Plot, Ranking, histogram, ranking
from glipv2.jobs.sampling import EVERYTHING, Scan, Wanted
from glipv2.jobs.stats import byte_text, set_size
from glipv2.jobs.survey import Frequent, Outcome, Survey, Tally
from glipv2.pipeline.shard_format import ShardSet

TOP_NAMES = 12
LEAST_TIMES = 5
"""That a phrase is said, for its share of boxes to say something."""

Fact = tuple[str, str, str]
"""Label, value, what stands small under it."""


def facts(shard_set: ShardSet, survey: Survey, making: Making) -> list[Fact]:
    boxes, size = survey.boxes, set_size(shard_set)
    mean = f"{boxes.mean:.1f} a picture" if boxes.total else ""
    tasks = ", ".join(name for name, _ in survey.tasks.most_common())
    found = [
        ("Samples", f"{shard_set.samples:,}", tasks),
        ("Shards", f"{size['shards']:,}", byte_text(size["bytes"])),
    ]
    for name, number in survey.texts.items():
        each = f"{number / survey.samples:.1f} a picture"
        found.append((name.capitalize(), f"{number:,}", each))
    if boxes.total or not survey.texts:
        found.append(("Boxes", f"{boxes.total:,.0f}", mean))
    if 0 < (empty := boxes.cells[0]) < survey.samples:
        found.append(("Without boxes", f"{empty:,}", f"{empty / survey.samples:.0%} of those read"))
    if survey.masks:
        found.append(("Masks", f"{survey.masks:,}", f"{survey.masks / boxes.total:.0%} of boxes"))
    if survey.short_sides.count:
        low, high = survey.short_sides.low, survey.short_sides.high
        sides = f"{low:.0f} to {high:.0f} px" if low < high else "all pictures"
        found.append(("Median short side", f"{survey.short_sides.quantile(0.5):.0f} px", sides))
    if survey.scores.count:
        median = survey.scores.quantile(0.5)
        found.append(("Median score", f"{median:.2f}", "of pseudo labels"))
    if making.find and (total := survey.phrases.total).times:
        found.append(
            ("Phrases with a box", f"{total.share:.0%}", f"of {total.times:,} in captions")
        )
    return found


def scanned_note(shard_set: ShardSet, scan: Scan, wanted: Wanted) -> str:
    """Of how much of the set the figures are."""
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


def plots(survey: Survey) -> list[Plot]:
    fractions = np.linspace(0, 1, 21).tolist()
    sides = survey.short_sides
    captions = survey.caption_words if survey.texts["captions"] else Tally()
    found = [
        _whole_numbers("Boxes in a picture", survey.boxes, "boxes"),
        _whole_numbers("Length of phrases", survey.phrase_words, "words"),
        _whole_numbers("Length of questions", survey.question_words, "words"),
        _whole_numbers("Length of captions", captions, "words"),
        _bars("Size of boxes", survey.box_sizes, "√ (share of the picture)", fractions),
        _bars("Scores of boxes", survey.scores, "score", fractions),
    ]
    if sides.low < sides.high:
        edges = np.linspace(sides.low, sides.high, 17).tolist()
        found.append(_bars("Short side", sides, "pixels", edges))
    return [plot for plot in found if plot]


def rankings(survey: Survey) -> list[Ranking]:
    names, answers, sources = survey.names, survey.answers, survey.sources
    by_source = sources.top(TOP_NAMES) if len(sources.counts) > 1 else []
    found = [
        ranking("Boxes by name", names.top(TOP_NAMES), _rest(names)),
        ranking("Questions by answer", answers.top(TOP_NAMES), _rest(answers)),
        ranking("Pictures by source", by_source),
    ]
    return [rank for rank in found if rank]


def _rest(names: Frequent) -> str:
    """How many there are besides those shown."""
    rest = f"the first of {len(names.counts):,}" if len(names.counts) > TOP_NAMES else ""
    error = f"counts up to {names.error:,} too low" if names.error else ""
    return "; ".join(part for part in (rest, error) if part)


@dataclass(frozen=True, kw_only=True)
class PhraseRow:
    """A phrase of a labelled set."""

    name: str
    times: str
    share: int | None
    """Percent of the times that it got a box; None where that isn't known."""
    score: str
    """The mean."""


@dataclass(frozen=True, kw_only=True)
class PhraseTable:
    """Phrases in the order of the title."""

    title: str
    rows: tuple[PhraseRow, ...]


@dataclass(frozen=True, kw_only=True)
class PhraseSection:
    """What became of the phrases of a labelled set."""

    note: str
    shares: bool
    tables: tuple[PhraseTable, ...]


def phrase_section(shard_set: ShardSet, survey: Survey, making: Making) -> PhraseSection | None:
    """None for a set that no model labelled."""
    phrases = survey.phrases
    if not phrases.by_name:
        return None
    shares = making.find is not None
    most = _table("Most frequent phrases", phrases.top(TOP_NAMES), shares)
    least = _table(
        f"Phrases that got a box least often, of those said {LEAST_TIMES} times or more",
        phrases.least_kept(TOP_NAMES, LEAST_TIMES) if shares else [],
        shares,
    )
    return PhraseSection(
        note=phrase_note(shard_set, making),
        shares=shares,
        tables=tuple(table for table in (most, least) if table.rows),
    )


def phrase_note(shard_set: ShardSet, making: Making) -> str:
    """Of which captions the shares are, or why there are none."""
    if making.why_not:
        return f"How often a phrase got no box isn't known: {making.why_not}."
    if making.find is None:
        return "Only phrases with a box are counted."
    if making.keeps_empty:
        return "Pairs without any box are in the set, and counted."
    counts = shard_set.info.get("counts")
    pairs, kept = (counts.get(name) for name in ("pairs", "images")) if counts else (None, None)
    number = ""
    if isinstance(pairs, int) and isinstance(kept, int):
        number = f" ({pairs - kept:,} of {pairs:,})"
    return f"Pairs without any box{number} are not in the set, and not counted."


def _table(title: str, phrases: Sequence[tuple[str, Outcome]], shares: bool) -> PhraseTable:
    rows = tuple(
        PhraseRow(
            name=name,
            times=f"{outcome.times:,}",
            share=round(100 * outcome.share) if shares else None,
            score="–" if math.isnan(outcome.score) else f"{outcome.score:.2f}",
        )
        for name, outcome in phrases
    )
    return PhraseTable(title=title, rows=rows)


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
