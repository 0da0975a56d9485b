"""What reads the fusion tower: boxes, centerness, region-word alignment, masked words, contrast."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glipv2.model.text_encoder import LAYER_NORM_EPS

PRIOR = 0.01
"""Probability that an untrained model gives to every region-word pair."""
LOGIT_LIMIT = 5e4
START_TEMPERATURE = 0.07
"""GLIP's code starts at 1, too soft for training from scratch; this is CLIP's start."""


def flatten_levels(maps: Sequence[Tensor]) -> Tensor:
    """Maps (B, D, H, W), finest first, to locations (B, A, D), rows from the top."""
    return torch.cat([x.flatten(2) for x in maps], dim=2).transpose(1, 2)


class BoxHead(nn.Module):
    """Encoded boxes and centerness of every location; one scale per level for the boxes."""

    def __init__(self, width: int, levels: int) -> None:
        super().__init__()
        self.deltas = nn.Linear(width, 4)
        self.centerness = nn.Linear(width, 1)
        self.level_scales = nn.Parameter(torch.ones(levels))
        for linear in (self.deltas, self.centerness):
            nn.init.normal_(linear.weight, std=0.01)
            nn.init.zeros_(linear.bias)

    def forward(
        self, locations_BAD: Tensor, anchors_per_level: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Deltas (B, A, 4) and centerness logits (B, A)."""
        scales_A = torch.cat(
            [s.expand(n) for s, n in zip(self.level_scales, anchors_per_level, strict=True)]
        )
        deltas_BA4 = self.deltas(locations_BAD) * scales_A[:, None]
        return deltas_BA4, self.centerness(locations_BAD)[..., 0]


class AlignmentHead(nn.Module):
    """Region-word alignment logits from fused features (facts A.7)."""

    def __init__(self, width: int, text_width: int, start_temperature: float) -> None:
        super().__init__()
        self.project_text = nn.Linear(text_width, width)
        self.log_scale = nn.Parameter(torch.tensor([math.log(start_temperature)]))
        self.bias_text = nn.Parameter(torch.zeros(text_width))
        self.bias0 = nn.Parameter(torch.full((1,), -math.log((1 - PRIOR) / PRIOR)))

    def forward(self, locations_BAD: Tensor, words_BTD: Tensor) -> Tensor:
        """Logits (B, A, T): locations as they are, words normalised."""
        words_BTD = F.normalize(words_BTD, dim=-1)
        bias_B1T = (words_BTD @ self.bias_text)[:, None] + self.bias0
        queries_BTD = self.project_text(words_BTD / 2) / self.log_scale.exp()
        logits_BAT = torch.baddbmm(bias_B1T, locations_BAD, queries_BTD.transpose(1, 2))
        return logits_BAT.clamp(-LOGIT_LIMIT, LOGIT_LIMIT)


class WordHead(nn.Module):
    """BERT's word prediction, on fused words; the decoder is not tied to the embeddings.

    One predicts masked words, another the next word of a caption.
    """

    def __init__(self, text_width: int, vocab_size: int) -> None:
        super().__init__()
        self.transform = nn.Linear(text_width, text_width)
        self.norm = nn.LayerNorm(text_width, eps=LAYER_NORM_EPS)
        self.decoder = nn.Linear(text_width, vocab_size)

    def forward(self, words: Tensor) -> Tensor:
        """(..., D) to vocabulary logits (..., V)."""
        return self.decoder(self.norm(F.gelu(self.transform(words))))


class ContrastHead(nn.Module):
    """Projections of unfused regions and words to one space, for comparisons between images."""

    def __init__(self, width: int, text_width: int, contrast_width: int) -> None:
        super().__init__()
        self.project_region = nn.Linear(width, contrast_width)
        self.project_word = nn.Linear(text_width, contrast_width)
        self.log_temperature = nn.Parameter(torch.tensor([math.log(START_TEMPERATURE)]))

    def forward(self, regions_BKD: Tensor, words_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Unit vectors of regions (B, K, C) and words (B, T, C)."""
        return (
            F.normalize(self.project_region(regions_BKD), dim=-1),
            F.normalize(self.project_word(words_BTD), dim=-1),
        )
