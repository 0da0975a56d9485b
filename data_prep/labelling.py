"""A shard of image-text pairs with the teacher's boxes: what a worker of `glipv2 label` makes.

Windows of pairs are read and decoded, and their phrases found, in threads ahead of the teacher,
which gets each sorted by text length and makes batches of one size; so they need little padding.
The results have the input's order again.

They are threads of the teacher's process, not workers of their own: pictures need not be copied
from process to process then, and who decodes them lets go of the interpreter's lock. What that
costs beyond the teacher is measured in infra/benchmarks/cpu.md.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from glipv2.data_prep.phrase_filters import Phrase, PhrasesFound
from glipv2.data_prep.pseudo_labels import finite, select_regions
from glipv2.data_prep.teachers import Teacher
from glipv2.model.batch import Detection
from glipv2.model.image_input import Picture
from glipv2.pipeline.ahead import one_ahead
from glipv2.pipeline.config import LabelConfig
from glipv2.pipeline.errors import BadSample, DataError, UserError
from glipv2.pipeline.images import decode_image
from glipv2.pipeline.record_json import parse_record
from glipv2.pipeline.records import Record, Region
from glipv2.pipeline.shard_format import RawSample, ShardSet
from glipv2.pipeline.shard_reader import raw_samples

VERSION = 2
"""Of the labels; a change of how they are made raises it."""
KILLED = "killed_worker"
"""Reason of a pair that workers died on."""
FAILED = "teacher_failed"
"""Reason of a pair that the teacher can't answer, even alone."""
MAX_FAILED, MAX_FAILED_SHARE = 8, 0.1
"""Pairs of a shard that a teacher may fail on: so few, or so small a share of those it was asked
about. With more the fault is the teacher's."""
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


@dataclass(frozen=True, kw_only=True)
class InHand:
    """What a worker notes: where it is in its shard, and what it has made of it so far."""

    shard: int
    first: int = 0
    last: int = 0
    """Positions [first, last) are worked on."""
    alone: bool = False
    """Whether that is one pair that is tried by itself, since a worker died."""
    pairs: int = 0
    images: int = 0
    boxes: int = 0


def after_kill(task: ShardTask, kills: int, last_note: Any) -> ShardTask | None:
    """What to do about a shard whose worker died: find the pair, leave it out, or give up.

    A worker notes which positions it has in hand. After the first death these are tried one by one;
    whoever dies then is left out (`skip`) and the shard goes on.
    """
    if kills - len(task.skip) > MAX_UNEXPLAINED:
        return None
    match last_note:
        case InHand(shard=task.number, first=first, last=last, alone=True):
            return replace(task, skip=(*task.skip, first), suspects=(last, task.suspects[1]))
        case InHand(shard=task.number, first=first, last=last):
            return replace(task, suspects=(first, last))
    return task


