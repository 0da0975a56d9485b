import json

import pytest
import torch

from glipv2.model.config import preset
from glipv2.model.glip import build_model
from glipv2.model.tokenizer import Tokenizer, tiny_vocab
from glipv2.model.weights import model_files, model_from_files

MAX_TOKENS = preset("tiny").text_encoder.max_tokens


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    tokenizer = Tokenizer.from_vocab(tiny_vocab(), MAX_TOKENS)
    return model_files(build_model(preset("tiny"), seed=4), tokenizer)


def test_files_give_the_same_model_and_tokenizer_back(files: dict[str, bytes]) -> None:
    model, tokenizer = model_from_files(files)
    original = build_model(preset("tiny"), seed=4)
    assert model.config == original.config
    for (name, a), b in zip(
        model.state_dict().items(), original.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name
    assert tokenizer.vocabulary == tiny_vocab() and tokenizer.max_tokens == MAX_TOKENS
    assert model_files(model, tokenizer) == files


def test_a_missing_file_is_named(files: dict[str, bytes]) -> None:
    with pytest.raises(ValueError, match=r"vocab\.txt"):
        model_from_files({name: data for name, data in files.items() if name != "vocab.txt"})


def test_weights_of_another_shape_are_refused_by_name(files: dict[str, bytes]) -> None:
    config = json.loads(files["config.json"])
    config["contrast_width"] = 16
    with pytest.raises(ValueError, match=r"contrast_head\.project_region\.bias"):
        model_from_files({**files, "config.json": json.dumps(config).encode()})


@pytest.mark.parametrize(
    ("name", "content"),
    [("model.safetensors", b"x"), ("config.json", b"{"), ("config.json", b"[]")],
)
def test_a_damaged_file_is_named(files: dict[str, bytes], name: str, content: bytes) -> None:
    with pytest.raises(ValueError, match=name):
        model_from_files({**files, name: content})
