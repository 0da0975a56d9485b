"""Weights of others as ours and back: GLIP, Swin of timm, BERT of transformers. Tensors, no files.

Nothing is skipped silently: tensors that are missing, of another shape or that nobody expects are
an error which counts and names them. What a file holds without use for the model is named here,
pattern by pattern.
"""

import math
import re
from collections.abc import Iterable, Mapping

import torch
from timm.models.swin_transformer import get_relative_position_index
from torch import Tensor

from glipv2.model.anchors import make_anchors
from glipv2.model.boxes import last_pixel_corners
from glipv2.model.config import ImageEncoderConfig, ModelConfig, TextEncoderConfig

Weights = Mapping[str, Tensor]

GLIP_INERT = (
    r"rpn\.head\.cls_logits\.(weight|bias)",  # a classifier whose loss is multiplied by 0
    r"language_backbone\.body\.model\.embeddings\.position_ids",  # of old transformers
    r"language_backbone\.body\.model\.pooler\..+",
)
GLIP_CLASSES = 80
TIMM_INERT = (r"norm\.(weight|bias)", r"head\..+", r".+\.(relative_position_index|attn_mask)")
BERT_INERT = (r"pooler\..+", r"cls\.seq_relationship\..+", r"embeddings\.position_ids")

_ATTENTION = {
    "norm_image": "layer_norm_v",
    "norm_text": "layer_norm_l",
    "image_scale": "gamma_v",
    "text_scale": "gamma_l",
    "query": "attn.v_proj",
    "key": "attn.l_proj",
    "image_value": "attn.values_v_proj",
    "text_value": "attn.values_l_proj",
    "image_out": "attn.out_v_proj",
    "text_out": "attn.out_l_proj",
}
_DYCONV = {
    "coarser": "DyConv.0.conv",
    "same": "DyConv.1.conv",
    "finer": "DyConv.2.conv",
    "norm_coarser": "DyConv.0.bn",
    "norm_same": "DyConv.1.bn",
    "norm_finer": "DyConv.2.bn",
    "scale_attention": "AttnConv.1",
    "offset": "offset",
}
_HEADS = {
    "prompt_table": "rpn.tunable_linear.weight",
    "box_head.deltas": "rpn.head.bbox_pred",
    "box_head.centerness": "rpn.head.centerness",
    "alignment_head.project_text": "rpn.head.dot_product_projection_text",
    "alignment_head.log_scale": "rpn.head.log_scale",
    "alignment_head.bias_text": "rpn.head.bias_lang",
    "alignment_head.bias0": "rpn.head.bias0",
    "masked_word_head.transform": "rpn.head.mlm_head.transform.dense",
    "masked_word_head.norm": "rpn.head.mlm_head.transform.LayerNorm",
    "masked_word_head.decoder": "rpn.head.mlm_head.decoder",
    "mask_head.upsample": "roi_heads.mask.predictor.conv5_mask",
    "mask_head.project_text": "roi_heads.mask.predictor.dot_product_projection_text",
    "mask_head.log_scale": "roi_heads.mask.predictor.log_scale",
    "mask_head.bias_text": "roi_heads.mask.predictor.bias_lang",
    "contrast_head.project_region": "rpn.loss_evaluator.shallow_contrastive_projection_image",
    "contrast_head.project_word": "rpn.loss_evaluator.shallow_contrastive_projection_text",
    "contrast_head.log_temperature": "rpn.loss_evaluator.shallow_log_scale",
}
_HOURGLASS = "roi_heads.mask.feature_extractor.mask_hg"
_LEVEL_SCALES = "box_head.level_scales"
_MLM_BIAS = ("rpn.head.mlm_head.decoder.bias", "rpn.head.mlm_head.bias")  # one vector, stored twice
# Convolutions of GLIP with one pixel are linear layers of ours.
_ONE_PIXEL = r"rpn\.head\.(bbox_pred|centerness)\.weight|.+\.AttnConv\.1\.weight"


