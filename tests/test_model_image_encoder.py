import pytest
import torch

from glipv2.model.config import preset
from glipv2.model.image_encoder import ImageEncoder


@pytest.fixture
def encoder() -> ImageEncoder:
    torch.manual_seed(0)
    return ImageEncoder(preset("tiny").image_encoder).eval()


def images(height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("size", [(128, 128), (32, 64), (96, 160)])
def test_maps_have_strides_8_16_32(encoder: ImageEncoder, size: tuple[int, int]) -> None:
    maps = encoder(images(*size), torch.tensor([size, size]))
    for stride, width, x in zip((8, 16, 32), encoder.widths, maps, strict=True):
        assert x.shape == (2, width, size[0] // stride, size[1] // stride)


def test_what_lies_beyond_an_image_is_not_seen(encoder: ImageEncoder) -> None:
    first, second = images(64, 64), images(64, 64)
    second[:, :, 40:] = 99
    second[:, :, :, 50:] = 7
    sizes = torch.tensor([[40, 50], [40, 50]])
    for a, b in zip(encoder(first, sizes), encoder(second, sizes), strict=True):
        assert torch.equal(a, b)


def test_an_image_of_the_mean_colour_is_zero_after_normalisation(encoder: ImageEncoder) -> None:
    mean_rgb = torch.tensor([124, 116, 104], dtype=torch.uint8).view(1, 3, 1, 1)
    pixels = encoder._normalise(mean_rgb.expand(1, 3, 32, 32), torch.tensor([[32, 32]]))
    assert pixels.abs().max() < 0.02
    red = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    red[:, 0] = 255
    pixels = encoder._normalise(red, torch.tensor([[32, 32]]))
    assert pixels[0, :, 0, 0].tolist() == pytest.approx(
        [-103.53 / 57.375, -116.28 / 57.12, (255 - 123.675) / 58.395], rel=1e-5
    )  # the weights of the original expect blue first
