import dataclasses
import json
import re
from pathlib import Path

import pytest
import timm
import torch
from glip_weights import generated_weights
from timm.models.swin_transformer import checkpoint_filter_fn
from torch import Tensor
from transformers import BertForMaskedLM, BertModel

from glipv2.model.config import ModelConfig, TextEncoderConfig, preset
from glipv2.model.convert import (
    bert_from_transformers,
    from_glip,
    glip_config,
    glip_constants,
    glip_inert,
    swin_from_timm,
    to_glip,
)
from glipv2.model.glip import GLIPv2, build_model
from glipv2.model.image_encoder import ImageEncoder
from glipv2.model.text_encoder import TextEncoder, bert_config

META = Path(__file__).parent / "data" / "glip_reference" / "meta.json"


@pytest.fixture(scope="module")
def original() -> dict[str, Tensor]:
    """A small checkpoint under GLIP's names."""
    weights = generated_weights(json.loads(META.read_text())["state_dict"])
    return weights | glip_constants(glip_config(weights, text_heads=4))


def shapes_of(config: ModelConfig) -> dict[str, Tensor]:
    with torch.device("meta"):
        return GLIPv2(config).state_dict()


def converted(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    config = glip_config(tensors, text_heads=4)
    return from_glip(tensors, shapes_of(config), config)


@pytest.mark.parametrize(
    ("name", "parameters", "entries"),
    [("A", 151_430_526, 541), ("T", 231_780_222, 745), ("L", 430_422_384, 1021)],
)
def test_the_published_models_have_the_published_size(
    name: str, parameters: int, entries: int
) -> None:
    config = dataclasses.replace(preset(name), masked_words=False, contrast=False)
    ours = shapes_of(config)
    inert_weight, inert_bias = 80 * 256, 80  # a classifier that GLIP counts and never uses
    assert sum(tensor.numel() for tensor in ours.values()) + inert_weight + inert_bias == parameters
    assert len(to_glip(ours, config)) + 2 == entries  # with its buffers, as in the released files


def test_sizes_are_read_off_the_shapes(original: dict[str, Tensor]) -> None:
    config = glip_config(original, text_heads=4)
    assert config.image_encoder.depths == (1, 1, 2, 1)
    assert config.image_encoder.num_heads == (2, 2, 4, 4)
    assert (config.image_encoder.embed_dim, config.image_encoder.window) == (24, 7)
    assert (config.width, config.fusion_blocks, config.fusion_width) == (64, 2, 128)
    text = config.text_encoder
    assert (text.width, text.layers, text.mlp_width, text.positions) == (64, 2, 128, 256)
    assert config.glip_compatible


def test_there_and_back_is_bit_for_bit_the_same(original: dict[str, Tensor]) -> None:
    config = glip_config(original, text_heads=4)
    back = to_glip(converted(original), config) | glip_inert(original)
    assert back.keys() == original.keys()
    for name, tensor in original.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor), name


def test_missing_extra_and_misshapen_tensors_are_all_listed(original: dict[str, Tensor]) -> None:
    tensors = dict(original)
    del tensors["rpn.head.bias0"]
    tensors["rpn.head.novelty"] = torch.zeros(1)
    tensors["backbone.fpn.fpn_inner2.bias"] = torch.zeros(7)
    with pytest.raises(ValueError, match="3 tensors do not fit") as caught:
        converted(tensors)
    message = str(caught.value)
    assert "rpn.head.bias0 is missing" in message
    assert "rpn.head.novelty is not expected" in message
    assert "backbone.fpn.fpn_inner2.bias has shape (7,), not (64,)" in message


def test_of_many_tensors_that_do_not_fit_ten_are_named_and_all_counted(
    original: dict[str, Tensor],
) -> None:
    tensors = {name: tensor for name, tensor in original.items() if ".norm1." not in name}
    missing = len(original) - len(tensors)
    tensors |= {f"zebra.{n}": torch.zeros(1) for n in range(4)}
    tensors["rpn.head.bias0"] = torch.zeros(2)
    with pytest.raises(ValueError, match="tensors do not fit") as caught:
        converted(tensors)
    head, *lines = str(caught.value).splitlines()
    assert missing > 10
    assert head.startswith(f"{missing + 5} tensors do not fit")
    assert f"({missing} missing, 4 not expected, 1 of another shape)" in head
    assert len(lines) == 11 and lines[-1].strip() == f"and {missing - 5} more"


