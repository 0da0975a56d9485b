import dataclasses

import pytest
import torch
from torch import Tensor

from glipv2.model.batch import Detection
from glipv2.model.config import InputConfig, preset
from glipv2.model.glip import build_model
from glipv2.model.grounder import Grounder
from glipv2.model.tokenizer import Tokenizer, tiny_vocab

NAMES = ["red square", "blue ring", "rbc", "teal star"]


@pytest.fixture(scope="module")
def grounder() -> Grounder:
    settings = InputConfig(short_side=64, long_side=96, pad_to=None)
    model = build_model(dataclasses.replace(preset("tiny"), input=settings), seed=0)
    # An untrained model expects nothing; make it find something everywhere.
    torch.nn.init.constant_(model.alignment_head.bias0, -1.0)
    torch.nn.init.normal_(
        model.alignment_head.bias_text, generator=torch.Generator().manual_seed(0)
    )
    return Grounder(model, Tokenizer.from_vocab(tiny_vocab(), 160))


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
        torch.testing.assert_close(a.scores_K, b.scores_K, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(a.boxes_K4, b.boxes_K4, rtol=1e-3, atol=1e-2)
        assert torch.equal(a.labels_K, b.labels_K)


def test_any_batch_size_gives_the_same_boxes(grounder: Grounder, images: list[Tensor]) -> None:
    one_by_one = grounder.detect(images, NAMES, batch_size=1)
    assert sum(len(d.scores_K) for d in one_by_one) > 20
    assert_same(grounder.detect(images, NAMES, batch_size=4), one_by_one)


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
        torch.testing.assert_close(
            a.scores_K[own], b.scores_K[: int(own.sum())], rtol=1e-4, atol=1e-5
        )
    assert_same(grounder.detect(images, NAMES, 4), grounder.detect(images, NAMES))


def test_each_image_may_have_its_own_categories_even_none(
    grounder: Grounder, images: list[Tensor]
) -> None:
    lists = [["rbc"], [], ["blue ring", "rbc"], ["rbc"], ["teal star"]]
    found = grounder.detect(images, lists)
    assert [d.names for d in found] == lists
    assert len(found[1].scores_K) == 0
    assert_same(found[:1], grounder.detect(images[:1], ["rbc"]))
    with pytest.raises(ValueError, match="2 category lists for 5"):
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
