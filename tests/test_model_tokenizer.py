import pickle

import pytest

from glipv2.model.config import preset
from glipv2.model.tokenizer import Tokenizer, tiny_vocab


@pytest.fixture
def tokenizer() -> Tokenizer:
    return Tokenizer.from_vocab(tiny_vocab(), max_tokens=160)


def test_the_tiny_vocabulary_fits_the_tiny_model() -> None:
    assert len(tiny_vocab()) == preset("tiny").text_encoder.vocab_size


def test_words_of_the_toy_world_and_of_blood_cells_are_whole(tokenizer: Tokenizer) -> None:
    text = "small striped purple diamonds above a teal star RBC WBC Platelets"
    pieces = [tokenizer.vocabulary[i] for i in tokenizer.encode(text).ids[1:-1]]
    assert pieces == text.lower().split()


def test_offsets_point_at_the_words(tokenizer: Tokenizer) -> None:
    text = "A  Ghanaian woman's bowl, 1,200 years old (café)!"
    tokens = tokenizer.encode(text)
    assert tokenizer.unknown_id not in tokens.ids
    for number, (start, end) in list(zip(tokens.ids, tokens.offsets, strict=True))[1:-1]:
        piece = tokenizer.vocabulary[number].removeprefix("##")
        assert text[start:end].lower().replace("é", "e") == piece


def test_text_is_framed_and_cut_to_the_limit() -> None:
    tokenizer = Tokenizer.from_vocab(tiny_vocab(), max_tokens=5)
    tokens = tokenizer.encode("a red square on a blue ring")
    assert tokens.truncated
    assert len(tokens.ids) == len(tokens.offsets) == 5
    assert (tokens.ids[0], tokens.ids[-1]) == (tokenizer.cls_id, tokenizer.sep_id)
    assert tokens.offsets[0] == tokens.offsets[-1] == (0, 0)
    assert not tokenizer.encode("a red square").truncated


def test_an_empty_text_is_two_special_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("").ids == [tokenizer.cls_id, tokenizer.sep_id]


def test_a_copy_in_another_process_reads_the_same(tokenizer: Tokenizer) -> None:
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode("a large teal ring") == tokenizer.encode("a large teal ring")


def test_a_vocabulary_without_special_tokens_or_with_doubles_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[MASK\]"):
        Tokenizer.from_vocab(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a"], max_tokens=16)
    with pytest.raises(ValueError, match="twice"):
        Tokenizer.from_vocab([*tiny_vocab(), "red"], max_tokens=16)
