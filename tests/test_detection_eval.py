"""Average precision against figures worked out by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glipv2.eval.detection import (
    ScoredBoxes,
    average_precision,
    box_iou,
    category_groups,
    greedy_match,
)
from glipv2.model.batch import Detection
from glipv2.pipeline.errors import DataError
from glipv2.pipeline.records import Record, Region

CATEGORIES = ["cat", "dog", "emu"]


def image(key, *regions, groups=None):
    """A detection record; regions are (box, category index)."""
    return Record(
        key=key,
        image=b"",
        image_format="jpg",
        width=100,
        height=100,
        task="detection",
        regions=tuple(Region(box=box, category=category) for box, category in regions),
        provenance={"groups": list(groups)} if groups else {},
    )


def boxes(*rows):
    """Rows are (box, score, name)."""
    return ScoredBoxes(
        boxes=[row[0] for row in rows],
        scores=[row[1] for row in rows],
        names=[row[2] for row in rows],
    )


A, B, C = (0, 0, 10, 10), (20, 20, 40, 40), (50, 50, 90, 90)
NOWHERE = (92, 0, 99, 5)
HALF_OF_A = (0, 0, 10, 6)  # IoU with A is 0.6: right at .50, .55, .60, wrong at the other seven


def test_ap_of_a_hand_made_case_is_what_the_definition_gives():
    # "cat": three truths in two images. In order of score: hit, miss, hit, and one never found.
    # Precision after each: 1, 1/2, 2/3; recall: 1/3, 1/3, 2/3.  Interpolated (running maximum from
    # the right): 1 up to recall 1/3, 2/3 up to recall 2/3, then 0.  101 recall points 0, .01, ...:
    # 0...0.33 are 34 points at 1, .34...0.66 are 33 points at 2/3, the other 34 points are 0.
    records = [image("a", (A, 0), (B, 0)), image("b", (C, 0))]
    found = {
        "a": boxes((A, 0.9, "cat"), (NOWHERE, 0.8, "cat")),
        "b": boxes((C, 0.7, "cat")),
    }
    result = average_precision(records, found, CATEGORIES)
    assert result.ap50 == pytest.approx((34 * 1 + 33 * 2 / 3) / 101)
    assert result.ap == pytest.approx(result.ap50)  # the hits are exact, so every IoU agrees


def test_ap_averages_over_the_ten_overlap_thresholds():
    result = average_precision([image("a", (A, 0))], {"a": boxes((HALF_OF_A, 0.5, "cat"))}, ["cat"])
    assert result.ap50 == pytest.approx(1.0)
    assert result.ap == pytest.approx(0.3)  # .50, .55 and .60 of ten


def test_of_two_boxes_on_one_truth_only_the_better_scored_is_right():
    # Order of score: hit, duplicate (wrong): precision 1 at full recall already.
    hit_first = {"a": boxes((A, 0.9, "cat"), (A, 0.8, "cat"))}
    assert average_precision([image("a", (A, 0))], hit_first, CATEGORIES).ap50 == pytest.approx(1)
    # A wrong box above the hit: precision 1/2 at recall 1.
    wrong_first = {"a": boxes((NOWHERE, 0.9, "cat"), (A, 0.8, "cat"))}
    assert average_precision([image("a", (A, 0))], wrong_first, CATEGORIES).ap50 == pytest.approx(
        0.5
    )


def test_equal_scores_keep_the_order_of_the_records():
    records = [image("a", (A, 0)), image("b")]
    found = {"a": boxes((A, 0.5, "cat")), "b": boxes((A, 0.5, "cat"))}
    assert average_precision(records, found, CATEGORIES).ap50 == pytest.approx(1.0)
    assert average_precision(records[::-1], found, CATEGORIES).ap50 == pytest.approx(0.5)


def test_categories_without_truth_do_not_enter_the_mean_and_wrong_names_do_not_match():
    records = [image("a", (A, 0), (B, 1))]
    found = {"a": boxes((A, 0.9, "cat"), (B, 0.9, "cat"), (C, 0.9, "emu"))}
    result = average_precision(records, found, CATEGORIES)
    assert set(result.per_category) == {"cat", "dog"}  # no emu in the truth
    assert result.per_category["dog"] == (0.0, 0.0)
    assert result.ap50 == pytest.approx(0.5)


def test_no_detections_at_all_is_zero():
    result = average_precision([image("a", (A, 0))], {"a": boxes()}, CATEGORIES)
    assert (result.ap, result.ap50) == (0.0, 0.0)


def test_group_and_over_give_the_mean_of_the_named_categories():
    records = [image("a", (A, 0), (B, 1))]
    found = {"a": boxes((A, 0.9, "cat"))}
    whole = average_precision(records, found, CATEGORIES)
    assert whole.over({"cat"}).ap50 == pytest.approx(1.0)
    assert average_precision(records, found, CATEGORIES, group={"dog"}).ap50 == 0.0
    with pytest.raises(DataError, match="emu"):
        whole.over({"emu"})


def test_groups_of_categories_come_from_the_records_provenance():
    records = [
        image("a", (A, 0), (B, 1), groups=["seen", "unseen"]),
        image("b", (C, 0), groups=["seen"]),
    ]
    assert category_groups(records, CATEGORIES) == {"seen": {"cat"}, "unseen": {"dog"}}
    with pytest.raises(DataError, match="cat"):
        category_groups([*records, image("c", (A, 0), groups=["unseen"])], CATEGORIES)


def test_a_model_detection_scores_like_plain_boxes():
    detection = Detection(
        boxes_K4=torch.tensor([A, NOWHERE], dtype=torch.float32),
        scores_K=torch.tensor([0.5, 0.75]),
        labels_K=torch.tensor([0, 1]),
        names=["cat", "dog"],
    )
    records = [image("a", (A, 0), (B, 1))]
    result = average_precision(records, {"a": detection}, CATEGORIES)
    plain = boxes((A, 0.5, "cat"), (NOWHERE, 0.75, "dog"))
    assert result == average_precision(records, {"a": plain}, CATEGORIES)
    assert result.per_category["cat"] == (pytest.approx(1.0), pytest.approx(1.0))


def test_non_finite_detections_are_dropped_and_counted():
    found = {"a": boxes((A, math.nan, "cat"), ((0, 0, math.inf, 5), 0.9, "cat"), (A, 0.5, "cat"))}
    result = average_precision([image("a", (A, 0))], found, CATEGORIES)
    assert (result.dropped, result.ap50) == (2, pytest.approx(1.0))


@pytest.mark.parametrize(
    ("records", "found", "names"),
    [
        ([image("a", (A, 0)), image("b")], {"a": boxes()}, "b"),
        ([image("a", (A, 0))], {"a": boxes((A, 0.5, "yak"))}, "yak"),
        ([image("a", (A, 7))], {"a": boxes()}, "category 7"),
        ([image("a", (A, None))], {"a": boxes()}, "category None"),
        ([image("a")], {"a": boxes()}, "undefined"),
    ],
    ids=["image never evaluated", "unknown name", "unknown category", "caption box", "no truth"],
)
def test_input_that_would_give_a_wrong_figure_is_refused(records, found, names):
    with pytest.raises(DataError, match=names):
        average_precision(records, found, CATEGORIES)


def test_pycocotools_prints_nothing(capsys):
    average_precision([image("a", (A, 0))], {"a": boxes()}, CATEGORIES)
    assert capsys.readouterr().out == ""


def test_iou_of_known_boxes():
    iou = box_iou([A, (5, 0, 15, 10)], [A, (10, 0, 20, 10), (3, 3, 3, 9)])
    np.testing.assert_allclose(iou, [[1, 0, 0], [1 / 3, 1 / 3, 0]])
    assert box_iou([], [A]).shape == (0, 1)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_the_match_above_a_threshold_ignores_what_is_below_it(data):
    count = data.draw(st.integers(1, 6))
    scores = data.draw(st.lists(st.sampled_from([0.1, 0.3, 0.5]), min_size=count, max_size=count))
    iou = np.array(data.draw(st.lists(st.lists(st.sampled_from([0, 0.4, 0.6, 0.9]), min_size=3,
                   max_size=3), min_size=count, max_size=count)))  # fmt: skip
    whole = greedy_match(scores, iou)
    high = [index for index, score in enumerate(scores) if score >= 0.3]
    assert greedy_match([scores[i] for i in high], iou[high]) == [whole[i] for i in high]
    taken = [index for index in whole if index >= 0]
    assert len(taken) == len(set(taken))
