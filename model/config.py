"""The numbers that decide the shape of the model, and the named presets."""

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

Tune = Literal["full", "linear_probe", "prompt", "mask_head", "answer_head", "caption_head"]
"""What of a model is trained; see `adaptation`."""
Part = Literal["image_encoder", "text_encoder", "fusion"]
"""Parts of a model whose activations can be computed again instead of being kept."""
PresetName = Literal["tiny", "A", "T", "B", "L", "H"]


@dataclass(frozen=True, kw_only=True)
class ImageEncoderConfig:
    embed_dim: int = 96
    """Width of the first Swin stage; stage s is 2**s times as wide."""
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    window: int = 7
    drop_path: float = 0.2

    def __post_init__(self) -> None:
        if len(self.depths) != 4 or len(self.num_heads) != 4:
            raise ValueError("image_encoder.depths and num_heads need four entries, one a stage")


@dataclass(frozen=True, kw_only=True)
class TextEncoderConfig:
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_width: int = 3072
    """Hidden width of the feed-forward part of each layer, here and in the fusion tower."""
    max_tokens: int = 256
    """Longest text, special tokens included; longer prompts are split by the caller."""
    positions: int = 512
    """Rows of the position table; at least max_tokens."""
    vocab_size: int = 30522
    dropout: float = 0.1
    word_init_std: float = 0.02
    """Spread of the word embeddings at initialisation; tiny models learn faster with 0.3."""

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(
                f"text_encoder.width {self.width} must be a multiple of its {self.heads} heads"
            )
        if self.positions < self.max_tokens:
            raise ValueError("text_encoder.positions must be at least text_encoder.max_tokens")


