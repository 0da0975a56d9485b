import pytest
import torch
from torch import Tensor

from glipv2.model.fusion import ImageTextAttention

B, N, T, DV, DT, HEADS, WIDTH = 2, 30, 7, 16, 24, 4, 32


@pytest.fixture
def attention() -> ImageTextAttention:
    torch.manual_seed(0)
    module = ImageTextAttention(DV, DT, WIDTH, HEADS, dropout=0.0, scale=0.5).double()
    for parameter in module.parameters():  # biases and scales that a mistake can't hide behind
        torch.nn.init.normal_(parameter, std=0.5)
    return module


@pytest.fixture
def features() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(B, N, DV, dtype=torch.float64, generator=generator)
    text = torch.randn(B, T, DT, dtype=torch.float64, generator=generator)
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[1, 4:] = False
    return image, text, mask


def plain(
    m: ImageTextAttention, image: Tensor, text: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """The original's arithmetic: every location is projected to the attention width."""

    def heads(x: Tensor) -> Tensor:
        return x.view(B, -1, HEADS, WIDTH // HEADS).transpose(1, 2)

    v, words = m.norm_image(image), m.norm_text(text)
    query, key = heads(m.query(v) * (WIDTH // HEADS) ** -0.5), heads(m.key(words))
    scores = query @ key.transpose(2, 3)  # (B, h, N, T)
    to_text = (scores + torch.where(mask, 1.0, -9e15)[:, None, None]).softmax(-1)
    transposed = scores.transpose(2, 3)
    to_image = (transposed - transposed.amax(-1, keepdim=True)).softmax(-1)
    image_delta = m.image_out((to_text @ heads(m.text_value(words))).transpose(1, 2).flatten(2))
    text_delta = m.text_out((to_image @ heads(m.image_value(v))).transpose(1, 2).flatten(2))
    return v + m.image_scale * image_delta, words + m.text_scale * text_delta


def test_folded_projections_equal_the_plain_form(
    attention: ImageTextAttention, features: tuple[Tensor, Tensor, Tensor]
) -> None:
    for actual, expected in zip(attention(*features), plain(attention, *features), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_gradients_equal_those_of_the_plain_form(
    attention: ImageTextAttention, features: tuple[Tensor, Tensor, Tensor]
) -> None:
    gradients = []
    for form in (attention, lambda *inputs: plain(attention, *inputs)):
        image, text = form(*features)
        loss = (image.sin() * 3).sum() + text.cos().sum()
        gradients.append(torch.autograd.grad(loss, list(attention.parameters())))
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-8)


def test_with_a_zero_scale_only_the_layer_norm_is_left(
    attention: ImageTextAttention, features: tuple[Tensor, Tensor, Tensor]
) -> None:
    torch.nn.init.zeros_(attention.image_scale)
    torch.nn.init.zeros_(attention.text_scale)
    image, text = attention(*features)
    torch.testing.assert_close(image, attention.norm_image(features[0]))
    torch.testing.assert_close(text, attention.norm_text(features[1]))


def test_padding_tokens_are_no_keys_for_the_image(
    attention: ImageTextAttention, features: tuple[Tensor, Tensor, Tensor]
) -> None:
    image, text, mask = features
    other = text.clone()
    other[1, 4:] = 9.0
    assert torch.equal(attention(image, text, mask)[0], attention(image, other, mask)[0])


def test_dropout_keeps_the_expected_values(
    attention: ImageTextAttention, features: tuple[Tensor, Tensor, Tensor]
) -> None:
    calm = attention(*features)
    attention.dropout = 0.2
    torch.manual_seed(0)
    runs = [attention.train()(*features) for _ in range(150)]
    assert not torch.equal(runs[0][0], runs[1][0])
    for side in (0, 1):
        mean = torch.stack([run[side] for run in runs]).mean(0)
        assert (mean - calm[side]).abs().mean() < 0.1 * (runs[0][side] - calm[side]).abs().max()
