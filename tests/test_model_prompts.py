import numpy as np
import pytest

from glipv2.model.prompts import (
    caption_prompt,
    category_prompt,
    clean_category,
    grounding_prompt,
    locate,
    split_categories,
    token_map,
)
from glipv2.model.tokenizer import Tokenizer, tiny_vocab


@pytest.fixture
def tokenizer() -> Tokenizer:
    return Tokenizer.from_vocab(tiny_vocab(), max_tokens=20)


def test_categories_become_one_text_with_a_span_each() -> None:
    prompt = category_prompt(["red square", "blue_ring (toy)"])
    assert prompt.text == "red square. blue ring"
    assert prompt.phrases == ["red square", "blue ring"]
    assert category_prompt([]).text == ""


def test_a_name_that_is_only_a_note_is_kept() -> None:
    assert clean_category("(other)") == "(other)"


def test_every_token_of_a_phrase_is_positive_and_no_other(tokenizer: Tokenizer) -> None:
    prompt = category_prompt(["red square", "ring", "red square"])
    tokens = tokenizer.encode(prompt.text)
    words = np.array([tokenizer.vocabulary[i] for i in tokens.ids])
    positive_PT = token_map(tokens, prompt.spans)
    assert [list(words[row]) for row in positive_PT] == [["red", "square"], ["ring"], ["red", "square"]]  # fmt: skip  # noqa: E501
    assert not (positive_PT[0] & positive_PT[2]).any()


def test_a_phrase_may_be_spread_over_several_spans(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("red and blue rings")
    assert token_map(tokens, [[(0, 3), (13, 18)]])[0].nonzero()[0].tolist() == [1, 4]


def test_spans_on_white_space_fall_inwards(tokenizer: Tokenizer) -> None:
    caption = "a  red square ."
    tokens = tokenizer.encode(caption)
    assert token_map(tokens, [[(1, 14)]])[0].nonzero()[0].tolist() == [2, 3]


def test_a_phrase_cut_off_with_the_end_of_the_text_has_no_tokens(tokenizer: Tokenizer) -> None:
    caption = "a " * 30 + "ring"
    assert not token_map(tokenizer.encode(caption), [[(60, 64)]]).any()


def test_a_span_outside_the_caption_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[2, 9\)"):
        caption_prompt("a ring", [[(2, 9)]])


def test_chunks_hold_every_category_once_in_order_and_fit(tokenizer: Tokenizer) -> None:
    names = [f"{colour} ring" for colour in ("red", "blue", "green", "teal", "pink")] * 3
    chunks = split_categories(names, tokenizer)
    assert [i for chunk in chunks for i in chunk] == list(range(15))
    for chunk in chunks:
        assert not tokenizer.encode(category_prompt([names[i] for i in chunk]).text).truncated
    too_long = [names[i] for i in chunks[0]] + [names[chunks[1][0]]]
    assert tokenizer.encode(category_prompt(too_long).text).truncated


def test_chunks_respect_a_wanted_size(tokenizer: Tokenizer) -> None:
    assert [len(c) for c in split_categories(["ring"] * 5, tokenizer, 2)] == [2, 2, 1]
    assert split_categories([], tokenizer) == []


@pytest.mark.parametrize(
    ("caption", "phrases"),
    [
        ("a red square. a blue circle.", ["a red square", "a blue circle"]),
        (" a dog .a 3.5 mm plug. . ", ["a dog", "a 3.5 mm plug"]),
        ("one thing", ["one thing"]),
        ("", []),
        (" ... ", []),
    ],
)
def test_the_sentences_of_a_bare_caption_are_its_phrases(caption: str, phrases: list[str]) -> None:
    prompt = grounding_prompt(caption)
    assert prompt.text == caption
    assert prompt.phrases == phrases


def test_phrases_are_found_as_whole_words_in_any_case_and_spacing() -> None:
    caption = "Cats near a  Big Cat, a cat"
    assert grounding_prompt((caption, ["big cat", "A CAT"])).phrases == ["Big Cat", "a cat"]
    assert locate(caption, ["cat"]) == [(17, 20)]
    for absent in ("ca", "cat a", "dog", " "):
        with pytest.raises(ValueError, match=f"phrase '{absent}' is not in"):
            grounding_prompt((caption, ["big cat", absent]))
    with pytest.raises(ValueError, match="must be a list"):
        grounding_prompt((caption, "cat"))


def test_repeated_words_are_dealt_to_the_phrases_one_by_one() -> None:
    caption = "a red square, a square and a blue square"
    assert locate(caption, ["square", "square", "red square"]) == [(16, 22), (34, 40), (2, 12)]
    assert locate(caption, ["square"] * 4) == [(6, 12), (16, 22), (34, 40), (6, 12)]


def test_words_and_spans_may_be_mixed() -> None:
    prompt = grounding_prompt(("a red square", [[(2, 5), (6, 12)], "red", [(0, 1)]]))
    assert prompt.spans == (((2, 5), (6, 12)), ((2, 5),), ((0, 1),))
