"""Samples of different sizes into one padded batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from glipv2.model.batch import NO_CATEGORY, NO_WORD, UNKNOWN_MASK, Batch, BatchTask
from glipv2.model.images import pad_images
from glipv2.pipeline.masking import IGNORE

SHORTEST_TEXT, TEXT_STEP = 16, 32


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One training sample, ready but for padding. N boxes, T tokens."""

    key: str
    """`source/key`."""
    image_3HW: Tensor
    """uint8, resized. The other fields are arrays: small enough to travel between processes."""
    boxes_N4: np.ndarray
    """float32 xyxy in pixels of image_3HW."""
    positive_NT: np.ndarray
    """bool, the tokens that name each box; every row has one."""
    box_category_N: np.ndarray
    token_ids_T: np.ndarray
    """int64, some of them corrupted."""
    mlm_labels_T: np.ndarray
    token_category_T: np.ndarray
    masks_NSS: np.ndarray | None = None
    """uint8 in the boxes' frames, UNKNOWN_MASK where there is none; None if nobody asked."""
    task: BatchTask = "grounding"
    """The same for all samples of a run."""
    answers_V: np.ndarray | None = None
    """vqa: float32, how right each of the model's answers is."""


def text_length(longest: int, most: int) -> int:
    """The few lengths that texts are padded to: 16, 32, 64, 96, ... at most `most` tokens."""
    if longest <= SHORTEST_TEXT:
        return min(SHORTEST_TEXT, most)
    return min(-(-longest // TEXT_STEP) * TEXT_STEP, most)


def collate(
    samples: Sequence[Sample], pad_id: int, max_tokens: int, pad_to: tuple[int, int] | None
) -> Batch:
    """Pad images (to `pad_to` or the largest), texts (to a bucket) and boxes (to the most)."""
    images_B3HW, sizes_B2 = pad_images([sample.image_3HW for sample in samples], pad_to)
    B, N = len(samples), max(1, *(len(sample.boxes_N4) for sample in samples))
    T = text_length(max(len(sample.token_ids_T) for sample in samples), max_tokens)
    batch = Batch(
        images_B3HW=images_B3HW,
        sizes_B2=sizes_B2,
        tokens_BT=torch.full((B, T), pad_id),
        token_mask_BT=torch.zeros((B, T), dtype=torch.bool),
        mlm_labels_BT=torch.full((B, T), IGNORE),
        boxes_BN4=torch.zeros((B, N, 4)),
        box_mask_BN=torch.zeros((B, N), dtype=torch.bool),
        positive_BNT=torch.zeros((B, N, T), dtype=torch.bool),
        box_category_BN=torch.full((B, N), NO_CATEGORY),
        token_category_BT=torch.full((B, T), NO_WORD),
        keys=[sample.key for sample in samples],
        task=samples[0].task,
        most_masked=max(int((sample.mlm_labels_T != IGNORE).sum()) for sample in samples),
    )
    for row, sample in enumerate(samples):
        n, t = sample.positive_NT.shape
        batch.tokens_BT[row, :t] = torch.from_numpy(sample.token_ids_T)
        batch.token_mask_BT[row, :t] = True
        batch.mlm_labels_BT[row, :t] = torch.from_numpy(sample.mlm_labels_T)
        batch.boxes_BN4[row, :n] = torch.from_numpy(sample.boxes_N4)
        batch.box_mask_BN[row, :n] = True
        batch.positive_BNT[row, :n, :t] = torch.from_numpy(sample.positive_NT)
        batch.box_category_BN[row, :n] = torch.from_numpy(sample.box_category_N)
        batch.token_category_BT[row, :t] = torch.from_numpy(sample.token_category_T)
    batch.masks_BNSS = _pad_masks([sample.masks_NSS for sample in samples], N)
    answers = [sample.answers_V for sample in samples if sample.answers_V is not None]
    batch.answers_BV = torch.from_numpy(np.stack(answers)) if answers else None
    return batch


def _pad_masks(masks: Sequence[np.ndarray | None], boxes: int) -> Tensor | None:
    """uint8 (B, boxes, S, S), unknown at padding; None without masks."""
    found = [masks_NSS for masks_NSS in masks if masks_NSS is not None]
    if not found:
        return None
    padded = np.full((len(found), boxes, *found[0].shape[1:]), UNKNOWN_MASK, dtype=np.uint8)
    for row, masks_NSS in enumerate(found):
        padded[row, : len(masks_NSS)] = masks_NSS
    return torch.from_numpy(padded)
