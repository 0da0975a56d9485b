"""Referring expressions: the best box, and only it, decides."""

import math

import numpy as np
import pytest

from glipv2.eval.predictions import ScoredBoxes
from glipv2.eval.referring import referring_accuracy
from glipv2.pipeline.errors import DataError
from glipv2.pipeline.records import Record, Region


def record(key, *boxes, split=None):
    return Record(
        key=key,
        image=b"",
        image_format="jpg",
        width=100,
        height=100,
        task="referring",
        caption="the left dog",
        regions=tuple(Region(box=box, spans=((0, 12),)) for box in boxes),
        provenance={"split": split} if split else {},
    )


def found(*rows):
    return ScoredBoxes(
        boxes=[row[0] for row in rows],
        scores=[row[1] for row in rows],
        names=["the left dog"] * len(rows),
    )


TRUE, HALF, LESS, OFF = (0, 0, 10, 10), (0, 0, 10, 5), (0, 0, 10, 4.9), (50, 50, 60, 60)


def test_only_the_best_box_counts_and_an_overlap_of_one_half_is_enough():
    records = [record(key, TRUE, split="val") for key in "abcd"]
    records += [record(key, TRUE, split="testA") for key in "ef"]
    detections = {
        "a": found((OFF, 0.2), (HALF, 0.9)),  # right
        "b": found((OFF, 0.9), (TRUE, 0.8)),  # wrong: the right box is second
        "c": found((LESS, 0.9)),  # wrong: 0.49
        "d": found(),  # wrong
        "e": found((TRUE, 0.5), (OFF, 0.5)),  # right: the first of equals
        "f": found((OFF, math.nan), ((0, 0, math.inf, 9), 0.9), (TRUE, 0.1)),  # right
    }
    result = referring_accuracy(records, detections)
    assert result.to_dict() == pytest.approx(
        {
            "accuracy": 3 / 6,
            "expressions": 6,
            "without_box": 1,
            "dropped": 2,
            "accuracy_val": 1 / 4,
            "accuracy_testA": 1,
        }
    )
    assert referring_accuracy(records, detections, min_iou=0.6).accuracy == pytest.approx(2 / 6)


def test_accuracy_equals_a_plain_loop_on_random_boxes():
    rng = np.random.default_rng(4)
    records, detections, right = [], {}, 0
    for number in range(300):
        corners = rng.integers(0, 5, (4, 2))
        boxes = np.concatenate([corners, corners + rng.integers(3, 8, (4, 2))], axis=1).tolist()
        scores = rng.permutation(3).tolist()
        records.append(record(str(number), tuple(boxes[0])))
        detections[str(number)] = found(*zip(boxes[1:], scores, strict=True))
        best = boxes[1 + scores.index(2)]
        width = min(best[2], boxes[0][2]) - max(best[0], boxes[0][0])
        height = min(best[3], boxes[0][3]) - max(best[1], boxes[0][1])
        both = max(width, 0) * max(height, 0)
        areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (best, boxes[0])]
        right += both / (sum(areas) - both) >= 0.5
    assert 0 < right < 300
    assert referring_accuracy(records, detections).accuracy == pytest.approx(right / 300)


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(DataError, match="undefined"):
        referring_accuracy([], {})
    with pytest.raises(DataError, match="image a: was it evaluated"):
        referring_accuracy([record("a", TRUE)], {})
    for boxes in ((), (TRUE, OFF)):
        with pytest.raises(DataError, match=f"this one has {len(boxes)}"):
            referring_accuracy([record("a", *boxes)], {"a": found()})
