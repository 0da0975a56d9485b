"""A shard of image-text pairs with the teacher's boxes: what a worker of `glipv2 label` makes.

Windows of pairs are read and decoded in threads ahead of the teacher, which gets each sorted by
text length so that its batches need little padding; the results have the input's order again.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from glipv2.data_prep.phrase_filters import Phrase, PhrasesFound
from glipv2.data_prep.pseudo_labels import select_regions
from glipv2.data_prep.teachers import Teacher
from glipv2.model.batch import Detection
from glipv2.model.image_input import Picture
from glipv2.pipeline.ahead import one_ahead
from glipv2.pipeline.config import LabelConfig
from glipv2.pipeline.errors import BadSample
from glipv2.pipeline.images import decode_image
from glipv2.pipeline.record_json import parse_record
from glipv2.pipeline.records import Record, Region
from glipv2.pipeline.shard_format import RawSample, ShardSet
from glipv2.pipeline.shard_reader import raw_samples

KILLED = "killed_worker"
"""Reason of a pair that workers died on."""
READ_AT_ONCE = 32
"""Pairs that are read and noted together."""
MAX_WINDOW_BYTES = 1 << 29
"""Of the pictures of a window, about."""
MAX_UNEXPLAINED = 3
"""Deaths of workers on one shard that no single pair accounts for."""


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """A shard to label, and what is known of workers that died on it."""

    number: int
    last: int | None = None
    """Pairs from its start that are wanted; None wants all."""
    skip: tuple[int, ...] = ()
    """Positions of pairs that are left out, since each killed two workers."""
    suspects: tuple[int, int] = (0, 0)
    """Positions [first, last) of which one may kill: they are tried alone before the rest."""

    def __str__(self) -> str:
        return f"shard {self.number}"


def after_kill(task: ShardTask, kills: int, last_note: Any) -> ShardTask | None:
    """What to do about a shard whose worker died: find the pair, leave it out, or give up.

    A worker notes which positions it has in hand. After the first death these are tried one by one;
    whoever dies then is left out (`skip`) and the shard goes on.
    """
    if kills - len(task.skip) > MAX_UNEXPLAINED:
        return None
    if last_note is None:
        return task
    alone, first, last = last_note
    if alone:
        return replace(task, skip=(*task.skip, first), suspects=(last, task.suspects[1]))
    return replace(task, suspects=(first, last))


@dataclass(kw_only=True)
class Tally:
    """What became of a shard's pairs; goes into its commit record."""

    counts: Counter[str] = field(default_factory=Counter)
    bad: list[tuple[str, str, str]] = field(default_factory=list)
    """(key, reason, detail) of pairs that can't be used."""
    best_score: float = 0.0
    """Highest of all boxes, kept or not, as finely as labels are stored; 0 without any."""


@dataclass(frozen=True, kw_only=True)
class _Pair:
    record: Record
    picture: Picture
    found: PhrasesFound

    @property
    def phrases(self) -> Sequence[Phrase]:
        return self.found.phrases

    @property
    def prompt(self) -> tuple[str, list[tuple[tuple[int, int], ...]]]:
        return self.record.caption, [((p.start, p.end),) for p in self.phrases]


@dataclass(frozen=True, kw_only=True)
class _Unusable:
    key: str
    error: BadSample


@dataclass(frozen=True, kw_only=True)
class _Window:
    first: int
    pairs: list[_Pair | _Unusable]


def _room(pairs: Sequence[_Pair | _Unusable]) -> bool:
    sizes = (p.picture.pixels_3HW.numel() for p in pairs if isinstance(p, _Pair))
    return sum(sizes) < MAX_WINDOW_BYTES


