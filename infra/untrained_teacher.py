"""A teacher for tests and benchmarks of labelling: random weights, but sure of itself."""

from dataclasses import replace
from pathlib import Path

import torch

from glipv2.model.config import TINY, InputConfig, ModelConfig, preset
from glipv2.model.glip import build_model
from glipv2.model.tokenizer import Tokenizer, tiny_vocab
from glipv2.model.weights import model_files

GLIP_T = replace(
    preset("T"),
    masked_words=False,
    contrast=False,
    input=InputConfig(short_side=320, long_side=480, pad_to=None),
)
"""GLIP-T for small images."""


def save_teacher(folder: Path, config: ModelConfig = TINY) -> None:
    """Make `folder` the folder of a model whose scores are about one half, not near zero."""
    model = build_model(config, seed=0)
    torch.nn.init.zeros_(model.alignment_head.bias0)
    tokenizer = Tokenizer.from_vocab(tiny_vocab(), model.config.text_encoder.max_tokens)
    folder.mkdir()
    for name, data in model_files(model, tokenizer).items():
        (folder / name).write_bytes(data)