def glip_name(name: str, fusion: bool) -> str:  # noqa: C901 (one case a part)
    """What GLIP calls a parameter of ours (facts J); KeyError if GLIP has no such thing."""

    def tower(block: str, module: int) -> str:
        return f"rpn.head.dyhead_tower.{3 * int(block) + module if fusion else block}"

    match name.split("."):
        case ["image_encoder", "norms", stage, *rest]:
            return ".".join((f"backbone.body.norm{int(stage) + 1}", *rest))
        case ["image_encoder", "swin", "layers", stage, "downsample", *rest]:
            # timm halves at the start of a stage, GLIP at the end of the one before
            return ".".join((f"backbone.body.layers.{int(stage) - 1}.downsample", *rest))
        case ["image_encoder", "swin", *rest]:
            return ".".join(("backbone.body", *rest))
        case ["pyramid", "top", level, *rest]:
            return ".".join((f"backbone.fpn.top_blocks.p{int(level) + 6}", *rest))
        case ["pyramid", ("inner" | "layer") as part, level, *rest]:
            return ".".join((f"backbone.fpn.fpn_{part}{int(level) + 2}", *rest))
        case ["text_encoder", "bert", *rest]:
            return ".".join(("language_backbone.body.model", *rest))
        case ["blocks", block, "attention", part, *rest]:
            return ".".join((tower(block, 0), "b_attn", _ATTENTION[part], *rest))
        case ["blocks", block, "words", *rest]:
            return ".".join((tower(block, 1), *rest))
        case ["blocks", block, "maps", "relu", part, *rest]:
            number = {"squeeze": 0, "expand": 2}[part]
            return ".".join((tower(block, 2), f"relu.fc.{number}", *rest))
        case ["blocks", block, "maps", part, *rest]:
            return ".".join((tower(block, 2), _DYCONV[part], *rest))
        case ["mask_head", "hourglasses", number, *rest]:
            return ".".join((f"{_HOURGLASS}{int(number) + 1}", *rest))
        case ["prompt_table"]:
            return _HEADS[name]
        case [head, part, *rest]:
            return ".".join((_HEADS[f"{head}.{part}"], *rest))
    raise KeyError(name)


def glip_config(
    tensors: Weights, text_heads: int | None = None, fusion_heads: int = 8
) -> ModelConfig:
    """The configuration of a GLIP checkpoint, read off its shapes.

    The numbers of heads of BERT and of the fusion show in no shape: BERT has one for 64 channels,
    and GLIP's fusion has 8.
    ValueError if a tensor that every GLIP model has is missing.
    """
    try:
        embedding = tensors["language_backbone.body.model.embeddings.word_embeddings.weight"]
        positions = tensors["language_backbone.body.model.embeddings.position_embeddings.weight"]
        mlp = tensors["language_backbone.body.model.encoder.layer.0.intermediate.dense.weight"]
        patches = tensors["backbone.body.patch_embed.proj.weight"]
        stages = [_count(tensors, rf"backbone\.body\.layers\.{s}\.blocks\.(\d+)") for s in range(4)]
        tables = [
            tensors[f"backbone.body.layers.{s}.blocks.0.attn.relative_position_bias_table"]
            for s in range(4)
        ]
        width = tensors["rpn.head.centerness.weight"].shape[1]
    except KeyError as error:
        raise ValueError(f"not a GLIP checkpoint: it has no {error.args[0]}") from None
    fused = "rpn.head.dyhead_tower.0.b_attn.gamma_v" in tensors
    modules = _count(tensors, r"rpn\.head\.dyhead_tower\.(\d+)")
    hourglasses = [re.match(rf"{re.escape(_HOURGLASS)}1((\.low2)*)\.low1", n) for n in tensors]
    attention = tensors.get("rpn.head.dyhead_tower.0.b_attn.attn.v_proj.weight")
    return ModelConfig(
        preset="T" if fused else "A",
        image_encoder=ImageEncoderConfig(
            embed_dim=patches.shape[0],
            depths=tuple(stages),
            num_heads=tuple(table.shape[1] for table in tables),
            window=(math.isqrt(tables[0].shape[0]) + 1) // 2,
            drop_path=0.2 if sum(stages) <= 12 else 0.4,
        ),
        text_encoder=TextEncoderConfig(
            width=embedding.shape[1],
            layers=_count(tensors, r"language_backbone\.body\.model\.encoder\.layer\.(\d+)"),
            heads=text_heads or embedding.shape[1] // 64,
            mlp_width=mlp.shape[0],
            max_tokens=min(256, positions.shape[0]),
            positions=positions.shape[0],
            vocab_size=embedding.shape[0],
        ),
        width=width,
        fusion=fused,
        fusion_blocks=modules // 3 if fused else modules,
        fusion_width=2048 if attention is None else attention.shape[0],
        fusion_heads=fusion_heads,
        masked_words=any(name.startswith("rpn.head.mlm_head.") for name in tensors),
        contrast="rpn.loss_evaluator.shallow_log_scale" in tensors,
        masks="roi_heads.mask.predictor.log_scale" in tensors,
        mask_hourglasses=max(1, _count(tensors, rf"{re.escape(_HOURGLASS)}(\d+)")),
        mask_depth=1
        + max((nested[1].count("low2") for nested in hourglasses if nested), default=0),
        prompt_rows=len(tensors.get("rpn.tunable_linear.weight", ())),
        glip_compatible=True,
    )


