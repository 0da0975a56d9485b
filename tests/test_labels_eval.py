"""Quality of pseudo labels and the choice of a threshold, against figures worked out by hand."""

import tracemalloc
from dataclasses import replace

import pytest

from glipv2.eval.labels import (
    GroupQuality,
    ScoredLabels,
    choose_threshold,
    judge_labels,
    score_labels,
)
from glipv2.pipeline.errors import DataError
from glipv2.pipeline.records import Record, Region

CAPTION = "a red square near a blue circle"
SQUARE, CIRCLE = (0, 12), (18, 31)
A, B, C = (0, 0, 10, 10), (20, 20, 40, 40), (50, 50, 90, 90)
SHIFTED_A = (0, 0, 10, 6)  # IoU 0.6 with A
FAR_A = (0, 0, 10, 4)  # IoU 0.4 with A


def pair(key, *regions, caption=CAPTION, groups=None):
    """Regions are (box, span or None, score)."""
    return Record(
        key=key,
        image=b"",
        image_format="jpg",
        width=100,
        height=100,
        task="grounding",
        caption=caption,
        regions=tuple(
            Region(
                box=box,
                spans=(span,) if span else (),
                phrase=caption[slice(*span)] if span else "green star",
                score=score,
            )
            for box, span, score in regions
        ),
        provenance={"groups": list(groups)} if groups else {},
    )


def quality(labels, truth):
    result = score_labels(labels, truth)
    return result.precision_at_50, result.recall_at_50


TRUTH = pair("k", (A, SQUARE, 1), (B, CIRCLE, 1), (C, None, 1), groups=["seen", "unseen", "seen"])


def test_right_labels_over_kept_and_over_mentioned_objects():
    labels = pair("k", (SHIFTED_A, SQUARE, 0.9), (B, CIRCLE, 0.8), (NOWHERE, SQUARE, 0.7))
    result = score_labels([labels], [TRUTH])
    assert result.precision_at_50 == pytest.approx(2 / 3)
    assert result.recall_at_50 == 1.0  # the green star is not mentioned, so it is not missed
    assert (result.kept, result.pairs) == (3, 1)


NOWHERE = (92, 0, 99, 5)


def test_a_label_with_another_objects_words_is_wrong():
    assert quality([pair("k", (A, CIRCLE, 0.9))], [TRUTH]) == (0.0, 0.0)


def test_a_phrase_that_spans_two_objects_speaks_of_its_last_word():
    both = (0, len(CAPTION))
    assert quality([pair("k", (A, both, 0.9), (B, both, 0.8))], [TRUTH]) == (0.5, 0.5)


def test_an_overlap_under_half_is_wrong():
    assert quality([pair("k", (FAR_A, SQUARE, 0.9))], [TRUTH]) == (0.0, 0.0)


def test_one_object_makes_one_label_right_and_the_better_scored_takes_it():
    # The exact box is scored lower: it comes second and finds its object taken.
    scored = judge_labels([pair("k", (A, SQUARE, 0.5), (SHIFTED_A, SQUARE, 0.9))], [TRUTH])
    assert scored.right == (False, True)


def test_pairs_without_labels_count_for_recall():
    labels = [pair("k", (A, SQUARE, 0.9), (B, CIRCLE, 0.9))]
    truth = [TRUTH, pair("other", (A, SQUARE, 1), (B, CIRCLE, 1))]
    assert quality(labels, truth) == (1.0, 0.5)
    assert score_labels([], truth).pairs == 2
    assert quality([], truth) == (0.0, 0.0)


def test_figures_of_each_group_follow_the_phrase_of_a_label():
    labels = pair("k", (NOWHERE, SQUARE, 0.9), (B, CIRCLE, 0.8), (C, (13, 17), 0.7))
    assert score_labels([labels], [TRUTH]).by_group == {
        "seen": GroupQuality(precision_at_50=0.0, recall_at_50=0.0, kept=1, mentioned=1),
        "unseen": GroupQuality(precision_at_50=1.0, recall_at_50=1.0, kept=1, mentioned=1),
        "other": GroupQuality(precision_at_50=0.0, recall_at_50=None, kept=1, mentioned=0),
    }


