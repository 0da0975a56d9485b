"""What a suite is scored by: each figure under its name is that of the scorer it is named after.

The predictions are made by hand so that no two variants of a task have the same figures.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glipv2.eval import captions
from glipv2.eval.captions import caption_scores
from glipv2.eval.coco import coco_ap, coco_truth
from glipv2.eval.grounding import phrase_recall
from glipv2.eval.lvis import CLASSIC, FIXED
from glipv2.eval.lvis_records import lvis_records_ap
from glipv2.eval.masks import encode
from glipv2.eval.predictions import RunLengths, ScoredBoxes
from glipv2.eval.referring import referring_accuracy
from glipv2.eval.segmentation import merged_mask, referring_segmentation
from glipv2.eval.vqa import QuestionKind, evalai_answers, vqa_accuracy
from glipv2.jobs.evaluate_predict import asked_of
from glipv2.jobs.evaluate_score import score
from glipv2.pipeline.eval_config import SuiteConfig
from glipv2.pipeline.records import Box, Question, Record, Region
from glipv2.pipeline.shard_format import ShardSet

SIDE = 100
CATEGORIES = ("cat", "dog", "emu")
FREQUENCY = ["f", "r", "c"]


def filled(box: Box) -> RunLengths:
    mask_HW = np.zeros((SIDE, SIDE), dtype=bool)
    x0, y0, x1, y1 = map(int, box)
    mask_HW[y0:y1, x0:x1] = True
    return encode(mask_HW)


def record(key: str, regions: Sequence[Region] = (), **changes: Any) -> Record:
    fields = {"image": b"", "image_format": "jpg", "width": SIDE, "height": SIDE}
    return Record(**{**fields, "key": key, "regions": tuple(regions), "task": "x", **changes})


def opened(**info: Any) -> ShardSet:
    return ShardSet(url="made/by/hand", categories=CATEGORIES, shards=(), info=info, digest="")


def boxes(*rows: tuple[Box, float, str, Box]) -> ScoredBoxes:
    """Rows are box, score, name, and what the mask fills."""
    return ScoredBoxes(
        boxes=[row[0] for row in rows],
        scores=[row[1] for row in rows],
        names=[row[2] for row in rows],
        masks=[filled(row[3]) for row in rows],
    )


CAT, DOG, EMU, NOWHERE = (0, 0, 20, 20), (30, 0, 50, 25), (60, 0, 99, 40), (0, 90, 5, 95)
SHOWN = [Region(box=box, category=n, mask=filled(box)) for n, box in enumerate((CAT, DOG, EMU))]
CHECKED = {"neg_categories": [], "not_exhaustive_categories": []}
ZOO = [record("zoo", SHOWN, task="detection", provenance=CHECKED)]
FOUND = {"zoo": boxes(
    (CAT, 0.99, "cat", CAT), (EMU, 0.98, "emu", NOWHERE),
    *[(NOWHERE, 0.9, "cat", NOWHERE)] * 310,  # of which classic AP takes 298
    (DOG, 0.1, "dog", DOG),
)}  # fmt: skip


def prefixed(prefix: str, metrics: dict[str, float]) -> dict[str, float]:
    return {f"{prefix}_{name}": value for name, value in metrics.items()}


def test_lvis_has_fixed_and_classic_ap_and_fixed_ap_of_masks() -> None:
    suite = SuiteConfig(set="x", task="lvis", masks=True)
    result = score(suite, opened(frequency=FREQUENCY), ZOO, FOUND)
    fixed, classic = (lvis_records_ap(ZOO, FOUND, CATEGORIES, FREQUENCY, cap)
                      for cap in (FIXED, CLASSIC))  # fmt: skip
    masks = lvis_records_ap(ZOO, FOUND, CATEGORIES, FREQUENCY, FIXED, "mask")
    assert (fixed.ap_rare, classic.ap_rare, masks.ap_rare) == pytest.approx((1, 0, 1))
    assert (fixed.ap_common, classic.ap_common, masks.ap_common) == pytest.approx((1, 1, 0))
    assert result.metrics == {
        **fixed.to_dict(), **prefixed("classic", classic.to_dict()),
        **prefixed("mask", masks.to_dict()),
    }  # fmt: skip
    names = dict(zip(fixed.per_category, CATEGORIES, strict=True))
    assert {name: own["ap"] for name, own in result.per_category.items()} == pytest.approx(
        {"cat": 1, "dog": 1, "emu": 1}
    )
    for number, expected in fixed.per_category.items():
        own = result.per_category[names[number]]
        assert (own["ap"], own["ap50"]) == (expected.ap, expected.ap50)
        assert own["precision"] == pytest.approx(expected.precision_R, abs=1e-4)
    without = score(SuiteConfig(set="x", task="lvis"), opened(frequency=FREQUENCY), ZOO, FOUND)
    assert not [name for name in without.metrics if name.startswith("mask_")]


@pytest.mark.parametrize("given", [{}, {"max_boxes": 100}, {"max_boxes_per_prompt": 7}])
def test_a_suite_of_lvis_keeps_all_boxes_unless_it_says_otherwise(given: dict[str, int]) -> None:
    """Another default would cap "fixed" AP, and nobody would be told."""
    for task, defaults in (("lvis", (0, 300)), ("detection", (100, 100))):
        asked = asked_of(SuiteConfig(set="x", task=task, **given), "fp32")  # type: ignore[arg-type]
        wanted = dict(zip(("max_boxes", "max_boxes_per_prompt"), defaults, strict=True)) | given
        assert {name: getattr(asked, name) for name in wanted} == wanted


def test_detection_has_ap_of_boxes_and_of_masks() -> None:
    truth = coco_truth(ZOO, CATEGORIES)
    by_box, by_mask = coco_ap(truth, FOUND), coco_ap(truth, FOUND, by="mask")
    assert (by_box.ap, by_mask.ap) == pytest.approx((1, 2 / 3))
    result = score(SuiteConfig(set="x", masks=True), opened(), ZOO, FOUND)
    assert result.metrics == {**by_box.to_dict(), **prefixed("mask", by_mask.to_dict())}
    for name, own in result.per_category.items():
        expected = by_box.per_category[name]
        assert (own["ap"], own["ap50"]) == (expected.ap, expected.ap50)
        assert own["precision"] == pytest.approx(expected.precision_R, abs=1e-4)
    assert score(SuiteConfig(set="x"), opened(), ZOO, FOUND).metrics == by_box.to_dict()


def test_phrases_are_found_by_any_box_and_by_the_box_around_all() -> None:
    spans = {"dogs": ((0, 8),), "cat": ((13, 18),)}
    regions = [Region(box=CAT, spans=spans["dogs"]), Region(box=DOG, spans=spans["dogs"]),
               Region(box=EMU, spans=spans["cat"])]  # fmt: skip
    own = [record("a", regions, caption="two dogs and a cat")]
    around = (0, 0, 50, 25)
    found = {"a": boxes((DOG, 0.9, "two dogs", DOG), (around, 0.8, "two dogs", around),
                        (EMU, 0.7, "a cat", EMU))}  # fmt: skip
    any_box, merged = (phrase_recall(own, found, protocol).to_dict()
                       for protocol in ("any-box", "merged-box"))  # fmt: skip
    assert (any_box["recall_at_1"], merged["recall_at_1"]) == (1, 0.5)
    result = score(SuiteConfig(set="x", task="phrases"), opened(), own, found)
    assert result.metrics == {**any_box, **prefixed("merged", merged)}


@pytest.mark.parametrize("least", [0.05, 0.5, 0.95])
def test_an_expression_is_what_its_masks_from_a_score_on_cover(least: float) -> None:
    own = [record("a", SHOWN[:2], caption="the animals on the left")]
    found = {"a": boxes((CAT, 0.9, "x", CAT), (DOG, 0.6, "x", DOG), (EMU, 0.1, "x", EMU))}
    expected = referring_segmentation(own, {"a": merged_mask(found["a"], own[0], least)}).to_dict()
    cat, dog, emu = 20 * 20, 20 * 25, 39 * 40
    hand = {0.05: (cat + dog) / (cat + dog + emu), 0.5: 1.0, 0.95: 0.0}[least]
    suite = SuiteConfig(set="x", task="segmentation", mask_score=least)
    result = score(suite, opened(), own, found)
    assert result.metrics == expected and result.metrics["mean_iou"] == pytest.approx(hand)


def test_the_best_box_of_an_expression_is_judged_whatever_the_others_are() -> None:
    own = [record(key, [SHOWN[n]], caption="that one") for n, key in enumerate("ab")]
    found = {key: boxes((CAT, 0.6, "x", CAT), (DOG, 0.3, "x", DOG)) for key in "ab"}
    result = score(SuiteConfig(set="x", task="referring"), opened(), own, found)
    assert result.metrics == referring_accuracy(own, found).to_dict()
    assert (result.metrics["accuracy"], result.metrics["expressions"]) == (0.5, 2)


def test_answers_have_the_accuracy_of_each_kind_where_the_kinds_are_known(tmp_path: Path) -> None:
    own = [record("a", questions=(
        Question(id="7", text="is it", answers=("yes",) * 10),
        Question(id="8", text="how many", answers=("2",) * 8 + ("3",) * 2),
    ))]  # fmt: skip
    kinds = {"7": QuestionKind("yes/no", "is it"), "8": QuestionKind("number", "how many")}
    file = tmp_path / "annotations.json"
    file.write_text(json.dumps({"annotations": [
        {"question_id": int(number), **kind._asdict()} for number, kind in kinds.items()
    ]}))  # fmt: skip
    said = {"7": "yes", "8": "3"}
    result = score(
        SuiteConfig(set="x", task="vqa", annotations=str(file)), opened(), own, {"a": said}
    )
    assert result.metrics == vqa_accuracy(own, said, kinds).to_dict()
    assert result.metrics["accuracy_yes/no"] == 1
    assert result.metrics["accuracy_number"] == pytest.approx(0.6)
    assert result.exports == {"evalai": evalai_answers(said)}
    plain = score(SuiteConfig(set="x", task="vqa"), opened(), own, {"a": said})
    assert plain.metrics == vqa_accuracy(own, said).to_dict()


def test_captions_have_the_scores_of_java_programs_where_they_are_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = [record("a", captions=("a red dog", "the dog")), record("b", captions=("a blue cat",))]
    said = {"a": "a red dog", "b": "a cat"}
    asked: list[Any] = []

    def java(*given: Any) -> dict[str, float]:
        asked.append(given)
        return {"meteor": 0.25, "spice": 0.125}

    monkeypatch.setattr(captions, "java_scores", java)
    plain = score(SuiteConfig(set="x", task="captioning"), opened(), own, said)
    assert plain.metrics == caption_scores(own, said).to_dict() and not asked
    result = score(SuiteConfig(set="x", task="captioning", java=True), opened(), own, said)
    assert result.metrics == {**plain.metrics, "meteor": 0.25, "spice": 0.125}
    assert asked == [(own, said)]
