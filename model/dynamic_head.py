"""The dynamic head block (DyConv): levels, space and channels attend to one another."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glipv2.model.deform import TAPS, DeformConv, Taps, misread_taps, resize_taps

SQUEEZE = 4


class DyReLU(nn.Module):
    """A ReLU whose slopes and offsets depend on the whole map; starts as a plain ReLU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.squeeze = nn.Linear(width, width // SQUEEZE)
        self.expand = nn.Linear(width // SQUEEZE, 4 * width)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Each (B, D, H, W) map by itself; all levels share the parameters."""
        pooled_LBD = torch.stack([x.mean(dim=(2, 3)) for x in maps])
        gates = F.hardsigmoid(self.expand(F.relu(self.squeeze(pooled_LBD)))) - 0.5
        slope1, offset1, slope2, offset2 = gates[..., None, None].chunk(4, dim=2)
        slope1, slope2 = 2 * slope1 + 1, 2 * slope2
        return [
            torch.maximum(
                torch.addcmul(offset1[i], x, slope1[i]), torch.addcmul(offset2[i], x, slope2[i])
            )
            for i, x in enumerate(maps)
        ]


class DyConv(nn.Module):
    """One block over all levels (facts A.6).

    Each level hears its coarser neighbour (upsampled), itself and its finer neighbour (strided),
    through deformable convolutions that share the level's offsets.
    """

    def __init__(self, width: int, groups: int, glip_compatible: bool = False) -> None:
        super().__init__()
        self.taps_below = misread_taps if glip_compatible else resize_taps
        self.offset = nn.Conv2d(width, 3 * TAPS, 3, padding=1)
        self.coarser, self.same, self.finer = (DeformConv(width) for _ in range(3))
        self.norm_coarser, self.norm_same, self.norm_finer = (
            nn.GroupNorm(groups, width) for _ in range(3)
        )
        self.scale_attention = nn.Linear(width, 1)
        nn.init.normal_(self.scale_attention.weight, std=0.01)
        nn.init.zeros_(self.scale_attention.bias)
        self.relu = DyReLU(width)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps (B, D, H, W), finest first, to maps of the same shapes."""
        branches: list[Tensor] = []
        levels: list[int] = []  # of each branch
        for i, x in enumerate(maps):
            offset, weight = self.offset(x).split([2 * TAPS, TAPS], dim=1)
            taps = Taps(offset_B18HW=offset, mask_B9HW=weight.sigmoid())
            branches.append(self.norm_same(self.same(x, taps)))
            if i > 0:
                branches.append(self.norm_finer(self.finer(maps[i - 1], replace(taps, stride=2))))
            if i + 1 < len(maps):
                below = maps[i + 1]
                small = self.taps_below(taps, (below.shape[2], below.shape[3]))
                coarse = self.norm_coarser(self.coarser(below, small))
                branches.append(
                    F.interpolate(coarse, size=x.shape[2:], mode="bilinear", align_corners=True)
                )
            levels += [i] * (len(branches) - len(levels))
        return self.relu(self._weighted_means(branches, levels))

    def _weighted_means(self, branches: list[Tensor], levels: list[int]) -> list[Tensor]:
        """The mean of each level's branches, each weighted by what the branch itself asks for."""
        pooled_FBD = torch.stack([x.mean(dim=(2, 3)) for x in branches])
        attention = F.hardsigmoid(F.relu(self.scale_attention(pooled_FBD)))[..., None, None]
        totals: list[Tensor] = []
        for number, (level, x) in enumerate(zip(levels, branches, strict=True)):
            weight = attention[number] / levels.count(level)
            if level == len(totals):
                totals.append(x * weight)
            else:
                totals[level] = torch.addcmul(totals[level], x, weight)
        return totals
