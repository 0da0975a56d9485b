"""The pictures of the report: labelled images, teacher against student, worst mistakes."""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from glipv2.jobs.card_text import plain_text
from glipv2.jobs.mistakes import (
    Found,
    Missed,
    Outcome,
    outcomes,
    telling_keys,
    worst_false,
    worst_missed,
)
from glipv2.jobs.page import (
    Card,
    LegendLine,
    Mark,
    Picture,
    box_mark,
    frame_ratio,
    palette_color,
    picture_uri,
    record_card,
)
from glipv2.pipeline import storage
from glipv2.pipeline.errors import BadSample, DataError
from glipv2.pipeline.records import Record
from glipv2.pipeline.shard_reader import iterate_records, open_shard_set

GALLERY = 12
GAINS, LOSSES = 6, 2
MISTAKES = 8
SEED = 0
PANEL_TAG_SHARE = 0.1
"""Tags of the small pictures that stand side by side."""
WRONG, TRUE = 6, 4
"""Palette numbers of a wrong box (red) and of the truth beside it (green)."""


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """Labelled images of one set."""

    name: str
    note: str
    ratio: float
    cards: tuple[Card, ...]


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One picture of a comparison."""

    title: str
    note: str
    picture: Picture


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One image: its truth and what two models made of it."""

    key: str
    panels: tuple[Panel, ...]
    legend: tuple[LegendLine, ...]


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """One image with one mistake marked."""

    key: str
    picture: Picture
    text: str


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Everything shown from the predictions of teacher and student."""

    comparisons: tuple[Comparison, ...]
    false: tuple[Mistake, ...]
    missed: tuple[Mistake, ...]
    model: str
    """Whose mistakes these are."""
    threshold: float
    """Score from which that model's boxes are shown."""
    missing: str = ""
    """Why there is nothing to show."""


def gallery(url: str, judged: bool, count: int = GALLERY) -> Gallery | None:
    """A seeded sample of a labelled set, images with boxes first; None if the set isn't there.

    `judged`: the set's truth is known, so its quality stands in the table above.
    """
    if not _is_set(url):
        return None
    total = open_shard_set(url).samples
    order = np.random.default_rng(SEED).permutation(total).tolist()
    kept: dict[bool, list[tuple[int, Record]]] = {True: [], False: []}
    with_boxes = boxes = 0
    for place, record in zip(order, iterate_records(url, on_bad=_ignore), strict=False):
        with_boxes += bool(record.regions)
        boxes += len(record.regions)
        pile = kept[bool(record.regions)]
        pile.append((place, record))
        if len(pile) > count:  # only the `count` first of the seeded order stay in memory
            pile.remove(max(pile, key=lambda item: item[0]))
    chosen = [r for pile in (kept[True], kept[False]) for _, r in sorted(pile, key=_place)][:count]
    cards = tuple(record_card(record, brief=True) for record in chosen)
    warning = "" if judged else " No truth is known for these: judge for yourself."
    return Gallery(
        name=url.rstrip("/").rsplit("/", 1)[-1],
        note=f"{boxes:,} boxes kept on {with_boxes:,} of {total:,} images.{warning}",
        ratio=frame_ratio([card.picture for card in cards]),
        cards=cards,
    )


def examples(run_dir: str, validation_url: str) -> Examples:
    """Comparisons and mistakes from eval/predictions-teacher.json and -student.json."""
    seen: dict[str, dict[str, Outcome]] = {}
    thresholds: dict[str, float] = {}
    for model in ("teacher", "student"):
        url = storage.join(run_dir, "eval", f"predictions-{model}.json")
        if storage.exists(url):
            thresholds[model], seen[model] = outcomes(json.loads(storage.read_bytes(url)))
    if not seen or not _is_set(validation_url):
        what = "eval/predictions-teacher.json" if not seen else validation_url
        return Examples(
            comparisons=(), false=(), missed=(), model="", threshold=0, missing=f"{what} is missing"
        )
    model = "student" if "student" in seen else "teacher"
    false, missed = worst_false(seen[model], MISTAKES), worst_missed(seen[model], MISTAKES)
    telling = telling_keys(seen["teacher"], seen["student"], GAINS, LOSSES) if len(seen) > 1 else []
    wanted = {*telling, *(outcome.key for outcome, _ in [*false, *missed])}
    pictures = _pictures(validation_url, wanted)
    return Examples(
        comparisons=tuple(
            _comparison(pictures[key], {name: own[key] for name, own in seen.items()})
            for key in telling
            if key in pictures
        ),
        false=tuple(false_box(pictures[o.key], o, f) for o, f in false if o.key in pictures),
        missed=tuple(missed_object(pictures[o.key], o, m) for o, m in missed if o.key in pictures),
        model=model,
        threshold=thresholds[model],
    )


