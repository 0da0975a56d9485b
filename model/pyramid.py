"""Feature pyramid: maps of one width at strides 8, 16, 32 and, on request, 64 and 128."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import drop_block2d

DROP_PROBABILITY = 0.3
DROP_SIZE = 3


def pyramid_sizes(height: int, width: int, levels: int) -> list[tuple[int, int]]:
    """(height, width) of each level's map for a padded image, whose sides 32 divides."""
    sizes = [(height // stride, width // stride) for stride in (8, 16, 32)]
    for _ in range(levels - len(sizes)):
        rows, columns = sizes[-1]
        sizes.append(((rows + 1) // 2, (columns + 1) // 2))
    return sizes


class Pyramid(nn.Module):
    """Top-down merge of the encoder's maps (facts A.4)."""

    def __init__(self, in_widths: Sequence[int], width: int, levels: int, drop_block: bool) -> None:
        super().__init__()
        self.inner = nn.ModuleList(nn.Conv2d(d, width, 1) for d in in_widths)
        self.layer = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in in_widths)
        self.top = nn.ModuleList(
            nn.Conv2d(width, width, 3, stride=2, padding=1) for _ in range(levels - len(in_widths))
        )
        self.drop_block = drop_block
        for conv in (*self.inner, *self.layer, *self.top):
            nn.init.kaiming_uniform_(conv.weight, a=1)
            nn.init.zeros_(conv.bias)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Three encoder maps, finest first, to `levels` maps (B, width, H, W), finest first."""
        merged = self.inner[-1](maps[-1])
        outputs = [self.layer[-1](merged)]
        for number in range(len(maps) - 2, -1, -1):
            lateral = self.inner[number](maps[number])
            merged = lateral + F.interpolate(merged, size=lateral.shape[-2:], mode="nearest")
            outputs.insert(0, self.layer[number](self._dropped(merged)))
        for number, conv in enumerate(self.top):
            coarsest = outputs[-1]
            outputs.append(conv(coarsest if number == 0 else F.relu(coarsest)))
        return outputs

    def _dropped(self, merged: Tensor) -> Tensor:
        if not (self.drop_block and self.training):
            return merged
        return drop_block2d(merged, DROP_PROBABILITY, DROP_SIZE, training=True)
