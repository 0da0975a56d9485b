"""glipv2 view: one static page that shows a shard set, with boxes and coloured phrases."""

import argparse
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from glipv2.jobs.page import Card, frame_ratio, record_card, render
from glipv2.jobs.plots import Plot, histogram
from glipv2.pipeline import storage
from glipv2.pipeline.errors import BadSample, DataError
from glipv2.pipeline.record_json import parse_record
from glipv2.pipeline.records import Record
from glipv2.pipeline.shard_format import ShardSet
from glipv2.pipeline.shard_reader import check_shard_sizes, open_shard_set, read_index, read_raw

STRETCH = 256
"""Samples read at once: one ranged read."""
MAX_STRETCHES = 16
"""Of a larger set this many stretches, drawn by the seed, stand for the whole."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `glipv2 view`."""
    parser.add_argument("shards", help="folder URL of a shard set (holds dataset.json)")
    parser.add_argument("--out", required=True, help="the HTML file to write")
    parser.add_argument("--count", type=int, default=48, help="pictures to show (default 48)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another sample")
    parser.add_argument("--keys", nargs="+", help="show exactly these samples instead")


def run(args: argparse.Namespace) -> int:
    """Write the page and say where it is."""
    path = view(args.shards, args.out, args.count, args.seed, args.keys)
    print(f"page: {path}")  # noqa: T201 - the answer of the command
    return 0


def view(
    shards_url: str, out_html: str, count: int, seed: int, keys: Sequence[str] | None = None
) -> str:
    """Write a page with `count` samples drawn by `seed`, or with the samples named in `keys`.

    One self-contained file: no script, nothing loaded from elsewhere. Returns `out_html`.
    """
    if count < 1:
        raise DataError(f"--count must be at least 1, got {count}")
    shard_set = open_shard_set(shards_url)
    check_shard_sizes(shard_set)
    rng = np.random.default_rng(seed)
    wanted = _find_keys(shard_set, keys) if keys else None
    survey = _survey(shard_set, _stretches(shard_set, rng, wanted), count, rng, wanted)
    name = shards_url.rstrip("/").rsplit("/", 1)[-1]
    drawn = "." if keys else f", drawn with seed {seed}."
    page = render(
        "view.html",
        name=name,
        url=shards_url,
        total=f"{shard_set.samples:,}",
        facts=_facts(shard_set, survey),
        plots=_plots(survey),
        scanned_note=_scanned_note(shard_set, survey),
        categories=shard_set.categories,
        skipped=survey.skipped.most_common(),
        heading="Samples asked for" if keys else "A random sample",
        sample_note=f"{len(survey.cards)} samples{drawn}",
        cards=survey.cards,
        ratio=frame_ratio([card.picture for card in survey.cards]),
    )
    storage.write_bytes(out_html, page)
    return out_html


@dataclass
class _Survey:
    """What was seen of a set."""

    samples: int = 0
    boxes: list[int] = field(default_factory=list)
    """Per sample."""
    scores: list[float] = field(default_factory=list)
    """Of boxes that a model made."""
    short_sides: list[int] = field(default_factory=list)
    tasks: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    cards: list[Card] = field(default_factory=list)

    def add(self, record: Record) -> None:
        self.samples += 1
        self.boxes.append(len(record.regions))
        self.scores += [r.score for r in record.regions if r.score < 1]
        self.short_sides.append(min(record.width, record.height))
        self.tasks[record.task] += 1


Stretch = tuple[int, int, int]
"""Shard number, first sample, end (exclusive)."""


def _stretches(
    shard_set: ShardSet, rng: np.random.Generator, wanted: Collection[tuple[int, int]] | None
) -> list[Stretch]:
    """What to read: everything of a small set, a seeded part of a large one, or just `wanted`."""
    if wanted is not None:
        return [(shard, sample, sample + 1) for shard, sample in sorted(wanted)]
    stretches = [
        (number, first, min(first + STRETCH, shard.samples))
        for number, shard in enumerate(shard_set.shards)
        for first in range(0, shard.samples, STRETCH)
    ]
    if len(stretches) <= MAX_STRETCHES:
        return stretches
    return [stretches[i] for i in sorted(rng.choice(len(stretches), MAX_STRETCHES, replace=False))]


