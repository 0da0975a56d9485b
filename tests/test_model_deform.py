import pytest
import torch
from original import deform
from torch import Tensor

from glipv2.model.deform import DeformConv, Taps, resize_taps


def setting(height: int, width: int, stride: int, seed: int = 0) -> tuple[Tensor, Taps, DeformConv]:
    torch.manual_seed(seed)
    rows, columns = (height - 1) // stride + 1, (width - 1) // stride + 1
    x = torch.randn(2, 6, height, width, dtype=torch.float32, requires_grad=True)
    taps = Taps(
        offset_B18HW=(torch.randn(2, 18, rows, columns) * 3).requires_grad_(),
        mask_B9HW=torch.rand(2, 9, rows, columns).requires_grad_(),
        stride=stride,
    )
    conv = DeformConv(6)
    torch.nn.init.normal_(conv.bias)
    return x, taps, conv


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(8, 12), (7, 5), (1, 4), (1, 1)])
def test_grid_sampling_equals_torchvisions_operator(size: tuple[int, int], stride: int) -> None:
    x, taps, conv = setting(*size, stride)
    torch.testing.assert_close(conv(x, taps), deform(conv, x, taps), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(9, 10), (1, 4)])
def test_gradients_equal_torchvisions(size: tuple[int, int], stride: int) -> None:
    x, taps, conv = setting(*size, stride)
    inputs = [x, taps.offset_B18HW, taps.mask_B9HW, conv.weight, conv.bias]
    wanted = torch.autograd.grad(deform(conv, x, taps).sin().sum(), inputs)
    found = torch.autograd.grad(conv(x, taps).sin().sum(), inputs)
    for actual, gradient in zip(found, wanted, strict=True):
        torch.testing.assert_close(actual, gradient, rtol=1e-3, atol=1e-3)


def test_mixed_precision_only_rounds_values_and_kernels() -> None:
    """A wide map: bf16 coordinates would miss by half a pixel."""
    x, taps, conv = setting(4, 200, 1)
    inputs = [x, taps.offset_B18HW, taps.mask_B9HW, conv.weight, conv.bias]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = conv(x, taps)
    assert rounded.dtype == torch.bfloat16
    exact = deform(conv, x, taps)
    found = torch.autograd.grad(rounded.float().sin().sum(), inputs)
    wanted = torch.autograd.grad(exact.sin().sum(), inputs)
    for actual, expected in zip((rounded.float(), *found), (exact, *wanted), strict=True):
        assert actual.dtype == torch.float32
        assert (actual - expected).norm() < 0.03 * expected.norm()


def test_taps_of_a_finer_map_are_averaged_for_a_coarser_one() -> None:
    _, taps, _ = setting(8, 12, 1)
    small = resize_taps(taps, (4, 6))
    assert small.mask_B9HW.shape == (2, 9, 4, 6)
    torch.testing.assert_close(
        small.offset_B18HW[:, :, 1, 2], taps.offset_B18HW[:, :, 2:4, 4:6].mean((2, 3))
    )
