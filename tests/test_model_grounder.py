import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torch import Tensor

from glipv2.model import postprocess
from glipv2.model.batch import Detection
from glipv2.model.boxes import pairwise_iou
from glipv2.model.config import InputConfig, preset
from glipv2.model.glip import GLIPv2, build_model
from glipv2.model.grounder import Grounder
from glipv2.model.mask_head import paste_masks, region_masks
from glipv2.model.prompts import category_prompt, token_map
from glipv2.model.tokenizer import Tokenizer, tiny_vocab
from glipv2.model.weights import model_files

NAMES = ["red square", "blue ring", "rbc", "teal star"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_vocab(tiny_vocab(), 160)


@pytest.fixture(scope="module")
def grounder(tokenizer: Tokenizer) -> Grounder:
    config = dataclasses.replace(
        preset("tiny"),
        input=InputConfig(short_side=64, long_side=96, pad_to=None),
        masks=True,
        answers=("yes", "no", "two"),
        captions=True,
    )
    return Grounder(finding(build_model(config, seed=0)), tokenizer)


def finding(model: GLIPv2) -> GLIPv2:
    """An untrained model expects nothing; this one finds something everywhere."""
    torch.nn.init.constant_(model.alignment_head.bias0, -1.0)
    torch.nn.init.normal_(
        model.alignment_head.bias_text, generator=torch.Generator().manual_seed(0)
    )
    return model


@pytest.fixture(scope="module")
def images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = [(64, 96), (128, 128), (120, 90), (64, 96), (33, 40)]
    return [
        torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator) for size in sizes
    ]


def assert_same(actual: list[Detection], expected: list[Detection]) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert a.names == b.names
        torch.testing.assert_close(a.scores_K, b.scores_K, rtol=0, atol=1e-5)
        torch.testing.assert_close(a.boxes_K4 / 128, b.boxes_K4 / 128, rtol=0, atol=1e-5)
        assert torch.equal(a.labels_K, b.labels_K)


CAPTIONS = [
    "a red square. a blue ring.",
    ("a red square next to a blue ring", ["blue ring"]),
    ("rbc and a teal star, rbc", ["rbc", "rbc", [(10, 14), (15, 19)]]),
    "",
    "rbc",
]


def test_any_batch_size_gives_the_same_boxes(grounder: Grounder, images: list[Tensor]) -> None:
    for ask, texts in ((grounder.detect, NAMES), (grounder.ground, CAPTIONS)):
        one_by_one = ask(images, texts, batch_size=1)
        assert sum(len(d.scores_K) for d in one_by_one) > 20
        assert_same(ask(images, texts, batch_size=2), one_by_one)
        assert_same(ask(images, texts), one_by_one)


def test_a_saved_model_finds_the_same(
    grounder: Grounder, images: list[Tensor], tmp_path: Path
) -> None:
    for name, data in model_files(grounder.model, grounder.tokenizer).items():
        (tmp_path / name).write_bytes(data)
    expected = grounder.detect(images[:2], NAMES)
    assert_same(Grounder.load(str(tmp_path)).detect(images[:2], NAMES), expected)
    for precision, error in (("bf16", 0.02), ("fp16", 0.002)):
        rough = Grounder.load(f"file://{tmp_path}", precision=precision).detect(images[:2], NAMES)
        for a, b in zip(rough, expected, strict=True):
            assert 0 < (a.scores_K[:20] - b.scores_K[:20]).abs().max() < error
    for precision in ("float16", "bfloat16", "double", "__name__"):
        with pytest.raises(ValueError, match="must be one of fp32, bf16, fp16, not"):
            Grounder.load(str(tmp_path), precision=precision)
    (tmp_path / "vocab.txt").unlink()
    with pytest.raises(ValueError, match="no vocab.txt"):
        Grounder.load(str(tmp_path))


def test_answers_and_captions_do_not_depend_on_the_batch(
    grounder: Grounder, images: list[Tensor]
) -> None:
    images = images[1:4]
    questions = ["is there a red square", "", "how many"]
    answers = grounder.answer(images, questions, top=2, batch_size=1)
    assert [len(own) for own in answers] == [2] * 3
    for one, batched in zip(answers, grounder.answer(images, questions, top=2), strict=True):
        assert [name for name, _ in one] == [name for name, _ in batched]
        assert [p for _, p in one] == pytest.approx([p for _, p in batched], abs=1e-5)
    captions = grounder.caption(images, beams=2, max_words=3, batch_size=1)
    for (text, score), (same, close) in zip(
        captions, grounder.caption(images, beams=2, max_words=3), strict=True
    ):
        assert text == same
        assert score == pytest.approx(close, abs=1e-5)


