"""What crosses between data, model and users, and the legend of shapes for this folder.

Shape suffixes: B images, A anchors (all levels, finest first, row-major), N boxes of one image
(padded to the largest of the batch), T text tokens, D channels, V vocabulary, H W pixels.
Boxes are always xyxy, in pixels; the docstring says of which image.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from torch import Tensor

BatchTask = Literal["grounding", "vqa", "captioning"]
NO_CATEGORY = -10
"""Category id of boxes that come from captions: they never propagate between images."""
NO_WORD = -1
"""Category id of a token that names no category."""
UNKNOWN_MASK = 255
"""What a mask holds everywhere if nobody drew it."""


@dataclass(kw_only=True)
class Batch:
    """One micro-batch of training samples, ready for the model."""

    images_B3HW: Tensor
    """uint8 RGB, resized, zero-padded at the right and bottom."""
    sizes_B2: Tensor
    """int64 (height, width) of each image before padding."""
    tokens_BT: Tensor
    """int64 token ids, some of them corrupted for masked language modelling."""
    token_mask_BT: Tensor
    """bool, False at padding."""
    mlm_labels_BT: Tensor
    """int64, the original id where it must be predicted, -100 elsewhere."""
    boxes_BN4: Tensor
    """float32 xyxy in pixels of the resized image."""
    box_mask_BN: Tensor
    """bool, False where a row of boxes_BN4 is only padding."""
    positive_BNT: Tensor
    """bool, the tokens that name each box."""
    box_category_BN: Tensor
    """int64 id in the vocabulary shared by all detection sets, NO_CATEGORY for caption boxes."""
    token_category_BT: Tensor
    """int64 id of the category that a token names, NO_WORD elsewhere and in captions."""
    keys: list[str]
    """`source/key` of each sample, so that a bad one can be found again."""
    masks_BNSS: Tensor | None = None
    """uint8 0 or 1, what of each box belongs to its object, resized to S x S; None without masks.
    A box whose mask is unknown holds UNKNOWN_MASK. All ranks have masks or none has."""
    task: BatchTask = "grounding"
    """What the whole batch, on every rank, is for: vqa texts are questions, captioning texts are
    to be predicted word by word; both have no boxes."""
    answers_BV: Tensor | None = None
    """vqa: float32 soft target of each of the model's answers, in [0, 1]."""
    most_masked: int | None = None
    """The most words that must be predicted in one of the texts: known before the batch is on a
    GPU, it spares a wait there. None makes every token a candidate."""

    def to(self, device: torch.device | str) -> "Batch":
        moved: dict[str, Any] = {
            f.name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
            for f in fields(self)
            for value in [getattr(self, f.name)]
        }
        return Batch(**moved)


@dataclass(kw_only=True)
class Outputs:
    """What one forward pass yields, before losses or post-processing."""

    pyramid: list[Tensor]
    """Image features before fusion, one (B, D, H, W) map a level, finest first."""
    words_BTD: Tensor
    """Text features before fusion."""
    fused_words_BTD: Tensor
    """Text features after the last fusion block."""
    token_logits_BAT: Tensor
    """Region-word alignment before the sigmoid."""
    deltas_BA4: Tensor
    """Encoded box offsets relative to the anchors."""
    centerness_BA: Tensor
    """Before the sigmoid."""
    anchors_A4: Tensor
    """xyxy in pixels of the padded input image."""
    level_sizes: list[tuple[int, int]]
    """(height, width) of each level's map."""


@dataclass(kw_only=True)
class Detection:
    """The boxes found in one image for one text or category list, best score first."""

    boxes_K4: Tensor
    """float32 xyxy in pixels of the image as the user gave it."""
    scores_K: Tensor
    """float32 in [0, 1]."""
    labels_K: Tensor
    """int64 index into `names`."""
    names: list[str]
    """The phrases or category names that were asked for."""
    masks_KHW: Tensor | None = None
    """bool, in pixels of the image as the user gave it; only if masks were asked for."""
    run_lengths_K: list[dict[str, Any]] | None = None
    """COCO run lengths instead of `masks_KHW`, where these were asked for: thousands of masks in a
    few megabytes."""

    @property
    def phrases(self) -> list[str]:
        """The phrase or category of each box."""
        return [self.names[label] for label in self.labels_K.tolist()]

    def to_dict(self) -> dict[str, Any]:
        """For JSON: {"names", "regions": [{"box", "phrase", "score", "mask"}, ...]}, best first.

        Boxes are rounded to hundredths of a pixel; masks are COCO run lengths.
        """
        rows = zip(self.boxes_K4.tolist(), self.phrases, self.scores_K.tolist(), strict=True)
        regions: list[dict[str, Any]] = [
            {"box": [round(v, 2) for v in box], "phrase": phrase, "score": round(score, 4)}
            for box, phrase, score in rows
        ]
        if (masks := self.run_lengths()) is not None:
            for region, mask in zip(regions, masks, strict=True):
                region["mask"] = mask
        return {"names": list(self.names), "regions": regions}

    def run_lengths(self) -> list[dict[str, Any]] | None:
        """The masks in COCO's form, {"size": [height, width], "counts": text} each."""
        if self.masks_KHW is None:
            return self.run_lengths_K
        return [run_lengths(mask_HW) for mask_HW in self.masks_KHW]


def run_lengths(mask_HW: Tensor) -> dict[str, Any]:
    """COCO's compressed RLE, {"size": [height, width], "counts": text}."""
    from pycocotools.mask import encode

    code = encode(mask_HW.byte().cpu().numpy().copy(order="F"))
    return {"size": list(mask_HW.shape), "counts": code["counts"].decode("ascii")}


def _identity(value: Tensor) -> Tensor:
    return value


@dataclass(frozen=True, kw_only=True)
class Collectives:
    """What losses need from other ranks; the defaults serve a single process.

    `pipeline.dist` fills in the real ones: the model itself knows no ranks.
    """

    gather: Callable[[Tensor], Tensor] = field(default=_identity)
    """Concatenate equal-shaped tensors of all ranks along dimension 0, in rank order; gradients
    flow back to every rank."""
    mean: Callable[[Tensor], Tensor] = field(default=_identity)
    """Average a tensor over ranks, without gradient."""
    rank: int = 0
    """Which block of a gathered tensor is the local one."""
    step_counts: Tensor | None = None
    """Where a step is taken in several micro-batches: what `GLIPv2.counts` gives for one, averaged
    over all of them and all ranks. Losses are divided by these counts instead of their own."""
