"""Which examples the report shows, and the reasons it gives."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from page_parser import BOX_A, BOX_B, CIRCLE_FOUND, SQUARE_FOUND, prediction  # noqa: E402

from glipv2.jobs.mistakes import (  # noqa: E402
    best_threshold,
    judge,
    outcomes,
    telling_keys,
    worst_false,
    worst_missed,
)


def test_each_wrong_box_gets_its_reason():
    shifted = (10.0, 5.5, 60.0, 22.0)  # IoU with A is 0.47
    entry = prediction(
        "v", SQUARE_FOUND, (BOX_A, "red square", 0.8), (shifted, "blue circle", 0.7),
        (shifted, "red square", 0.65), ((0.0, 90.0, 9.0, 99.0), "red square", 0.6),
        (BOX_B, "blue circle", 0.1),
    )  # fmt: skip
    outcome = judge(entry, 0.5)
    assert [found.why for found in outcome.found] == [
        "",
        "this object was found already",
        "the truth here is “red square”",
        "right name, but the box fits badly (IoU 0.47)",
        "no object of the truth is here",
    ]
    assert [(m.name, m.best_score) for m in outcome.missed] == [("blue circle", 0.1)]
    assert outcome.f1 == pytest.approx(2 * 1 / (5 + 2))


def test_the_display_threshold_is_the_best_f1():
    noise = ((0.0, 90.0, 9.0, 99.0), "red square", 0.3)
    entries = [prediction("a", SQUARE_FOUND, CIRCLE_FOUND, noise), prediction("b", noise)]
    assert best_threshold(entries) == 0.31
    threshold, seen = outcomes(entries)
    assert threshold == 0.31 and seen["a"].f1 == 1.0


def test_telling_images_are_ordered_by_change_and_ties_are_left_out():
    def seen(**rights):
        rows = (SQUARE_FOUND, CIRCLE_FOUND)
        return {key: judge(prediction(key, *rows[:n]), 0.5) for key, n in rights.items()}

    before, after = seen(a=1, b=0, c=2, d=1), seen(a=2, b=2, c=1, d=1)
    assert telling_keys(before, after, gains=5, losses=5) == ["b", "a", "c"]
    assert telling_keys(before, after, gains=1, losses=0) == ["b"]


def test_the_surest_wrong_box_comes_first():
    def wrong(key, score):
        return judge(prediction(key, SQUARE_FOUND, (BOX_A, "blue circle", score)), 0.1)

    seen = {"a": wrong("a", 0.3), "b": wrong("b", 0.6), "c": judge(prediction("c"), 0.1)}
    assert [(o.key, f.score) for o, f in worst_false(seen, 5)] == [("b", 0.6), ("a", 0.3)]
    assert [o.key for o, _ in worst_false(seen, 1)] == ["b"]


def test_a_missed_object_without_any_box_is_worse_than_one_with_a_weak_box():
    weak = {"a": judge(prediction("a", SQUARE_FOUND, (BOX_B, "blue circle", 0.2)), 0.5)}
    none = {"b": judge(prediction("b", SQUARE_FOUND), 0.5)}
    assert [o.key for o, _ in worst_missed({**weak, **none}, 5)] == ["b", "a"]
