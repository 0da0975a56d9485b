import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch import Tensor

from glipv2.model.batch import Batch, Collectives
from glipv2.model.config import LossWeights, preset
from glipv2.model.glip import GLIPv2, build_model
from glipv2.model.tokenizer import SPECIAL_TOKENS, Tokenizer, tiny_vocab
from glipv2.model.understanding import (
    TERMS,
    answer,
    answer_loss,
    beam_search,
    caption_loss,
    generate,
)

ANSWERS = ("yes", "no", "red", "two")
# A large fusion scale, so that what the words read in the image is not lost in rounding.
CONFIG = dataclasses.replace(preset("tiny"), answers=ANSWERS, captions=True, fusion_scale=0.5)
TOKENIZER = Tokenizer.from_vocab(tiny_vocab(), CONFIG.text_encoder.max_tokens)
TEXTS = ("a small red square", "two circles", "a dotted ring above the green star")


@pytest.fixture(scope="module")
def model() -> GLIPv2:
    return build_model(CONFIG, seed=0).eval()


def make_batch(task: Literal["grounding", "vqa", "captioning"], rows: slice = slice(None)) -> Batch:
    """Three noise images with texts of different lengths, or some of them, padded as they need."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8, generator=generator)[rows]
    targets = torch.tensor([[1, 0, 0.3, 0], [0, 0.6, 0, 0], [0.9, 0, 0, 1]])[rows]
    ids = [TOKENIZER.encode(text).ids for text in TEXTS[rows]]
    B, T = len(ids), max(len(row) for row in ids)
    tokens = torch.tensor([row + [TOKENIZER.pad_id] * (T - len(row)) for row in ids])
    return Batch(
        images_B3HW=images,
        sizes_B2=torch.tensor([[64, 64], [60, 50], [40, 64]])[rows],
        tokens_BT=tokens,
        token_mask_BT=tokens != TOKENIZER.pad_id,
        mlm_labels_BT=torch.full((B, T), -100),
        boxes_BN4=torch.zeros(B, 0, 4),
        box_mask_BN=torch.zeros(B, 0, dtype=torch.bool),
        positive_BNT=torch.zeros(B, 0, T, dtype=torch.bool),
        box_category_BN=torch.zeros(B, 0, dtype=torch.int64),
        token_category_BT=torch.full((B, T), -1),
        keys=[f"toy/{i}" for i in range(B)],
        task=task,
        answers_BV=targets if task == "vqa" else None,
    )


def word_logits(model: GLIPv2, batch: Batch, tokens_BT: Tensor, causal: bool) -> Tensor:
    assert model.caption_head is not None
    with torch.no_grad():
        outputs = model.predict(
            batch.images_B3HW, batch.sizes_B2, tokens_BT, batch.token_mask_BT, causal
        )
        return model.caption_head(outputs.fused_words_BTD)


@pytest.mark.parametrize("causal", [False, True])
def test_words_are_fused_alone_as_they_are_with_the_boxes(model: GLIPv2, causal: bool) -> None:
    batch = make_batch("vqa")
    text = batch.tokens_BT, batch.token_mask_BT
    found = []
    for alone in (False, True):
        pyramid = model.encode_images(batch.images_B3HW, batch.sizes_B2)
        words = model.encode_words(*text, causal)
        inputs = pyramid, words, batch.token_mask_BT, causal
        fused = model.fuse_words(*inputs) if alone else model.fuse(*inputs).fused_words_BTD
        found.append([fused, *torch.autograd.grad(fused.cos().sum(), [*pyramid, words])])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("t", [1, 3, 5])
def test_no_word_hears_a_later_one_unless_attention_is_open(model: GLIPv2, t: int) -> None:
    batch = make_batch("captioning", slice(2, 3))
    changed = batch.tokens_BT.clone()
    changed[:, t] = 300
    moved = {}
    for causal in (True, False):
        before, after = (
            word_logits(model, batch, tokens, causal) for tokens in (batch.tokens_BT, changed)
        )
        moved[causal] = (after - before).abs().amax(dim=(0, 2))
    assert moved[True][:t].max() < 1e-6
    assert moved[True][t:].min() > 1e-3
    assert moved[False][:t].min() > 1e-3


def test_text_reaches_earlier_words_through_the_image_alone_if_the_image_reads_it(
    model: GLIPv2, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the second mask of facts A.13 is for: a causal mask on the text is not enough."""
    batch = make_batch("captioning", slice(2, 3))
    changed = batch.tokens_BT.clone()
    changed[:, 5] = 300
    for block in model.blocks:
        attention = block.attention.forward  # type: ignore[union-attr]
        monkeypatch.setattr(
            block.attention,
            "forward",
            lambda *inputs, attention=attention, **_: attention(*inputs),
        )
    before, after = (word_logits(model, batch, x, True) for x in (batch.tokens_BT, changed))
    assert (after - before)[:, :5].abs().max() > 1e-4


