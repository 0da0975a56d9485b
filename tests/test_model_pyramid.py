import pytest
import torch
from torch.nn import functional as F

from glipv2.model.pyramid import Pyramid

WIDTHS = (8, 16, 32)


def encoder_maps(height: int = 96, width: int = 160) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, d, -(-height // s), -(-width // s), generator=generator)
        for d, s in zip(WIDTHS, (8, 16, 32), strict=True)
    ]


@pytest.mark.parametrize("levels", [3, 4, 5])
def test_each_level_halves_the_one_before(levels: int) -> None:
    maps = Pyramid(WIDTHS, 16, levels, drop_block=False)(encoder_maps())
    sizes = [(12, 20), (6, 10), (3, 5), (2, 3), (1, 2)]
    assert [tuple(x.shape) for x in maps] == [(2, 16, *size) for size in sizes[:levels]]


def test_p6_comes_from_p5_and_p7_from_its_positive_part() -> None:
    pyramid = Pyramid(WIDTHS, 16, 5, drop_block=False)
    maps = pyramid(encoder_maps())
    torch.testing.assert_close(maps[3], pyramid.top[0](maps[2]))
    torch.testing.assert_close(maps[4], pyramid.top[1](F.relu(maps[3])))


def test_odd_sizes_are_merged_at_the_laterals_size() -> None:
    maps = Pyramid(WIDTHS, 16, 3, drop_block=False)(encoder_maps(72, 104))
    assert [tuple(x.shape[2:]) for x in maps] == [(9, 13), (5, 7), (3, 4)]


def test_drop_block_acts_while_training_only() -> None:
    pyramid = Pyramid(WIDTHS, 16, 3, drop_block=True)
    maps = encoder_maps()
    calm = pyramid.eval()(maps)
    assert all(torch.equal(a, b) for a, b in zip(calm, pyramid.eval()(maps), strict=True))
    torch.manual_seed(0)
    dropped = pyramid.train()(maps)
    changed = [not torch.equal(a, b) for a, b in zip(calm, dropped, strict=True)]
    assert changed == [True, True, False]  # the coarsest has no merged map