def test_each_image_and_each_distinct_text_is_encoded_once(
    grounder: Grounder, images: list[Tensor]
) -> None:
    rows: Counter[str] = Counter()
    watched = [grounder.model.image_encoder, grounder.model.text_encoder]
    hooks = [
        module.register_forward_pre_hook(
            lambda module, inputs: rows.update({type(module).__name__: len(inputs[0])})
        )
        for module in watched
    ]
    grounder.detect(images, NAMES, max_categories_per_prompt=1, batch_size=2)
    assert rows == {"ImageEncoder": 5, "TextEncoder": 4}
    rows.clear()
    lists = [NAMES[:2], NAMES[2:], NAMES[:2], [], NAMES]
    grounder.detect(images, lists, batch_size=3)
    assert rows == {"ImageEncoder": 4, "TextEncoder": 3}
    for hook in hooks:
        hook.remove()


def test_a_tower_that_hears_no_text_is_computed_once_for_all_prompts(
    images: list[Tensor], tokenizer: Tokenizer
) -> None:
    config = dataclasses.replace(
        preset("tiny"),
        input=InputConfig(short_side=64, long_side=96, pad_to=None),
        fusion=False,
        masks=True,
    )
    late = Grounder(finding(build_model(config, seed=0)), tokenizer)
    rows: Counter[str] = Counter()
    hook = late.model.blocks[-1].register_forward_pre_hook(lambda *_: rows.update(["fused"]))
    tower = late.model.blocks[-1].maps.register_forward_pre_hook(
        lambda _, inputs: rows.update({"tower": len(inputs[0][0])})
    )
    found = late.detect(images, NAMES, max_categories_per_prompt=1, batch_size=2, masks=True)
    assert rows == {"tower": 5}
    hook.remove()
    tower.remove()
    for label, name in enumerate(NAMES):
        for together, alone in zip(found, late.detect(images, [name], masks=True), strict=True):
            own = together.labels_K == label
            count = int(own.sum())
            torch.testing.assert_close(together.scores_K[own], alone.scores_K[:count])
            torch.testing.assert_close(together.boxes_K4[own], alone.boxes_K4[:count])
            differing = together.masks_KHW[own] != alone.masks_KHW[:count]
            assert differing.sum() <= 0.001 * differing.numel()
    assert sum(len(detection.scores_K) for detection in found) > 100


def test_boxes_are_in_pixels_of_the_image_as_given(
    grounder: Grounder, images: list[Tensor]
) -> None:
    large = [image.repeat_interleave(3, dim=1).repeat_interleave(3, dim=2) for image in images]
    for found, image in zip(grounder.detect(large, NAMES), large, strict=True):
        height, width = image.shape[1:]
        assert found.boxes_K4[:, 2].amax() > 0.6 * width
        limits = torch.tensor([width, height, width, height])
        assert ((found.boxes_K4 >= 0) & (found.boxes_K4 <= limits + 1e-3)).all()


def test_chunks_ask_about_every_category_and_number_them_as_the_caller_does(
    grounder: Grounder, images: list[Tensor]
) -> None:
    found = grounder.detect(images, NAMES, max_categories_per_prompt=1)
    single = grounder.detect(images, ["teal star"])
    for a, b in zip(found, single, strict=True):
        assert a.names == NAMES
        own = a.labels_K == 3
        torch.testing.assert_close(a.scores_K[own], b.scores_K[: int(own.sum())])


def test_one_chunk_that_holds_all_categories_is_a_single_prompt(
    grounder: Grounder, images: list[Tensor]
) -> None:
    at_once = grounder.ground(images, [(". ".join(NAMES), NAMES)] * len(images))
    assert_same(grounder.detect(images, NAMES), at_once)
    assert_same(grounder.detect(images, NAMES, max_categories_per_prompt=4), at_once)


def test_each_image_may_have_its_own_categories_even_none(
    grounder: Grounder, images: list[Tensor]
) -> None:
    lists = [["rbc"], [], ["blue ring", "rbc"], ["rbc"], ["teal star"]]
    found = grounder.detect(images, lists)
    assert [d.names for d in found] == lists
    assert len(found[1].scores_K) == 0
    assert_same(found[:1], grounder.detect(images[:1], ["rbc"]))
    with pytest.raises(ValueError, match="5 images need .* category lists, not 2"):
        grounder.detect(images, lists[:2])


