"""What a shard set holds, in figures: counted record by record in bounded memory, and mergeable."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from glipv2.data_prep.writing import texts_of
from glipv2.jobs.labelled import making_of
from glipv2.pipeline.answers import agreed_answer
from glipv2.pipeline.errors import BadSample
from glipv2.pipeline.record_json import parse_record
from glipv2.pipeline.records import Record, Region, Span
from glipv2.pipeline.shard_format import ShardSet
from glipv2.pipeline.shard_reader import SLICE, read_raw

if TYPE_CHECKING:
    from glipv2.data_prep.phrase_filters import PhrasesFound

NAME_LENGTH = 80
"""Longer names are cut before they are counted."""
SMALL, LARGE = 32**2, 96**2
"""COCO's limits: a box below the first area, in pixels, is small, one above the second large."""
SCORE_STEP = 1e-4
"""As finely as labels are stored."""


@dataclass
class Tally:
    """How often each value occurred, to the nearest multiple of `step` (whole numbers: exactly).

    Number, mean and extremes are exact. Memory grows with the range of values over `step` alone.
    """

    step: float = 1.0
    cells: Counter[int] = field(default_factory=Counter)
    total: float = 0.0
    low: float = math.inf
    high: float = -math.inf

    def add(self, value: float) -> None:
        self.cells[round(value / self.step)] += 1
        self.total += value
        self.low, self.high = min(self.low, value), max(self.high, value)

    def merge(self, other: "Tally") -> None:
        self.cells += other.cells
        self.total += other.total
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)

    @property
    def count(self) -> int:
        return self.cells.total()

    @property
    def mean(self) -> float:
        """NaN of nothing, as `quantile`."""
        return self.total / self.count if self.cells else math.nan

    def quantile(self, share: float) -> float:
        """The smallest value that this share of all don't exceed; half a step off at most."""
        cells = sorted(self.cells)
        reached = np.cumsum([self.cells[cell] for cell in cells])
        place = np.searchsorted(reached, share * self.count - 1e-9)
        return self._value(cells[min(int(place), len(cells) - 1)]) if cells else math.nan

    def between(self, edges: Sequence[float]) -> list[int]:
        """Numbers of values between ascending edges; those outside count in the end bins."""
        values = np.array([self._value(cell) for cell in self.cells]) + 1e-9
        numbers = list(self.cells.values())
        counts, _ = np.histogram(values.clip(edges[0], edges[-1]), edges, weights=numbers)
        return [int(count) for count in counts]

    def figures(self) -> dict[str, Any]:
        """Plain numbers for JSON, the whole histogram among them."""
        if not self.cells:
            return {"number": 0}
        shares = {"p10": 0.1, "median": 0.5, "p90": 0.9}
        return {
            "number": self.count,
            "mean": self.mean,
            "min": self.low,
            "max": self.high,
            **{name: self.quantile(share) for name, share in shares.items()},
            "histogram": [[self._value(cell), self.cells[cell]] for cell in sorted(self.cells)],
        }

    def _value(self, cell: int) -> float:
        return round(cell * self.step, 9)


@dataclass
class Frequent:
    """The most frequent of any number of different names (Misra and Gries).

    Up to `capacity` names all counts are exact. Beyond, each is too low by at most `error`, which
    is at most all that was counted / capacity, and names rarer than that may be missing.
    """

    capacity: int = 20_000
    counts: Counter[str] = field(default_factory=Counter)
    error: int = 0

    def add(self, name: str) -> None:
        self.counts[name[:NAME_LENGTH]] += 1
        self._shrink()

    def merge(self, other: "Frequent") -> None:
        self.counts += other.counts
        self.error += other.error
        self._shrink()

    def top(self, number: int) -> list[tuple[str, int]]:
        """The highest counts; names in order where counts are equal."""
        return sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))[:number]

    def _shrink(self) -> None:
        if len(self.counts) <= 2 * self.capacity:
            return
        least = sorted(self.counts.values(), reverse=True)[self.capacity]
        self.counts = Counter({n: c - least for n, c in self.counts.items() if c > least})
        self.error += least


