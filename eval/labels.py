"""How good are pseudo labels, judged by a truth that training never sees, and which to keep.

A kept box is right if it overlaps (IoU >= 0.5) a true region whose phrase it was labelled with;
each true region can make one box right, and better-scored boxes choose first.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from glipv2.eval.detection import box_iou, greedy_match
from glipv2.pipeline.errors import DataError
from glipv2.pipeline.records import Record, Region

MIN_IOU = 0.5
NO_GROUP = "other"
"""Group of a kept box whose phrase names nothing in the truth."""
_WORD = re.compile(r"\w+")


@dataclass(frozen=True, kw_only=True)
class ScoredLabels:
    """Every pseudo label of a set with its verdict; the common ground of both questions."""

    scores: tuple[float, ...]
    right: tuple[bool, ...]
    groups: tuple[str, ...]
    """Of each label: the group of the true phrase it was labelled with, or NO_GROUP."""
    truth_groups: tuple[str, ...]
    """Of each true region that its caption mentions: what recall divides by."""
    found_groups: tuple[str, ...]
    """Of each true region that some label got right."""
    pairs: int
    """Image-text pairs of the truth."""


@dataclass(frozen=True, kw_only=True)
class GroupQuality:
    """Precision and recall of the labels of one group of phrases; None where undefined (0/0)."""

    precision_at_50: float | None
    recall_at_50: float | None
    kept: int
    mentioned: int
    """True regions of this group that captions mention."""


@dataclass(frozen=True, kw_only=True)
class LabelQuality:
    """Precision and recall of kept pseudo labels at IoU 0.5."""

    precision_at_50: float
    """Right labels / kept labels; 0 when none was kept."""
    recall_at_50: float
    """True regions found / true regions that captions mention."""
    kept: int
    """Labels, that is boxes."""
    pairs: int
    """Image-text pairs of the truth, whether or not a label was kept for them."""
    by_group: dict[str, GroupQuality]


@dataclass(frozen=True, kw_only=True)
class ThresholdPoint:
    """What keeping the labels scored `threshold` or more would give."""

    threshold: float
    precision: float
    recall: float
    kept: int


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """The chosen threshold and what was seen on the calibration images."""

    threshold: float
    precision: float
    recall: float
    target_precision: float
    reached: bool
    """False: no threshold reached the target, this is the most precise one."""
    curve: tuple[ThresholdPoint, ...]


def score_labels(labelled: Iterable[Record], truth: Iterable[Record]) -> LabelQuality:
    """Quality of a labelled set; records are paired by key, and pairs without labels count."""
    scored = judge_labels(labelled, truth)
    names = sorted({*scored.groups, *scored.truth_groups})
    return LabelQuality(
        precision_at_50=sum(scored.right) / max(len(scored.right), 1),
        recall_at_50=len(scored.found_groups) / max(len(scored.truth_groups), 1),
        kept=len(scored.right),
        pairs=scored.pairs,
        by_group={name: _group_quality(scored, name) for name in names},
    )


def choose_threshold(
    scored: ScoredLabels, target_precision: float, min_kept: int = 20, step: float = 0.01
) -> Threshold:
    """The lowest score threshold whose precision reaches the target, on a grid of `step`.

    Meant for `judge_labels` of calibration images labelled with a low threshold. A threshold that
    keeps fewer than `min_kept` labels (or all, if there are fewer) is no evidence and is not
    considered. If none reaches the target: the most precise one, of equals the lowest.
    """
    if not 0 < target_precision <= 1:
        raise ValueError(f"target_precision must be in (0, 1], got {target_precision}")
    curve = _threshold_curve(scored, step)
    if not curve:
        raise DataError(
            "the teacher found no box on the calibration images, so no threshold can be chosen; "
            "train it longer or give it calibration images of its own domain"
        )
    enough = [p for p in curve if p.kept >= min(min_kept, len(scored.scores))]
    reaching = [p for p in enough if p.precision >= target_precision]
    best = reaching[0] if reaching else max(enough, key=lambda p: (p.precision, -p.threshold))
    return Threshold(
        threshold=best.threshold,
        precision=best.precision,
        recall=best.recall,
        target_precision=target_precision,
        reached=bool(reaching),
        curve=tuple(curve),
    )


def judge_labels(labelled: Iterable[Record], truth: Iterable[Record]) -> ScoredLabels:
    """Match each labelled record with the true record of the same key.

    A true region counts only if the caption mentions it: it has spans, or, when the two captions
    differ, its head word occurs in the labelled caption.
    """
    truth_by_key = {record.key: replace(record, image=b"") for record in truth}  # boxes suffice
    labels_by_key: dict[str, Record] = {}
    for record in labelled:
        if record.key not in truth_by_key:
            raise DataError(f"labelled image {record.key} has no truth: are these the same pairs?")
        labels_by_key[record.key] = record
    scores: list[float] = []
    right: list[bool] = []
    groups: list[str] = []
    truth_groups: list[str] = []
    found_groups: list[str] = []
    for key, true_record in truth_by_key.items():
        label_record = labels_by_key.get(key)
        caption = label_record.caption if label_record else true_record.caption
        regions, region_groups = _mentioned(true_record, caption)
        truth_groups += region_groups
        if label_record is None:
            continue
        labels = label_record.regions
        same_KN = _same_phrase_table(labels, regions, label_record, true_record)
        iou_KN = box_iou([r.box for r in labels], [r.box for r in regions]) * same_KN
        match = greedy_match([r.score for r in labels], iou_KN, MIN_IOU)
        scores += [r.score for r in labels]
        right += [index >= 0 for index in match]
        found_groups += [region_groups[index] for index in match if index >= 0]
        for label, index in enumerate(match):
            named = [index] if index >= 0 else np.flatnonzero(same_KN[label])
            groups.append(region_groups[named[0]] if len(named) else NO_GROUP)
    return ScoredLabels(
        scores=tuple(scores),
        right=tuple(right),
        groups=tuple(groups),
        truth_groups=tuple(truth_groups),
        found_groups=tuple(found_groups),
        pairs=len(truth_by_key),
    )


def _mentioned(record: Record, caption: str) -> tuple[list[Region], list[str]]:
    """The regions that the caption speaks of, and their groups."""
    groups = record.provenance.get("groups") or ["all"] * len(record.regions)
    words = set(_words(caption))
    chosen = [
        (region, group)
        for region, group in zip(record.regions, groups, strict=True)
        if (region.spans if caption == record.caption else _head(region.phrase) in words)
    ]
    return [region for region, _ in chosen], [group for _, group in chosen]


def _same_phrase_table(
    labels: Sequence[Region], regions: Sequence[Region], label_record: Record, true_record: Record
) -> np.ndarray:
    """(K, N) bool: was label k made for the phrase that names region n?"""
    shared = label_record.caption == true_record.caption
    table_KN = np.zeros((len(labels), len(regions)), dtype=bool)
    for k, label in enumerate(labels):
        for n, region in enumerate(regions):
            if shared and label.spans and region.spans:
                table_KN[k, n] = _head_inside(label, region, true_record.caption)
            else:
                table_KN[k, n] = _head(label.phrase) == _head(region.phrase) != ""
    return table_KN


def _head_inside(label: Region, region: Region, caption: str) -> bool:
    """Does the last word of a label's span lie in a span of the region?

    More than overlap: a label that covers "a dog near a cat" speaks of the cat only.
    """
    for start, end in label.spans:
        words = list(_WORD.finditer(caption, start, end))
        if words and any(a <= words[-1].start() and words[-1].end() <= b for a, b in region.spans):
            return True
    return False


def _head(phrase: str) -> str:
    """The last word: the head of an English noun phrase."""
    words = _words(phrase)
    return words[-1] if words else ""


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _group_quality(scored: ScoredLabels, name: str) -> GroupQuality:
    verdicts = [
        good for good, group in zip(scored.right, scored.groups, strict=True) if group == name
    ]
    mentioned = scored.truth_groups.count(name)
    return GroupQuality(
        precision_at_50=sum(verdicts) / len(verdicts) if verdicts else None,
        recall_at_50=scored.found_groups.count(name) / mentioned if mentioned else None,
        kept=len(verdicts),
        mentioned=mentioned,
    )


def _threshold_curve(scored: ScoredLabels, step: float) -> list[ThresholdPoint]:
    """Points on the grid from 0 up to the last threshold that keeps a label."""
    order = np.argsort(scored.scores, kind="stable")
    scores = np.asarray(scored.scores, dtype=np.float64)[order]
    right = np.asarray(scored.right, dtype=np.int64)[order]
    right_from = np.append(np.cumsum(right[::-1])[::-1], 0)  # right labels from index i upwards
    curve = []
    for threshold in np.round(np.arange(0, 1 + step / 2, step), 6):
        first = int(np.searchsorted(scores, threshold, side="left"))
        kept = len(scores) - first
        if kept == 0:
            break
        hits = int(right_from[first])
        recall = hits / max(len(scored.truth_groups), 1)
        curve.append(
            ThresholdPoint(
                threshold=float(threshold), precision=hits / kept, recall=recall, kept=kept
            )
        )
    return curve
