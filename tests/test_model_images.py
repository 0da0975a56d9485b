import pytest
import torch

from glipv2.model.images import pad_images, resize, resized_size


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((480, 640), (800, 1066)),
        ((640, 480), (1066, 800)),
        ((427, 1280), (445, 1333)),  # the long side decides
        ((100, 100), (800, 800)),
        ((1, 5000), (1, 1333)),
    ],
)
def test_sizes_follow_the_short_side_up_to_the_long_side(
    size: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert resized_size(*size, 800, 1333) == expected


def test_resizing_keeps_colours_and_type() -> None:
    image = torch.tensor([10, 200, 30], dtype=torch.uint8).view(3, 1, 1).expand(3, 48, 64)
    small = resize(image, (24, 32))
    assert small.shape == (3, 24, 32)
    assert small.dtype == torch.uint8
    assert torch.equal(small[:, 5, 5], image[:, 0, 0])


def test_shrinking_averages_instead_of_skipping_pixels() -> None:
    stripes = torch.zeros(3, 64, 64, dtype=torch.uint8)
    stripes[:, ::2] = 200
    assert (resize(stripes, (16, 16))[:, 2:-2].float() - 100).abs().max() < 8


def test_padding_is_zero_at_the_right_and_bottom() -> None:
    images = [torch.full((3, 40, 60), 7, dtype=torch.uint8), torch.ones(3, 33, 20).byte()]
    padded, sizes = pad_images(images)
    assert padded.shape == (2, 3, 64, 64)
    assert sizes.tolist() == [[40, 60], [33, 20]]
    assert torch.equal(padded[0, :, :40, :60], images[0])
    assert padded[0].sum() == images[0].sum()


def test_a_fixed_padding_must_hold_the_images() -> None:
    image = torch.ones(3, 40, 60).byte()
    assert pad_images([image], (64, 96))[0].shape == (1, 3, 64, 96)
    with pytest.raises(ValueError, match="pad_to"):
        pad_images([image], (32, 96))
