"""What a checkpoint argument means, to the pipeline and to `Grounder.load` alike."""

import dataclasses
from pathlib import Path

import pytest
import torch

from glipv2.model.config import InputConfig, preset
from glipv2.model.folders import COMMIT, step_url
from glipv2.model.glip import GLIPv2, build_model
from glipv2.model.grounder import Grounder
from glipv2.model.tokenizer import Tokenizer, tiny_vocab
from glipv2.model.weights import model_files
from glipv2.pipeline import storage
from glipv2.pipeline.checkpoint import (
    load_model,
    read_model,
    resolve_checkpoint,
    weights_identity,
    write_folder,
)
from glipv2.pipeline.errors import DataError


def files(seed: int) -> dict[str, bytes]:
    settings = InputConfig(short_side=64, long_side=64, pad_to=(64, 64))
    model = build_model(dataclasses.replace(preset("tiny"), input=settings), seed)
    return model_files(model, Tokenizer.from_vocab(tiny_vocab(), 96))


@pytest.fixture(scope="module", params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run with two steps, the newer one of seed 2, a step without commit, and a plain model."""
    local = request.param == "local"
    url = str(tmp_path_factory.mktemp("folders")) if local else "memory://folders"
    write_folder(step_url(f"{url}/run", 9), files(1), 9)
    write_folder(step_url(f"{url}/run", 10), {**files(2), "trainer.json": b"{}"}, 10)
    storage.write_bytes(f"{url}/run/checkpoints/step-000011/model.safetensors", b"cut off")
    for name, data in files(3).items():
        storage.write_bytes(f"{url}/plain/{name}", data)
    storage.write_bytes(f"{url}/part/config.json", files(3)["config.json"])
    storage.write_bytes(f"{url}/other/notes.txt", b"no model")
    return url


def first(model: GLIPv2) -> float:
    return model.alignment_head.project_text.weight[0, 0].item()


@pytest.mark.parametrize(
    ("folder", "meant", "seed"),
    [
        ("run", "run/checkpoints/step-000010", 2),
        ("run/", "run/checkpoints/step-000010", 2),
        ("run/checkpoints/step-000009", "run/checkpoints/step-000009", 1),
        ("plain", "plain", 3),
    ],
)
def test_run_step_and_plain_folder_mean_the_same_to_every_reader(
    root: str, folder: str, meant: str, seed: int
) -> None:
    url = f"{root}/{folder}"
    expected = first(build_model(preset("tiny"), seed))
    assert resolve_checkpoint(url) == f"{root}/{meant}"
    assert first(load_model(url)[0]) == expected
    grounder = Grounder.load(url if "://" in url else Path(url))
    assert first(grounder.model) == first(GLIPv2.from_pretrained(url)) == expected
    image = torch.zeros(3, 20, 20, dtype=torch.uint8)
    assert grounder.detect([image], ["ring"])[0].names == ["ring"]


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        (
            "nowhere",
            "no checkpoint in .*nowhere: it is no folder, or empty. Looked for checkpoints/",
        ),
        ("other", "other: it holds notes.txt. Looked for .* for model.safetensors, "),
        ("other", "Give another folder, or train first$"),
        ("part", r"part is not the folder of a model: it has no model\.safetensors, vocab\.txt"),
    ],
)
def test_a_folder_without_a_model_is_told_what_would_do(
    root: str, folder: str, message: str
) -> None:
    with pytest.raises(DataError, match=message) as refused:
        load_model(f"{root}/{folder}")
    with pytest.raises(ValueError, match=message) as same:
        Grounder.load(f"{root}/{folder}")
    assert str(refused.value) == str(same.value)


def test_a_plain_folder_is_known_by_its_weights(root: str) -> None:
    committed = f"{root}/run/checkpoints/step-000009"
    copy = f"{root}/copy"
    for name, data in read_model(committed, "trainer.json").items():
        storage.write_bytes(f"{copy}/{name}", data)
    assert weights_identity(committed)[0] == 9 and weights_identity(copy)[0] == 0
    assert weights_identity(copy)[1] == weights_identity(committed)[1]
    assert weights_identity(copy) != weights_identity(f"{root}/plain")
    assert read_model(copy) == read_model(committed)
    assert "trainer.json" in read_model(f"{root}/run/checkpoints/step-000010", "trainer.json")


def test_weights_that_were_altered_after_their_commit_are_refused(root: str) -> None:
    url = step_url(f"{root}/altered", 1)
    write_folder(url, files(1), 1)
    storage.write_bytes(f"{url}/model.safetensors", files(2)["model.safetensors"])
    with pytest.raises(DataError, match=r"model\.safetensors differs from its commit record"):
        load_model(url)
    storage.delete(f"{url}/{COMMIT}")
    storage.write_bytes(f"{url}/model.safetensors", b"x")
    with pytest.raises(DataError, match=r"step-000001: model\.safetensors is damaged"):
        load_model(url)