def test_phrases_of_a_caption_are_found_by_their_spans(
    grounder: Grounder, images: list[Tensor]
) -> None:
    caption = "a red square next to a blue ring"
    spans = [[(2, 12)], [(23, 32)]]
    found = grounder.ground(images, [(caption, spans)] * len(images))
    assert all(d.names == ["red square", "blue ring"] for d in found)
    assert {int(x) for d in found for x in d.labels_K} == {0, 1}
    only = grounder.ground(images, [(caption, spans[1:])] * len(images))
    own = found[0].labels_K == 1
    torch.testing.assert_close(only[0].scores_K[: int(own.sum())], found[0].scores_K[own])


def test_the_score_threshold_leaves_the_better_boxes(
    grounder: Grounder, images: list[Tensor]
) -> None:
    everything = grounder.detect(images[:1], NAMES)[0]
    limit = float(everything.scores_K.median())
    kept = grounder.detect(images[:1], NAMES, score_threshold=limit)[0]
    assert 0 < len(kept.scores_K) < len(everything.scores_K)
    assert kept.scores_K.min() >= limit


def test_a_tokenizer_larger_than_the_embedding_table_is_refused(grounder: Grounder) -> None:
    larger = Tokenizer.from_vocab([*tiny_vocab(), "zebrafish"], 160)
    with pytest.raises(ValueError, match="embeddings"):
        Grounder(grounder.model, larger)


def test_of_two_phrases_for_one_place_the_better_keeps_it(
    grounder: Grounder, images: list[Tensor]
) -> None:
    captions = ["a red square. a blue ring. a teal star."] * len(images)
    usual = grounder.ground(images, captions)
    named_once = grounder.ground(images, captions, cross_phrase_nms=0.5)
    for many, few in zip(usual, named_once, strict=True):
        assert 0 < len(few.scores_K) < len(many.scores_K)
        overlap = pairwise_iou(few.boxes_K4, few.boxes_K4).fill_diagonal_(0)
        assert overlap.max() <= 0.5 + 1e-5
        assert few.scores_K[0] == many.scores_K[0]


def test_masks_are_those_of_the_mask_head_in_pixels_of_the_image(
    grounder: Grounder, images: list[Tensor]
) -> None:
    image = images[0]  # 64 x 96 already: not resized
    (found,) = grounder.detect([image], NAMES, max_categories_per_prompt=2, masks=True)
    assert found.masks_KHW is not None and found.masks_KHW.shape[1:] == (64, 96)
    for chunk in (NAMES[:2], NAMES[2:]):
        tokens = grounder.tokenizer.encode(". ".join(chunk))
        ids_1T = torch.tensor([tokens.ids])
        outputs = grounder.model.predict(
            image[None], torch.tensor([[64, 96]]), ids_1T, torch.ones_like(ids_1T).bool()
        )
        words = category_prompt(chunk)
        phrase_tokens = torch.from_numpy(token_map(tokens, words.spans))
        own = torch.tensor([name in chunk for name in found.phrases])
        labels = torch.tensor([chunk.index(n) for n in found.phrases if n in chunk])
        boxes_K4 = found.boxes_K4[own]
        (maps,) = region_masks(grounder.model, outputs, [phrase_tokens], [boxes_K4], [labels])
        expected = paste_masks(maps, boxes_K4, 64, 96)
        assert own.any() and expected.any()
        assert (found.masks_KHW[own] != expected).float().mean() < 1e-4

    large = image.repeat_interleave(3, dim=1).repeat_interleave(3, dim=2)
    (enlarged, nothing) = grounder.detect([large, image], [NAMES, []], masks=True)
    assert enlarged.masks_KHW is not None and enlarged.masks_KHW.shape[1:] == (192, 288)
    assert nothing.masks_KHW is not None and nothing.masks_KHW.shape == (0, 64, 96)


