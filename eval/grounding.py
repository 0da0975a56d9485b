"""Phrase grounding as Flickr30k Entities scores it, "any-box" protocol (glip_facts I).

A phrase counts at k if any of its k best boxes overlaps any of its true boxes with IoU >= 0.5.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from glipv2.eval.detection import box_iou, scored_boxes
from glipv2.pipeline.errors import DataError
from glipv2.pipeline.records import Box, Record, Span

if TYPE_CHECKING:  # torch is not needed to count hits
    from glipv2.model.batch import Detection

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

    def __init__(self, ks: Sequence[int] = (1, 5, 10)) -> None:
        self.ks = tuple(ks)
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
        good_K = [bool(row.any()) for row in box_iou(boxes_K4, truth_N4) >= MIN_IOU]
        for name in {None, group}:
            self._phrases[name] += 1
            self._hits[name, None] += any(good_K)
            for k in self.ks:
                self._hits[name, k] += any(good_K[:k])

    def add_record(self, record: Record, detection: "Detection") -> None:
        """All phrases of a record; detection.names are those of `phrases_of`, in that order."""
        phrases = phrases_of(record)
        if len(detection.names) != len(phrases):
            raise DataError(
                f"{record.key}: {len(detection.names)} phrases were grounded, "
                f"but the record has {len(phrases)}"
            )
        boxes, labels = scored_boxes(detection).boxes, detection.labels_K.tolist()
        for number, phrase in enumerate(phrases):
            own = [box for box, label in zip(boxes, labels, strict=True) if label == number]
            self.add(own, phrase.boxes, phrase.group)

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
