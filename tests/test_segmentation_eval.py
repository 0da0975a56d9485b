"""Referring segmentation against counting pixels."""

import math

import numpy as np
import pytest

from glipv2.eval.masks import encode
from glipv2.eval.predictions import ScoredBoxes
from glipv2.eval.segmentation import merged_mask, referring_segmentation
from glipv2.pipeline.errors import DataError
from glipv2.pipeline.records import Record, Region

SHAPE = 12, 17


def record(key, masks):
    return Record(
        key=key,
        image=b"",
        image_format="jpg",
        width=SHAPE[1],
        height=SHAPE[0],
        task="referring",
        caption="white dogs",
        regions=tuple(
            Region(box=(0, 0, 5, 5), spans=((0, 10),), mask=None if m is None else encode(m))
            for m in masks
        ),
    )


def rows(*chosen):
    """A mask of whole rows."""
    mask_HW = np.zeros(SHAPE, dtype=bool)
    mask_HW[list(chosen)] = True
    return mask_HW


def test_the_three_figures_of_a_case_counted_by_hand():
    # IoU 1, 1/2 (not above .5), 3/4, 0 (nothing common), 0 (both empty); in rows: common 2 1 3 0 0,
    # together 2 2 4 4 0.
    cases = {
        "a": ([rows(0), rows(1)], rows(0, 1)),
        "b": ([rows(0), rows(0)], rows(0, 1)),
        "c": ([rows(0, 1, 2, 3)], rows(1, 2, 3)),
        "d": ([rows(0, 1)], rows(2, 3)),
        "e": ([rows()], rows()),
    }
    records = [record(key, masks) for key, (masks, _) in cases.items()]
    found = {key: encode(mask) for key, (_, mask) in cases.items()}
    assert referring_segmentation(records, found).to_dict() == pytest.approx(
        {
            "mean_iou": (1 + 0.5 + 0.75) / 5,
            "cumulative_iou": 6 / 12,
            "precision_at_50": 2 / 5,
            "precision_at_70": 2 / 5,
            "precision_at_90": 1 / 5,
            "phrases": 5,
        }
    )


def test_random_masks_score_as_their_pixels_do():
    rng = np.random.default_rng(1)
    records, found, ious, pixels = [], {}, [], np.zeros(2)
    for number in range(40):
        masks = rng.random((rng.integers(1, 4), *SHAPE)) < rng.choice([0.1, 0.5, 0.9])
        guess = masks.any(axis=0) ^ (rng.random(SHAPE) < rng.random())
        records.append(record(str(number), masks))
        found[str(number)] = encode(guess)
        both, either = (masks.any(axis=0) & guess).sum(), (masks.any(axis=0) | guess).sum()
        ious.append(both / either)
        pixels += both, either
    result = referring_segmentation(records, found)
    assert result.mean_iou == pytest.approx(np.mean(ious))
    assert result.cumulative_iou == pytest.approx(pixels[0] / pixels[1])
    for threshold, share in result.precision_at.items():
        assert share == np.mean(np.array(ious) > threshold)


def test_masks_of_one_detection_are_merged_from_a_score_on():
    masks = [encode(rows(0)), encode(rows(3, 4)), encode(rows(6)), encode(rows(9))]
    found = ScoredBoxes(
        boxes=[(0, 0, 1, 1)] * 4, scores=[0.9, 0.5, 0.4, math.nan], names=["x"] * 4, masks=masks
    )
    own = record("a", [rows(0)])
    assert merged_mask(found, own, min_score=0.5) == encode(rows(0, 3, 4))
    assert merged_mask(found, own) == encode(rows(0, 3, 4, 6))
    assert merged_mask(found, own, min_score=0.95) == encode(rows())
    bare = ScoredBoxes(boxes=[], scores=[], names=[])
    with pytest.raises(DataError, match="no masks"):
        merged_mask(bare, own)


def test_what_cannot_be_scored_is_refused():
    own = record("a", [rows(0)])
    with pytest.raises(DataError, match="no mask for a"):
        referring_segmentation([own], {})
    with pytest.raises(DataError, match="undefined"):
        referring_segmentation([], {})
    with pytest.raises(DataError, match="of 12 x 17 pixels"):
        referring_segmentation([own], {"a": encode(rows(0).T)})
    for masks in ([], [rows(0), None]):
        with pytest.raises(DataError, match="one lacks"):
            referring_segmentation([record("a", masks)], {"a": encode(rows(0))})