@dataclass(frozen=True, kw_only=True)
class InputConfig:
    """The resolution at prediction time."""

    short_side: int = 800
    """Images are resized so that their shorter side has this many pixels ..."""
    long_side: int = 1333
    """... unless the longer one would exceed this."""
    pad_to: tuple[int, int] | None = None
    """(height, width) every resized image is padded to; null pads to the next multiple of 32."""


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """How much each term counts in the sum that is minimised; 0 leaves a term out."""

    box: float = 2.0
    centerness: float = 1.0
    token: float = 1.0
    inter_image: float = 1.0
    mlm: float = 1.0
    mask: float = 1.0
    answer: float = 1.0
    caption: float = 1.0

    def __post_init__(self) -> None:
        for name, weight in vars(self).items():
            if not 0 <= weight < math.inf:
                raise ValueError(f"losses.{name} must be 0 or more, and finite, not {weight}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    preset: PresetName = "T"
    """Where the other fields of this section start from; see `preset`."""
    image_encoder: ImageEncoderConfig = field(default_factory=ImageEncoderConfig)
    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    input: InputConfig = field(default_factory=InputConfig)
    width: int = 256
    """Channels of the pyramid, the fusion tower and the heads."""
    levels: int = 5
    """Pyramid levels, 3 to 5; the finest has stride 8."""
    anchor_scale: float = 8.0
    """Side of the one square anchor of a location, in strides of its level."""
    fusion_blocks: int = 6
    """Blocks of image-text attention + BERT layer + DyConv; 0 blocks is not allowed."""
    fusion: bool = True
    """False keeps only the DyConv of each block: the GLIP-T(A) layout."""
    fusion_width: int = 2048
    fusion_heads: int = 8
    fusion_dropout: float = 0.1
    fusion_scale: float | None = None
    """Initial layer scale of image-text attention; null is GLIP's 1 / fusion_blocks."""
    alignment_temperature: float = 1.0
    """What region-word logits are divided by at first; it is learned. Narrow models need less."""
    group_norm_groups: int = 16
    contrast_width: int = 64
    """Width of the projections that the inter-image contrast compares."""
    contrast_regions: int = 100
    """Anchors of each image that take part in the inter-image contrast."""
    drop_block: bool = True
    """GLIP's DropBlock (p 0.3, block 3) on the two finest merged maps, while training only."""
    masked_words: bool = True
    """Whether there is a head for masked language modelling."""
    contrast: bool = True
    """Whether there are projections for the inter-image contrast."""
    masks: bool = False
    """Whether there is a mask head."""
    mask_hourglasses: int = 1
    """Hourglass modules in the mask head's extractor."""
    mask_depth: int = 1
    """How often each hourglass halves its map; the region map's side is a multiple of 2**depth."""
    answers: tuple[str, ...] = ()
    """The answers that the question answering head knows; empty means there is no such head. A
    recipe may name the file of `glipv2 prepare answers` instead."""
    captions: bool = False
    """Whether there is a captioning head."""
    prompt_rows: int = 0
    """Rows of a table that is added to the words of a fixed prompt, for prompt tuning (GLIP: 1000);
    0 means there is none."""
    glip_compatible: bool = False
    """Compute as weights trained by the original GLIP code expect, its defects included: DyConv
    misreads the offsets of a finer level as a flat buffer, and values of the fusion tower are
    clamped. Set by `glipv2 convert`; off for new training."""

    def __post_init__(self) -> None:
        if not 3 <= self.levels <= 5:
            raise ValueError(f"model.levels must be 3, 4 or 5, not {self.levels}")
        if self.prompt_rows and self.prompt_rows < self.text_encoder.max_tokens:
            raise ValueError("model.prompt_rows must be at least text_encoder.max_tokens")
        if self.fusion_blocks < 1:
            raise ValueError("model.fusion_blocks must be at least 1")
        if min(self.mask_hourglasses, self.mask_depth) < 1:
            raise ValueError("model.mask_hourglasses and model.mask_depth must be at least 1")
        if (self.answers or self.captions) and not self.fusion:
            raise ValueError("model.answers and model.captions need model.fusion to see the image")
        for name, divisor in (
            ("width", self.group_norm_groups),
            ("width", 4),  # DyReLU squeezes to a quarter
            ("fusion_width", self.fusion_heads),
        ):
            if getattr(self, name) % divisor:
                raise ValueError(f"model.{name} must be a multiple of {divisor}")

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels of the padded input image between neighbouring locations, finest level first."""
        return tuple(8 * 2**level for level in range(self.levels))


TINY = ModelConfig(
    preset="tiny",
    image_encoder=ImageEncoderConfig(
        embed_dim=32, depths=(1, 2, 2, 1), num_heads=(1, 2, 4, 8), window=4, drop_path=0.0
    ),
    text_encoder=TextEncoderConfig(
        width=64,
        layers=2,
        heads=4,
        mlp_width=256,
        max_tokens=96,
        vocab_size=1024,
        dropout=0.0,
        word_init_std=0.3,
    ),
    input=InputConfig(short_side=128, long_side=128, pad_to=(128, 128)),
    width=64,
    levels=3,
    anchor_scale=3.5,
    fusion_blocks=2,
    fusion_width=128,
    fusion_heads=4,
    fusion_dropout=0.0,
    fusion_scale=0.02,
    alignment_temperature=0.22,
    contrast_width=32,
    contrast_regions=32,
    drop_block=False,
)
"""Learns a toy world on two CPU cores in minutes; for tests and the quickstart."""

GLIP_T_A = ModelConfig(preset="A", fusion=False, masked_words=False, contrast=False)
"""GLIP-T(A): Swin-T and BERT-base that meet only in the alignment head (151 M parameters)."""

GLIP_T = ModelConfig(preset="T")
"""GLIP-T and GLIPv2-T: Swin-T, BERT-base, six blocks (232 M parameters)."""

GLIPV2_B = ModelConfig(
    preset="B",
    image_encoder=ImageEncoderConfig(
        embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), window=12, drop_path=0.3
    ),
    fusion_blocks=8,
)
"""GLIPv2-B: Swin-B, eight blocks. The text encoder of the paper is uncertain: BERT-base here."""

GLIP_L = ModelConfig(
    preset="L",
    image_encoder=ImageEncoderConfig(
        embed_dim=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48), window=12, drop_path=0.4
    ),
    fusion_blocks=8,
)
"""GLIP-L: Swin-L, BERT-base, eight blocks (430 M parameters)."""

GLIPV2_H = ModelConfig(
    preset="H",
    image_encoder=ImageEncoderConfig(
        embed_dim=352, depths=(2, 2, 18, 2), num_heads=(11, 22, 44, 88), window=7, drop_path=0.4
    ),
    fusion_blocks=8,
)
"""The size of GLIPv2-H. CoSwin-H was never public: this is a plain Swin of that size."""

PRESETS: dict[str, ModelConfig] = {
    config.preset: config for config in (TINY, GLIP_T_A, GLIP_T, GLIPV2_B, GLIP_L, GLIPV2_H)
}


def preset(name: str) -> ModelConfig:
    """The configuration of a named size; ValueError lists the names if there is no such one."""
    if name not in PRESETS:
        known = ", ".join(get_args(PresetName))
        raise ValueError(f"unknown model preset {name!r}; known presets: {known}")
    return PRESETS[name]


def config_to_dict(config: ModelConfig) -> dict[str, Any]:
    """Plain values that JSON can hold; `config_from_dict` is the inverse."""
    return asdict(config)


def config_from_dict(values: dict[str, Any]) -> ModelConfig:
    """Rebuild a configuration exactly; a missing or unknown key is a ValueError."""
    sections = {
        "image_encoder": ImageEncoderConfig,
        "text_encoder": TextEncoderConfig,
        "input": InputConfig,
    }
    values = dict(values)
    for name, section in sections.items():
        if name in values:
            values[name] = _build(section, values[name], f"model.{name}")
    return _build(ModelConfig, values, "model")


def _build(kind: type, values: dict[str, Any], where: str) -> Any:
    known = {f.name for f in fields(kind)}
    if set(values) != known:
        wrong = ", ".join(sorted(set(values) ^ known))
        raise ValueError(f"{where}: missing or unknown keys: {wrong}")
    return kind(**{key: tuple(v) if isinstance(v, list) else v for key, v in values.items()})
