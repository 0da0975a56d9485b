import dataclasses
import json

import pytest
import torch

from glipv2.model.config import (
    PRESETS,
    ModelConfig,
    TextEncoderConfig,
    config_from_dict,
    config_to_dict,
    preset,
)
from glipv2.model.glip import GLIPv2, build_model


@pytest.mark.parametrize("name", ["tiny", "T", "B", "L", "H"])
def test_a_preset_survives_json(name: str) -> None:
    config = preset(name)
    assert config.preset == name
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config


def test_an_unknown_preset_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="tiny, A, T, B, L, H"):
        preset("XL")


def test_an_unknown_or_missing_key_is_refused_with_its_name() -> None:
    values = config_to_dict(PRESETS["tiny"])
    values["text_encoder"]["widht"] = values["text_encoder"].pop("heads")
    with pytest.raises(ValueError, match="model.text_encoder.*heads, widht"):
        config_from_dict(values)


@pytest.mark.parametrize(
    "change", [{"levels": 2}, {"fusion_blocks": 0}, {"width": 100}, {"fusion_width": 100}]
)
def test_impossible_shapes_are_refused(change: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        dataclasses.replace(ModelConfig(), **change)


def test_text_width_must_split_into_heads() -> None:
    with pytest.raises(ValueError, match="heads"):
        TextEncoderConfig(width=100, heads=12)


def test_the_tiny_preset_has_two_to_five_million_parameters() -> None:
    parameters = sum(p.numel() for p in build_model(preset("tiny"), seed=0).parameters())
    assert 2e6 < parameters < 5e6


DUMMY_CLASSIFIER = 20_560  # the released head has 80 class logits that nothing uses; we don't


@pytest.mark.parametrize(
    ("name", "change", "image", "pyramid", "head"),
    [
        ("T", {"fusion": False}, 27_520_506, 3_295_232, 11_723_140),  # GLIP-T(A)
        ("T", {}, 27_520_506, 3_295_232, 92_072_836),
        ("L", {}, 195_200_820, 3_639_296, 122_690_620),
    ],
)
def test_parameters_are_as_many_as_in_the_released_models(
    name: str, change: dict[str, bool], image: int, pyramid: int, head: int
) -> None:
    with torch.device("meta"):
        model = GLIPv2(dataclasses.replace(preset(name), **change))

    def count(*modules: torch.nn.Module) -> int:
        return sum(p.numel() for module in modules for p in module.parameters())

    assert count(model.image_encoder) == image
    assert count(model.pyramid) == pyramid
    assert count(model.text_encoder) == 108_891_648
    assert count(model.blocks, model.box_head, model.alignment_head) == head - DUMMY_CLASSIFIER
    assert count(model.masked_word_head) == 24_063_546
    assert count(model.contrast_head) == 65_665
