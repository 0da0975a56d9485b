"""Weighted box fusion against its definition in plain loops, and what must hold of any fusion."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from glipv2.data_prep.box_fusion import Ensemble, fuse
from glipv2.model.batch import Detection
from glipv2.model.boxes import suppress

NAMES = ["a cat", "a dog"]
Box = tuple[float, float, float, float]
Row = tuple[float, int, Box]
"""Score, label, box."""


def detection(rows: Sequence[Row]) -> Detection:
    """As a teacher gives it: best first, overlaps of one phrase above 0.6 suppressed."""
    boxes_K4 = torch.tensor([box for _, _, box in rows]).reshape(-1, 4)
    scores_K = torch.tensor([score for score, _, _ in rows])
    labels_K = torch.tensor([label for _, label, _ in rows], dtype=torch.int64)
    kept = suppress(boxes_K4, scores_K, labels_K, 0.6)
    return Detection(
        boxes_K4=boxes_K4[kept], scores_K=scores_K[kept], labels_K=labels_K[kept], names=NAMES
    )


def rows_of(found: Detection) -> list[Row]:
    boxes = [tuple(box) for box in found.boxes_K4.tolist()]
    return list(zip(found.scores_K.tolist(), found.labels_K.tolist(), boxes, strict=True))


@st.composite
def findings(draw: st.DrawFn) -> Detection:
    """Boxes crowded enough that many of them match, at scores that tie often or hardly ever."""
    seed = draw(st.integers(0, 2**32))
    count = draw(st.integers(0, 12))
    generator = torch.Generator().manual_seed(seed)
    corners_K2 = torch.rand(count, 2, generator=generator) * 12
    sides_K2 = torch.rand(count, 2, generator=generator) * 10 + 15
    boxes_K4 = torch.cat([corners_K2, corners_K2 + sides_K2], dim=1)
    scores_K = torch.rand(count, generator=generator) * 0.94 + 0.06
    if draw(st.booleans()):
        scores_K = (scores_K * 4).ceil() / 4
    labels_K = torch.randint(0, 2, (count,), generator=generator)
    boxes: list[Box] = [tuple(box) for box in boxes_K4.tolist()]
    return detection(list(zip(scores_K.tolist(), labels_K.tolist(), boxes, strict=True)))


def iou(a: Box, b: Box) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return width * height / (areas - width * height)


def mean_box(members: list[tuple[int, Row]]) -> Box:
    total = sum(score for _, (score, _, _) in members)
    x0, y0, x1, y1 = (
        sum(score * box[side] for _, (score, _, box) in members) / total for side in range(4)
    )
    return x0, y0, x1, y1


def fused_literally(found: Sequence[Detection]) -> list[Row]:
    """The algorithm of Solovyev et al., section 3, with one box of each teacher in a cluster."""
    teachers = sorted(rows_of(d) for d in found)
    everything = [(teacher, row) for teacher, rows in enumerate(teachers) for row in rows]
    clusters: list[list[tuple[int, Row]]] = []
    for teacher, (score, label, box) in sorted(everything, key=lambda item: -item[1][0]):
        best, most = None, 0.0
        for cluster in clusters:
            if cluster[0][1][1] != label or teacher in [member for member, _ in cluster]:
                continue
            overlap = iou(box, mean_box(cluster))
            if overlap >= 0.55 and overlap > most:
                best, most = cluster, overlap
        if best is None:
            clusters.append([(teacher, (score, label, box))])
        else:
            best.append((teacher, (score, label, box)))
    fused = [
        (sum(score for _, (score, _, _) in own) / len(found), own[0][1][1], mean_box(own))
        for own in clusters
    ]
    kept: list[Row] = []
    for row in sorted(fused, key=lambda row: -row[0]):
        if all(iou(row[2], other[2]) <= 0.6 for other in kept if other[1] == row[1]):
            kept.append(row)
    return kept


def assert_same(found: Sequence[Row], expected: Sequence[Row]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(sorted(found), sorted(expected), strict=True):
        assert a[0] == pytest.approx(b[0], abs=1e-5)
        assert a[1] == b[1]
        assert a[2] == pytest.approx(b[2], abs=1e-4)


@settings(max_examples=150, deadline=None)
@given(st.lists(findings(), min_size=2, max_size=4))
def test_fusion_is_what_the_paper_says(found: list[Detection]) -> None:
    fused = fuse(found)
    assert fused.names == NAMES
    assert fused.scores_K.tolist() == sorted(fused.scores_K.tolist(), reverse=True)
    assert_same(rows_of(fused), fused_literally(found))


@settings(max_examples=60, deadline=None)
@given(st.lists(findings(), min_size=2, max_size=4), st.randoms(use_true_random=False))
def test_the_order_of_teachers_does_not_matter(found: list[Detection], chance: object) -> None:
    other = list(found)
    chance.shuffle(other)  # type: ignore[attr-defined]
    assert rows_of(fuse(other)) == rows_of(fuse(found))


def test_equal_boxes_and_scores_of_two_teachers_are_taken_in_one_order() -> None:
    """Were the first one's small box taken first, both small boxes would be another object."""
    small = (0.5, 0, (0.0, 0.0, 10.0, 5.8))
    one, two = detection([(0.9, 0, (0.0, 0.0, 10.0, 10.0)), small]), detection([small])
    assert rows_of(fuse([one, two])) == rows_of(fuse([two, one]))
    assert_same(rows_of(fuse([one, two])), [(0.7, 0, (0.0, 0.0, 10.0, 11.9 / 1.4))])


