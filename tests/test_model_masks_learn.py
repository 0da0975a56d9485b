"""A model of the tiny size learns the masks of toy scenes, through the data path of training."""

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from glipv2.data_prep.toy import toy_categories, toy_records
from glipv2.model.batch import Batch
from glipv2.model.config import LossWeights, preset
from glipv2.model.glip import GLIPv2, build_model
from glipv2.model.mask_head import paste_masks, region_masks
from glipv2.model.tokenizer import Tokenizer, tiny_vocab
from glipv2.pipeline import shards
from glipv2.pipeline.config import DataConfig
from glipv2.pipeline.loader import build_loader

SIDE, STEPS = 128, 100
SCENES = "toy_detection"


def batches(images: int, seed: int, size: int, folder: str) -> Iterator[Batch]:
    config = preset("tiny")
    records = toy_records(SCENES, images, seed, SIDE)
    sets = {"toy": shards.write_shard_set(folder, records, toy_categories(SCENES), {}, 64)}
    data = DataConfig(
        mixture={"toy": 1.0},
        short_sides=(SIDE,),
        long_side=SIDE,
        pad_to=config.input.pad_to,
        max_negatives=4,
        mlm_probability=0.0,
    )
    tokenizer = Tokenizer.from_vocab(tiny_vocab(), config.text_encoder.max_tokens)
    loader = build_loader(data, size, sets, tokenizer, masks=True)
    return (batch for batch, _ in loader.batches(loader.start()))


def overlap(masks_KHW: Tensor, truth_KHW: Tensor) -> Tensor:
    both, either = masks_KHW & truth_KHW, masks_KHW | truth_KHW
    return both.sum(dim=(1, 2)) / either.sum(dim=(1, 2))


@pytest.mark.timeout(600)
def test_a_tiny_model_learns_masks_of_scenes_it_has_not_seen(tmp_path: Path) -> None:
    config = dataclasses.replace(preset("tiny"), masks=True, fusion_blocks=1)
    model = build_model(config, seed=0).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, STEPS + 1, pct_start=0.2)
    weights = LossWeights(inter_image=0, mlm=0)
    for batch in itertools.islice(batches(200, 1, 2, str(tmp_path / "train")), STEPS):
        model(batch, weights=weights)["mask"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)

    held_out = next(batches(48, 2, 48, str(tmp_path / "held_out")))
    assert held_out.masks_BNSS is not None
    with torch.inference_mode():
        found_KHW = torch.cat(_predicted(model.eval(), held_out))
    boxes_K4 = held_out.boxes_BN4[held_out.box_mask_BN]
    maps_KSS = held_out.masks_BNSS[held_out.box_mask_BN].float()
    truth_KHW = paste_masks(maps_KSS, boxes_K4, SIDE, SIDE)
    full_KHW = paste_masks(torch.ones_like(maps_KSS), boxes_K4, SIDE, SIDE)
    typical_KHW = paste_masks(maps_KSS.mean(dim=0).expand_as(maps_KSS), boxes_K4, SIDE, SIDE)
    learned, full, typical = (
        float(overlap(masks_KHW, truth_KHW).mean())
        for masks_KHW in (found_KHW, full_KHW, typical_KHW)
    )
    assert len(boxes_K4) > 90
    assert learned > full + 0.12  # what boxes alone would give
    assert learned > typical + 0.04  # the best that can be said without a look at the image


def _predicted(model: GLIPv2, batch: Batch) -> list[Tensor]:
    outputs = model.predict(batch.images_B3HW, batch.sizes_B2, batch.tokens_BT, batch.token_mask_BT)
    rows = list(batch.box_mask_BN)
    boxes = [boxes_N4[row] for boxes_N4, row in zip(batch.boxes_BN4, rows, strict=True)]
    tokens = [words_NT[row] for words_NT, row in zip(batch.positive_BNT, rows, strict=True)]
    labels = [torch.arange(len(x)) for x in boxes]
    maps = region_masks(model, outputs, tokens, boxes, labels)
    return [paste_masks(x_KSS, own, SIDE, SIDE) for x_KSS, own in zip(maps, boxes, strict=True)]
