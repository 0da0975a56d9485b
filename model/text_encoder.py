"""BERT of transformers: token ids to word features."""

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from glipv2.model.config import TextEncoderConfig

LAYER_NORM_EPS = 1e-12


def bert_config(config: TextEncoderConfig, attention: str = "sdpa") -> BertConfig:
    """transformers' settings for the encoder and for the BERT layers of the fusion tower."""
    settings = BertConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        intermediate_size=4 * config.width,
        max_position_embeddings=max(512, config.max_tokens),
        hidden_dropout_prob=config.dropout,
        attention_probs_dropout_prob=config.dropout,
        layer_norm_eps=LAYER_NORM_EPS,
    )
    settings._attn_implementation = attention
    return settings


def attention_bias(token_mask_BT: Tensor, dtype: torch.dtype) -> Tensor:
    """What BERT layers add to attention scores: (B, 1, 1, T), very negative at padding.

    Additive and four-dimensional: boolean or smaller masks are misread by some implementations.
    """
    bias_BT = torch.zeros(token_mask_BT.shape, dtype=dtype, device=token_mask_BT.device)
    return bias_BT.masked_fill(~token_mask_BT, torch.finfo(dtype).min)[:, None, None]


class TextEncoder(nn.Module):
    """BERT without its pooler (facts A.5)."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.bert = BertModel(bert_config(config), add_pooling_layer=False)
        if config.word_init_std != self.bert.config.initializer_range:
            embedding = self.bert.embeddings.word_embeddings
            nn.init.normal_(embedding.weight, std=config.word_init_std)

    def forward(self, tokens_BT: Tensor, token_mask_BT: Tensor) -> Tensor:
        """Hidden states (B, T, D) of the last layer; rows at padding are not zeroed."""
        x = self.bert.embeddings(input_ids=tokens_BT)
        bias = attention_bias(token_mask_BT, x.dtype)
        for layer in self.bert.encoder.layer:
            x = layer(x, bias)
        return x