def test_another_window_index_than_glips_is_refused(original: dict[str, Tensor]) -> None:
    name = "backbone.body.layers.0.blocks.0.attn.relative_position_index"
    with pytest.raises(ValueError, match=name):
        converted(original | {name: original[name].T.contiguous()})


def test_a_file_that_is_no_glip_checkpoint_is_refused() -> None:
    with pytest.raises(ValueError, match="not a GLIP checkpoint"):
        glip_config({"conv.weight": torch.zeros(1)})


def test_heads_of_glipv2_come_along_when_a_file_has_them(original: dict[str, Tensor]) -> None:
    bias = torch.rand(30522)
    heads = {
        "rpn.head.mlm_head.transform.dense.weight": torch.rand(64, 64),
        "rpn.head.mlm_head.transform.dense.bias": torch.rand(64),
        "rpn.head.mlm_head.transform.LayerNorm.weight": torch.rand(64),
        "rpn.head.mlm_head.transform.LayerNorm.bias": torch.rand(64),
        "rpn.head.mlm_head.decoder.weight": torch.rand(30522, 64),
        "rpn.head.mlm_head.decoder.bias": bias,
        "rpn.head.mlm_head.bias": bias,
        "rpn.loss_evaluator.shallow_log_scale": torch.rand(1),
        "rpn.loss_evaluator.shallow_contrastive_projection_image.weight": torch.rand(64, 64),
        "rpn.loss_evaluator.shallow_contrastive_projection_image.bias": torch.rand(64),
        "rpn.loss_evaluator.shallow_contrastive_projection_text.weight": torch.rand(64, 64),
        "rpn.loss_evaluator.shallow_contrastive_projection_text.bias": torch.rand(64),
    }
    config = glip_config(original | heads, text_heads=4)
    assert config.masked_words
    assert config.contrast
    ours = converted(original | heads)
    assert torch.equal(ours["masked_word_head.decoder.bias"], bias)
    back = to_glip(ours, config)
    assert all(torch.equal(back[name], tensor) for name, tensor in heads.items())


def test_masks_and_tuned_prompts_have_their_place_in_glips_file() -> None:
    config = dataclasses.replace(
        preset("T"),
        masks=True,
        mask_hourglasses=2,
        mask_depth=3,
        prompt_rows=1000,
        glip_compatible=True,
        drop_block=True,
    )
    ours = shapes_of(config)
    theirs = {n: torch.empty(t.shape, device="meta") for n, t in to_glip(ours, config).items()}
    assert theirs["rpn.tunable_linear.weight"].shape == (1000, 768)
    assert "roi_heads.mask.feature_extractor.mask_hg2.low2.low2.low1.conv3.bias" in theirs
    assert theirs["roi_heads.mask.predictor.conv5_mask.weight"].shape == (256, 256, 2, 2)
    assert glip_config(theirs) == config
    assert from_glip(theirs | glip_constants(config), ours, config).keys() == ours.keys()


