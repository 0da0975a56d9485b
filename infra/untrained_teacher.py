"""A teacher for tests and benchmarks of labelling: random weights, but sure of itself."""

from pathlib import Path

import torch

from glipv2.model.config import preset
from glipv2.model.glip import build_model
from glipv2.model.tokenizer import Tokenizer, tiny_vocab
from glipv2.model.weights import model_files


def save_teacher(folder: Path) -> None:
    """Make `folder` the folder of a tiny model whose scores are about one half, not near zero."""
    model = build_model(preset("tiny"), seed=0)
    torch.nn.init.zeros_(model.alignment_head.bias0)
    tokenizer = Tokenizer.from_vocab(tiny_vocab(), model.config.text_encoder.max_tokens)
    folder.mkdir()
    for name, data in model_files(model, tokenizer).items():
        (folder / name).write_bytes(data)
