import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glipv2.data_prep.noun_phrases import noun_phrases
from glipv2.data_prep.toy import toy_records
from glipv2.pipeline.config import PhraseConfig

PIECES = (
    "a",
    "the",
    "red",
    "dog",
    "'s",
    "’s",
    ",",
    ".",
    "-",
    "_",
    "and",
    "two",
    "runs",
    "犬",
    "\0",
)
SAMPLES = Path(__file__).parents[1] / "infra" / "samples"


def texts(caption):
    return [phrase.text for phrase in noun_phrases(caption)]


@pytest.mark.parametrize("set_name", ["toy_grounding", "toy_pairs_truth", "toy_val"])
def test_toy_captions_parse_without_a_single_error(set_name):
    for record in toy_records(set_name, 250, seed=11, size=48):
        said = sorted({region.spans[0] for region in record.regions})
        found = [(phrase.start, phrase.end) for phrase in noun_phrases(record.caption)]
        assert found == said, record.caption


@pytest.mark.parametrize(
    ("caption", "phrases"),
    [
        ("A man in a hat holds two dogs.", ["man", "hat", "dogs"]),
        ("a purple cross near green crosses", ["purple cross", "green crosses"]),
        ("an orange and a plain square", ["orange", "plain square"]),
        ("A boy rides the bike", ["boy", "bike"]),
        ("Smiling boy in a striped shirt", ["Smiling boy", "striped shirt"]),
        ("Wearing hats, they wave", ["hats"]),
        ("Black and white dog on the left side", ["Black and white dog"]),
        ("a photo of a group of people at night", ["people"]),
        ("the man's lap", ["man's lap"]),
        ("A pig wearing a brightly colored harness", ["pig", "brightly colored harness"]),
        ("a low-cut t-shirt is on the chair", ["low-cut t-shirt", "chair"]),
        ("In front of a wall, in the background of the image", ["wall"]),
        ("3 of 12", []),
        ("", []),
    ],
)
def test_phrases_are_the_things_one_could_point_at(caption, phrases):
    assert texts(caption) == phrases


def test_real_alt_texts_give_their_main_things():
    lines = (SAMPLES / "web_pairs" / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
    pairs = [json.loads(line) for line in lines]
    found = {Path(pair["image"]).stem: texts(pair["alt"]) for pair in pairs}
    assert found["ANTHRO_Figure_04_05_026"][0] == "Chimpanzee"
    assert {"small dog", "bucket", "house"} <= set(found["ANTHRO_Figure_18_01_006"])
    assert all(phrases for phrases in found.values())


def test_a_phrase_never_grows_without_bound():
    (phrase,) = noun_phrases("dog " * 40)
    assert len(phrase.text.split()) == PhraseConfig().max_words


@settings(max_examples=300, deadline=None)
@given(
    st.text(max_size=120)
    | st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=25).map(" ".join)
)
def test_spans_are_exact_ordered_and_never_overlap_on_any_text(caption):
    end = 0
    for phrase in noun_phrases(caption):
        assert caption[phrase.start : phrase.end] == phrase.text
        assert end <= phrase.start < phrase.end
        assert phrase.text.strip() == phrase.text
        end = phrase.end
