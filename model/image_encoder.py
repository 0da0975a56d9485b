"""Swin Transformer of timm: an image to feature maps of strides 8, 16 and 32."""

import torch
from timm.models.swin_transformer import (
    SwinTransformer,
    SwinTransformerBlock,
    window_partition,
)
from torch import Tensor, nn
from torch.nn import functional as F

from glipv2.model.config import ImageEncoderConfig

# ImageNet statistics in 0-255, as GLIP has them, in the BGR order that its weights expect.
_MEAN_BGR = (103.530, 116.280, 123.675)
_STD_BGR = (57.375, 57.120, 58.395)


class _PaddedBlock(SwinTransformerBlock):
    """Pads maps to whole windows before the cyclic shift, as GLIP does; timm pads after it.

    The two differ where a map is no multiple of the window, as most images are.
    """

    def _attn(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        bottom, right = -height % self.window_size[0], -width % self.window_size[1]
        return super()._attn(F.pad(x, (0, 0, 0, right, 0, bottom)))[:, :height, :width]

    def get_attn_mask(self, x: Tensor) -> Tensor | None:  # type: ignore[override]
        """timm's mask of shifted windows, in operations that torch.compile can build."""
        if not any(self.shift_size):
            return None
        rows, columns = (
            (torch.arange(size, device=x.device) >= size - window).int()
            + (torch.arange(size, device=x.device) >= size - shift).int()
            for size, window, shift in zip(
                x.shape[1:3], self.window_size, self.shift_size, strict=True
            )
        )
        region_HW = 3 * rows[:, None] + columns
        region_WP = window_partition(region_HW[None, ..., None], self.window_size).flatten(1)
        apart_WPP = region_WP[:, None] != region_WP[:, :, None]
        return torch.where(apart_WPP, -100.0, 0.0).to(x.dtype)


class ImageEncoder(nn.Module):
    """uint8 RGB images to three feature maps, each with its own LayerNorm (facts A.2, A.3)."""

    def __init__(self, config: ImageEncoderConfig) -> None:
        super().__init__()
        self.swin = SwinTransformer(
            img_size=224,  # no limit: strict_img_size=False takes any size
            patch_size=4,
            embed_dim=config.embed_dim,
            depths=config.depths,
            num_heads=config.num_heads,
            window_size=config.window,
            drop_path_rate=config.drop_path,
            num_classes=0,
            strict_img_size=False,
            # Windows keep their size on maps smaller than one, so that an image's features do not
            # depend on the size the module was built for.
            always_partition=True,
        )
        for stage in self.swin.layers:
            for block in stage.blocks:
                block.__class__ = _PaddedBlock  # timm has no argument for the kind of block
        # The classifier's norm would be a parameter without a gradient.
        self.swin.norm = nn.Identity()
        self.widths = [config.embed_dim * 2**stage for stage in (1, 2, 3)]
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in self.widths)

    def forward(self, images_B3HW: Tensor, sizes_B2: Tensor) -> list[Tensor]:
        """uint8 RGB (B, 3, H, W) to three maps (B, D, H/8, W/8), (.., H/16, ..), (.., H/32, ..).

        H and W are multiples of 32; pixels beyond each image's (height, width) become zeros after
        normalisation, whatever they hold.
        """
        x = self.swin.patch_embed(self._normalise(images_B3HW, sizes_B2))
        maps = []
        for number, stage in enumerate(self.swin.layers):
            x = stage(x)  # (B, H, W, D)
            if number > 0:
                maps.append(self.norms[number - 1](x).permute(0, 3, 1, 2))
        return maps

    def _normalise(self, images_B3HW: Tensor, sizes_B2: Tensor) -> Tensor:
        H, W = images_B3HW.shape[2:]
        dtype = self.swin.patch_embed.proj.weight.dtype
        device = images_B3HW.device
        # No buffers: those would be rounded when the module is cast to bf16.
        mean = torch.tensor(_MEAN_BGR, device=device).view(3, 1, 1)
        std = torch.tensor(_STD_BGR, device=device).view(3, 1, 1)
        normalised = ((images_B3HW.flip(1).float() - mean) / std).to(dtype)
        rows_BH = torch.arange(H, device=device) < sizes_B2[:, :1]
        columns_BW = torch.arange(W, device=device) < sizes_B2[:, 1:]
        return normalised * (rows_BH[:, None, :, None] & columns_BW[:, None, None, :])
