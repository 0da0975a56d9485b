"""More categories than one prompt holds: image features computed once, against once per prompt.

PYTHONPATH=infra python infra/bench_chunks.py
"""

from dataclasses import replace

import torch
from bench_measure import row, seconds

from glipv2.model.config import PresetName, preset
from glipv2.model.glip import build_model
from glipv2.model.grounder import Grounder
from glipv2.model.tokenizer import Tokenizer, tiny_vocab

SIZE = (320, 480)
CATEGORIES, CHUNK = 240, 40
"""GLIP asks for LVIS in prompts of 40."""


def bench_chunks() -> None:
    """GLIP-T, whose fusion sees the prompt, so only the backbone is shared; and GLIP-T(A), which
    has none, so all of the image's side is."""
    bench_model_chunks("T")
    bench_model_chunks("A")


def bench_model_chunks(name: PresetName) -> None:
    whole = preset(name)
    size = replace(whole.input, short_side=SIZE[0], long_side=SIZE[1])
    config = replace(whole, masked_words=False, contrast=False, input=size)
    model = build_model(config, seed=0).eval()
    tokenizer = Tokenizer.from_vocab(tiny_vocab(), config.text_encoder.max_tokens)
    grounder = Grounder(model, tokenizer)
    image = torch.randint(0, 256, (3, *SIZE), dtype=torch.uint8)
    colours = ("red", "blue", "green", "yellow")
    names = [f"{colours[n % 4]} {n}" for n in range(CATEGORIES)]

    def together() -> None:
        grounder.detect([image], names, max_categories_per_prompt=CHUNK)

    def apart() -> None:
        for first in range(0, CATEGORIES, CHUNK):
            grounder.detect([image], names[first : first + CHUNK])

    ours, peer = seconds(together, apart, repeats=1)
    prompts = CATEGORIES // CHUNK
    row(f"GLIP-{name}, {prompts} prompts about an image", ours, peer, "a forward per prompt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    bench_chunks()