def test_timms_swin_gives_the_same_features_as_in_timm() -> None:
    torch.manual_seed(0)
    sizes = {"embed_dim": 24, "depths": (1, 2, 2, 1), "num_heads": (2, 2, 4, 4)}
    theirs = timm.create_model("swin_tiny_patch4_window7_224", img_size=224, **sizes).eval()
    config = dataclasses.replace(preset("tiny").image_encoder, window=7, **sizes)
    ours = ImageEncoder(config).eval()
    prefixed = {f"image_encoder.{name}": value for name, value in ours.state_dict().items()}
    found = swin_from_timm(theirs.state_dict(), prefixed)
    missing, unexpected = ours.load_state_dict(
        {name.removeprefix("image_encoder."): value for name, value in found.items()}, strict=False
    )
    assert not unexpected
    assert all(name.startswith("norms.") for name in missing)

    image = torch.randint(0, 256, (1, 3, 224, 224), dtype=torch.uint8)
    mean = 255 * torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)  # red, green, blue
    std = 255 * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    expected = theirs.forward_intermediates((image - mean) / std, indices=[3])[1][0]
    stages = []
    ours.swin.layers[3].register_forward_hook(lambda _m, _i, output: stages.append(output))
    ours(image, torch.tensor([[224, 224]]))
    torch.testing.assert_close(stages[0].permute(0, 3, 1, 2), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_microsofts_swin_gives_what_timm_makes_of_it(prefix: str) -> None:
    sizes = {"embed_dim": 24, "depths": (1, 2, 2, 1), "num_heads": (2, 2, 4, 4)}
    theirs = timm.create_model("swin_tiny_patch4_window7_224", img_size=224, **sizes)
    microsoft = {}  # its classifier is `head`, and a stage that halves does so at its end
    for name, tensor in theirs.state_dict().items():
        stage = re.match(r"layers\.(\d)\.downsample", name)
        old = stage and f"layers.{int(stage[1]) - 1}.downsample" + name[stage.end() :]
        microsoft[old or name.replace("head.fc.", "head.")] = torch.rand_like(tensor)
    expected = checkpoint_filter_fn(dict(microsoft), theirs)
    config = dataclasses.replace(preset("tiny").image_encoder, window=7, **sizes)
    ours = {f"image_encoder.{n}": t for n, t in ImageEncoder(config).state_dict().items()}
    microsoft["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49)
    found = swin_from_timm({prefix + name: t for name, t in microsoft.items()}, ours)
    assert len(found) == sum(name.startswith("image_encoder.swin.") for name in ours)
    for name, tensor in found.items():
        wanted = expected[name.removeprefix("image_encoder.swin.")]
        assert torch.equal(tensor, wanted.flip(1) if "patch_embed.proj.weight" in name else wanted)


def test_other_layouts_of_swin_are_told_which_file_to_take() -> None:
    ours = shapes_of(preset("tiny"))
    tensors = {"swin.encoder.layers.0.blocks.0.attention.self.query.weight": torch.zeros(2, 2)}
    with pytest.raises(ValueError, match=r"neither timm's Swin nor Microsoft's.* take model"):
        swin_from_timm(tensors, ours)


def text_config() -> TextEncoderConfig:
    return TextEncoderConfig(
        width=32, layers=2, heads=4, mlp_width=64, max_tokens=16, positions=32, vocab_size=99
    )


def test_a_bert_of_transformers_gives_the_same_words() -> None:
    torch.manual_seed(0)
    theirs = BertModel(bert_config(text_config())).eval()
    ours = TextEncoder(text_config()).eval()
    prefixed = {f"text_encoder.{name}": value for name, value in ours.state_dict().items()}
    found = bert_from_transformers(theirs.state_dict(), prefixed)
    ours.load_state_dict({name.removeprefix("text_encoder."): v for name, v in found.items()})
    tokens = torch.randint(0, 99, (2, 9))
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 5:] = False
    expected = theirs(tokens, attention_mask=mask.long()).last_hidden_state
    torch.testing.assert_close(ours(tokens, mask)[mask], expected[mask])


def test_berts_word_prediction_fills_the_head_for_masked_words() -> None:
    torch.manual_seed(0)
    theirs = BertForMaskedLM(bert_config(text_config())).eval()
    config = dataclasses.replace(preset("tiny"), text_encoder=text_config())
    model = build_model(config, seed=0).eval()
    tensors = theirs.state_dict()
    tensors.pop("cls.predictions.decoder.weight", None)  # files leave the tied matrix out
    model.load_state_dict(model.state_dict() | bert_from_transformers(tensors, model.state_dict()))
    assert model.masked_word_head is not None
    hidden = torch.randn(1, 4, 32)
    torch.testing.assert_close(model.masked_word_head(hidden), theirs.cls(hidden))


def test_a_bert_of_another_size_is_refused() -> None:
    theirs = BertModel(bert_config(dataclasses.replace(text_config(), width=64)))
    ours = {f"text_encoder.{k}": v for k, v in TextEncoder(text_config()).state_dict().items()}
    with pytest.raises(ValueError, match=r"embeddings\.LayerNorm\.bias has shape \(64,\)"):
        bert_from_transformers(theirs.state_dict(), ours)
