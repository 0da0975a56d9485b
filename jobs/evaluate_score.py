"""Predictions and records in, figures out: what each task of `eval.suites` is scored by."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from glipv2.pipeline import storage
from glipv2.pipeline.errors import DataError
from glipv2.pipeline.eval_config import SuiteConfig
from glipv2.pipeline.records import Record
from glipv2.pipeline.shard_format import ShardSet

if TYPE_CHECKING:
    from glipv2.eval.coco import CategoryAP

VERSION = 3
"""Of the figures; a change of how they are computed raises it."""
FIRST = {
    "detection": "ap", "lvis": "ap", "phrases": "recall_at_1", "referring": "accuracy",
    "segmentation": "mean_iou", "vqa": "accuracy", "captioning": "cider_d",
}  # fmt: skip
"""The metric of each task by which checkpoints are compared."""
COUNT = re.compile(
    r"(mask_|merged_|classic_)?"
    "(dropped|empty|expressions|images|nan_scores|phrases|questions|unanswered_by_people|without_box)"
)
"""Metrics that count something: of several sets they are added up."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Of one set."""

    metrics: dict[str, float]
    per_category: dict[str, dict[str, Any]] = field(default_factory=dict)
    """detection, lvis: category -> its figures."""
    exports: dict[str, Any] = field(default_factory=dict)
    """Name of a file beside the result -> its JSON value."""


def score(
    suite: SuiteConfig, data: ShardSet, records: Sequence[Record], found: Mapping[str, Any]
) -> Scores:
    """The figures of one set; `found`: record key -> boxes (a Detection), answers or a caption.

    DataError when an image has no prediction, or the set is not what its task needs.
    """
    lacking = [record.key for record in records if record.key not in found]
    if lacking:
        raise DataError(f"{data.url}: nothing was predicted for {lacking[0]}, and {len(lacking)} "
                        "images in all")  # fmt: skip
    return _SCORERS[suite.task](suite, data, records, found)


def averages(task: str, by_set: Mapping[str, Scores], odinw: int = 0) -> dict[str, float]:
    """Over the sets of a suite: the mean of each metric that all have, or the sum of what it
    counts, and the median of the first metric."""
    every = [own.metrics for own in by_set.values()]
    if len(every) == 1:
        return every[0]
    first = FIRST[task]
    without = [name for name, own in by_set.items() if first not in own.metrics]
    if without and len(without) < len(every):
        raise DataError(f"{first} is undefined for {', '.join(without)}: no ground truth there")
    shared = [key for key in every[0] if all(key in own for own in every)]
    means = {
        key: (sum if COUNT.fullmatch(key) else fmean)([own[key] for own in every]) for key in shared
    }
    if without:  # none has it: EvalAI will tell
        return means
    if odinw:
        from glipv2.eval.odinw import odinw_mean

        total = odinw_mean({name: own.metrics[first] for name, own in by_set.items()}, odinw)
        return {**means, first: total.mean, f"{first}_median": total.median}
    return {**means, f"{first}_median": median(own[first] for own in every)}


def _detection(
    suite: SuiteConfig, data: ShardSet, records: Sequence[Record], found: Mapping[str, Any]
) -> Scores:
    from glipv2.eval.coco import coco_ap, coco_truth

    truth = coco_truth(records, data.categories)
    result = coco_ap(truth, found)
    metrics = result.to_dict()
    if suite.masks:
        by_mask = coco_ap(truth, found, by="mask")
        metrics |= {f"mask_{key}": value for key, value in by_mask.to_dict().items()}
    return Scores(metrics=metrics, per_category=_per_category(result.per_category))


