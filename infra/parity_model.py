"""What our model computes on a reference's inputs, under the names that the original gave it."""

import dataclasses
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from glipv2.model.assign import assign
from glipv2.model.batch import NO_CATEGORY, NO_WORD, Batch, Outputs
from glipv2.model.boxes import encode, last_pixel_corners
from glipv2.model.config import ModelConfig
from glipv2.model.convert import from_glip, glip_config, glip_constants, glip_inert, to_glip
from glipv2.model.glip import GLIPv2
from glipv2.model.images import pad_images
from glipv2.model.postprocess import candidates, detections

Tensors = dict[str, Tensor]


def build(meta: dict[str, Any], weights: Tensors) -> GLIPv2:
    """Our model with a reference's weights; everything random in training is switched off."""
    settings = meta["reduced_config"]
    config = glip_config(
        weights,
        text_heads=settings["bert"]["num_attention_heads"],
        fusion_heads=settings.get("fuse", {}).get("n_head", 8),
    )
    config = without_dropout(
        dataclasses.replace(
            config,
            group_norm_groups=settings.get("group_norm_groups", 16),
            text_encoder=dataclasses.replace(
                config.text_encoder, max_tokens=settings["max_query_len"]
            ),
        )
    )
    model = GLIPv2(config)
    weights = glip_constants(config) | weights  # generated weights come without constants
    model.load_state_dict(from_glip(weights, model.state_dict(), config))
    return model


def without_dropout(config: ModelConfig) -> ModelConfig:
    return dataclasses.replace(
        config,
        image_encoder=dataclasses.replace(config.image_encoder, drop_path=0.0),
        text_encoder=dataclasses.replace(config.text_encoder, dropout=0.0),
        fusion_dropout=0.0,
        drop_block=False,
    )


def reference_images(reference: Tensors) -> tuple[Tensor, Tensor]:
    """uint8 RGB (B, 3, H, W) and the int64 (B, 2) heights and widths."""
    count = sum(name.startswith("in.image_bgr_uint8.") for name in reference)
    images = [reference[f"in.image_bgr_uint8.{i}"].flip(0) for i in range(count)]
    return pad_images(images)  # to the next multiple of 32, as the original does


@torch.no_grad()
def evaluated(
    model: GLIPv2, weights: Tensors, reference: Tensors, images: Tensor, sizes: Tensor
) -> Tensors:
    """Everything that the original shows of evaluation."""
    tokens, mask = reference["in.eval.input_ids"], reference["in.eval.attention_mask"].bool()
    model.eval()
    with Recorder(model) as seen:
        outputs = model.predict(images, sizes, tokens, mask)
    found = seen.named(outputs, mask)
    found["in.images"] = model.image_encoder._normalise(images, sizes)
    found |= _head_rows(outputs, seen.tower[-1], weights)
    phrases = reference["in.eval.positive_map"].bool()
    for image in range(len(images)):
        boxes, scores, labels = candidates(outputs, image, phrases, sizes[image])
        _add_detections(found, f"eval.prenms.{image}", boxes, scores, labels)
    names = [[str(row) for row in range(len(phrases))]] * len(images)
    results = detections(outputs, [phrases] * len(images), names, sizes)
    for image, result in enumerate(results):
        _add_detections(
            found, f"eval.det.{image}", result.boxes_K4, result.scores_K, result.labels_K
        )
    return found


def _add_detections(
    found: Tensors, prefix: str, boxes: Tensor, scores: Tensor, labels: Tensor
) -> None:
    found[f"{prefix}.boxes"] = last_pixel_corners(boxes)
    found[f"{prefix}.scores"] = scores
    found[f"{prefix}.labels"] = labels + 1  # the original counts from 1


