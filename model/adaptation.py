"""What of a model is trained for a new task, and what of another model it starts from."""

import dataclasses
import json
from typing import TYPE_CHECKING, Any

from glipv2.model.config import ModelConfig, Tune

if TYPE_CHECKING:  # that models agree is seen without loading torch
    from glipv2.model.glip import GLIPv2

_TRAINED: dict[Tune, tuple[str, ...]] = {
    "full": ("",),
    "linear_probe": ("box_head.deltas.", "box_head.centerness.", "alignment_head."),
    "prompt": ("prompt_table",),
    "mask_head": ("mask_head.",),
    "answer_head": ("answer_head.",),
    "caption_head": ("caption_head.",),
}
"""Setting -> the names' beginnings of the parameters that are trained (facts G.4)."""

OPTIONAL_PARTS = (
    "masked_word_head", "contrast_head", "mask_head", "answer_head", "caption_head", "prompt_table",
)  # fmt: skip
_FREE = {
    "": ("preset", "input", "masked_words", "contrast", "contrast_width", "contrast_regions",
         "masks", "mask_hourglasses", "mask_depth", "answers", "captions", "prompt_rows",
         "fusion_dropout", "fusion_scale", "alignment_temperature", "drop_block"),
    "image_encoder": ("drop_path",),
    "text_encoder": ("dropout", "word_init_std"),
}  # fmt: skip
"""Fields that may differ between a model and the one it starts from: they say what is trained on
top, or how, but not what the common weights compute."""


def set_trainable(model: "GLIPv2", tune: Tune, frozen: tuple[str, ...] = ()) -> int:
    """Freeze everything but what `tune` trains, and all whose names begin with one of `frozen`;
    returns the number of trained parameters.

    ValueError if the model has no such part.
    """
    prefixes = _TRAINED[tune]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(prefixes) and not name.startswith(frozen))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if not trained:
        raise ValueError(f"the model has no {prefixes[0].rstrip('.')} to tune")
    return trained


def check_agreement(config: ModelConfig, source: ModelConfig) -> None:
    """ValueError names the settings in which a model and the one it starts from must agree and
    don't, with both values, and what to set."""
    if different := _differences(config, source):
        said = ", ".join(
            f"{key} is {here} here and {there} there" for key, here, there in different
        )
        cure = " ".join(f"{key}={there}" for key, _, there in different)
        raise ValueError(
            f"the models differ: {said}. Set {cure}, which the weights were trained with, or start "
            "from others"
        )


def adopt(model: "GLIPv2", source: "GLIPv2") -> list[str]:
    """Copy into `model` what it has in common with `source`; ValueError where they don't agree.

    Returns the optional parts that keep their own start, because `source` lacks them or has them
    for something else.
    """
    check_agreement(model.config, source.config)
    mine, theirs = model.state_dict(), source.state_dict()
    new = [part for part in OPTIONAL_PARTS if not _shared(part, model, source)]
    common = {name: theirs[name] for name in mine if name.split(".")[0] not in new}
    model.load_state_dict(mine | common)
    return [part for part in new if getattr(model, part) is not None]


def _shared(part: str, model: "GLIPv2", source: "GLIPv2") -> bool:
    if part == "answer_head" and model.config.answers != source.config.answers:
        return False  # one output an answer: the same size would not mean the same answers
    shapes: list[dict[str, Any]] = [
        {name: tensor.shape for name, tensor in m.state_dict().items() if name.startswith(part)}
        for m in (model, source)
    ]
    return bool(shapes[0]) and shapes[0] == shapes[1]


def _differences(config: ModelConfig, other: ModelConfig) -> list[tuple[str, str, str]]:
    """Key of the recipe, value here and value there, both as a recipe has them."""
    found = []
    for section, free in _FREE.items():
        mine, theirs = (dataclasses.asdict(c) for c in (config, other))
        if section:
            mine, theirs = mine[section], theirs[section]
        prefix = f"model.{section}." if section else "model."
        found += [
            (f"{prefix}{field}", _as_yaml(mine[field]), _as_yaml(theirs[field]))
            for field in mine
            if mine[field] != theirs[field]
            and field not in free
            and not isinstance(mine[field], dict)
        ]
    return found


def _as_yaml(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))