def test_the_words_of_a_caption_see_the_image(model: GLIPv2) -> None:
    batch = make_batch("captioning")
    before = word_logits(model, batch, batch.tokens_BT, True)
    batch.images_B3HW = 255 - batch.images_B3HW
    after = word_logits(model, batch, batch.tokens_BT, True)
    assert (after - before).abs().amax(dim=2)[batch.token_mask_BT].min() > 1e-2


def test_answer_loss_and_its_gradient_equal_the_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, generator=generator) * 3
    targets = torch.rand(3, 5, generator=generator)
    logits.requires_grad_()
    loss = answer_loss(logits, targets)
    (gradient,) = torch.autograd.grad(loss, logits)
    total = 0.0
    for b, v in itertools.product(range(3), range(5)):
        share = 1 / (1 + math.exp(-logits[b, v].item()))
        y = targets[b, v].item()
        total -= y * math.log(share) + (1 - y) * math.log(1 - share)
        assert gradient[b, v].item() == pytest.approx((share - y) / 3, rel=1e-4, abs=1e-7)
    assert loss.item() == pytest.approx(total / 3, rel=1e-6)


def test_a_question_batch_has_the_one_term_answer(model: GLIPv2) -> None:
    batch = make_batch("vqa")
    assert model.answer_head is not None and batch.answers_BV is not None
    outputs = model.predict(batch.images_B3HW, batch.sizes_B2, batch.tokens_BT, batch.token_mask_BT)
    probability = model.answer_head(outputs.fused_words_BTD).double().sigmoid()
    y = batch.answers_BV.double()
    expected = -(y * probability.log() + (1 - y) * (1 - probability).log()).sum() / 3
    terms = model(batch)
    assert set(terms) == {"answer"}
    assert terms["answer"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_caption_batch_has_the_one_term_caption(model: GLIPv2) -> None:
    batch = make_batch("captioning")
    shares = word_logits(model, batch, batch.tokens_BT, True).double().log_softmax(dim=2)
    ids = [TOKENIZER.encode(text).ids for text in TEXTS]
    pairs = [(b, t) for b, row in enumerate(ids) for t in range(len(row) - 1)]
    expected = -sum(shares[b, t, ids[b][t + 1]].item() for b, t in pairs) / len(pairs)
    terms = model(batch)
    assert set(terms) == {"caption"}
    assert terms["caption"].item() == pytest.approx(expected, rel=1e-5)


def test_two_ranks_with_unequal_captions_learn_what_one_rank_learns(model: GLIPv2) -> None:
    head = model.caption_head
    assert head is not None
    batch = make_batch("captioning")
    words = torch.randn(
        *batch.tokens_BT.shape,
        CONFIG.text_encoder.width,
        generator=torch.Generator().manual_seed(0),
    )
    counts = batch.token_mask_BT[:, 1:].sum(dim=1).float()
    mean = Collectives(mean=lambda own: torch.stack([counts[:1].sum(), counts[1:].sum()]).mean())
    ranks = [
        caption_loss(head, words[r], batch.tokens_BT[r], batch.token_mask_BT[r], mean)
        for r in (slice(0, 1), slice(1, 3))
    ]
    whole = caption_loss(head, words, batch.tokens_BT, batch.token_mask_BT, Collectives())
    weight = head.decoder.weight
    torch.testing.assert_close(sum(ranks) / 2, whole)
    torch.testing.assert_close(
        torch.autograd.grad(sum(ranks) / 2, weight, retain_graph=True),
        torch.autograd.grad(whole, weight),
    )


@pytest.mark.parametrize("task", ["vqa", "captioning"])
def test_micro_batches_of_a_step_teach_what_the_whole_does(
    model: GLIPv2, task: Literal["vqa", "captioning"]
) -> None:
    whole = make_batch(task)
    rows = [slice(i, i + 1) for i in range(len(TEXTS))]  # of unequal length
    micro = [make_batch(task, row) for row in rows]
    counts = torch.stack([model.counts(batch) for batch in micro]).mean(dim=0)
    term = TERMS[task]
    losses = [model(batch, Collectives(step_counts=counts))[term].item() for batch in micro]
    assert sum(losses) / len(losses) == pytest.approx(model(whole)[term].item(), rel=1e-5)


@pytest.mark.parametrize("task", ["grounding", "vqa", "captioning"])
@pytest.mark.parametrize("off", [False, True])
def test_every_parameter_is_connected_in_every_task(
    model: GLIPv2, task: Literal["grounding", "vqa", "captioning"], off: bool
) -> None:
    weights = LossWeights(answer=0, caption=0) if off else LossWeights()
    terms = model(make_batch(task), weights=weights)
    total = torch.stack(list(terms.values())).sum()
    if off and task != "grounding":
        assert total == 0
    # Raises if a parameter is not part of the graph.
    found = torch.autograd.grad(total, list(model.parameters()))
    assert all(gradient.isfinite().all() for gradient in found)


def test_a_batch_for_a_head_that_is_missing_is_refused(model: GLIPv2) -> None:
    bare = build_model(preset("tiny"), seed=0)
    with pytest.raises(ValueError, match=r"no head for questions: model\.answers is empty"):
        bare(make_batch("vqa"))
    with pytest.raises(ValueError, match=r"no head for captions: model\.captions is false"):
        bare(make_batch("captioning"))
    batch = make_batch("vqa")
    batch.answers_BV = torch.zeros(3, 7)
    with pytest.raises(ValueError, match=r"shape \(3, 4\), the batch has \(3, 7\)"):
        model(batch)
    with pytest.raises(ValueError, match=r"need model\.fusion"):
        dataclasses.replace(preset("tiny"), captions=True, fusion=False)


def test_answers_come_best_first_and_do_not_depend_on_the_batch(model: GLIPv2) -> None:
    def ask(batch: Batch, top: int) -> list[list[tuple[str, float]]]:
        inputs = (batch.images_B3HW, batch.sizes_B2, batch.tokens_BT, batch.token_mask_BT)
        return answer(model, model.predict(*inputs).fused_words_BTD, top)

    together = ask(make_batch("vqa"), top=9)
    for row in together:
        assert sorted(name for name, _ in row) == sorted(ANSWERS)
        assert [p for _, p in row] == sorted((p for _, p in row), reverse=True)
    for i in range(3):
        (alone,) = ask(make_batch("vqa", slice(i, i + 1)), top=2)
        assert [name for name, _ in alone] == [name for name, _ in together[i][:2]]
        assert alone[0][1] == pytest.approx(together[i][0][1], rel=1e-4)


# --- beam search on score functions whose every prefix has its own odds

END, V = 3, 4
Odds = Callable[[int, tuple[int, ...]], Tensor]


def random_odds(image: int, prefix: tuple[int, ...]) -> Tensor:
    seed = int("".join(map(str, (image + 1, *prefix))))
    logits = torch.randn(V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (2 * logits).log_softmax(0)


def as_step(odds: Odds) -> Callable[[Tensor], Tensor]:
    return lambda tokens_BKT: torch.stack(
        [
            torch.stack([odds(image, tuple(text[1:])) for text in texts])
            for image, texts in enumerate(tokens_BKT.tolist())
        ]
    )


def exhaustive(odds: Odds, image: int, max_words: int, penalty: float) -> tuple[list[int], float]:
    def total(words: tuple[int, ...]) -> float:
        full = (*words, END)
        return sum(odds(image, full[:t])[full[t]].item() for t in range(len(full)))

    texts = [
        words for n in range(max_words + 1) for words in itertools.product(range(END), repeat=n)
    ]
    best = max(texts, key=lambda words: total(words) / (len(words) + 1) ** penalty)
    return list(best), total(best) / (len(best) + 1)


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize(("max_words", "beams"), [(1, V), (2, 1 + 3 * V), (3, 1 + 3 + 9 * V)])
def test_a_beam_as_wide_as_the_tree_finds_the_best_text(
    max_words: int, beams: int, penalty: float
) -> None:
    start = torch.zeros(3, dtype=torch.int64)
    found = beam_search(as_step(random_odds), start, END, beams, max_words, penalty)
    for image, (words, mean) in enumerate(found):
        best, expected = exhaustive(random_odds, image, max_words, penalty)
        assert words == best
        assert mean == pytest.approx(expected, rel=1e-5)


def test_one_beam_is_greedy() -> None:
    start = torch.zeros(20, dtype=torch.int64)
    lengths = set()
    for image, (words, _) in enumerate(beam_search(as_step(random_odds), start, END, 1, 5)):
        greedy: list[int] = []
        while len(greedy) < 5 and (best := int(random_odds(image, tuple(greedy)).argmax())) != END:
            greedy.append(best)
        assert words == greedy
        lengths.add(len(words))
    assert {0, 5} <= lengths  # some stopped at once, some were cut


def test_two_beams_find_what_greed_misses() -> None:
    """The likeliest first word leads to even odds, the second likeliest to a sure text."""

    def odds(image: int, prefix: tuple[int, ...]) -> Tensor:
        share = {(): [0.5, 0.4, 0.05, 0.05], (1,): [0.01, 0.01, 0.01, 0.97]}
        return torch.tensor(share.get(prefix, [0.25] * V)).log()

    start = torch.zeros(1, dtype=torch.int64)
    (narrow,), (wide,) = (beam_search(as_step(odds), start, END, beams, 3) for beams in (1, 2))
    assert narrow[0][0] == 0
    assert wide == ([1], pytest.approx((math.log(0.4) + math.log(0.97)) / 2))


def test_a_text_that_ended_is_not_lost_to_livelier_ones() -> None:
    """After two steps both open texts are likelier than the ended one, but they end badly."""

    def odds(_: int, prefix: tuple[int, ...]) -> Tensor:
        share = {(): [0.7, 0.04, 0.01, 0.25], (0,): [0.5, 0.48, 0.01, 0.01]}
        return torch.tensor(share.get(prefix, [0.5, 0.3, 0.1999, 0.0001])).log()

    (found,) = beam_search(as_step(odds), torch.zeros(1, dtype=torch.int64), END, 2, 2)
    assert found == ([], pytest.approx(math.log(0.25)))


def test_an_impossible_end_takes_no_place_in_the_beam() -> None:
    """At first only the word 1 is possible; later three places are needed to find the best text."""
    shares = {(): [0.0, 1.0], (1,): [0.05, 0.95], (1, 1): [0.4, 0.6], (1, 1, 1): [0.01, 0.99]}
    step = as_step(lambda _, prefix: torch.tensor(shares.get(prefix, [0.5, 0.5])).log())
    (found,) = beam_search(step, torch.ones(1, dtype=torch.int64), end=0, beams=3, max_words=3)
    assert found == ([1, 1], pytest.approx(math.log(0.95 * 0.4) / 3))


# --- captions of a whole model


def captions(model: GLIPv2, rows: slice = slice(None), **asked: float) -> list[tuple[str, float]]:
    batch = make_batch("captioning", rows)
    pyramid = model.encode_images(batch.images_B3HW, batch.sizes_B2)
    return generate(model, TOKENIZER, pyramid, **asked)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def talker() -> GLIPv2:
    """Untrained, but opinionated, in love with special tokens, and not shy of ending."""
    model = build_model(CONFIG, seed=3).eval()
    assert model.caption_head is not None
    with torch.no_grad():
        model.caption_head.decoder.weight *= 15
        model.caption_head.decoder.bias[: len(SPECIAL_TOKENS)] += 60
        model.caption_head.decoder.bias[TOKENIZER.sep_id] -= 47
    return model


@pytest.mark.parametrize("beams", [1, 3])
def test_captions_are_those_of_full_causal_passes(talker: GLIPv2, beams: int) -> None:
    """`generate` keeps the image's part over all steps and joins the beams: nothing may change."""
    batch = make_batch("captioning")
    barred = [TOKENIZER.vocabulary.index(token) for token in SPECIAL_TOKENS if token != "[SEP]"]

    def plain_step(tokens_BKT: Tensor) -> Tensor:
        repeated = dataclasses.replace(
            batch,
            images_B3HW=batch.images_B3HW.repeat_interleave(beams, dim=0),
            sizes_B2=batch.sizes_B2.repeat_interleave(beams, dim=0),
            token_mask_BT=torch.ones_like(tokens_BKT, dtype=torch.bool).flatten(0, 1),
        )
        logits = word_logits(talker, repeated, tokens_BKT.flatten(0, 1), True)[:, -1].clone()
        logits[:, barred] = -math.inf
        return logits.log_softmax(dim=1).view(3, beams, -1)

    start = torch.full((3,), TOKENIZER.cls_id)
    found = captions(talker, beams=beams, max_words=4)
    expected = beam_search(plain_step, start, TOKENIZER.sep_id, beams, 4)
    for (text, score), (ids, mean) in zip(found, expected, strict=True):
        pieces = [TOKENIZER.vocabulary[i] for i in ids]
        assert text.replace(" ", "") == "".join(piece.removeprefix("##") for piece in pieces)
        assert len(text.split()) == 1 + sum(not piece.startswith("##") for piece in pieces[1:])
        assert "[" not in text
        assert score == pytest.approx(mean, rel=1e-4, abs=1e-6)
    assert len({text for text, _ in found}) > 1  # images matter


def test_captions_repeat_and_do_not_depend_on_the_batch(talker: GLIPv2) -> None:
    together = captions(talker, beams=3, max_words=5)
    assert captions(talker, beams=3, max_words=5) == together
    for i in range(3):
        ((text, score),) = captions(talker, slice(i, i + 1), beams=3, max_words=5)
        assert text == together[i][0]
        assert score == pytest.approx(together[i][1], rel=1e-4)


def test_a_caption_that_the_model_has_no_room_for_is_refused(talker: GLIPv2) -> None:
    with pytest.raises(ValueError, match="max_words must lie between 1 and 94, not 95"):
        captions(talker, max_words=95)
    with pytest.raises(ValueError, match="beams must be at least 1, not 0"):
        captions(talker, beams=0)