def _count(tensors: Weights, pattern: str) -> int:
    """How many numbers stand in a place of the tensors' names."""
    return len({match[1] for name in tensors if (match := re.match(pattern, name))})


def from_glip(tensors: Weights, ours: Weights, config: ModelConfig) -> dict[str, Tensor]:
    """A GLIP state dict as the state dict of our model; `ours` gives names and shapes.

    ValueError lists missing, unexpected and misshapen tensors, and constants that differ.
    """
    expected = to_glip(ours, config)
    _check(tensors, {name: tensor.shape for name, tensor in expected.items()}, GLIP_INERT)
    for name, constant in glip_constants(config).items():
        if not torch.equal(tensors[name].cpu(), constant.to(tensors[name].dtype)):
            raise ValueError(f"{name} holds other numbers than GLIP's code computes")
    named = {name: tensors[name] for name in expected}
    found = {}
    for name, own in ours.items():
        if name == _LEVEL_SCALES:
            found[name] = torch.cat([named[scale] for scale in _scale_names(config)])
        else:
            found[name] = named[glip_name(name, config.fusion)].reshape(own.shape)
    return found


def to_glip(
    ours: Weights, config: ModelConfig, dtypes: Mapping[str, str] | None = None
) -> dict[str, Tensor]:
    """Our state dict under GLIP's names and in its shapes, with its constants: what GLIP loads.

    Tensors named in `dtypes` get that type. Parts that GLIP does not know are an error; its inert
    tensors are the caller's to add.
    """
    found: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in ours.items():
        if name == _LEVEL_SCALES:
            found.update(zip(_scale_names(config), tensor.split(1), strict=True))
            continue
        try:
            target = glip_name(name, config.fusion)
        except KeyError:
            unknown.append(name)
            continue
        found[target] = tensor[..., None, None] if re.fullmatch(_ONE_PIXEL, target) else tensor
        if target == _MLM_BIAS[0]:
            found[_MLM_BIAS[1]] = tensor
    if unknown:
        raise ValueError(f"GLIP has no place for {_listed(unknown)}")
    found |= glip_constants(config)
    return found | {n: found[n].to(getattr(torch, dtype)) for n, dtype in (dtypes or {}).items()}


def glip_dtypes(tensors: Weights, ours: Weights, config: ModelConfig) -> dict[str, str]:
    """Of a GLIP state dict and ours made of it: name -> type where the file's is not ours.

    With these, `to_glip` gives the same bits again: float32 holds every half. ValueError names
    tensors whose numbers it does not hold.
    """
    back = to_glip(ours, config)
    lost = [n for n, t in back.items() if not torch.equal(t.to(tensors[n].dtype), tensors[n].cpu())]
    if lost:
        raise ValueError(
            f"{len(lost)} tensors hold NaN or numbers that float32, in which weights are kept, "
            f"does not; save them as float32 first: {_listed(lost)}"
        )
    return {
        name: str(tensors[name].dtype).removeprefix("torch.")
        for name, tensor in back.items()
        if tensors[name].dtype != tensor.dtype
    }


def glip_inert(tensors: Weights) -> dict[str, Tensor]:
    """What a GLIP state dict holds besides: needed only to write the same file again."""
    return {name: tensor for name, tensor in tensors.items() if _matches(name, GLIP_INERT)}


def glip_inert_zeros(config: ModelConfig) -> dict[str, Tensor]:
    """The classifier that GLIP's code loads and never uses, for a model that never had one."""
    kernel, bias = torch.zeros(GLIP_CLASSES, config.width, 1, 1), torch.zeros(GLIP_CLASSES)
    return {"rpn.head.cls_logits.weight": kernel, "rpn.head.cls_logits.bias": bias}


def glip_constants(config: ModelConfig) -> dict[str, Tensor]:
    """Buffers of GLIP that follow from the configuration: window indices and anchor cells."""
    window = config.image_encoder.window
    found = {
        f"backbone.body.layers.{stage}.blocks.{block}.attn.relative_position_index":
            get_relative_position_index(window, window)
        for stage, depth in enumerate(config.image_encoder.depths)
        for block in range(depth)
    }  # fmt: skip
    cells = make_anchors([(1, 1)] * config.levels, config.strides, config.anchor_scale)
    for level, cell in enumerate(last_pixel_corners(cells)):
        found[f"rpn.anchor_generator.cell_anchors.{level}"] = cell[None]
    return found


