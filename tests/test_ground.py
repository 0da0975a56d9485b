import dataclasses
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from glipv2.jobs.cli import main
from glipv2.model.config import InputConfig, preset
from glipv2.model.glip import build_model
from glipv2.model.tokenizer import Tokenizer, tiny_vocab
from glipv2.model.weights import model_files


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder without any run around it, and two pictures."""
    settings = InputConfig(short_side=64, long_side=64, pad_to=(64, 64))
    config = dataclasses.replace(
        preset("tiny"), input=settings, masks=True, answers=("yes", "no"), captions=False
    )
    model = build_model(config, seed=0)
    torch.nn.init.constant_(model.alignment_head.bias0, 1.0)
    path = tmp_path_factory.mktemp("model")
    for name, data in model_files(model, Tokenizer.from_vocab(tiny_vocab(), 96)).items():
        (path / name).write_bytes(data)
    Image.new("RGB", (40, 30), "red").save(path / "a.jpg")
    Image.new("L", (20, 50), 90).save(path / "b.png")
    return path


def ground(folder: Path, *options: object, images: tuple[str, ...] = ("a.jpg", "b.png")) -> int:
    paths = [folder / image for image in images]
    return main(["ground", "--checkpoint", f"{folder}", "--image", *map(str, (*paths, *options))])


def test_several_images_give_a_list_and_a_picture_each(folder: Path, tmp_path: Path) -> None:
    text = ("--text", "a red square. a blue circle.", "--threshold", 0.3)
    assert ground(folder, *text, "--masks", "--out", tmp_path / "both") == 0
    results = json.loads((tmp_path / "both.json").read_text())
    for result, name, size in zip(results, ("a.jpg", "b.png"), ((40, 30), (20, 50)), strict=True):
        assert result["image"].endswith(name)
        assert result["regions"]
        for region in result["regions"]:
            assert region["phrase"] in ("red square", "blue circle")
            assert region["score"] >= 0.3
            assert coco_mask.decode(region["mask"]).shape == size[::-1]
    for number, factor in ((1, 16), (2, 13)):
        with Image.open(tmp_path / f"both-{number}.png") as picture:
            assert max(picture.size) == factor * (40, 50)[number - 1]

    assert ground(folder, *text, "--out", tmp_path / "one", images=("a.jpg",)) == 0
    single = json.loads((tmp_path / "one.json").read_text())
    boxes = [region["box"] for region in results[0]["regions"]]
    assert [region["box"] for region in single["regions"]] == boxes
    assert (tmp_path / "one.png").exists()


def test_questions_are_answered_and_missing_heads_named(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ground(folder, "--question", "is it red?") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] in ("yes", "no") for line in lines] == [True, True]
    assert ground(folder, "--caption") == 2
    assert "no head for captions" in capsys.readouterr().err


@pytest.mark.parametrize("words", [("--question", "is it red?"), ("--caption",)])
@pytest.mark.parametrize("option", [("--threshold", 0.2), ("--masks",), ("--out", "x")])
def test_options_about_boxes_are_refused_where_there_are_none(
    folder: Path,
    words: tuple[str, ...],
    option: tuple[object, ...],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert ground(folder, *words, *option) == 2
    said = capsys.readouterr().err
    assert f"{option[0]} is about boxes: it goes with --text or --categories" in said
    assert f"not with {words[0]}" in said


def test_a_picture_of_another_kind_is_refused_in_words(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("L", (20, 50), 90).save(folder / "c.gif")
    assert ground(folder, "--caption", images=("c.gif",)) == 2
    said = capsys.readouterr().err
    assert "c.gif: of unknown format: neither JPEG, PNG nor WebP" in said
    assert "image_format" not in said


@pytest.mark.parametrize("threshold", [2, -1, "nan"])
def test_a_threshold_that_is_no_probability_is_refused(
    folder: Path, threshold: object, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ground(folder, "--text", "a square", "--threshold", threshold) == 2
    assert "--threshold must be between 0 and 1" in capsys.readouterr().err