def _comparison(picture: Picture, seen: dict[str, Outcome]) -> Comparison:
    first = next(iter(seen.values()))
    picture = replace(picture, tag_share=PANEL_TAG_SHARE)
    names = [name for _, name in first.truth]
    names += [found.name for outcome in seen.values() for found in outcome.found]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    truth = tuple(box_mark(box, name, numbers[name]) for box, name in first.truth)
    panels = [Panel(title="Truth", note=_count(len(truth), "object"), picture=picture)]
    panels[0] = replace(panels[0], picture=replace(picture, marks=truth))
    for model, outcome in seen.items():
        marks = tuple(
            box_mark(f.box, f.name, numbers[f.name], f.score, dashed=not f.right)
            for f in reversed(outcome.found)  # the best score on top
        )
        shown = replace(picture, marks=marks)
        panels.append(Panel(title=model.capitalize(), note=_tally(outcome), picture=shown))
    legend = tuple(
        LegendLine(
            number=str(number + 1), name=plain_text(name), color=palette_color(number), detail=""
        )
        for name, number in numbers.items()
    )
    return Comparison(key=first.key, panels=tuple(panels), legend=legend)


def false_box(picture: Picture, outcome: Outcome, found: Found) -> Mistake:
    """A wrong box beside the truth."""
    truth = tuple(symbol_mark(box, name, TRUE, "✓") for box, name in outcome.truth)
    wrong = symbol_mark(found.box, found.name, WRONG, "×", dashed=True)
    text = f"“{plain_text(found.name)}” {found.score:.2f}: {plain_text(found.why)}."
    return Mistake(key=outcome.key, picture=replace(picture, marks=(*truth, wrong)), text=text)


def missed_object(picture: Picture, outcome: Outcome, missed: Missed) -> Mistake:
    """A true object without a box."""
    mark = symbol_mark(missed.box, missed.name, TRUE, "?")
    best = f"best box here scored {missed.best_score:.2f}" if missed.best_score else "no box here"
    text = f"“{plain_text(missed.name)}” was not found: {best}."
    return Mistake(key=outcome.key, picture=replace(picture, marks=(mark,)), text=text)


def well_found(picture: Picture, outcome: Outcome, of: int, what: str) -> Mistake:
    """The boxes of an image with `of` objects or phrases; those that are wrong are dashed."""
    numbers = {name: n for n, name in enumerate(dict.fromkeys(f.name for f in outcome.found))}
    marks = tuple(
        box_mark(f.box, f.name, numbers[f.name], f.score, dashed=not f.right)
        for f in reversed(outcome.found)
    )
    names = ", ".join(f"{number + 1} {plain_text(name)}" for name, number in numbers.items())
    text = f"{names}: {outcome.right} of {_count(of, what)} found."
    return Mistake(key=outcome.key, picture=replace(picture, marks=marks), text=text)


def symbol_mark(
    box: Sequence[float], name: str, number: int, tag: str, dashed: bool = False
) -> Mark:
    """A box in a colour of the palette, with a sign in its corner."""
    return replace(box_mark(box, name, number, dashed=dashed), tag=tag)


def _pictures(url: str, keys: Collection[str]) -> dict[str, Picture]:
    """Images of a set without boxes, by key."""
    records = iterate_records(url, on_bad=_ignore)
    return {record.key: picture_of(record) for record in records if record.key in keys}


def picture_of(record: Record) -> Picture:
    """The image of a record, without boxes."""
    uri, problem = picture_uri(record.image)
    alt = plain_text(record.caption) or record.key
    return Picture(
        uri=uri, problem=problem, width=record.width, height=record.height, alt=alt, marks=()
    )


def _is_set(url: str) -> bool:
    try:
        open_shard_set(url)
    except DataError:
        return False
    return True


def _ignore(shard: str, key: str, why: BadSample) -> None:
    """Bad samples are counted where they are trained on; a gallery passes over them."""


def _place(item: tuple[int, Any]) -> int:
    return item[0]


def _tally(outcome: Outcome) -> str:
    wrong = len(outcome.found) - outcome.right
    if not wrong and not outcome.missed:
        return "all right"
    parts = ((outcome.right, "right"), (wrong, "wrong"), (len(outcome.missed), "missed"))
    return ", ".join(f"{number} {what}" for number, what in parts if number)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
