"""What the mask head learns from and predicts; its layers: test_model_mask_network.py."""

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from glipv2.model.batch import NO_CATEGORY, NO_WORD, UNKNOWN_MASK, Batch, Collectives, Outputs
from glipv2.model.config import LossWeights, ModelConfig, preset
from glipv2.model.glip import GLIPv2, build_model
from glipv2.model.mask_head import mask_loss, paste_masks, phrases, region_masks
from glipv2.model.regions import (
    MAX_PREDICTED,
    pick_mask_regions,
    region_features,
)

CONFIG = dataclasses.replace(preset("tiny"), masks=True, fusion_blocks=1)
ALONE = Collectives()
CELLS = 10


@pytest.fixture(scope="module")
def model() -> GLIPv2:
    return build_model(CONFIG, seed=0).eval()


def make_batch(images: int = 2, boxes: int = 3, tokens: int = 10) -> Batch:
    """Random boxes, masks and pixels; the last box of every second image is only padding."""
    generator = torch.Generator().manual_seed(7)
    corner = torch.rand(images, boxes, 2, generator=generator) * 30
    size = 18 + torch.rand(images, boxes, 2, generator=generator) * 14
    positive = torch.zeros(images, boxes, tokens, dtype=torch.bool)
    box_mask = torch.ones(images, boxes, dtype=torch.bool)
    for n in range(boxes):
        positive[:, n, 1 + 2 * n : 3 + 3 * n] = True
    box_mask[1::2, boxes - 1 :] = False
    masks = torch.rand(images, boxes, CELLS, CELLS, generator=generator) < 0.5
    return Batch(
        images_B3HW=torch.randint(
            0, 256, (images, 3, 64, 96), dtype=torch.uint8, generator=generator
        ),
        sizes_B2=torch.tensor([[64, 96], [60, 90]]).repeat(images, 1)[:images],
        tokens_BT=torch.randint(100, 900, (images, tokens), generator=generator),
        token_mask_BT=torch.ones(images, tokens, dtype=torch.bool),
        mlm_labels_BT=torch.full((images, tokens), -100),
        boxes_BN4=torch.cat((corner, corner + size), dim=2),
        box_mask_BN=box_mask,
        positive_BNT=positive,
        box_category_BN=torch.full((images, boxes), NO_CATEGORY),
        token_category_BT=torch.full((images, tokens), NO_WORD),
        keys=[f"toy/{i}" for i in range(images)],
        masks_BNSS=masks.to(torch.uint8),
    )


def rows(batch: Batch, which: slice) -> Batch:
    values = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    cut = {name: value[which] for name, value in values.items() if isinstance(value, Tensor | list)}
    return Batch(**{**values, **cut})


def predict(model: GLIPv2, batch: Batch) -> Outputs:
    return model.predict(batch.images_B3HW, batch.sizes_B2, batch.tokens_BT, batch.token_mask_BT)


# Regions -------------------------------------------------------------------------------------


def slow_value(map_SS: Tensor, box: list[float], y: float, x: float) -> float:
    """A map that fills a box, padded by a ring of zeros, at one point: bilinear by hand."""
    padded, S = F.pad(map_SS, (1, 1, 1, 1)), len(map_SS)
    row = (y - box[1]) / (box[3] - box[1]) * S + 0.5
    column = (x - box[0]) / (box[2] - box[0]) * S + 0.5
    j, i = math.floor(row), math.floor(column)
    if not (0 <= j <= S and 0 <= i <= S):
        return 0.0
    a, b = row - j, column - i
    top = (1 - b) * padded[j, i] + b * padded[j, i + 1]
    bottom = (1 - b) * padded[j + 1, i] + b * padded[j + 1, i + 1]
    return float((1 - a) * top + a * bottom)


