"""Phrase grounding as Flickr30k Entities scores it (facts I; the rules are MDETR's evaluator's).

"any-box": a phrase counts at k if any of its k best boxes overlaps any of its true boxes with
IoU >= 0.5. "merged-box": the true boxes of a phrase are replaced by the one box around them all.
Phrases without true boxes are skipped; every sentence must have been grounded.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from glipv2.eval.detection import box_iou
from glipv2.eval.predictions import Found, ScoredBoxes, found_in, scored_boxes
from glipv2.pipeline.errors import DataError
from glipv2.pipeline.records import Box, Record, Span

Protocol = Literal["any-box", "merged-box"]
MIN_IOU = 0.5


@dataclass(frozen=True, kw_only=True)
class PhraseTruth:
    """One phrase of a caption and all the boxes it names."""

    text: str
    spans: tuple[Span, ...]
    boxes: tuple[Box, ...]
    """xyxy in pixels of the stored image."""
    group: str | None = None
    """"seen", "unseen", ... where the record's provenance says so."""


def phrases_of(record: Record) -> list[PhraseTruth]:
    """The record's phrases in the order of their first region; equal spans are one phrase.

    Regions without spans have no phrase and are left out (the protocol skips such boxes).
    """
    groups = record.provenance.get("groups") or [None] * len(record.regions)
    boxes: dict[tuple[Span, ...], list[Box]] = {}
    described: dict[tuple[Span, ...], tuple[str, str | None]] = {}
    for region, group in zip(record.regions, groups, strict=True):
        if region.spans:
            boxes.setdefault(region.spans, []).append(region.box)
            text = " ".join(record.caption[start:end] for start, end in region.spans)
            described.setdefault(region.spans, (text, group))
    return [
        PhraseTruth(text=text, spans=spans, boxes=tuple(boxes[spans]), group=group)
        for spans, (text, group) in described.items()
    ]


class PhraseRecall:
    """Counts phrases found among the k best boxes; fed phrase by phrase or record by record."""

    def __init__(self, ks: Sequence[int] = (1, 5, 10), protocol: Protocol = "any-box") -> None:
        self.ks = tuple(ks)
        self.protocol = protocol
        self.dropped = 0
        """Boxes with a NaN or infinite number, left out."""
        self._phrases: Counter[str | None] = Counter()
        self._hits: Counter[tuple[str | None, int | None]] = Counter()

    def add(
        self,
        boxes_K4: Sequence[Sequence[float]],
        truth_N4: Sequence[Sequence[float]],
        group: str | None = None,
    ) -> None:
        """One phrase: predicted boxes, best first, and true boxes. K may be 0, N may not."""
        if not len(truth_N4):
            raise ValueError("a phrase without true boxes can't be scored")
        if self.protocol == "merged-box":
            truth_N4 = [box_around(truth_N4)]
        good_K = [bool(row.any()) for row in box_iou(boxes_K4, truth_N4) >= MIN_IOU]
        for name in {None, group}:
            self._phrases[name] += 1
            self._hits[name, None] += any(good_K)
            for k in self.ks:
                self._hits[name, k] += any(good_K[:k])

    def add_record(self, record: Record, detection: Found) -> None:
        """All phrases of a record, whose boxes are in any order.

        A Detection has the phrases of `phrases_of` as its names, in that order; the boxes of
        ScoredBoxes are those of a phrase if they have its text, so that phrases of equal text (two
        men called "a man") share them: ground these as a Detection, or give each a text of its own.
        """
        phrases = phrases_of(record)
        numbers_K = _numbers(record, phrases, detection)
        plain = scored_boxes(detection)
        scores_K = np.asarray(plain.scores, dtype=np.float64)
        boxes_K4 = np.asarray(plain.boxes, dtype=np.float64).reshape(-1, 4)
        finite_K = np.isfinite(scores_K) & np.isfinite(boxes_K4).all(axis=1)
        self.dropped += int((~finite_K).sum())
        best_first_K = np.argsort(-scores_K, kind="stable")
        for number, phrase in enumerate(phrases):
            own = [row for row in best_first_K if finite_K[row] and number in numbers_K[row]]
            self.add(boxes_K4[own].tolist(), phrase.boxes, phrase.group)

    @property
    def phrases(self) -> int:
        """How many were scored."""
        return self._phrases[None]

    def metrics(self) -> Iterator[tuple[str, float]]:
        """`recall_at_K` in [0, 1] and its bound when every box counts; then per group, suffixed.

        Nothing is yielded before the first phrase.
        """
        for group in sorted(self._phrases, key=lambda name: name or ""):
            suffix = f"_{group}" if group else ""
            for k in self.ks:
                yield f"recall_at_{k}{suffix}", self._hits[group, k] / self._phrases[group]
            yield f"recall_bound{suffix}", self._hits[group, None] / self._phrases[group]


@dataclass(frozen=True, kw_only=True)
class PhraseRecallScore:
    """Shares of phrases, in [0, 1]."""

    metrics: dict[str, float]
    """recall_at_K and recall_bound, of all phrases and, with _TYPE behind, of each type (people,
    clothing, ...)."""
    phrases: int
    dropped: int
    """Boxes with a NaN or infinite number, left out."""

    def to_dict(self) -> dict[str, float]:
        counts = {"phrases": float(self.phrases), "dropped": float(self.dropped)}
        return {**self.metrics, **counts}


def phrase_recall(
    records: Sequence[Record],
    detections_by_key: Mapping[str, Found],
    protocol: Protocol = "any-box",
    ks: Sequence[int] = (1, 5, 10),
) -> PhraseRecallScore:
    """Recall over all phrases of the records; detections as in `PhraseRecall.add_record`.

    DataError for a sentence that was not grounded, for other phrases than its own, and if no
    phrase has a box.
    """
    recall = PhraseRecall(ks, protocol)
    for record in records:
        found_in(record.key, detections_by_key)
        recall.add_record(record, detections_by_key[record.key])
    if not recall.phrases:
        raise DataError("no phrase has a true box: recall is undefined")
    return PhraseRecallScore(
        metrics=dict(recall.metrics()), phrases=recall.phrases, dropped=recall.dropped
    )


def box_around(boxes_N4: Sequence[Sequence[float]]) -> list[float]:
    """The smallest xyxy box that holds all of one or more."""
    corners_N4 = np.asarray(boxes_N4, dtype=np.float64)
    return [*corners_N4[:, :2].min(axis=0).tolist(), *corners_N4[:, 2:].max(axis=0).tolist()]


def _numbers(record: Record, phrases: list[PhraseTruth], detection: Found) -> list[set[int]]:
    """For each box the phrases that it was found for."""
    if isinstance(detection, ScoredBoxes):
        texts = [phrase.text for phrase in phrases]
        if strange := set(detection.names) - set(texts):
            raise DataError(f"{record.key}: {min(strange)!r} is no phrase of the record")
        places = {text: {n for n, own in enumerate(texts) if own == text} for text in texts}
        return [places[name] for name in detection.names]
    if len(detection.names) != len(phrases):
        raise DataError(
            f"{record.key}: {len(detection.names)} phrases were grounded, "
            f"but the record has {len(phrases)}"
        )
    return [{number} for number in detection.labels_K.tolist()]