class ShardLabeller:
    """Labels shards of one set of pairs."""

    def __init__(
        self,
        pairs: ShardSet,
        teacher: Teacher,
        find_phrases: Callable[[str], PhrasesFound],
        settings: LabelConfig,
        stamp: dict[str, str],
        note: Callable[[tuple[bool, int, int]], None] = lambda _: None,
    ) -> None:
        """`stamp` goes into every record's provenance; `note` hears (alone, first, last) of the
        positions that are worked on next."""
        self.pairs, self.teacher, self.find_phrases = pairs, teacher, find_phrases
        self.settings, self.stamp, self.note = settings, stamp, note
        self.in_hand = 0

    def records(self, task: ShardTask, tally: Tally) -> Iterator[Record]:
        """The labelled pairs of a shard in their order; those without a box as the settings say."""
        self._try_suspects(task)
        for window in one_ahead(self._windows(task)):
            self.in_hand = window.first
            yield from self._ground(window, tally)

    def _try_suspects(self, task: ShardTask) -> None:
        """Do everything to each of them that could kill, and forget the result."""
        first, last = task.suspects
        for position in range(first, last):
            if position in task.skip:
                continue
            self.note((True, position, position + 1))
            for raw in raw_samples(self.pairs, task.number, position, position + 1):
                pair = self._prepare(raw)
                if isinstance(pair, _Pair):
                    self.teacher.ground([pair.picture], [pair.prompt], batch_size=1)

    def _windows(self, task: ShardTask) -> Iterator[_Window]:
        """Up to `settings.window` pairs each, fewer where their pictures would fill the memory."""
        end = self.pairs.shards[task.number].samples
        end = end if task.last is None else min(end, task.last)
        first = last = 0
        with ThreadPoolExecutor(self.settings.decode_threads) as threads:
            while last < end:
                pairs: list[_Pair | _Unusable] = []
                while last < end and len(pairs) < self.settings.window and _room(pairs):
                    start, last = last, min(last + READ_AT_ONCE, first + self.settings.window, end)
                    self.note((False, self.in_hand, last))  # these, and the teacher's
                    raws = raw_samples(self.pairs, task.number, start, last)
                    skipped = [position in task.skip for position in range(start, last)]
                    pairs += threads.map(self._prepare, raws, skipped)
                yield _Window(first=first, pairs=pairs)
                first = last

    def _prepare(self, raw: RawSample, skipped: bool = False) -> _Pair | _Unusable:
        try:
            if skipped:
                raise BadSample(KILLED, "two workers died on it")
            record = parse_record(raw)
            image_3HW = decode_image(record.image)
        except BadSample as error:
            return _Unusable(key=raw.key, error=error)
        return _Pair(
            record=record,
            picture=self.teacher.prepare(image_3HW),
            found=self.find_phrases(record.caption),
        )

    def _ground(self, window: _Window, tally: Tally) -> Iterator[Record]:
        asked = [pair for pair in window.pairs if isinstance(pair, _Pair) and pair.phrases]
        asked.sort(key=lambda pair: len(pair.record.caption))
        detections = self.teacher.ground(
            [pair.picture for pair in asked],
            [pair.prompt for pair in asked],
            batch_size=self.settings.batch_size,
        )
        found = {pair.record.key: d for pair, d in zip(asked, detections, strict=True)}
        for pair in window.pairs:
            tally.counts["pairs"] += 1
            if isinstance(pair, _Unusable):
                tally.counts[pair.error.reason] += 1
                tally.bad.append((pair.key, pair.error.reason, pair.error.detail))
                continue
            tally.counts.update({f"phrase_{why}": n for why, n in pair.found.dropped.items()})
            regions = self._regions(pair, found.get(pair.record.key), tally)
            if regions or self.settings.keep_empty:
                tally.counts["images"] += 1
                yield replace(
                    pair.record,
                    task="grounding",
                    regions=regions,
                    provenance={**pair.record.provenance, **self.stamp},
                )

    def _regions(
        self, pair: _Pair, detection: Detection | None, tally: Tally
    ) -> tuple[Region, ...]:
        if detection is None:
            tally.counts["no_phrase"] += 1
            return ()
        tally.counts["phrases"] += len(pair.phrases)
        scores_K = detection.scores_K[detection.scores_K.isfinite()]
        if len(scores_K):
            tally.best_score = max(tally.best_score, round(float(scores_K.max()), 4))
        regions = select_regions(
            detection,
            pair.phrases,
            score_threshold=self.settings.score_threshold,
            cross_phrase_nms=self.settings.cross_phrase_nms,
            max_boxes=self.settings.max_boxes,
        )
        tally.counts["boxes"] += len(regions)
        tally.counts["no_box"] += not regions
        return regions