def test_pasting_equals_a_loop_over_pixels() -> None:
    generator = torch.Generator().manual_seed(2)
    maps = torch.rand(4, 7, 7, generator=generator)
    boxes = torch.tensor(
        [[3.2, 1.7, 20.9, 12.1], [-6.0, 4.0, 9.5, 30.0], [8.1, 8.2, 9.0, 9.9], [0, 0, 24, 16]]
    )
    pasted = paste_masks(maps, boxes, 16, 24)
    assert pasted.shape == (4, 16, 24)
    for k in range(4):
        for y in range(16):
            for x in range(24):
                value = slow_value(maps[k], boxes[k].tolist(), y + 0.5, x + 0.5)
                if abs(value - 0.5) > 1e-5:
                    assert bool(pasted[k, y, x]) == (value > 0.5), (k, y, x, value)
    assert 0.1 < pasted[[0, 1, 3]].float().mean() < 0.6


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.3])
def test_a_pasted_ellipse_is_the_ellipse(scale: float) -> None:
    step = (torch.arange(28) + 0.5) / 14 - 1
    ellipse = ((step[:, None] ** 2 + step**2) <= 1).float()
    box = torch.tensor([[20.3, 31.8, 75.6, 110.2]]) * scale
    height, width = int(128 * scale), int(96 * scale)
    x0, y0, x1, y1 = box[0].tolist()
    y = (torch.arange(height) + 0.5 - (y0 + y1) / 2) / ((y1 - y0) / 2)
    x = (torch.arange(width) + 0.5 - (x0 + x1) / 2) / ((x1 - x0) / 2)
    truth = (y[:, None] ** 2 + x**2) <= 1
    found = paste_masks(ellipse[None], box, height, width)[0]
    assert (found & truth).sum() / (found | truth).sum() > 0.95


def test_no_region_pastes_nothing() -> None:
    assert paste_masks(torch.zeros(0, 28, 28), torch.zeros(0, 4), 5, 6).shape == (0, 5, 6)


def test_regions_are_known_boxes_and_predictions_near_them() -> None:
    batch = make_batch(images=1, boxes=4)
    assert batch.masks_BNSS is not None
    batch.boxes_BN4[0, :3] = torch.tensor(
        [[0.0, 0.0, 20.0, 20.0], [40.0, 10.0, 60.0, 30.0], [70.0, 30.0, 96.0, 64.0]]
    )
    batch.masks_BNSS[0, 1] = UNKNOWN_MASK
    batch.box_mask_BN[0, 3] = False
    batch.boxes_BN4[0, 3] = torch.tensor([0.0, 1.0, 20.0, 20.0])  # padding may hold anything
    predicted = torch.tensor(
        [
            [-9.0, 1.0, 20.0, 20.0],  # box 0, over the edge
            [40.0, 10.0, 61.0, 30.0],  # the box whose mask nobody knows
            [10.0, 0.0, 30.0, 20.0],  # IoU 1/3
            [70.0, 30.0, 99.0, 70.0],  # box 2, over the edge
            [50.0, 50.0, 50.0, 50.0],
        ]
    )[None].requires_grad_()
    regions = pick_mask_regions(predicted, batch)
    kept = sorted(
        (int(matched), tuple(box.tolist()))
        for matched, box in zip(regions.matched_BK[0], regions.boxes_BK4[0], strict=True)
        if matched >= 0
    )
    assert kept == [
        (0, (0.0, 0.0, 20.0, 20.0)),
        (0, (0.0, 1.0, 20.0, 20.0)),
        (2, (70.0, 30.0, 96.0, 64.0)),  # the box, and the clipped prediction
        (2, (70.0, 30.0, 96.0, 64.0)),
    ]
    assert not regions.boxes_BK4.requires_grad
    crowd = pick_mask_regions(batch.boxes_BN4[:, :1].expand(-1, 500, -1), batch)
    assert int((crowd.matched_BK >= 0).sum()) == 2 + MAX_PREDICTED


# Training ------------------------------------------------------------------------------------


def far_away(batch: Batch) -> Tensor:
    """Predictions that are near no box, so that the boxes are the only regions."""
    return torch.zeros(len(batch.keys), 5, 4)