class Recorder:
    """Writes down what the parts of a model return during one pass."""

    def __init__(self, model: GLIPv2) -> None:
        self.model = model
        self.calls: dict[str, list[Any]] = defaultdict(list)

    def __enter__(self) -> "Recorder":
        parts: dict[str, nn.Module] = {
            "stage": self.model.image_encoder.swin.layers[0],
            "encoder": self.model.image_encoder,
            "text": self.model.text_encoder,
        }
        for i, block in enumerate(self.model.blocks):
            if self.model.config.fusion:
                parts[f"{i}.fuse"] = block.attention
                parts[f"{i}.bert"] = block.words
            parts[f"{i}.dyconv"] = block.maps
            parts[f"{i}.offset"] = block.maps.offset
            parts[f"{i}.branch0"] = block.maps.norm_coarser
            parts[f"{i}.branch1"] = block.maps.norm_same
            parts[f"{i}.branch2"] = block.maps.norm_finer
        self.hooks = [
            part.register_forward_hook(
                lambda _module, _inputs, output, name=name: self.calls[name].append(output)
            )
            for name, part in parts.items()
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()

    @property
    def tower(self) -> list[list[Tensor]]:
        """The maps after each block."""
        return [self.calls[f"{i}.dyconv"][0] for i in range(len(self.model.blocks))]

    def named(self, outputs: Outputs, mask_BT: Tensor) -> Tensors:
        """The recorded tensors under the names of the original's."""
        hidden = self.calls["text"][0]
        embedded = hidden * mask_BT[..., None]
        found = {
            "eval.lang.hidden": hidden,
            "eval.lang.embedded": embedded,
            "eval.lang.aggregate": embedded.sum(1) / mask_BT.sum(1, keepdim=True),
            "eval.backbone.stage2": self.calls["stage"][0].permute(0, 3, 1, 2),
        }
        for stage, x in enumerate(self.calls["encoder"][0], start=3):
            found[f"eval.backbone.stage{stage}"] = x
        found |= _by_level("eval.fpn", outputs.pyramid)
        levels = len(outputs.pyramid)
        for i in range(len(self.model.blocks)):
            block = f"eval.block{i}"
            if self.calls[f"{i}.fuse"]:
                image_BND, words_BTD = self.calls[f"{i}.fuse"][0]
                found |= _by_level(f"{block}.fuse", _maps(image_BND, outputs.level_sizes))
                found[f"{block}.fuse.hidden"] = words_BTD
                found[f"{block}.bert.hidden"] = self.calls[f"{i}.bert"][0]
            found |= _by_level(f"{block}.dyconv", self.tower[i])
            found |= _by_level(f"{block}.offset", self.calls[f"{i}.offset"])
            for branch, levels_heard in (
                (0, range(levels - 1)),
                (1, range(levels)),
                (2, range(1, levels)),
            ):
                for level, x in zip(levels_heard, self.calls[f"{i}.branch{branch}"], strict=True):
                    found[f"{block}.dyconv_branch{branch}.P{level + 3}"] = x
        return found


def _by_level(name: str, maps: list[Tensor]) -> Tensors:
    return {f"{name}.P{level}": x for level, x in enumerate(maps, start=3)}


def _maps(locations_BAD: Tensor, level_sizes: list[tuple[int, int]]) -> list[Tensor]:
    """Values of all locations as one (B, D, H, W) map a level."""
    parts = locations_BAD.transpose(1, 2).split([h * w for h, w in level_sizes], dim=2)
    return [part.unflatten(2, size) for part, size in zip(parts, level_sizes, strict=True)]


def _head_rows(outputs: Outputs, tower: list[Tensor], weights: Tensors) -> Tensors:
    sizes = outputs.level_sizes
    counts = [h * w for h, w in sizes]
    found = _by_level("eval.head.bbox_reg", _maps(outputs.deltas_BA4, sizes))
    found |= _by_level("eval.head.centerness", _maps(outputs.centerness_BA[..., None], sizes))
    found |= _by_level("eval.head.dot_logits", list(outputs.token_logits_BAT.split(counts, dim=1)))
    anchors = last_pixel_corners(outputs.anchors_A4)
    found |= _by_level("eval.anchors", list(anchors.split(counts)))
    # The inert classifier is no part of our model; on our features it must give the original's.
    inert = glip_inert(weights)
    kernel, bias = (inert[f"rpn.head.cls_logits.{part}"] for part in ("weight", "bias"))
    logits = [nn.functional.conv2d(x, kernel, bias) for x in tower]
    return found | _by_level("eval.head.cls_logits", logits)


def trained(
    model: GLIPv2, reference: Tensors, images: Tensor, sizes: Tensor
) -> tuple[Tensors, dict[str, float]]:
    """What the original shows of training, and the norm of every parameter's gradient."""
    batch, labels = _training_batch(reference, images, sizes)
    model.train()
    outputs = model.predict(images, sizes, batch.tokens_BT, batch.token_mask_BT)
    matched_BA = assign(
        outputs.anchors_A4,
        [h * w for h, w in outputs.level_sizes],
        batch.boxes_BN4,
        batch.box_mask_BN,
    )
    found = {
        "train.dot_logits": outputs.token_logits_BAT.detach(),
        "train.bbox_reg": outputs.deltas_BA4.detach(),
        "train.centerness": outputs.centerness_BA.detach(),
    }
    for i, matched_A in enumerate(matched_BA):
        chosen = (matched_A >= 0).nonzero()[:, 0]
        found[f"train.assign.{i}.labels"] = torch.where(
            matched_A >= 0, labels[i][matched_A.clamp(min=0)], 0
        )
        found[f"train.assign.{i}.pos_index"] = chosen
        found[f"train.assign.{i}.pos_reg_targets"] = encode(
            batch.boxes_BN4[i, matched_A[chosen]], outputs.anchors_A4[chosen]
        )
    terms = model(batch)
    total = 2 * terms["box"] + terms["centerness"] + terms["token"]
    total.backward()
    found["train.loss_reg"] = 2 * terms["box"].detach()[None]
    found["train.loss_centerness"] = terms["centerness"].detach()[None]
    found["train.loss_dot_product_token"] = terms["token"].detach()[None]
    found["train.loss_cls"] = torch.zeros(1)  # multiplied by 0 in the original
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in model.named_parameters()
    }
    by_name = to_glip(gradients, model.config)
    found |= {f"grad.{name}": gradient for name, gradient in by_name.items()}
    return found, {name: float(g.double().norm()) for name, g in by_name.items()}