def _survey(
    shard_set: ShardSet,
    stretches: Sequence[Stretch],
    count: int,
    rng: np.random.Generator,
    wanted: Collection[tuple[int, int]] | None,
) -> _Survey:
    """Count everything in the stretches and make cards of a random `count` of it."""
    total = sum(end - first for _, first, end in stretches)
    number = total if wanted is not None else min(count, total)
    chosen = set(rng.choice(total, number, replace=False).tolist()) if total else set()
    survey = _Survey()
    for position, sample in enumerate(_records(shard_set, stretches)):
        if isinstance(sample, BadSample):
            survey.skipped[sample.reason] += 1
            continue
        survey.add(sample)
        if position in chosen:
            survey.cards.append(record_card(sample, shard_set.categories))
    return survey


def _records(shard_set: ShardSet, stretches: Sequence[Stretch]) -> Iterator[Record | BadSample]:
    for shard, first, end in stretches:
        for raw in read_raw(shard_set, shard, first, end):
            try:
                yield parse_record(raw, len(shard_set.categories))
            except BadSample as bad:
                yield bad


def _find_keys(shard_set: ShardSet, keys: Sequence[str]) -> set[tuple[int, int]]:
    """(shard number, sample number) of each key; an unknown one is an error."""
    missing, places = set(keys), set()
    for shard in range(len(shard_set.shards)):
        for number, entry in enumerate(read_index(shard_set, shard)):
            if entry.key in missing:
                missing.discard(entry.key)
                places.add((shard, number))
    if missing:
        raise DataError(f"{shard_set.url} has no sample with key {', '.join(sorted(missing))}")
    return places


def _facts(shard_set: ShardSet, survey: _Survey) -> list[tuple[str, str, str]]:
    boxes = sum(survey.boxes)
    mean = f"{boxes / survey.samples:.1f} a picture" if boxes else ""
    size = sum(shard.bytes for shard in shard_set.shards)
    tasks = ", ".join(name for name, _ in survey.tasks.most_common())
    facts = [
        ("Samples", f"{shard_set.samples:,}", tasks),
        ("Shards", f"{len(shard_set.shards):,}", _bytes(size)),
        ("Boxes", f"{boxes:,}", mean),
    ]
    if 0 < (empty := survey.boxes.count(0)) < survey.samples:
        facts.append(("Without boxes", f"{empty:,}", f"{empty / survey.samples:.0%} of those read"))
    if survey.short_sides:
        low, high = min(survey.short_sides), max(survey.short_sides)
        sides = f"{low} to {high} px" if low < high else "all pictures"
        facts.append(("Median short side", f"{np.median(survey.short_sides):.0f} px", sides))
    if survey.scores:
        facts.append(("Median score", f"{np.median(survey.scores):.2f}", "of pseudo labels"))
    return facts


def _scanned_note(shard_set: ShardSet, survey: _Survey) -> str:
    read = survey.samples + sum(survey.skipped.values())
    if read == shard_set.samples:
        return f"All {read:,} samples were read."
    return f"Figures on boxes are of {read:,} samples that were read, of {shard_set.samples:,}."


def _plots(survey: _Survey) -> list[Plot]:
    most = max(survey.boxes, default=0)
    step = max(1, -(-(most + 1) // 20))
    edges = [edge - 0.5 for edge in range(0, most + 1 + step, step)]
    plots = [
        histogram("Boxes in a picture", survey.boxes if most else (), "boxes", edges),
        histogram("Scores of boxes", survey.scores, "score", np.linspace(0, 1, 21).tolist()),
    ]
    low, high = min(survey.short_sides, default=0), max(survey.short_sides, default=0)
    if low < high:
        edges = np.linspace(low, high, 17).tolist()
        plots.append(histogram("Short side", survey.short_sides, "pixels", edges))
    return [plot for plot in plots if plot]


def _bytes(size: float) -> str:
    units = ["B", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.3g} {units[0]}"