def test_the_loss_of_true_boxes_is_their_mean_cross_entropy(model: GLIPv2) -> None:
    batch = make_batch()
    assert model.mask_head is not None
    assert batch.masks_BNSS is not None
    with torch.no_grad():
        outputs = predict(model, batch)
        found = mask_loss(model.mask_head, outputs, far_away(batch), CONFIG.strides, batch, ALONE)
        each = []
        for b, n in batch.box_mask_BN.nonzero().tolist():
            box = batch.boxes_BN4[b, n]
            x = region_features(outputs.pyramid, CONFIG.strides, box[None], torch.tensor([b]), 14)
            query = phrases(
                outputs.fused_words_BTD[b : b + 1], batch.positive_BNT[b, n][None, None]
            )
            p = model.mask_head(x, query[0])[0].double().sigmoid()
            for row in range(28):
                for column in range(28):
                    y_ = float(box[1] + (row + 0.5) * (box[3] - box[1]) / 28)
                    x_ = float(box[0] + (column + 0.5) * (box[2] - box[0]) / 28)
                    value = slow_value(batch.masks_BNSS[b, n].double(), box.tolist(), y_, x_)
                    q = p[row, column] if value >= 0.5 else 1 - p[row, column]
                    each.append(-q.log())
    assert len(each) == 5 * 28 * 28
    assert float(found) == pytest.approx(float(torch.stack(each).mean()), rel=1e-3)


@pytest.mark.parametrize("boxes", [3, 0])
def test_two_ranks_with_half_a_batch_each_have_the_loss_of_the_whole(
    model: GLIPv2, boxes: int
) -> None:
    batch = make_batch(images=4, boxes=boxes)
    assert model.mask_head is not None
    head = model.mask_head

    def loss(part: Batch, mean: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.no_grad():
            outputs = predict(model, part)
            regions = part.boxes_BN4 + 2 if boxes else far_away(part)
            collectives = Collectives(mean=mean)
            return mask_loss(head, outputs, regions, CONFIG.strides, part, collectives)

    halves = [rows(batch, slice(0, 2)), rows(batch, slice(2, 4))]
    halves[0].box_mask_BN[:, 1:] = False  # the ranks' counts differ
    batch.box_mask_BN[:2, 1:] = False
    counts: list[Tensor] = []

    def note(count: Tensor) -> Tensor:
        counts.append(count)
        return count

    for half in halves:
        loss(half, note)
    average = (counts[0] + counts[1]) / 2
    both = [loss(half, lambda _: average) for half in halves]
    whole = loss(batch, lambda value: value)
    assert bool(counts[0][0] < counts[1][0]) == (boxes > 0)
    torch.testing.assert_close((both[0] + both[1]) / 2, whole, rtol=1e-4, atol=1e-6)
    assert bool(whole > 0) == (boxes > 0)


@pytest.mark.parametrize(
    "case",
    ["ordinary", "no box rows", "no boxes", "unknown masks", "no words", "no masks", "term off"],
)
def test_the_term_is_finite_and_reaches_every_parameter_of_the_head(case: str) -> None:
    model = build_model(CONFIG, seed=0).train()
    batch = make_batch(boxes=0 if case == "no box rows" else 3)
    assert batch.masks_BNSS is not None
    if case == "no boxes":
        batch.box_mask_BN[:] = False
    elif case == "unknown masks":
        batch.masks_BNSS[:] = UNKNOWN_MASK
    elif case == "no words":
        batch.positive_BNT[:] = False
    elif case == "no masks":
        batch.masks_BNSS = None
    terms = model(batch, weights=LossWeights(mask=0.0 if case == "term off" else 1.0))
    assert terms["mask"].dim() == 0
    assert bool(terms["mask"] > 0) == (case == "ordinary")
    assert model.mask_head is not None
    found = torch.autograd.grad(terms["mask"], list(model.mask_head.parameters()))
    assert all(gradient.isfinite().all() for gradient in found)
    if case == "ordinary":
        assert all(gradient.abs().sum() > 0 for gradient in found)


def test_a_frozen_model_trains_its_mask_head_alone() -> None:
    model = build_model(CONFIG, seed=0).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("mask_head."))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    sum(model(make_batch()).values()).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == name.startswith("mask_head."), name
    optimizer.step()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) != name.startswith("mask_head."), name