@dataclass(kw_only=True)
class Tally:
    """What became of a shard's pairs; goes into its commit record."""

    counts: Counter[str] = field(default_factory=Counter)
    bad: list[tuple[str, str, str]] = field(default_factory=list)
    """(key, reason, detail) of pairs that can't be used."""
    best_score: float = 0.0
    """Highest of all boxes, kept or not, as finely as labels are stored; 0 without any."""

    def leave_out(self, key: str, why: BadSample) -> None:
        self.counts[why.reason] += 1
        self.bad.append((key, why.reason, why.detail))

    @property
    def asked(self) -> int:
        """Pairs that the teacher had to answer, or failed to."""
        unusable = len(self.bad) - self.counts[FAILED]
        return self.counts["pairs"] - self.counts["no_phrase"] - unusable


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
        note: Callable[[InHand], None] = lambda _: None,
    ) -> None:
        """`stamp` goes into every record's provenance; `note` hears what is worked on next."""
        self.pairs, self.teacher, self.find_phrases = pairs, teacher, find_phrases
        self.settings, self.stamp, self.note = settings, stamp, note
        self.in_hand = InHand(shard=-1)
        self.one_note = threading.Lock()

    def records(self, task: ShardTask, tally: Tally) -> Iterator[Record]:
        """The labelled pairs of a shard in their order; those without a box as the settings say.

        DataError where the teacher fails on so many that the fault is its own.
        """
        self.in_hand = InHand(shard=task.number)
        self._try_suspects(task)
        for window in one_ahead(self._windows(task)):
            self._tell(first=window.first, **_done(tally))
            yield from self._ground(window, tally)
            _check_failures(task, tally)

    def _tell(self, **changes: Any) -> None:
        """Note what is in hand now. The teacher and who reads ahead do; the last is the newest."""
        with self.one_note:
            self.in_hand = replace(self.in_hand, **changes)
            self.note(self.in_hand)

    def _try_suspects(self, task: ShardTask) -> None:
        """Do everything to each of them that could kill, and forget the result."""
        first, last = task.suspects
        for position in range(first, last):
            if position in task.skip:
                continue
            self._tell(first=position, last=position + 1, alone=True)
            for raw in raw_samples(self.pairs, task.number, position, position + 1):
                pair = self._prepare(raw)
                if isinstance(pair, _Pair):
                    list(self._answers([pair]))
        self.in_hand = InHand(shard=task.number)

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
                    self._tell(last=last)  # these, and the teacher's
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
            picture = self._picture(image_3HW)
        except BadSample as error:
            return _Unusable(key=raw.key, error=error)
        return _Pair(record=record, picture=picture, found=self.find_phrases(record.caption))

    def _picture(self, image_3HW: Tensor) -> Picture:
        try:
            return self.teacher.prepare(image_3HW)
        except UserError:
            raise
        except Exception as error:
            raise _failure(error) from error

    def _ground(self, window: _Window, tally: Tally) -> Iterator[Record]:
        asked = [pair for pair in window.pairs if isinstance(pair, _Pair) and pair.phrases]
        asked.sort(key=lambda pair: len(pair.record.caption))
        found = {
            pair.record.key: answer
            for pair, answer in zip(asked, self._answers(asked), strict=True)
        }
        for pair in window.pairs:
            tally.counts["pairs"] += 1
            if isinstance(pair, _Unusable):
                tally.leave_out(pair.key, pair.error)
                continue
            answer = found.get(pair.record.key)
            if isinstance(answer, BadSample):
                tally.leave_out(pair.record.key, answer)
                continue
            tally.counts.update({f"phrase_{why}": n for why, n in pair.found.dropped.items()})
            regions = self._regions(pair, answer, tally)
            if regions or self.settings.keep_empty:
                tally.counts["images"] += 1
                yield replace(
                    pair.record,
                    task="grounding",
                    regions=regions,
                    provenance={**pair.record.provenance, **self.stamp},
                )

    def _answers(self, pairs: Sequence[_Pair]) -> Iterator[Detection | BadSample]:
        """The teacher's, in order: of what it fails on each half by itself, down to single pairs.

        An error that leaves the device unusable is as good as the worker's death.
        """
        if not pairs:
            return
        try:
            yield from self.teacher.ground(
                [pair.picture for pair in pairs],
                [pair.prompt for pair in pairs],
                batch_size=self.settings.batch_size,
            )
            return
        except UserError:
            raise
        except torch.AcceleratorError as error:
            raise SystemExit(f"the device can't be used any more: {error}") from error
        except Exception as error:
            failure = _failure(error)
        # out here nothing holds the failed batch's memory
        if len(pairs) == 1:
            yield failure
            return
        half = len(pairs) // 2
        yield from self._answers(pairs[:half])
        yield from self._answers(pairs[half:])

    def _regions(
        self, pair: _Pair, detection: Detection | None, tally: Tally
    ) -> tuple[Region, ...]:
        if detection is None:
            tally.counts["no_phrase"] += 1
            return ()
        tally.counts["phrases"] += len(pair.phrases)
        finite_K = finite(detection)
        if lost := int((~finite_K).sum()):
            tally.counts["box_not_finite"] += lost
        scores_K = detection.scores_K[finite_K]
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


def _done(tally: Tally) -> dict[str, int]:
    return {name: tally.counts[name] for name in ("pairs", "images", "boxes")}


def _failure(error: Exception) -> BadSample:
    lines = str(error).strip().splitlines()
    return BadSample(FAILED, f"{type(error).__name__}: {lines[0] if lines else ''}")


def _check_failures(task: ShardTask, tally: Tally) -> None:
    """DataError once a shard's teacher fails too often for the pairs to be the cause."""
    failed, asked = tally.counts[FAILED], tally.asked
    if failed <= 1 or (failed < asked and failed <= max(MAX_FAILED, MAX_FAILED_SHARE * asked)):
        return
    last = next(detail for _, reason, detail in reversed(tally.bad) if reason == FAILED)
    raise DataError(
        f"{task}: the teacher failed on {failed} of {asked} pairs, each tried alone, the last time "
        f"with {last}; nothing of the shard is kept. Look at label.teacher and label.precision, or "
        "give it more memory, and run again"
    )
