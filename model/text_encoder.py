"""BERT of transformers: token ids to word features."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertModel
from transformers.models.bert.modeling_bert import BertLayer

from glipv2.model.config import TextEncoderConfig

LAYER_NORM_EPS = 1e-12
OVERFLOW_LIMIT = 5e4


def bert_config(config: TextEncoderConfig, attention: str = "sdpa") -> BertConfig:
    """transformers' settings for the encoder and for the BERT layers of the fusion tower."""
    settings = BertConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        intermediate_size=config.mlp_width,
        max_position_embeddings=config.positions,
        hidden_dropout_prob=config.dropout,
        attention_probs_dropout_prob=config.dropout,
        layer_norm_eps=LAYER_NORM_EPS,
    )
    settings._attn_implementation = attention
    return settings


def attention_bias(token_mask_BT: Tensor, dtype: torch.dtype, causal: bool = False) -> Tensor:
    """What BERT layers add to attention scores: (B, 1, T or 1, T), very negative at padding.

    Causal: and at all later tokens. Additive and four-dimensional: boolean or smaller masks are
    misread by some implementations.
    """
    T = token_mask_BT.shape[1]
    seen = token_mask_BT[:, None, None]
    if causal:
        seen = seen & torch.ones(T, T, dtype=torch.bool, device=seen.device).tril()
    bias = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return bias.masked_fill(~seen, torch.finfo(dtype).min)


class TowerLayer(BertLayer):
    """A BERT layer of the fusion tower, with the clamps of GLIP's (facts N.5).

    They keep half precision, which ends at 65504, from overflowing, and are part of what released
    weights were trained with.
    """

    def __init__(self, config: TextEncoderConfig, clamped: bool) -> None:
        super().__init__(bert_config(config, attention="eager" if clamped else "sdpa"))
        self.clamped = clamped

    def forward(self, words_BTD: Tensor, bias: Tensor) -> Tensor:  # type: ignore[override]
        """Words (B, T, D) to the same shape; `bias` of `attention_bias` is added to the scores."""
        if not self.clamped:
            return super().forward(words_BTD, bias)
        attended_BTD = self.attention.output(self._attend(words_BTD, bias), words_BTD)
        hidden = _clamp(self.intermediate.dense(attended_BTD))
        hidden = _clamp(self.intermediate.intermediate_act_fn(hidden))
        return _clamp(self.output(hidden, attended_BTD))

    def _attend(self, words_BTD: Tensor, bias: Tensor) -> Tensor:
        attention = self.attention.self
        B, T, D = words_BTD.shape
        query, key, value = (
            project(words_BTD).view(B, T, -1, attention.attention_head_size).transpose(1, 2)
            for project in (attention.query, attention.key, attention.value)
        )
        scores = _clamp(query @ key.transpose(2, 3) * attention.scaling)
        context = attention.dropout((scores + bias).softmax(dim=3)) @ value
        return context.transpose(1, 2).reshape(B, T, D)


def _clamp(values: Tensor) -> Tensor:
    return values.clamp(-OVERFLOW_LIMIT, OVERFLOW_LIMIT)


class TextEncoder(nn.Module):
    """BERT without its pooler (facts A.5)."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.bert = BertModel(bert_config(config), add_pooling_layer=False)
        self.recompute = False
        if config.word_init_std != self.bert.config.initializer_range:
            embedding = self.bert.embeddings.word_embeddings
            nn.init.normal_(embedding.weight, std=config.word_init_std)

    def forward(self, tokens_BT: Tensor, token_mask_BT: Tensor, causal: bool = False) -> Tensor:
        """Hidden states (B, T, D) of the last layer; rows at padding are not zeroed.

        Causal: no token sees a later one.
        """
        x = self.bert.embeddings(input_ids=tokens_BT)
        bias = attention_bias(token_mask_BT, x.dtype, causal)
        for layer in self.bert.encoder.layer:
            if self.recompute:
                x = checkpoint(layer, x, bias, use_reentrant=False)
            else:
                x = layer(x, bias)
        return x
