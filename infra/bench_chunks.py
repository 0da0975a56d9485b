"""More categories than one prompt holds: what is computed once, against once per prompt.

PYTHONPATH=infra python infra/bench_chunks.py
"""

from dataclasses import replace

import torch
from bench_measure import note, row, seconds
from original import original_operators
from torch import Tensor

from glipv2.model.batch import Detection
from glipv2.model.config import PresetName, preset
from glipv2.model.glip import GLIPv2, build_model
from glipv2.model.grounder import Grounder
from glipv2.model.postprocess import MIN_PROBABILITY, detections, merge
from glipv2.model.prompts import category_prompt, token_map
from glipv2.model.tokenizer import Tokenizer, tiny_vocab

SIZE = (320, 480)
CHUNK, LVIS = 40, 1203
"""Categories of a prompt, as GLIP asks for LVIS, and of LVIS."""
BIAS = -3.0
"""Of the alignment: an untrained model then finds a few boxes, as a trained one does."""


def bench_chunks() -> None:
    """GLIP-T, whose fusion sees the prompt, so that only the backbone and the texts are shared; and
    GLIP-T(A), which has no fusion, so that all of the image's side is."""
    bench_model_chunks("T", image_count=3, categories=4 * CHUNK)
    bench_model_chunks("T", image_count=1, categories=LVIS)
    bench_model_chunks("A", image_count=3, categories=4 * CHUNK)


def bench_model_chunks(name: PresetName, image_count: int, categories: int) -> None:
    whole = preset(name)
    size = replace(whole.input, short_side=SIZE[0], long_side=SIZE[1])
    config = replace(whole, masked_words=False, contrast=False, input=size)
    model = build_model(config, seed=0).eval()
    torch.nn.init.constant_(model.alignment_head.bias0, BIAS)
    tokenizer = Tokenizer.from_vocab(tiny_vocab(), config.text_encoder.max_tokens)
    grounder = Grounder(model, tokenizer)
    images = list(torch.randint(0, 256, (image_count, 3, *SIZE), dtype=torch.uint8))
    names = two_words(categories)
    chunks = [names[first : first + CHUNK] for first in range(0, categories, CHUNK)]

    found: dict[str, list[Detection]] = {}

    def together() -> None:
        found["ours"] = grounder.detect(
            images, names, max_categories_per_prompt=CHUNK, batch_size=1
        )

    def apart() -> None:
        for image in images:
            _merged([grounder.detect([image], chunk)[0] for chunk in chunks], names)

    def original() -> None:
        found["original"] = [
            _merged([whole_forward(model, tokenizer, image, chunk) for chunk in chunks], names)
            for image in images
        ]

    ours, peer, originals = seconds(together, apart, original, repeats=1, warm_up=categories < LVIS)
    what = f"GLIP-{name}, {len(chunks)} prompts, {image_count} images"
    row(what, ours, peer, "a forward per prompt")
    row("  the same", ours, originals, "the original's forward per prompt")
    pairs = [
        (a.scores_K, b.scores_K) for a, b in zip(found["ours"], found["original"], strict=True)
    ]
    error = max(float((a - b).abs().max()) for a, b in pairs)
    boxes = sum(len(a) for a, _ in pairs)
    note("  largest difference of a score", f"{error:.1e} in {boxes} boxes")


def two_words(count: int) -> list[str]:
    """Category names of two tokens: COCO's 80 take some 200 of a prompt with the points between."""
    words = [word for word in tiny_vocab() if word.isalpha() and len(word) > 2]
    return [f"{first} {second}" for first in words[:36] for second in words[36:72]][:count]


@torch.inference_mode()
def whole_forward(
    model: GLIPv2, tokenizer: Tokenizer, image_3HW: Tensor, chunk: list[str]
) -> Detection:
    """One prompt in the original's way: padded to 256 tokens, every location projected."""
    prompt = category_prompt(chunk)
    tokens = tokenizer.encode(prompt.text)
    length = model.config.text_encoder.max_tokens
    ids_T = torch.zeros(length, dtype=torch.int64)
    ids_T[: len(tokens.ids)] = torch.tensor(tokens.ids)
    mask_BT = (torch.arange(length) < len(tokens.ids))[None]
    sizes_B2 = torch.tensor([image_3HW.shape[1:]])
    with original_operators():
        outputs = model.predict(image_3HW[None], sizes_B2, ids_T[None], mask_BT)
    phrases_PT = torch.from_numpy(token_map(tokens, prompt.spans))
    found = detections(outputs, [phrases_PT], [prompt.phrases], sizes_B2, MIN_PROBABILITY)
    return found[0]


def _merged(parts: list[Detection], names: list[str]) -> Detection:
    numbered = [
        replace(part, labels_K=part.labels_K + number * CHUNK) for number, part in enumerate(parts)
    ]
    return merge(numbered, names)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    bench_chunks()
