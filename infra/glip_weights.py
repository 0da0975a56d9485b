"""Reference weights of GLIP from names alone, so that no file of them is needed.

Each value is uniform around a mean with a spread that the name decides, from a generator seeded
with the CRC-32 of the name. `parity.py` describes what they are for.
"""

import math
import re
import zlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

BUFFERS = re.compile(r".*(relative_position_index|cell_anchors\.\d+|position_ids)")

Fan = tuple[str, float]
"""("fan", gain): a spread of gain / sqrt(fan in)."""

# name pattern, least number of dimensions, mean, spread; the first that fits counts
_RULES: tuple[tuple[str, int, float, float | Fan], ...] = (
    (r"rpn\.head\.scales\.\d+\.scale$", 0, 1.0, 0.1),
    (r"rpn\.head\.log_scale$", 0, 0.0, 0.1),
    (r"rpn\.head\.bias0$", 0, -3.0, 0.1),
    (r"rpn\.head\.bias_lang$", 0, 0.0, 1.5),
    (r"\.gamma_[vl]$", 0, 0.3, 0.1),
    (r"relative_position_bias_table$", 0, 0.0, 0.5),
    (r"embeddings\.word_embeddings\.weight$", 0, 0.0, 1.0),
    (r"embeddings\.(position|token_type)_embeddings\.weight$", 0, 0.0, 0.2),
    (r"rpn\.head\.dot_product_projection_text\.weight$", 0, 0.0, ("fan", 8.0)),
    (r"rpn\.head\.(bbox_pred|centerness)\.weight$", 0, 0.0, ("fan", 3.0)),
    (r"rpn\.head\.cls_logits\.weight$", 0, 0.0, ("fan", 0.5)),
    (r"(\.AttnConv\.1|\.relu\.fc\.0)\.weight$", 0, 0.0, ("fan", 4.0)),
    (r"\.relu\.fc\.2\.weight$", 0, 0.0, ("fan", 2.0)),
    (r"\.attn\.qkv\.weight$", 0, 0.0, ("fan", 1.5)),
    (r"\.b_attn\.attn\.[vl]_proj\.weight$", 0, 0.0, ("fan", 2.0)),
    (r"\.attention\.self\.(query|key)\.weight$", 0, 0.0, ("fan", 2.0)),
    (r"(\.attention\.self\.value|\.output\.dense)\.weight$", 0, 0.0, ("fan", 0.5)),
    (r"\.AttnConv\.1\.bias$", 0, 1.0, 0.1),
    (r"\.(self\.(query|key|value)|dense|LayerNorm)\.bias$", 0, 0.0, 0.05),
    (r"\.bias$", 0, 0.0, 0.1),
    (r"\.weight$", 2, 0.0, ("fan", 1.2)),
    (r"\.weight$", 0, 1.0, 0.1),
)


def generated_weights(shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Parameter name -> float32 values; index and anchor buffers are left out."""
    return {
        name: generated(name, tuple(shape))
        for name, shape in shapes.items()
        if not BUFFERS.fullmatch(name)
    }


def generated(name: str, shape: tuple[int, ...]) -> Tensor:
    """The float32 values of one parameter; KeyError if no rule knows its name."""
    fitting = [
        (mean, spread)
        for pattern, dimensions, mean, spread in _RULES
        if re.search(pattern, name) and len(shape) >= dimensions
    ]
    if not fitting:
        raise KeyError(f"no rule for {name} {shape}")
    mean, spread = fitting[0]
    count = math.prod(shape)
    if isinstance(spread, tuple):
        spread = spread[1] / math.sqrt(count / shape[0])
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    uniform = torch.rand(count, generator=generator).double()
    return ((2 * uniform - 1) * (math.sqrt(3.0) * spread) + mean).float().reshape(shape)
