"""Modulated deformable convolution (DCNv2, 3 x 3) by grid sampling.

Equal to torchvision.ops.deform_conv2d, several times faster on CPUs, and without custom kernels.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

TAPS = 9


@dataclass(kw_only=True)
class Taps:
    """Where one convolution looks, and how much each look counts."""

    offset_B18HW: Tensor
    """(dy, dx) of each tap in pixels of the map that is sampled, row-major taps."""
    mask_B9HW: Tensor
    """Weight of each tap."""
    stride: int = 1
    """H and W are those of a 3 x 3 convolution with padding 1 and this stride."""


class _SampledConv(torch.autograd.Function):
    """A 3 x 3 kernel on what a grid finds in a map; each find counts by its weight.

    Takes a map (B, D, H, W), a sampling grid (B, 9, P, 2), weights (B, 9, P), both float32, and
    the kernel (D_out, D * 9). Results are (B, D_out, P) in the kernel's type; sampling is float32.

    The gradient is written out because autograd would keep the sampled values, nine times a map,
    twice. Sampling again is cheap beside the products.
    """

    @staticmethod
    def forward(
        ctx: Any, x_BDHW: Tensor, grid_B9P2: Tensor, weight_B9P: Tensor, kernel: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x_BDHW, grid_B9P2, weight_B9P, kernel)
        values_BD9P = _look_up(x_BDHW, grid_B9P2).mul_(weight_B9P[:, None])
        kernels = kernel.expand(len(x_BDHW), -1, -1)
        return torch.bmm(kernels, values_BD9P.flatten(1, 2).to(kernel.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x_BDHW, grid_B9P2, weight_B9P, kernel = ctx.saved_tensors
        with torch.autocast(d_out.device.type, enabled=False):
            values_BD9P = _look_up(x_BDHW, grid_B9P2)
            kernels = kernel.T.expand(len(x_BDHW), -1, -1)
            d_values_BD9P = torch.bmm(kernels, d_out).float().view_as(values_BD9P)
            d_weight_B9P = (d_values_BD9P * values_BD9P).sum(dim=1)
            values_BD9P.mul_(weight_B9P[:, None])
            columns_BPK = values_BD9P.flatten(1, 2).transpose(1, 2).to(kernel.dtype)
            d_kernel = torch.bmm(d_out, columns_BPK).sum(dim=0)
            d_values_BD9P.mul_(weight_B9P[:, None])
            d_x_BDHW, d_grid_B9P2 = torch.ops.aten.grid_sampler_2d_backward(
                d_values_BD9P, x_BDHW.float(), grid_B9P2, _BILINEAR, _ZEROS, True, (True, True)
            )
        return d_x_BDHW.to(x_BDHW.dtype), d_grid_B9P2, d_weight_B9P, d_kernel


_BILINEAR, _ZEROS = 0, 0  # the operator's numbers for grid_sample's mode and padding


def _look_up(x_BDHW: Tensor, grid_B9P2: Tensor) -> Tensor:
    return F.grid_sample(
        x_BDHW.float(), grid_B9P2, mode="bilinear", padding_mode="zeros", align_corners=True
    )


def _coordinates(taps: Taps) -> Tensor:
    """What the taps look at, (B, 9, H, W, 2), xy in pixels of the sampled map."""
    B, _, H, W = taps.mask_B9HW.shape
    offset = taps.offset_B18HW.float().view(B, TAPS, 2, H, W)
    device = offset.device
    tap = torch.arange(TAPS, device=device)
    x0 = torch.arange(W, device=device) * taps.stride
    y0 = torch.arange(H, device=device) * taps.stride
    x = offset[:, :, 1] + (x0 + (tap % 3 - 1)[:, None])[:, None]
    y = offset[:, :, 0] + (y0 + (tap // 3 - 1)[:, None])[:, :, None]
    return torch.stack((x, y), dim=-1)


def resize_taps(taps: Taps, size: tuple[int, int]) -> Taps:
    """The taps of a finer map for use on a coarser one: offsets and weights averaged over space."""
    return Taps(
        offset_B18HW=F.adaptive_avg_pool2d(taps.offset_B18HW, size),
        mask_B9HW=F.adaptive_avg_pool2d(taps.mask_B9HW, size),
    )


def misread_taps(taps: Taps, size: tuple[int, int]) -> Taps:
    """What GLIP does instead of `resize_taps`: its kernel takes the buffers of the finer map for
    flat ones of the coarser size and so uses their first numbers, from wrong places (facts A.6).

    Released weights were trained with it.
    """
    h, w = size
    return Taps(
        offset_B18HW=taps.offset_B18HW.flatten(1)[:, : 2 * TAPS * h * w].unflatten(1, (-1, h, w)),
        mask_B9HW=taps.mask_B9HW.flatten(1)[:, : TAPS * h * w].unflatten(1, (-1, h, w)),
    )


class DeformConv(nn.Module):
    """One modulated deformable convolution; the taps come from the caller."""

    def __init__(self, width: int) -> None:
        super().__init__()
        plain = nn.Conv2d(width, width, 3)  # for its default initialisation: U(+-1/sqrt(9 D))
        self.weight = nn.Parameter(plain.weight.detach())
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x_BDHW: Tensor, taps: Taps) -> Tensor:
        """A map (B, D, H, W), looked up at the taps, to a map of the taps' H and W.

        Bilinear, zero outside the map, times the taps' weights. Coordinates stay in fp32: bf16
        could not tell neighbouring pixels of a wide map apart.
        """
        H, W = x_BDHW.shape[2:]
        if min(H, W) == 1:  # align_corners has no scale for one pixel
            x_BDHW = F.pad(x_BDHW, (0, int(W == 1), 0, int(H == 1)))
        coordinates = _coordinates(taps)
        to_grid = coordinates.new_tensor([2 / max(W - 1, 1), 2 / max(H - 1, 1)])
        grid_B9P2 = (coordinates * to_grid - 1).flatten(2, 3)
        weight_B9P = taps.mask_B9HW.float().flatten(2)
        kernel = self.weight.flatten(1).to(_product_dtype(x_BDHW))
        with torch.autocast(x_BDHW.device.type, enabled=False):
            out_BDP = _SampledConv.apply(x_BDHW, grid_B9P2, weight_B9P, kernel)
        out_BDP = out_BDP + self.bias.to(out_BDP.dtype)[:, None]
        return out_BDP.unflatten(2, taps.mask_B9HW.shape[2:])


def _product_dtype(x: Tensor) -> torch.dtype:
    """What a matrix product would be computed in."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