def test_joint_training_reaches_image_and_text_but_not_the_boxes() -> None:
    model = build_model(CONFIG, seed=0).train()
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(
        model(make_batch())["mask"], parameters, allow_unused=True, materialize_grads=False
    )
    reached = {
        name.split(".")[0]
        for name, gradient in zip(names, found, strict=True)
        if gradient is not None and gradient.abs().sum() > 0
    }
    assert {"image_encoder", "pyramid", "text_encoder", "mask_head"} <= reached
    assert "box_head" not in reached


# Predicting ----------------------------------------------------------------------------------


def ask(batch: Batch) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Phrases, boxes and labels of each image's boxes; the last box is asked for twice."""
    tokens, boxes, labels = [], [], []
    for b, count in enumerate(batch.box_mask_BN.sum(dim=1).tolist()):
        rows = [*range(count), count - 1]
        tokens.append(batch.positive_BNT[b, :count])
        boxes.append(batch.boxes_BN4[b, rows])
        labels.append(torch.tensor(rows))
    return tokens, boxes, labels


def test_masks_of_a_batch_are_those_of_its_images_one_by_one(model: GLIPv2) -> None:
    batch = make_batch()
    tokens, boxes, labels = ask(batch)
    with torch.inference_mode():
        together = region_masks(model, predict(model, batch), tokens, boxes, labels)
        for b, maps_KSS in enumerate(together):
            one = rows(batch, slice(b, b + 1))
            (alone,) = region_masks(model, predict(model, one), *ask(one))
            assert maps_KSS.shape == (len(boxes[b]), 28, 28)
            torch.testing.assert_close(maps_KSS, alone, rtol=0, atol=1e-5)
            height, width = batch.sizes_B2[b].tolist()
            masks_KHW, own_KHW = (
                paste_masks(x, boxes[b], height, width) for x in (maps_KSS, alone)
            )
            assert masks_KHW.dtype == torch.bool and masks_KHW.shape[1:] == (height, width)
            assert torch.equal(masks_KHW, own_KHW)
            assert torch.equal(masks_KHW[-1], masks_KHW[-2])
            assert masks_KHW.any()
    assert [len(maps) for maps in together] == [4, 3]


def test_a_phrase_without_tokens_and_an_image_without_boxes_have_no_mask(model: GLIPv2) -> None:
    batch = make_batch()
    tokens, boxes, labels = ask(batch)
    tokens[0] = F.pad(tokens[0], (0, 0, 0, 1))  # a fourth phrase, cut off with the text
    labels[0] = torch.tensor([0, 3, 3, 1])
    boxes[1], labels[1] = boxes[1][:0], labels[1][:0]
    with torch.inference_mode():
        first, second = region_masks(model, predict(model, batch), tokens, boxes, labels)
    assert first.flatten(1).any(dim=1).tolist() == [True, False, False, True]
    assert second.shape == (0, 28, 28)
    assert paste_masks(second, boxes[1], 60, 90).shape == (0, 60, 90)


def test_masks_of_a_shorter_text_need_no_padded_columns(model: GLIPv2) -> None:
    batch = make_batch()
    tokens, boxes, labels = ask(batch)
    with torch.inference_mode():
        outputs = predict(model, batch)
        long = region_masks(model, outputs, tokens, boxes, labels)
        short = [x[:, :9] for x in tokens]
        for one, two in zip(region_masks(model, outputs, short, boxes, labels), long, strict=True):
            assert torch.equal(one, two)


def test_a_model_without_a_mask_head_says_so() -> None:
    config: ModelConfig = dataclasses.replace(CONFIG, masks=False)
    model = build_model(config, seed=0).eval()
    batch = make_batch()
    with torch.inference_mode(), pytest.raises(ValueError, match=r"no mask head.*model\.masks"):
        region_masks(model, predict(model, batch), *ask(batch))
