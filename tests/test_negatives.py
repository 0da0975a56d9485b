from collections import Counter
from dataclasses import replace

import numpy as np

from glipv2.pipeline.negatives import Categories, Negatives, caption_text, detection_text
from glipv2.pipeline.records import Record, Region

COLOURS, SHAPES = ("red", "blue", "green", "yellow"), ("square", "circle", "triangle")
CATEGORIES = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)


def record(task, caption="", **region):
    box = (10.0, 20.0, 41.0, 51.0)
    return Record(
        key="k",
        image=b"",
        image_format="jpg",
        width=80,
        height=60,
        task=task,
        caption=caption,
        regions=(Region(box=box, **region),),
    )


def detection(number):
    return record("detection", category=number)


def grounding(number):
    phrase = CATEGORIES[number % len(CATEGORIES)]
    caption = f"a picture of a {phrase} and number {number}"
    start = caption.index(phrase)
    return record("grounding", caption, spans=((start, start + len(phrase)),), phrase=phrase)


def categories(ids=None):
    costs = tuple(len(name.split()) for name in CATEGORIES)
    return Categories(
        names=CATEGORIES, costs=costs, ids=tuple(ids or range(100, 100 + len(CATEGORIES)))
    )


def texts(count, budget=1000, settings=None, records=None):
    settings = settings or Negatives(max_categories=5, full_share=0.5, packing=1.0, max_captions=3)
    rng = np.random.default_rng(0)
    return [
        detection_text(detection(n % 7), categories(), budget, settings, rng) for n in range(count)
    ]


def test_half_the_detection_prompts_are_full_and_the_others_hold_any_number():
    counts = Counter(len(text.categories) - 1 for text in texts(1000))
    assert set(counts) == {1, 2, 3, 4, 5}
    assert 500 < counts[5] < 700
    assert min(counts.values()) > 60


def test_a_detection_prompt_holds_its_positives_once_at_any_place():
    places = Counter()
    for number, text in enumerate(texts(300)):
        assert len(set(text.categories)) == len(text.categories)
        (phrase,) = text.phrase_of_region
        assert text.categories[phrase] == number % 7
        (span,) = text.prompt.spans[phrase]
        assert text.maskable == (span,)
        places[phrase] += 1
    assert len(places) == 6


def test_negatives_stop_at_the_token_budget_and_positives_come_first():
    for text in texts(100, budget=8):
        assert len(text.categories) <= 3
        assert text.phrase_of_region != [None]
    assert all(text.phrase_of_region == [None] for text in texts(5, budget=1))


def test_a_packed_caption_keeps_its_spans_and_fits_the_budget():
    settings = Negatives(
        max_categories=1, full_share=0.5, packing=0.6, max_captions=4, pack_gold=True
    )
    rng = np.random.default_rng(0)
    neighbours = [f"this is neighbour number {n}." for n in range(9)]
    packed = Counter()
    for number in range(300):
        record = grounding(number)
        text = caption_text(record, neighbours, lambda t: len(t.split()), 40, settings, rng)
        ((start, end),) = text.prompt.spans[0]
        assert text.prompt.text[start:end] == record.regions[0].phrase
        ((start, end),) = text.maskable
        assert text.prompt.text[start:end] == record.caption
        assert len(text.prompt.text.split()) <= 40
        packed[text.prompt.text.count("neighbour")] += 1
    assert 90 < packed[0] < 150
    assert set(packed) == {0, 1, 2, 3, 4}
    for number in range(50):  # the own caption takes 9 of the 20 and a neighbour 6
        text = caption_text(
            grounding(number), neighbours, lambda t: len(t.split()), 20, settings, rng
        )
        assert text.prompt.text.count("neighbour") <= 1


def test_captions_whose_boxes_people_drew_are_packed_on_request_only():
    neighbours = ["a neighbour"] * 3
    web, gold = (record("grounding", "a dog", spans=((2, 5),), score=s) for s in (0.7, 1.0))

    def packed(made, pack_gold):
        settings = Negatives(
            max_categories=1, full_share=0.5, packing=1.0, max_captions=3, pack_gold=pack_gold
        )
        rng = np.random.default_rng(0)
        text = caption_text(made, neighbours, lambda t: len(t.split()), 40, settings, rng)
        return "neighbour" in text.prompt.text

    found = [packed(made, pack_gold) for made in (web, gold) for pack_gold in (True, False)]
    assert found == [True, True, True, False]


def drawn(record, ids=None, count=60):
    settings = Negatives(max_categories=99, full_share=1.0, packing=0.0, max_captions=0)
    rng = np.random.default_rng(1)
    texts = [detection_text(record, categories(ids), 1000, settings, rng) for _ in range(count)]
    return texts, {category for text in texts for category in text.categories}


def test_a_name_of_the_same_category_is_never_a_negative():
    ids = [7 if number in (2, 5) else number + 20 for number in range(len(CATEGORIES))]
    _, names = drawn(detection(2), ids)
    assert names == set(range(len(CATEGORIES))) - {5}


def test_a_crowd_is_neither_learned_nor_a_negative():
    one, crowd = detection(3).regions[0], replace(detection(4).regions[0], crowd=True)
    texts, names = drawn(replace(detection(3), regions=(crowd, one)))
    assert names == set(range(len(CATEGORIES))) - {4}
    assert all(text.phrase_of_region[0] is None for text in texts)
    assert all(text.categories[text.phrase_of_region[1]] == 3 for text in texts)
    alone = grounding(1)
    alone = replace(alone, regions=(replace(alone.regions[0], crowd=True),))
    settings = Negatives(max_categories=1, full_share=1.0, packing=0.0, max_captions=0)
    text = caption_text(alone, [], len, 100, settings, np.random.default_rng(0))
    assert text.phrase_of_region == [None]


def test_of_federated_labels_only_what_was_looked_for_is_a_negative():
    lvis = replace(detection(3), provenance={"neg_categories": [0, 8, 3, 99, "x"]})
    assert drawn(lvis)[1] == {0, 3, 8}
    assert drawn(replace(lvis, provenance={"neg_categories": []}))[1] == {3}
