"""One square anchor for every location of every pyramid level."""

from collections.abc import Sequence

import torch
from torch import Tensor


def make_anchors(
    level_sizes: Sequence[tuple[int, int]],
    strides: Sequence[int],
    scale: float,
    device: torch.device | None = None,
) -> Tensor:
    """Anchors (A, 4) in pixels of the padded input, finest level first, rows from the top.

    The anchor of a location is centred on its cell and has a side of `scale` strides (GLIP: 8, so
    the first anchor of the finest level is [-28, -28, 36, 36]).
    """
    levels = []
    for (height, width), stride in zip(level_sizes, strides, strict=True):
        x = (torch.arange(width, device=device, dtype=torch.float32) + 0.5) * stride
        y = (torch.arange(height, device=device, dtype=torch.float32) + 0.5) * stride
        centre_y, centre_x = torch.meshgrid(y, x, indexing="ij")
        centres = torch.stack((centre_x, centre_y), dim=-1).reshape(-1, 2)
        half = scale * stride / 2
        levels.append(torch.cat((centres - half, centres + half), dim=-1))
    return torch.cat(levels)
