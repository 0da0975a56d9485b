"""Recall of phrase grounding against a brute-force reading of the protocol."""

import numpy as np
import pytest
import torch

from glipv2.eval.grounding import PhraseRecall, phrases_of
from glipv2.model.batch import Detection
from glipv2.pipeline.errors import DataError
from glipv2.pipeline.records import Record, Region

CAPTION = "two dogs and a cat"
DOGS, CAT = ((0, 8),), ((13, 18),)


def record(**changes):
    fields = {
        "key": "a",
        "image": b"",
        "image_format": "jpg",
        "width": 100,
        "height": 100,
        "task": "grounding",
        "caption": CAPTION,
        "regions": (
            Region(box=(0, 0, 10, 10), spans=DOGS),
            Region(box=(50, 50, 60, 60), spans=CAT),
            Region(box=(20, 0, 30, 10), spans=DOGS),
            Region(box=(80, 80, 90, 90)),
        ),
        "provenance": {"groups": ["seen", "unseen", "seen", "seen"]},
    }
    return Record(**{**fields, **changes})


def overlap(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    both = max(width, 0) * max(height, 0)
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def random_boxes(rng, count):
    corners = rng.integers(0, 12, (count, 2))
    return np.concatenate([corners, corners + rng.integers(3, 9, (count, 2))], 1).tolist()


def test_recall_equals_a_brute_force_count_on_random_phrases():
    rng = np.random.default_rng(7)
    recall, hits = PhraseRecall(), dict.fromkeys((1, 5, 10, None), 0)
    for _ in range(200):
        found, truth = random_boxes(rng, rng.integers(0, 14)), random_boxes(rng, rng.integers(1, 4))
        recall.add(found, truth)
        for k in hits:
            hits[k] += any(overlap(box, true) >= 0.5 for box in found[:k] for true in truth)
    assert 0 < hits[1] < hits[5] < hits[10] < hits[None] < 200  # the case tells the ks apart
    assert dict(recall.metrics()) == {
        "recall_at_1": hits[1] / 200,
        "recall_at_5": hits[5] / 200,
        "recall_at_10": hits[10] / 200,
        "recall_bound": hits[None] / 200,
    }


def test_a_phrase_gathers_all_boxes_with_its_spans():
    dogs, cat = phrases_of(record())
    assert (dogs.text, dogs.group, dogs.boxes) == (
        "two dogs",
        "seen",
        ((0, 0, 10, 10), (20, 0, 30, 10)),
    )
    assert (cat.text, cat.group, cat.boxes) == ("a cat", "unseen", ((50, 50, 60, 60),))


def test_a_record_is_scored_phrase_by_phrase_and_group_by_group():
    detection = Detection(
        boxes_K4=torch.tensor([[50.0, 50, 60, 60], [20, 0, 30, 10], [0, 50, 5, 60]]),
        scores_K=torch.tensor([0.9, 0.8, 0.7]),
        labels_K=torch.tensor([0, 0, 1]),  # the cat's box was called "two dogs": no hit for the cat
        names=["two dogs", "a cat"],
    )
    recall = PhraseRecall(ks=(1, 5))
    recall.add_record(record(), detection)
    assert recall.phrases == 2
    assert dict(recall.metrics()) == {
        "recall_at_1": 0.0,
        "recall_at_5": 0.5,  # "two dogs" by its second box
        "recall_bound": 0.5,
        "recall_at_1_seen": 0.0,
        "recall_at_5_seen": 1.0,
        "recall_bound_seen": 1.0,
        "recall_at_1_unseen": 0.0,
        "recall_at_5_unseen": 0.0,
        "recall_bound_unseen": 0.0,
    }


def test_a_detection_of_other_phrases_is_refused():
    other = Detection(
        boxes_K4=torch.zeros(0, 4),
        scores_K=torch.zeros(0),
        labels_K=torch.zeros(0, dtype=torch.int64),
        names=["a cat"],
    )
    with pytest.raises(DataError, match="1 phrases were grounded, but the record has 2"):
        PhraseRecall().add_record(record(), other)
    with pytest.raises(ValueError, match="without true boxes"):
        PhraseRecall().add([], [])


def test_nothing_fed_yields_nothing():
    assert dict(PhraseRecall().metrics()) == {}
