"""Which of a teacher's boxes become labels."""

from math import inf, nan

import pytest
import torch

from glipv2.data_prep.noun_phrases import Phrase
from glipv2.data_prep.pseudo_labels import SUREST, finite, select_regions
from glipv2.model.batch import Detection
from glipv2.pipeline.records import Region

CAPTION = "a cat on a mat"
PHRASES = [Phrase(text="cat", start=2, end=5), Phrase(text="mat", start=11, end=14)]
Found = tuple[tuple[float, float, float, float], float, int]


def detection(*found: Found) -> Detection:
    """Of (box, score, which phrase)."""
    boxes, scores, labels = zip(*found, strict=True)
    return Detection(
        boxes_K4=torch.tensor(boxes),
        scores_K=torch.tensor(scores),
        labels_K=torch.tensor(labels),
        names=[PHRASES[label].text for label in labels],
    )


def selected(*found: Found, nms: float = 0.6, most: int = 20) -> list[tuple[str, float]]:
    regions = regions_of(*found, nms=nms, most=most)
    assert all(CAPTION[slice(*region.spans[0])] == region.phrase for region in regions)
    return [(region.phrase, region.score) for region in regions]


def regions_of(*found: Found, nms: float = 0.6, most: int = 20) -> tuple[Region, ...]:
    return select_regions(
        detection(*found), PHRASES, score_threshold=0.5, cross_phrase_nms=nms, max_boxes=most
    )


def test_of_boxes_that_overlap_only_the_best_stays_whatever_their_phrases() -> None:
    # the second covers 80 of 100 rows of the first, the third lies apart
    found = ((0, 0, 100, 80), 0.75, 0), ((0, 0, 100, 100), 0.875, 1), ((200, 0, 250, 50), 0.5, 0)
    assert selected(*found) == [("mat", 0.875), ("cat", 0.5)]
    assert selected(*found, nms=0.81) == [("mat", 0.875), ("cat", 0.75), ("cat", 0.5)]
    same = ((0, 0, 9, 9), 0.75, 0), ((0, 0, 9, 9), 0.875, 1)
    assert selected(*same, nms=1) == [("mat", 0.875), ("cat", 0.75)]


@pytest.mark.parametrize("nms", [0.6, 1])
def test_an_image_has_so_many_boxes_at_most_the_best_of_all_phrases(nms: float) -> None:
    scores = [0.5, 0.8125, 0.625, 0.9375, 0.75]
    found = [((20.0 * n, 0, 20 * n + 10, 10), score, n % 2) for n, score in enumerate(scores)]
    expected = [("mat", 0.9375), ("mat", 0.8125), ("cat", 0.75)]
    assert selected(*found, nms=nms, most=3) == expected
    assert len(selected(*found, nms=nms)) == 5


@pytest.mark.parametrize("nms", [0.6, 1])
def test_boxes_that_are_no_numbers_are_dropped(nms: float) -> None:
    found = [
        ((0, 0, 10, 10), 0.75, 0),
        ((0, nan, 10, 10), 0.875, 1),
        ((0, 0, inf, 10), 0.875, 1),
        ((0, 0, 10, 10), nan, 1),
        ((0, 0, 10, 10), inf, 1),
    ]
    assert selected(*found, nms=nms) == [("cat", 0.75)]
    assert finite(detection(*found)).tolist() == [True, False, False, False, False]


def test_no_label_is_as_sure_as_what_people_drew() -> None:
    found = [((20.0 * n, 0, 20 * n + 10, 10), s, 0) for n, s in enumerate((1.0, 0.99996, 0.9998))]
    assert [score for _, score in selected(*found)] == [SUREST, SUREST, 0.9998]
    assert SUREST < 1


@pytest.mark.parametrize("nms", [0.6, 1])
def test_only_boxes_of_the_threshold_or_more_are_labels(nms: float) -> None:
    scores = (0.9, 0.4999, 0.5, 0.02)
    found = [((20.0 * n, 0, 20 * n + 10, 10), score, n % 2) for n, score in enumerate(scores)]
    assert selected(*found, nms=nms) == [("cat", 0.9), ("cat", 0.5)]