@dataclass(slots=True)
class Outcome:
    """What became of a phrase, or of several together."""

    times: int = 0
    """That captions say it."""
    kept: int = 0
    """Of these, with a box."""
    boxes: int = 0
    score_sum: int = 0
    """Of the boxes, in steps of SCORE_STEP: whole numbers give the same sum in any order."""

    @property
    def share(self) -> float:
        """Of the times with a box; NaN of nothing, as `score`."""
        return self.kept / self.times if self.times else math.nan

    @property
    def score(self) -> float:
        """The mean."""
        return self.score_sum * SCORE_STEP / self.boxes if self.boxes else math.nan

    def add(self, scores: Sequence[float]) -> None:
        """One place in a caption and the scores of its boxes."""
        self.times += 1
        self.kept += bool(scores)
        self.boxes += len(scores)
        self.score_sum += sum(round(score / SCORE_STEP) for score in scores)

    def merge(self, other: "Outcome") -> None:
        for name in ("times", "kept", "boxes", "score_sum"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def figures(self) -> dict[str, Any]:
        return {
            "times": self.times,
            "kept": self.kept,
            "boxes": self.boxes,
            "mean_score": self.score if self.boxes else None,
        }


@dataclass
class Phrases:
    """What became of the most frequent phrases, and of all together.

    Bounded like `Frequent`, which decides who stays. What is known of a phrase is of its last
    `times` places; these are too few by at most `often.error`.
    """

    often: Frequent = field(default_factory=Frequent)
    by_name: dict[str, Outcome] = field(default_factory=dict)
    total: Outcome = field(default_factory=Outcome)

    def add(self, phrase: str, scores: Sequence[float]) -> None:
        """One place in a caption and the scores of its boxes."""
        name = phrase[:NAME_LENGTH]
        self.often.add(name)
        self.by_name.setdefault(name, Outcome()).add(scores)
        self.total.add(scores)
        self._forget()

    def merge(self, other: "Phrases") -> None:
        self.often.merge(other.often)
        self.total.merge(other.total)
        for name, outcome in other.by_name.items():
            self.by_name.setdefault(name, Outcome()).merge(outcome)
        self._forget()

    def top(self, number: int) -> list[tuple[str, Outcome]]:
        """Those said most often; names in order where they are equal."""
        return sorted(self.by_name.items(), key=lambda item: (-item[1].times, item[0]))[:number]

    def least_kept(self, number: int, times: int) -> list[tuple[str, Outcome]]:
        """Those that got a box least often, among phrases said at least so many times."""
        said = [(name, o) for name, o in self.by_name.items() if o.times >= times]
        return sorted(said, key=lambda item: (item[1].share, -item[1].times, item[0]))[:number]

    def figures(self) -> dict[str, Any]:
        return {
            **self.total.figures(),
            "different": len(self.by_name),
            "times_too_low_by": self.often.error,
            "most_frequent": {name: outcome.figures() for name, outcome in self.top(1000)},
        }

    def _forget(self) -> None:
        if len(self.often.counts) < len(self.by_name):
            self.by_name = {name: self.by_name[name] for name in self.often.counts}


TALLIES = {
    "boxes": "boxes in a picture",
    "box_sizes": "box side / picture side",
    "scores": "scores of boxes",
    "phrase_words": "words in a phrase",
    "caption_words": "words in a caption",
    "question_words": "words in a question",
    "short_sides": "short side, pixels",
}
"""The tallies of a survey, as people read them."""


@dataclass
class Survey:
    """Figures of the records of a set, or of a part of it."""

    samples: int = 0
    """That could be read."""
    unreadable: Counter[str] = field(default_factory=Counter)
    """Reason -> samples."""
    tasks: Counter[str] = field(default_factory=Counter)
    sources: Frequent = field(default_factory=Frequent)
    names: Frequent = field(default_factory=Frequent)
    """Of boxes: the category, or the phrase in lower case."""
    areas: Counter[str] = field(default_factory=Counter)
    """Small, medium and large boxes."""
    masks: int = 0
    texts: Counter[str] = field(default_factory=Counter)
    """Captions, questions and answers of the tasks that are about these."""
    answers: Frequent = field(default_factory=Frequent)
    """Questions by the answer that most people gave, in the form in which answers are compared."""
    boxes: Tally = field(default_factory=Tally)
    """Per sample."""
    box_sizes: Tally = field(default_factory=lambda: Tally(step=0.001))
    """Square root of the share of the picture's area."""
    scores: Tally = field(default_factory=lambda: Tally(step=0.001))
    """Of boxes that a model made."""
    phrases: Phrases = field(default_factory=Phrases)
    """Of boxes that a model made, in lower case."""
    phrase_words: Tally = field(default_factory=Tally)
    """Of each phrase that has boxes, once a sample."""
    caption_words: Tally = field(default_factory=Tally)
    question_words: Tally = field(default_factory=Tally)
    short_sides: Tally = field(default_factory=Tally)

    def add(
        self,
        record: Record,
        categories: Sequence[str] = (),
        find: "Callable[[str], PhrasesFound] | None" = None,
    ) -> None:
        """`find` gives a caption's phrases, so that those without a box count too."""
        self.samples += 1
        self.tasks[record.task] += 1
        self.sources.add(source_name(record))
        self.texts.update(texts_of(record))
        self.boxes.add(len(record.regions))
        self.short_sides.add(min(record.width, record.height))
        for caption in record.captions or (record.caption,):
            if caption:
                self.caption_words.add(len(caption.split()))
        for question in record.questions:
            self.question_words.add(len(question.text.split()))
            if agreed := agreed_answer(question.answers):
                self.answers.add(agreed)
        for spans in {region.spans for region in record.regions if region.spans}:
            self.phrase_words.add(len(" ".join(record.caption[s:e] for s, e in spans).split()))
        for region in record.regions:
            self._add_region(region, record, categories)
        self._add_phrases(record, find)

    def merge(self, other: "Survey") -> None:
        """Take in what another part of the set gave."""
        self.samples += other.samples
        self.masks += other.masks
        for name in ("unreadable", "tasks", "areas", "texts"):
            getattr(self, name).update(getattr(other, name))
        for name in ("sources", "names", "answers", "phrases", *TALLIES):
            getattr(self, name).merge(getattr(other, name))

    def figures(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        return {
            "samples": self.samples,
            "unreadable": dict(self.unreadable),
            "tasks": dict(self.tasks),
            "sources": dict(self.sources.top(100)),
            "masks": self.masks,
            "texts": dict(self.texts),
            "answers": dict(self.answers.top(1000)),
            "areas": dict(self.areas),
            "names": dict(self.names.top(1000)),
            "different_names": len(self.names.counts),
            "names_too_low_by": self.names.error,
            "phrases": self.phrases.figures(),
            **{name: getattr(self, name).figures() for name in TALLIES},
        }

    def _add_region(self, region: Region, record: Record, categories: Sequence[str]) -> None:
        x0, y0, x1, y1 = region.box
        area = (x1 - x0) * (y1 - y0)
        self.box_sizes.add(math.sqrt(area / (record.width * record.height)))
        self.areas["small" if area < SMALL else "large" if area > LARGE else "medium"] += 1
        self.masks += region.mask is not None
        name = region_name(region, record, categories)
        self.names.add(name.lower() if region.category is None else name)
        if region.score < 1:
            self.scores.add(region.score)

    def _add_phrases(self, record: Record, find: "Callable[[str], PhrasesFound] | None") -> None:
        asked = find(record.caption).phrases if find else ()
        scores: dict[tuple[Span, ...], list[float]] = {((p.start, p.end),): [] for p in asked}
        for region in record.regions:
            if region.spans and (find or region.score < 1):
                scores.setdefault(region.spans, []).append(region.score)
        for spans, own in scores.items():
            self.phrases.add(spans_text(record.caption, spans).lower(), own)


def source_name(record: Record) -> str:
    """Where a record comes from, as its provenance says."""
    return str(record.provenance.get("source") or "unknown")


def region_name(region: Region, record: Record, categories: Sequence[str]) -> str:
    """What a box shows: its phrase, its category, or the words of its spans."""
    if region.phrase:
        return region.phrase
    if region.category is not None and region.category < len(categories):
        return categories[region.category]
    return spans_text(record.caption, region.spans) or "unnamed"


def spans_text(caption: str, spans: Sequence[Span]) -> str:
    """The words of a phrase, which may be apart."""
    return " … ".join(caption[start:end] for start, end in spans)


def survey_shard(shard_set: ShardSet, shard_number: int) -> Survey:
    """The figures of one shard."""
    survey, find = Survey(), making_of(shard_set).find
    for sample in records_of(shard_set, shard_number, 0, shard_set.shards[shard_number].samples):
        if isinstance(sample, BadSample):
            survey.unreadable[sample.reason] += 1
        else:
            survey.add(sample, shard_set.categories, find)
    return survey


def records_of(
    shard_set: ShardSet, shard_number: int, first: int, last: int
) -> Iterator[Record | BadSample]:
    """Samples [first, last) of a shard, or why one can't be read; SLICE of them in memory."""
    for start in range(first, last, SLICE):
        for raw in read_raw(shard_set, shard_number, start, min(start + SLICE, last)):
            try:
                yield parse_record(raw, len(shard_set.categories))
            except BadSample as bad:
                yield bad