def _scale_names(config: ModelConfig) -> list[str]:
    return [f"rpn.head.scales.{level}.scale" for level in range(config.levels)]


def swin_from_timm(tensors: Weights, ours: Weights) -> dict[str, Tensor]:
    """A classifier of timm, or Microsoft's own, as our state dict under `image_encoder.swin`.

    Their weights expect red first and ours blue first, so the colours of the patch embedding
    change places: the features stay the same. The norms of the three maps are new.
    """
    tensors = _as_timm(tensors)
    prefix = "image_encoder.swin."
    wanted = {name: tensor for name, tensor in ours.items() if name.startswith(prefix)}
    shapes = {name.removeprefix(prefix): tensor.shape for name, tensor in wanted.items()}
    _check(tensors, shapes, TIMM_INERT)
    found = {name: tensors[name.removeprefix(prefix)] for name in wanted}
    patches = f"{prefix}patch_embed.proj.weight"
    found[patches] = found[patches].flip(1)
    return found


def _as_timm(tensors: Weights) -> Weights:
    """Microsoft's Swin under timm's names; ValueError for a layout that is neither's."""
    for prefix in ("module.", "model."):
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    if "layers.0.blocks.0.attn.qkv.weight" not in tensors:
        raise ValueError(
            "neither timm's Swin nor Microsoft's (no layers.0.blocks.0.attn.qkv.weight); take "
            "model.safetensors of a swin_* of timm, or a swin_*.pth of "
            "github.com/microsoft/Swin-Transformer; those of transformers or mmdetection have "
            "other names"
        )
    if not any(name.startswith("layers.0.downsample.") for name in tensors):
        return tensors
    # Microsoft (and timm before 0.9) halves at the end of a stage, timm at the start of the next.
    stage = re.compile(r"^layers\.(\d)\.downsample")
    return {
        stage.sub(lambda match: f"layers.{int(match[1]) + 1}.downsample", name): tensor
        for name, tensor in tensors.items()
    }


def bert_from_transformers(tensors: Weights, ours: Weights) -> dict[str, Tensor]:
    """A BERT of transformers as the part of our state dict under `text_encoder.bert`.

    A file with BERT's own word prediction fills our `masked_word_head` too, if there is one.
    """
    plain = {
        re.sub(r"^bert\.", "", name).replace(".gamma", ".weight").replace(".beta", ".bias"): tensor
        for name, tensor in tensors.items()
    }
    predictions = "cls.predictions."
    renamed = {"text_encoder.bert." + n: n for n in plain if not n.startswith("cls.")}
    if predictions + "transform.dense.weight" in plain:
        plain[predictions + "decoder.weight"] = plain.get(
            predictions + "decoder.weight", plain["embeddings.word_embeddings.weight"]
        )
        head = {
            "transform.weight": "transform.dense.weight",
            "transform.bias": "transform.dense.bias",
            "norm.weight": "transform.LayerNorm.weight",
            "norm.bias": "transform.LayerNorm.bias",
            "decoder.weight": "decoder.weight",
            "decoder.bias": "bias",
        }
        renamed |= {f"masked_word_head.{a}": predictions + b for a, b in head.items()}
    wanted = [
        name
        for name in ours
        if name.startswith("text_encoder.")
        or (name.startswith("masked_word_head.") and name in renamed)
    ]
    shapes = {renamed.get(name, name): ours[name].shape for name in wanted}
    _check(plain, shapes, (*BERT_INERT, r"cls\.predictions\..+"))
    return {name: plain[renamed[name]] for name in wanted}


def _check(tensors: Weights, shapes: Mapping[str, torch.Size], inert: Iterable[str]) -> None:
    """ValueError unless `tensors` has exactly the named shapes, inert ones aside."""
    missing = [f"{name} is missing" for name in shapes if name not in tensors]
    extra = [
        f"{name} is not expected"
        for name in tensors
        if name not in shapes and not _matches(name, inert)
    ]
    misshapen = [
        f"{name} has shape {tuple(tensors[name].shape)}, not {tuple(shape)}"
        for name, shape in shapes.items()
        if name in tensors and tensors[name].shape != shape
    ]
    problems = sorted(missing + extra + misshapen)
    if problems:
        lines = _listed(problems, "\n  ")
        raise ValueError(
            f"{len(problems)} tensors do not fit ({len(missing)} missing, {len(extra)} not "
            f"expected, {len(misshapen)} of another shape):\n  {lines}"
        )


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def _listed(items: list[str], between: str = ", ", most: int = 10) -> str:
    more = [f"and {len(items) - most} more"] if len(items) > most else []
    return between.join([*items[:most], *more])