def test_masks_as_run_lengths_are_the_same_and_made_one_by_one(
    grounder: Grounder, images: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = grounder.detect(images, [NAMES, NAMES, [], NAMES, NAMES], masks=True)
    at_once: list[int] = []

    def counting(maps_KSS: Tensor, *others: Any) -> Tensor:
        at_once.append(len(maps_KSS))
        return paste_masks(maps_KSS, *others)

    monkeypatch.setattr(postprocess, "paste_masks", counting)
    names = [NAMES, NAMES, [], NAMES, NAMES]
    found = grounder.detect(images, names, masks="run_lengths", max_boxes=None)
    assert set(at_once) == {1}
    for one, other in zip(found, plain, strict=True):
        assert one.masks_KHW is None and one.run_lengths_K == other.run_lengths()
        assert one.to_dict() == other.to_dict()
    assert sum(len(one.run_lengths_K or ()) for one in found) == len(at_once) > 100


def test_a_detection_becomes_json_and_back(grounder: Grounder, images: list[Tensor]) -> None:
    found = grounder.detect(images[:1], NAMES, masks=True)[0]
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["names"] == NAMES
    regions = plain["regions"]
    assert [region["phrase"] for region in regions] == found.phrases
    assert np.allclose([region["box"] for region in regions], found.boxes_K4, atol=0.006)
    assert np.allclose([region["score"] for region in regions], found.scores_K, atol=6e-5)
    masks = [coco_mask.decode(region["mask"]) for region in regions]
    assert found.masks_KHW is not None and np.array_equal(masks, found.masks_KHW.numpy())
    assert "mask" not in grounder.detect(images[:1], NAMES)[0].to_dict()["regions"][0]


def test_any_kind_of_image_gives_the_same_boxes(grounder: Grounder, images: list[Tensor]) -> None:
    image = images[1]
    array = image.permute(1, 2, 0).numpy()
    found = grounder.detect([image, array, Image.fromarray(array), image.float() / 255], NAMES)
    assert_same(found[1:], found[:1] * 3)


def test_heads_that_a_model_lacks_are_missed_by_name(images: list[Tensor]) -> None:
    tokenizer = Tokenizer.from_vocab(tiny_vocab(), 96)
    plain = Grounder(build_model(preset("tiny"), seed=0), tokenizer)
    with pytest.raises(ValueError, match="no mask head"):
        plain.detect(images, NAMES, masks=True)
    with pytest.raises(ValueError, match="no head for questions"):
        plain.answer(images[:1], ["what is it?"])
    with pytest.raises(ValueError, match="no head for captions"):
        plain.caption(images[:1])


def test_calls_that_make_no_sense_are_refused(grounder: Grounder, images: list[Tensor]) -> None:
    with pytest.raises(ValueError, match="5 images need a list of as many captions, not a text"):
        grounder.ground(images, "a red square")
    with pytest.raises(ValueError, match="5 images need a list of as many questions, not 1"):
        grounder.answer(images, ["what is it?"])
    with pytest.raises(ValueError, match="'a heron' is not in the caption"):
        grounder.ground(images[:1], [("a red square", ["a heron"])])
    with pytest.raises(ValueError, match="categories must be a list, not the text 'red square'"):
        grounder.detect(images, "red square")
    with pytest.raises(ValueError, match="category 1 of 2 is blank"):
        grounder.detect(images, ["rbc", " "])
    with pytest.raises(ValueError, match="max_categories_per_prompt must be positive"):
        grounder.detect(images, NAMES, max_categories_per_prompt=0)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        grounder.detect(images, NAMES, batch_size=-1)
    with pytest.raises(ValueError, match="images must be a list"):
        grounder.detect(images[0], NAMES)
    with pytest.raises(TypeError, match="images must be a list, not of type generator"):
        grounder.detect((image for image in images), NAMES)
    for top in (0, -1):
        with pytest.raises(ValueError, match=f"top must be at least 1, not {top}"):
            grounder.answer(images[:1], ["what is it?"], top=top)
    with pytest.raises(ValueError, match="image 1: NaN"):
        grounder.detect([images[0], torch.full((3, 8, 8), torch.nan)], NAMES)
    assert grounder.detect([], NAMES) == grounder.ground([], []) == []


@pytest.mark.parametrize(
    ("method", "texts", "message"),
    [
        ("ground", ["rbc", None], "caption 1, of type NoneType, must be a text or a pair"),
        ("ground", ["rbc", (None, [])], "caption 1: text 0 of 1 is of type NoneType, not a text"),
        ("ground", ["rbc", ("a ring", None)], "caption 1, of type tuple, .*each phrase its words"),
        ("ground", ["rbc", ("a ring", [(2, 6)])], "caption 1, of type tuple"),
        ("ground", ["rbc", ("a ring", [[(2, 9)]])], r"caption 1: span \[2, 9\) is outside"),
        ("ground", None, "as many captions, not of type NoneType"),
        ("answer", ["how many", None], "question 1 of 2 is of type NoneType, not a text"),
        ("answer", ["how many", 3], "question 1 of 2 is of type int"),
        ("detect", [None], "category 0 of 1 is of type NoneType, not a text"),
        ("detect", ["rbc", 7], "category 1 of 2 is of type int"),
        ("detect", [["rbc"], ["ring", None]], "image 1: category 1 of 2 is of type NoneType"),
        ("detect", [["rbc"], None], "category list 1 is of type NoneType, not a list"),
        ("detect", [["rbc"], "ring"], "category list 1 is of type str, not a list"),
        ("detect", None, "categories must be a list, not of type NoneType"),
    ],
)
def test_what_is_no_text_is_named_with_its_place(
    grounder: Grounder, images: list[Tensor], method: str, texts: object, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(grounder, method)(images[:2], texts)