def _lvis(
    suite: SuiteConfig, data: ShardSet, records: Sequence[Record], found: Mapping[str, Any]
) -> Scores:
    from glipv2.eval.lvis import CLASSIC, FIXED
    from glipv2.eval.lvis_records import lvis_records_ap

    frequency = data.info.get("frequency")
    if not frequency:
        raise DataError(
            f"{data.url} has no frequencies of categories; make it with the source lvis"
        )
    names = data.categories
    fixed = lvis_records_ap(records, found, names, frequency, cap=FIXED)
    classic = lvis_records_ap(records, found, names, frequency, cap=CLASSIC)
    metrics = {**fixed.to_dict(), **_prefixed("classic", classic.to_dict())}
    if suite.masks:
        by_mask = lvis_records_ap(records, found, names, frequency, cap=FIXED, by="mask")
        metrics |= _prefixed("mask", by_mask.to_dict())
    named = {names[number - 1]: own for number, own in fixed.per_category.items()}
    return Scores(metrics=metrics, per_category=_per_category(named))


def _phrases(
    suite: SuiteConfig, data: ShardSet, records: Sequence[Record], found: Mapping[str, Any]
) -> Scores:
    from glipv2.eval.grounding import phrase_recall

    merged = phrase_recall(records, found, "merged-box").to_dict()
    metrics = {**phrase_recall(records, found).to_dict(), **_prefixed("merged", merged)}
    return Scores(metrics=metrics)


def _referring(
    suite: SuiteConfig, data: ShardSet, records: Sequence[Record], found: Mapping[str, Any]
) -> Scores:
    from glipv2.eval.referring import referring_accuracy

    return Scores(metrics=referring_accuracy(records, found).to_dict())


def _segmentation(
    suite: SuiteConfig, data: ShardSet, records: Sequence[Record], found: Mapping[str, Any]
) -> Scores:
    from glipv2.eval.segmentation import merged_mask, referring_segmentation

    masks = {r.key: merged_mask(found[r.key], r, suite.mask_score) for r in records}
    return Scores(metrics=referring_segmentation(records, masks).to_dict())


def _vqa(
    suite: SuiteConfig, data: ShardSet, records: Sequence[Record], found: Mapping[str, Any]
) -> Scores:
    """Of questions whose answers are kept secret (test-dev, test-std) what their server takes."""
    from glipv2.eval.vqa import evalai_answers, question_kinds, vqa_accuracy

    answers = {number: said for own in found.values() for number, said in own.items()}
    exports = {"evalai": evalai_answers(answers)} if _all_numbers(answers) else {}
    if exports and not any(asked.answers for record in records for asked in record.questions):
        return Scores(metrics={"questions": float(len(answers))}, exports=exports)
    kinds = question_kinds(storage.read_json(suite.annotations)) if suite.annotations else None
    result = vqa_accuracy(records, answers, kinds)
    return Scores(metrics=result.to_dict(), exports=exports)


def _captioning(
    suite: SuiteConfig, data: ShardSet, records: Sequence[Record], found: Mapping[str, Any]
) -> Scores:
    from glipv2.eval.captions import caption_scores, java_scores

    metrics = caption_scores(records, found).to_dict()
    if suite.java:
        metrics |= java_scores(records, found)
    return Scores(metrics=metrics)


def _per_category(found: "Mapping[str, CategoryAP]") -> dict[str, dict[str, Any]]:
    return {
        name: {"ap": own.ap, "ap50": own.ap50, "precision": [round(p, 4) for p in own.precision_R]}
        for name, own in found.items()
    }


def _prefixed(prefix: str, metrics: Mapping[str, float]) -> dict[str, float]:
    return {f"{prefix}_{key}": value for key, value in metrics.items()}


def _all_numbers(answers: Mapping[str, str]) -> bool:
    """Whether the questions have ids as VQAv2's, which its server wants."""
    return all(number.isdigit() for number in answers)


_SCORERS = {
    "detection": _detection, "lvis": _lvis, "phrases": _phrases, "referring": _referring,
    "segmentation": _segmentation, "vqa": _vqa, "captioning": _captioning,
}  # fmt: skip