def _training_batch(
    reference: Tensors, images: Tensor, sizes: Tensor
) -> tuple[Batch, list[Tensor]]:
    boxes = [reference[f"in.train.boxes.{i}"] for i in range(len(images))]
    labels = [reference[f"in.train.labels.{i}"] for i in range(len(images))]
    tokens = reference["in.train.input_ids"]
    B, N, T = len(images), max(len(b) for b in boxes), tokens.shape[1]
    batch = Batch(
        images_B3HW=images,
        sizes_B2=sizes,
        tokens_BT=tokens,
        token_mask_BT=reference["in.train.attention_mask"].bool(),
        mlm_labels_BT=torch.full((B, T), -100),
        boxes_BN4=torch.zeros(B, N, 4),
        box_mask_BN=torch.zeros(B, N, dtype=torch.bool),
        positive_BNT=torch.zeros(B, N, T, dtype=torch.bool),
        box_category_BN=torch.full((B, N), NO_CATEGORY),
        token_category_BT=torch.full((B, T), NO_WORD),
        keys=[f"reference/{i}" for i in range(B)],
    )
    maps = reference["in.train.positive_map"].bool().split([len(b) for b in boxes])
    for i, (own, words) in enumerate(zip(boxes, maps, strict=True)):
        batch.boxes_BN4[i, : len(own)] = own + torch.tensor([0.0, 0.0, 1.0, 1.0])  # our edges
        batch.box_mask_BN[i, : len(own)] = True
        batch.positive_BNT[i, : len(own)] = words
    return batch, labels
