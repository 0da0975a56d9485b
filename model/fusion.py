"""Image-text attention of the fusion tower, with its projections folded into the text side.

There are hundreds of times more visual locations than tokens. GLIP projects every location to
the attention width; here the projections meet the tokens instead:
  scores  (v Wq) k^T = v (Wq k^T)          context  A (u Wo) per head, and (A^T v) Wv
Parameters and results are the same (up to rounding), the work at full size 2 to 5 times less.
K in shape suffixes counts the tokens of all heads: heads * T.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

SCORE_LIMIT = 5e4
"""GLIP clamps attention scores to this, for half precision's sake, which ends at 65504."""


class ImageTextAttention(nn.Module):
    """Both directions of attention between all levels and the text (facts A.6)."""

    def __init__(
        self,
        image_width: int,
        text_width: int,
        attention_width: int,
        heads: int,
        dropout: float,
        scale: float,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.head_width = attention_width // heads
        self.norm_image = nn.LayerNorm(image_width)
        self.norm_text = nn.LayerNorm(text_width)
        self.query = nn.Linear(image_width, attention_width)
        self.key = nn.Linear(text_width, attention_width)
        self.image_value = nn.Linear(image_width, attention_width)
        self.text_value = nn.Linear(text_width, attention_width)
        self.image_out = nn.Linear(attention_width, image_width)
        self.text_out = nn.Linear(attention_width, text_width)
        for linear in (self.query, self.key, self.image_value, self.text_value):
            _init_projection(linear)
        _init_projection(self.image_out)
        _init_projection(self.text_out)
        self.image_scale = nn.Parameter(torch.full((image_width,), scale))
        self.text_scale = nn.Parameter(torch.full((text_width,), scale))
        self.dropout = dropout

    def forward(
        self,
        image_BND: Tensor,
        text_BTD: Tensor,
        token_mask_BT: Tensor,
        image_reads_text: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Updated locations (B, N, D_image) and words (B, T, D_text).

        The residual starts from the normalised features. Padding tokens are no keys for the image
        but are updated themselves; no text is padding alone. Every location is a key for the text,
        padding pixels included. Without `image_reads_text` only the words are
        updated: what captioning needs, where no word may reach an earlier one through the image
        (facts A.13).
        """
        h = self.heads
        dropped = round(self.dropout * _RANDOM_VALUES) if self.training else 0
        kept_share = 1 - dropped / _RANDOM_VALUES
        image_BND = self.norm_image(image_BND)
        text_BTD = self.norm_text(text_BTD)

        keys_BThd = (self.key(text_BTD) * self.head_width**-0.5).unflatten(2, (h, -1))
        query_hdD = self.query.weight.unflatten(0, (h, -1))
        folded_BKD = torch.einsum("bthd,hdc->bhtc", keys_BThd, query_hdD).flatten(1, 2)
        dtype = folded_BKD.dtype  # autocast's, where it is on
        if image_reads_text:
            bias_BhT = torch.einsum("bthd,hd->bht", keys_BThd, self.query.bias.view(h, -1))
            bias_BhT = bias_BhT.masked_fill(~token_mask_BT[:, None], -torch.inf)
            words_BThd = self.text_value(text_BTD).unflatten(2, (h, -1))
            out_Dhd = self.image_out.weight.unflatten(1, (h, -1))
            values_BhTD = torch.einsum("bthd,chd->bhtc", words_BThd, out_Dhd)
            values_BhTD = values_BhTD * (self.image_scale / kept_share)
            with torch.autocast(image_BND.device.type, enabled=False):
                read_BND, seen_BKD, mass_BK = _BothDirections.apply(
                    image_BND.to(dtype),
                    folded_BKD,
                    bias_BhT.to(dtype).flatten(1),
                    values_BhTD.to(dtype).flatten(1, 2),
                    h,
                    dropped,
                )
        else:
            with torch.autocast(image_BND.device.type, enabled=False):
                seen_BKD, mass_BK = _to_words(image_BND.to(dtype), folded_BKD, dropped)

        value_hdD = self.image_value.weight.unflatten(0, (h, -1))
        context_BThd = torch.einsum("bhtc,hdc->bthd", seen_BKD.unflatten(1, (h, -1)), value_hdD)
        # The bias is weighted by the probabilities' sum, which dropout moves away from 1.
        mass_BTh1 = mass_BK.unflatten(1, (h, -1)).transpose(1, 2)[..., None]
        context_BThd = context_BThd + mass_BTh1 * self.image_value.bias.view(h, -1)
        words_BTD = text_BTD + self.text_scale * self.text_out(context_BThd.flatten(2) / kept_share)
        if not image_reads_text:
            return image_BND, words_BTD
        return image_BND + read_BND + self.image_scale * self.image_out.bias, words_BTD


def _to_words(image_BND: Tensor, keys_BKD: Tensor, dropped: int) -> tuple[Tensor, Tensor]:
    """What `_BothDirections` gives the words, without what it gives the locations."""
    scores_BNK = torch.bmm(image_BND, keys_BKD.transpose(1, 2))
    if scores_BNK.dtype == torch.float16:
        over_BNK = scores_BNK - scores_BNK.clamp(-SCORE_LIMIT, SCORE_LIMIT)
        scores_BNK = scores_BNK - over_BNK.detach()
    weights_BNK = (scores_BNK - scores_BNK.detach().amax(dim=1, keepdim=True)).exp()
    weights_BNK = weights_BNK / weights_BNK.sum(dim=1, keepdim=True)
    share = dropped / _RANDOM_VALUES
    kept_BNK = F.dropout(weights_BNK, share)  # which divides by the share that is kept
    seen_BKD = torch.bmm(kept_BNK.transpose(1, 2), image_BND)
    return seen_BKD * (1 - share), kept_BNK.sum(dim=1) * (1 - share)


class _BothDirections(torch.autograd.Function):
    """Attention of the locations to the words' values, and of the words to the locations.

    Results: what the locations read (B, N, D); what the words of each head read, as a weighted sum
    of the locations (B, K, D); the sum of those weights (B, K). Dropout only zeroes probabilities:
    the caller divides by the share that is kept.

    The gradient is written out because autograd would keep and pass through several times as many
    (B, N, K) tensors: this keeps the two of probabilities, with the sign turned where dropout hit.
    """

    @staticmethod
    def forward(
        ctx: Any,
        image_BND: Tensor,
        keys_BKD: Tensor,
        bias_BK: Tensor,
        values_BKD: Tensor,
        heads: int,
        dropped: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        scores_BNK = torch.bmm(image_BND, keys_BKD.transpose(1, 2))
        if scores_BNK.dtype == torch.float16:  # its gradient passes as if there were no clamp
            scores_BNK.clamp_(-SCORE_LIMIT, SCORE_LIMIT)
        # A softmax over the locations, of which torch's own takes three times as long on CPUs.
        # What is added to all scores of a token, as the bias, would not change it.
        to_image_BNK = (scores_BNK - scores_BNK.amax(dim=1, keepdim=True)).exp_()
        to_image_BNK /= to_image_BNK.sum(dim=1, keepdim=True)
        scores_BNK += bias_BK[:, None]
        to_text_BNK = scores_BNK.unflatten(2, (heads, -1)).softmax(dim=3).flatten(2)

        spare_BNK = scores_BNK
        if dropped:
            _turn_signs(to_text_BNK, dropped, spare_BNK)
            _turn_signs(to_image_BNK, dropped, spare_BNK)
        read_BND = torch.bmm(_kept(to_text_BNK, dropped, spare_BNK), values_BKD)
        kept_BNK = _kept(to_image_BNK, dropped, spare_BNK)
        seen_BKD = torch.bmm(kept_BNK.transpose(1, 2), image_BND)
        mass_BK = kept_BNK.sum(dim=1) if dropped else torch.ones_like(bias_BK)
        ctx.heads, ctx.dropped = heads, dropped
        ctx.save_for_backward(
            image_BND, keys_BKD, values_BKD, to_text_BNK, to_image_BNK, seen_BKD, mass_BK
        )
        return read_BND, seen_BKD, mass_BK

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_read_BND: Tensor, d_seen_BKD: Tensor, d_mass_BK: Tensor
    ) -> tuple[Tensor | None, ...]:
        image_BND, keys_BKD, values_BKD, to_text, to_image, seen_BKD, mass_BK = ctx.saved_tensors
        dropped = ctx.dropped
        spare_BNK = torch.empty_like(to_text)
        with torch.autocast(image_BND.device.type, enabled=False):
            # Of a softmax p followed by dropout: d_scores = p_kept d_kept - p sum(p_kept d_kept).
            kept_BNK = _kept(to_text, dropped, spare_BNK)
            d_values_BKD = torch.bmm(kept_BNK.transpose(1, 2), d_read_BND)
            d_scores_BNK = torch.bmm(d_read_BND, values_BKD.transpose(1, 2)).mul_(kept_BNK)
            d_scores_BNhT = d_scores_BNK.unflatten(2, (ctx.heads, -1))
            total_BNh1 = d_scores_BNhT.sum(dim=3, keepdim=True)
            all_BNhT = _all(to_text, dropped, spare_BNK).view_as(d_scores_BNhT)
            d_scores_BNhT.addcmul_(all_BNhT, total_BNh1, value=-1)
            d_bias_BK = d_scores_BNK.sum(dim=1)

            # The same over the locations, where the sum follows from the results.
            total_BK = (d_seen_BKD * seen_BKD).sum(dim=2)
            d_kept_BNK = torch.bmm(image_BND, d_seen_BKD.transpose(1, 2))
            if dropped:  # else the mass is 1 whatever the scores are
                total_BK += d_mass_BK * mass_BK
                d_kept_BNK += d_mass_BK[:, None]
            kept_BNK = _kept(to_image, dropped, spare_BNK)
            d_image_BND = torch.bmm(kept_BNK, d_seen_BKD)
            d_scores_BNK.addcmul_(kept_BNK, d_kept_BNK)
            all_BNK = _all(to_image, dropped, spare_BNK)
            d_scores_BNK.addcmul_(all_BNK, total_BK[:, None], value=-1)

            d_image_BND.baddbmm_(d_scores_BNK, keys_BKD)
            d_keys_BKD = torch.bmm(d_scores_BNK.transpose(1, 2), image_BND)
        return d_image_BND, d_keys_BKD, d_bias_BK, d_values_BKD, None, None


_RANDOM_VALUES = 2**16
"""Dropout compares 16 random bits: torch's own takes three times as long on CPUs."""


def _turn_signs(probabilities: Tensor, dropped: int, spare: Tensor) -> None:
    """Make `dropped` in 2**16 of the probabilities negative, in place."""
    numbers = probabilities.numel()
    words = torch.empty(-(-numbers // 4), dtype=torch.int64, device=probabilities.device)
    bits = words.random_(-(2**63), None).view(torch.int16)[:numbers].view_as(probabilities)
    limit = dropped - _RANDOM_VALUES // 2
    signs = bits.clamp_(limit - 1, limit).sub_(limit).bitwise_or_(1)  # -1 below the limit, else 1
    probabilities.mul_(spare.copy_(signs))


def _kept(signed: Tensor, dropped: int, spare: Tensor) -> Tensor:
    """Probabilities after dropout, in `spare` if there is any."""
    return torch.clamp(signed, min=0, out=spare) if dropped else signed


def _all(signed: Tensor, dropped: int, spare: Tensor) -> Tensor:
    """Probabilities before dropout, in `spare` if there is any."""
    return torch.abs(signed, out=spare) if dropped else signed


def _init_projection(linear: nn.Linear) -> None:
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)