def test_other_captions_are_compared_by_the_head_word_of_the_phrase():
    label = pair("k", (A, (4, 14), 0.9), caption="the big square")  # "big square"
    assert quality([label], [TRUTH]) == (1.0, 1.0)  # no circle, no star in this caption
    label = pair("k", (A, (4, 14), 0.9), caption="the red circle")  # "red circle" on the square
    assert quality([label], [TRUTH]) == (0.0, 0.0)


def test_the_pictures_of_the_truth_are_not_kept_in_memory():
    picture = 200_000

    def truth():
        for number in range(50):
            yield replace(TRUTH, key=f"k{number}", image=bytes(picture))

    tracemalloc.start()
    judged = judge_labels([replace(TRUTH, key="k7")], truth())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert judged.pairs == 50
    assert peak < 5 * picture


def test_labels_of_unknown_images_are_refused():
    with pytest.raises(DataError, match="stranger"):
        score_labels([pair("stranger")], [TRUTH])


def verdicts(*rows, objects=10):
    """Rows are (score, right)."""
    return ScoredLabels(
        scores=tuple(score for score, _ in rows),
        right=tuple(good for _, good in rows),
        groups=("all",) * len(rows),
        truth_groups=("all",) * objects,
        found_groups=("all",) * sum(good for _, good in rows),
        pairs=1,
    )


# From the top: right, right, wrong, right, wrong, wrong -> precision 1, 1, 2/3, 3/4, 3/5, 1/2
ROWS = ((0.95, True), (0.85, True), (0.75, False), (0.65, True), (0.55, False), (0.45, False))


def test_the_lowest_threshold_that_reaches_the_target_is_chosen():
    chosen = choose_threshold(verdicts(*ROWS), 0.75, min_kept=1)
    # 0.65 keeps four of which three are right; 0.56 to 0.65 keep the same four: the lowest wins.
    assert (chosen.threshold, chosen.precision, chosen.recall) == (0.56, 0.75, 0.3)
    assert chosen.reached


def test_the_curve_holds_every_threshold_that_keeps_something():
    curve = choose_threshold(verdicts(*ROWS), 0.75, min_kept=1).curve
    assert [point.threshold for point in curve][:: len(curve) - 1] == [0.0, 0.95]
    assert (curve[50].kept, curve[50].precision, curve[50].recall) == (5, 0.6, 0.3)
    assert (curve[95].kept, curve[95].precision, curve[95].recall) == (1, 1.0, 0.1)


def test_a_label_scored_exactly_the_threshold_is_kept():
    chosen = choose_threshold(verdicts((0.29, True), (0.28, False)), 1.0, min_kept=1)
    assert (chosen.threshold, chosen.precision) == (0.29, 1.0)


def test_a_threshold_that_keeps_too_few_labels_is_no_evidence():
    # Alone, the two best reach 0.9; with at least five kept the best precision is 3/5 at 0.46.
    chosen = choose_threshold(verdicts(*ROWS), 0.9, min_kept=5)
    assert not chosen.reached
    assert (chosen.threshold, chosen.precision) == (0.46, 0.6)


def test_without_a_threshold_that_reaches_the_target_the_most_precise_is_taken():
    chosen = choose_threshold(verdicts((0.9, False), (0.5, True), (0.3, False)), 0.8, min_kept=1)
    assert (chosen.threshold, chosen.precision, chosen.reached) == (0.31, 0.5, False)


def test_no_labels_at_all_is_an_error_with_a_cure():
    with pytest.raises(DataError, match="train it longer"):
        choose_threshold(verdicts(), 0.8)
    with pytest.raises(ValueError, match="target_precision"):
        choose_threshold(verdicts(*ROWS), 1.2)