@settings(max_examples=60, deadline=None)
@given(findings(), st.integers(1, 4))
def test_teachers_who_agree_change_nothing(found: Detection, count: int) -> None:
    fused = fuse([found] * count)
    if count == 1:
        assert sorted(rows_of(fused)) == sorted(rows_of(found))
    assert_same(rows_of(fused), rows_of(found))


@settings(max_examples=60, deadline=None)
@given(st.lists(findings(), min_size=1, max_size=4))
def test_scores_and_boxes_stay_in_range(found: list[Detection]) -> None:
    fused = fuse(found)
    everything = torch.cat([d.boxes_K4 for d in found])
    for score, label, box in rows_of(fused):
        own = [row for d in found for row in rows_of(d) if row[1] == label]
        assert 0 < score <= max(row[0] for row in own) + 1e-6
        assert (torch.tensor(box) >= everything.amin(0) - 1e-4).all()
        assert (torch.tensor(box) <= everything.amax(0) + 1e-4).all()


def test_a_worked_example() -> None:
    """Two of three teachers see one cat, one of them a second one, the third the dog there."""
    first = detection([(0.9, 0, (0.0, 0.0, 10.0, 10.0)), (0.6, 0, (50.0, 50.0, 60.0, 60.0))])
    second = detection([(0.3, 0, (0.0, 0.0, 12.0, 10.0))])
    third = detection([(0.6, 1, (0.0, 0.0, 10.0, 10.0))])
    expected = [
        (0.4, 0, (0.0, 0.0, (0.9 * 10 + 0.3 * 12) / 1.2, 10.0)),
        (0.2, 0, (50.0, 50.0, 60.0, 60.0)),
        (0.2, 1, (0.0, 0.0, 10.0, 10.0)),
    ]
    assert_same(rows_of(fuse([first, second, third])), expected)


def test_one_teacher_is_never_fused_with_itself() -> None:
    """Its two boxes overlap by 0.58: its own suppression keeps both, so two cats it says."""
    pair = detection([(0.9, 0, (0.0, 0.0, 10.0, 10.0)), (0.8, 0, (0.0, 0.0, 10.0, 5.8))])
    assert len(pair.scores_K) == 2
    assert rows_of(fuse([pair])) == rows_of(pair)
    nothing = detection([])
    assert [row[0] for row in rows_of(fuse([pair, nothing]))] == pytest.approx([0.45, 0.4])


class Fixed:
    """A teacher that finds the same in every image."""

    def __init__(self, found: Detection) -> None:
        self.found = found
        self.asked: list[int] = []

    def ground(self, images: Sequence[Tensor], captions: object, batch_size: int = 8) -> list:
        self.asked.append(batch_size)
        return [self.found for _ in images]


def test_an_ensemble_asks_every_teacher_about_every_image() -> None:
    teachers = [Fixed(detection([(score, 0, (0.0, 0.0, 10.0, 10.0))])) for score in (0.9, 0.6, 0.3)]
    images = [torch.zeros(3, 20, 20, dtype=torch.uint8)] * 2
    found = Ensemble(teachers).ground(images, [("a cat, a dog", [])] * 2, batch_size=5)
    assert [teacher.asked for teacher in teachers] == [[5], [5], [5]]
    for one in found:
        assert_same(rows_of(one), [(0.6, 0, (0.0, 0.0, 10.0, 10.0))])
