import dataclasses

import pytest
import torch
from torch import Tensor

from glipv2.model.adaptation import adopt, set_trainable
from glipv2.model.batch import NO_CATEGORY, NO_WORD, Batch
from glipv2.model.config import ModelConfig, Tune, preset
from glipv2.model.glip import GLIPv2, build_model
from glipv2.pipeline.config_loader import config_from_tree
from glipv2.pipeline.optim import build_optimizer
from glipv2.pipeline.train_config import TrainConfig

PLAIN = dataclasses.replace(preset("tiny"), masked_words=False, contrast=False)
TUNABLE = dataclasses.replace(PLAIN, prompt_rows=96)


def batch() -> Batch:
    """Two images with one box each, under one fixed prompt of six tokens."""
    generator = torch.Generator().manual_seed(2)
    B, T = 2, 6
    positive = torch.zeros(B, 1, T, dtype=torch.bool)
    positive[0, 0, 1] = positive[1, 0, 3] = True
    return Batch(
        images_B3HW=torch.randint(0, 256, (B, 3, 64, 64), dtype=torch.uint8, generator=generator),
        sizes_B2=torch.tensor([[64, 64], [64, 64]]),
        tokens_BT=torch.tensor([[2, 50, 60, 70, 80, 3]] * B),
        token_mask_BT=torch.ones(B, T, dtype=torch.bool),
        mlm_labels_BT=torch.full((B, T), -100),
        boxes_BN4=torch.tensor([[[8.0, 8, 40, 40]], [[20.0, 16, 60, 50]]]),
        box_mask_BN=torch.ones(B, 1, dtype=torch.bool),
        positive_BNT=positive,
        box_category_BN=torch.full((B, 1), NO_CATEGORY),
        token_category_BT=torch.full((B, T), NO_WORD),
        keys=["toy/0", "toy/1"],
    )


def tuned(model: GLIPv2, tune: Tune, steps: int, rate: float) -> list[float]:
    """The losses of some steps of the optimiser that training uses."""
    set_trainable(model, tune)
    train = TrainConfig(head_learning_rate=rate, weight_decay=0.01)
    optimizer = build_optimizer(model.train(), train)
    losses = []
    for _ in range(steps):
        terms = model(batch())
        loss = terms["box"] * 2 + terms["centerness"] + terms["token"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("tune", "rate", "trained"),
    [
        (
            "linear_probe",
            0.02,
            {
                "box_head.deltas.weight",
                "box_head.deltas.bias",
                "box_head.centerness.weight",
                "box_head.centerness.bias",
                "alignment_head.project_text.weight",
                "alignment_head.project_text.bias",
                "alignment_head.log_scale",
                "alignment_head.bias_text",
                "alignment_head.bias0",
            },
        ),
        ("prompt", 0.1, {"prompt_table"}),
    ],
)
def test_what_is_not_tuned_stays_bit_for_bit_the_same(
    tune: Tune, rate: float, trained: set[str]
) -> None:
    model = build_model(TUNABLE, seed=0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    losses = tuned(model, tune, steps=12, rate=rate)
    changed = {n for n, tensor in model.state_dict().items() if not torch.equal(tensor, before[n])}
    assert changed == trained
    assert losses[-1] < 0.95 * losses[0]


def test_full_tuning_trains_everything() -> None:
    model = build_model(PLAIN, seed=0)
    assert set_trainable(model, "full") == sum(p.numel() for p in model.parameters())


def test_a_part_that_is_not_there_can_not_be_tuned() -> None:
    with pytest.raises(ValueError, match="no mask_head to tune"):
        set_trainable(build_model(PLAIN, seed=0), "mask_head")


def outputs(model: GLIPv2) -> Tensor:
    b = batch()
    with torch.no_grad():
        found = model.eval().predict(b.images_B3HW, b.sizes_B2, b.tokens_BT, b.token_mask_BT)
    return found.token_logits_BAT


def test_a_fresh_prompt_table_changes_nothing_and_a_filled_one_each_word_by_its_place() -> None:
    plain = build_model(PLAIN, seed=0)
    model = build_model(TUNABLE, seed=1)
    assert adopt(model, plain) == ["prompt_table"]
    assert torch.equal(outputs(model), outputs(plain))
    assert model.prompt_table is not None
    with torch.no_grad():
        model.prompt_table[4] = 0.5
    b = batch()
    unfused = model.encode_words(b.tokens_BT, b.token_mask_BT)
    difference = unfused - plain.eval().encode_words(b.tokens_BT, b.token_mask_BT)
    torch.testing.assert_close(difference[:, 4], torch.full_like(difference[:, 4], 0.5))
    assert difference[:, :4].abs().max() == 0
    assert not torch.equal(outputs(model), outputs(plain))


def test_a_model_with_more_heads_starts_from_one_with_fewer() -> None:
    source = build_model(PLAIN, seed=0)
    model = build_model(dataclasses.replace(preset("tiny"), answers=("yes", "no")), seed=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert adopt(model, source) == ["masked_word_head", "contrast_head", "answer_head"]
    common = source.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, common[name] if name in common else before[name]), name


def test_answers_in_another_order_are_another_head() -> None:
    source = build_model(dataclasses.replace(PLAIN, answers=("yes", "no")), seed=0)
    same = build_model(dataclasses.replace(PLAIN, answers=("yes", "no")), seed=1)
    other = build_model(dataclasses.replace(PLAIN, answers=("no", "yes")), seed=1)
    assert adopt(same, source) == []
    assert adopt(other, source) == ["answer_head"]


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (dataclasses.replace(PLAIN, width=128), r"model\.width"),
        (dataclasses.replace(PLAIN, fusion_heads=2), r"model\.fusion_heads"),
        (
            dataclasses.replace(
                PLAIN, text_encoder=dataclasses.replace(PLAIN.text_encoder, heads=2)
            ),
            r"model\.text_encoder\.heads",
        ),
        (dataclasses.replace(PLAIN, glip_compatible=True), r"model\.glip_compatible"),
    ],
)
def test_models_that_compute_differently_are_refused(config: ModelConfig, field: str) -> None:
    with pytest.raises(ValueError, match=field):
        adopt(build_model(PLAIN, seed=0), build_model(config, seed=0))


def test_the_refusal_names_both_values_and_its_cure_is_a_recipes() -> None:
    encoder = dataclasses.replace(PLAIN.image_encoder, depths=(1, 1, 2, 1))
    config = dataclasses.replace(PLAIN, glip_compatible=True, image_encoder=encoder)
    source = build_model(config, seed=0)
    with pytest.raises(ValueError, match="the models differ") as caught:
        adopt(build_model(PLAIN, seed=0), source)
    message = str(caught.value)
    assert "model.glip_compatible is false here and true there" in message
    cure = message.partition("Set ")[2].partition(", which")[0]
    assert sorted(cure.split()) == [
        "model.glip_compatible=true",
        "model.image_encoder.depths=[1,1,2,1]",
    ]
    mended = config_from_tree({"run_dir": "r", "model": {"preset": "tiny"}}, cure.split()).model
    adopt(build_model(mended, seed=0), source)
