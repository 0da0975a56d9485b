"""Recall of phrase grounding against a brute-force reading of the protocol.

FLICKR30K=FOLDER in the environment adds the real annotations of Flickr30k Entities.
"""

import os
import re
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from glipv2.data_prep.reasons import Dropped
from glipv2.data_prep.sources import open_source
from glipv2.eval.grounding import PhraseRecall, box_around, phrase_recall, phrases_of
from glipv2.eval.predictions import ScoredBoxes
from glipv2.model.batch import Detection
from glipv2.pipeline.config import PrepareConfig
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


def detection_of(boxes_by_phrase, names, rng):
    """Boxes of each phrase, best first, scored and shuffled among each other."""
    rows = [
        (box, -rank, label)
        for label, boxes in enumerate(boxes_by_phrase)
        for rank, box in enumerate(boxes)
    ]
    rows = [rows[row] for row in rng.permutation(len(rows))]
    return Detection(
        boxes_K4=torch.tensor([row[0] for row in rows], dtype=torch.float32).reshape(-1, 4),
        scores_K=torch.tensor([0.5 + row[1] / 100 for row in rows]),
        labels_K=torch.tensor([row[2] for row in rows], dtype=torch.int64),
        names=names,
    )


def test_merged_box_wants_the_hull_of_all_boxes():
    dogs = (Region(box=(0, 0, 10, 10), spans=DOGS), Region(box=(20, 0, 30, 12), spans=DOGS))
    own = record(regions=dogs, provenance={})
    hull, one = (0, 0, 30, 12), (20, 0, 30, 12)
    assert box_around([region.box for region in dogs]) == list(hull)
    for box, any_box, merged in [(hull, 0, 1), (one, 1, 0)]:
        found = ScoredBoxes(boxes=[box], scores=[0.9], names=["two dogs"])
        recalls = [
            phrase_recall([own], {"a": found}, protocol).to_dict()["recall_at_1"]
            for protocol in ("any-box", "merged-box")
        ]
        assert recalls == [any_box, merged]


def test_merged_box_equals_a_brute_force_count_on_random_phrases():
    rng = np.random.default_rng(11)
    recall, hits = PhraseRecall(protocol="merged-box"), dict.fromkeys((1, 5, 10, None), 0)
    any_box = 0
    for _ in range(300):
        found, truth = random_boxes(rng, rng.integers(0, 14)), random_boxes(rng, rng.integers(1, 4))
        recall.add(found, truth)
        x0, y0, x1, y1 = zip(*truth, strict=True)
        hull = (min(x0), min(y0), max(x1), max(y1))
        for k in hits:
            hits[k] += any(overlap(box, hull) >= 0.5 for box in found[:k])
        any_box += any(overlap(box, true) >= 0.5 for box in found[:1] for true in truth)
    assert 0 < hits[1] < hits[5] < hits[10] < hits[None] < 300 and hits[1] != any_box
    names = {1: "recall_at_1", 5: "recall_at_5", 10: "recall_at_10", None: "recall_bound"}
    assert dict(recall.metrics()) == {names[k]: count / 300 for k, count in hits.items()}


def test_plain_boxes_in_any_order_score_like_a_detection_and_broken_ones_are_counted():
    boxes = [[20.0, 0, 30, 10], [50, 50, 60, 60], [0, 50, 5, 60], [0, 0, float("nan"), 1]]
    names = ["two dogs", "a cat", "two dogs", "a cat"]
    found = ScoredBoxes(boxes=boxes, scores=[0.5, 0.4, 0.8, 0.9], names=names)
    result = phrase_recall([record()], {"a": found}, ks=(1, 2)).to_dict()
    assert result["recall_at_1"] == 0.5  # the better box of the dogs is wrong
    assert (result["recall_at_2"], result["recall_at_1_unseen"]) == (1, 1)
    assert (result["phrases"], result["dropped"]) == (2, 1)


def test_a_sentence_not_grounded_or_without_boxes_is_refused():
    with pytest.raises(DataError, match="image a: was it evaluated"):
        phrase_recall([record()], {})
    strange = ScoredBoxes(boxes=[(0, 0, 1, 1)], scores=[1], names=["an emu"])
    with pytest.raises(DataError, match="'an emu' is no phrase"):
        phrase_recall([record()], {"a": strange})
    bare = record(regions=(), provenance={})
    nothing = ScoredBoxes(boxes=[], scores=[], names=[])
    with pytest.raises(DataError, match="undefined"):
        phrase_recall([bare], {"a": nothing})


def entities(folder):
    """(image, sentence) -> its phrases with boxes: (text, type, boxes), read by hand."""
    phrases = defaultdict(list)
    for path in sorted((folder / "Sentences").glob("*.txt")):
        boxes = defaultdict(list)
        for item in ElementTree.parse(folder / "Annotations" / f"{path.stem}.xml").iter("object"):
            sides = [item.findtext(f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax")]
            for name in item.findall("name") if sides[0] else ():
                x0, y0, x1, y1 = map(int, sides)
                boxes[name.text].append((x0 - 1, y0 - 1, x1, y1))
        for number, line in enumerate(path.read_text().splitlines()):
            for chain, kind, text in re.findall(r"\[/EN#(\d+)/([^ /]+)\S* ([^]]+)\]", line):
                if chain in boxes:
                    phrases[path.stem, number].append((text, kind, boxes[chain]))
    return phrases


@pytest.mark.skipif("FLICKR30K" not in os.environ, reason="set FLICKR30K to its folder")
@pytest.mark.parametrize("protocol", ["any-box", "merged-box"])
def test_real_entities_score_as_by_brute_force(protocol):
    folder = Path(os.environ["FLICKR30K"])
    source = open_source(PrepareConfig(source="flickr30k-entities", root=str(folder)))
    records = list(source.records(Dropped()))
    truth, rng = entities(folder), np.random.default_rng(5)
    detections, hits, counts = {}, defaultdict(int), defaultdict(int)
    for own in records:
        image, sentence = own.provenance["file"].split(".")[0], own.provenance["sentence"]
        phrases = truth[image, sentence]
        guesses = []
        for _, kind, boxes in phrases:
            guess = [
                (np.array(boxes[rng.integers(len(boxes))]) + rng.normal(0, spread, 4)).tolist()
                for spread in rng.choice([3, 20, 40, 200], rng.integers(0, 14))
            ]
            guesses.append(guess)
            if protocol == "merged-box":
                x0, y0, x1, y1 = zip(*boxes, strict=True)
                boxes = [(min(x0), min(y0), max(x1), max(y1))]
            guess = np.array(guess, dtype=np.float32).reshape(-1, 4).tolist()
            sane = [box[2] > box[0] and box[3] > box[1] for box in guess]
            for k in (1, 5, 10):
                hit = any(
                    overlap(box, true) >= 0.5
                    for box, fine in zip(guess[:k], sane, strict=False)
                    for true in boxes
                    if fine
                )
                for group in ("", f"_{kind}"):
                    hits[f"recall_at_{k}{group}"] += hit
                    counts[f"recall_at_{k}{group}"] += 1
        detections[own.key] = detection_of(guesses, [text for text, *_ in phrases], rng)
    result = phrase_recall(records, detections, protocol).to_dict()
    assert counts["recall_at_1"] == result["phrases"] > 500
    assert len(counts) > 12  # several types
    for name, hit in hits.items():
        assert result[name] == pytest.approx(hit / counts[name]), name
    assert 0 < result["recall_at_1"] < result["recall_at_5"] < 1
