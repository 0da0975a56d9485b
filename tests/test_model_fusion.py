from collections.abc import Callable
from functools import partial

import pytest
import torch
from original import attention as plain
from torch import Tensor

from glipv2.model.fusion import ImageTextAttention

B, N, T, DV, DT, HEADS, WIDTH = 2, 30, 7, 16, 24, 4, 32
Features = tuple[Tensor, Tensor, Tensor]
Form = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def build(dropout: float = 0.0) -> ImageTextAttention:
    torch.manual_seed(0)
    module = ImageTextAttention(DV, DT, WIDTH, HEADS, dropout=dropout, scale=0.5).double()
    for parameter in module.parameters():  # biases and scales that a mistake can't hide behind
        torch.nn.init.normal_(parameter, std=0.5)
    return module


@pytest.fixture
def attention() -> ImageTextAttention:
    return build()


@pytest.fixture
def features() -> Features:
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(B, N, DV, dtype=torch.float64, generator=generator)
    text = torch.randn(B, T, DT, dtype=torch.float64, generator=generator)
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[1, 4:] = False
    return image.requires_grad_(), text.requires_grad_(), mask


def loss_of(results: tuple[Tensor, Tensor]) -> Tensor:
    image, text = results
    return (image.sin() * 3).sum() + text.cos().sum()


def test_folded_projections_equal_the_plain_form(
    attention: ImageTextAttention, features: Features
) -> None:
    for actual, expected in zip(attention(*features), plain(attention, *features), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_gradients_equal_those_of_the_plain_form(
    attention: ImageTextAttention, features: Features
) -> None:
    inputs = [*features[:2], *attention.parameters()]
    actual = torch.autograd.grad(loss_of(attention(*features)), inputs)
    expected = torch.autograd.grad(loss_of(plain(attention, *features)), inputs)
    for mine, its in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-7, atol=1e-8)


def test_gradients_under_dropout_are_those_of_finite_differences(features: Features) -> None:
    attention = build(dropout=0.3)

    def same_draw(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(3)
        return attention(image, text, features[2])

    assert not torch.allclose(same_draw(*features[:2])[0], build()(*features)[0])
    torch.autograd.gradcheck(same_draw, features[:2], fast_mode=True)


def test_dropout_keeps_the_expected_values(features: Features) -> None:
    attention = build(dropout=0.2)
    calm = attention.eval()(*features)
    with torch.no_grad():
        runs = [attention.train()(*features) for _ in range(150)]
    assert not torch.equal(runs[0][0], runs[1][0])
    for side in (0, 1):
        mean = torch.stack([run[side] for run in runs]).mean(0)
        assert (mean - calm[side]).abs().mean() < 0.1 * (runs[0][side] - calm[side]).abs().max()


@pytest.mark.parametrize("dropout", [0.1, 0.5])
def test_dropout_removes_its_share_of_both_directions(dropout: float) -> None:
    """All scores are equal and the values 1, so that results are the shares that are left."""
    locations, tokens = 2000, 40
    attention = build(dropout)
    for parameter in attention.parameters():
        torch.nn.init.zeros_(parameter)
    for ones in (attention.image_scale, attention.text_scale, attention.norm_image.bias):
        torch.nn.init.ones_(ones)
    torch.nn.init.constant_(attention.text_value.bias, 1 / WIDTH)
    torch.nn.init.constant_(attention.image_value.bias, 1 / WIDTH)
    torch.nn.init.ones_(attention.image_out.weight)
    torch.nn.init.ones_(attention.text_out.weight)
    mask = torch.ones(1, tokens, dtype=torch.bool)
    silent = torch.zeros(1, locations, DV).double(), torch.zeros(1, tokens, DT).double(), mask
    image, text = attention(*silent)
    # Probabilities are 1/tokens or 1/locations; each sum has `draws` of them, kept by chance.
    draws = locations * tokens * HEADS
    error = 5 * (dropout / (1 - dropout) / draws) ** 0.5
    assert image.mean().item() - 1 == pytest.approx(1, abs=error)
    assert text.mean().item() == pytest.approx(1, abs=error)
    alone = attention(*silent, image_reads_text=False)[1]
    assert alone.mean().item() == pytest.approx(1, abs=error) and not torch.equal(alone, text)
    spread = (dropout / (1 - dropout) / (tokens * HEADS)) ** 0.5
    assert image.std().item() == pytest.approx(spread, rel=0.1)


def test_with_a_zero_scale_only_the_layer_norm_is_left(
    attention: ImageTextAttention, features: Features
) -> None:
    torch.nn.init.zeros_(attention.image_scale)
    torch.nn.init.zeros_(attention.text_scale)
    image, text = attention(*features)
    torch.testing.assert_close(image, attention.norm_image(features[0]))
    torch.testing.assert_close(text, attention.norm_text(features[1]))


def test_padding_tokens_are_no_keys_for_the_image(
    attention: ImageTextAttention, features: Features
) -> None:
    image, text, mask = features
    other = text.detach().clone()
    other[1, 4:] = 9.0
    assert torch.equal(attention(image, text, mask)[0], attention(image, other, mask)[0])


def test_an_image_that_reads_no_text_still_updates_the_words(
    attention: ImageTextAttention, features: Features
) -> None:
    image, words = attention(*features, image_reads_text=False)
    torch.testing.assert_close(image, attention.norm_image(features[0]))
    expected = plain(attention, *features)[1]
    torch.testing.assert_close(words, expected, rtol=1e-9, atol=1e-9)
    found = torch.autograd.grad(words.cos().sum(), features[:2])
    wanted = torch.autograd.grad(expected.cos().sum(), features[:2])
    for actual, gradient in zip(found, wanted, strict=True):
        torch.testing.assert_close(actual, gradient, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_rounds_little_more_than_the_plain_form(
    features: Features, dtype: torch.dtype
) -> None:
    attention = build().float()
    single = [x.detach().float().requires_grad_() for x in features[:2]]
    inputs = [*single, *attention.parameters()]

    def run(form: Form, enabled: bool) -> list[Tensor]:
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            results = form(*single, features[2])
        return [*results, *torch.autograd.grad(loss_of(results), inputs)]

    exact = run(partial(plain, attention), enabled=False)
    peer = run(partial(plain, attention), enabled=True)
    ours = run(attention, enabled=True)
    for wanted, rounded, found in zip(exact, peer, ours, strict=True):
        assert found.dtype == torch.float32
        bound = 3 * (rounded - wanted).norm() + 2e-3 * wanted.norm()
        assert (found - wanted).norm() < bound


def test_half_precision_survives_scores_that_it_cannot_hold(features: Features) -> None:
    attention = build()
    with torch.no_grad():
        attention.query.weight *= 100
        attention.key.weight *= 100
    image, text = attention.norm_image(features[0]), attention.norm_text(features[1])
    heads = [x.unflatten(2, (HEADS, -1)) for x in (attention.query(image), attention.key(text))]
    scores = torch.einsum("bnhd,bthd->bhnt", *heads) * (WIDTH // HEADS) ** -0.5
    assert scores.abs().max() > torch.finfo(torch.float16).max
    half = [x.detach().half().requires_grad_() for x in features[:2]]
    results = attention.half()(*half, features[2])
    for value in (*results, *torch.autograd.grad(loss_of(results), half)):
        assert value.isfinite().all()
