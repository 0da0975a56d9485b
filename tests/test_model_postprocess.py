import math

import pytest
import torch
from torch import Tensor

from glipv2.model.anchors import make_anchors
from glipv2.model.batch import Detection, Outputs
from glipv2.model.boxes import pairwise_iou
from glipv2.model.postprocess import detections, merge, suppress_across_phrases

SIZES = [(4, 4), (2, 2), (1, 1)]
ANCHORS = make_anchors(SIZES, strides=(8, 16, 32), scale=2.0)
A, T = len(ANCHORS), 6
RED_SQUARE, RING = [1, 2], [4]


def logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


def outputs(batch: int = 1) -> Outputs:
    """Background everywhere, centerness 0.81."""
    return Outputs(
        pyramid=[],
        words_BTD=torch.zeros(batch, T, 8),
        fused_words_BTD=torch.zeros(batch, T, 8),
        token_logits_BAT=torch.full((batch, A, T), logit(0.01)),
        deltas_BA4=torch.zeros(batch, A, 4),
        centerness_BA=torch.full((batch, A), logit(0.81)),
        anchors_A4=ANCHORS,
        level_sizes=SIZES,
    )


def phrases(*columns: list[int]) -> Tensor:
    rows = torch.zeros(len(columns), T, dtype=torch.bool)
    for row, chosen in zip(rows, columns, strict=True):
        row[chosen] = True
    return rows


def test_the_score_is_the_root_of_mean_token_probability_times_centerness() -> None:
    out = outputs()
    out.token_logits_BAT[0, 5, 1], out.token_logits_BAT[0, 5, 2] = logit(0.9), logit(0.4)
    (found,) = detections(
        out, [phrases(RED_SQUARE, RING)], [["red square", "ring"]], torch.tensor([[32, 32]])
    )
    assert found.labels_K.tolist() == [0]
    assert found.scores_K.item() == pytest.approx(math.sqrt(0.65 * 0.81), rel=1e-5)
    torch.testing.assert_close(found.boxes_K4[0], ANCHORS[5])
    assert found.names == ["red square", "ring"]


def test_an_unlikely_place_is_only_looked_at_where_that_is_asked_for() -> None:
    out = outputs()
    out.token_logits_BAT[0, 5, 4] = logit(0.04)
    given = ([phrases(RING)], [["ring"]], torch.tensor([[32, 32]]))
    (usual,), (every,) = detections(out, *given), detections(out, *given, min_probability=0.0)
    assert len(usual.scores_K) == 0
    assert every.scores_K[0].item() == pytest.approx(math.sqrt(0.04 * 0.81), rel=1e-5)


def test_overlaps_of_one_phrase_are_suppressed_and_of_two_are_kept() -> None:
    out = outputs()
    out.deltas_BA4[0, 6, 0] = -10 * 8 / 16  # one cell to the left: on top of anchor 5
    out.token_logits_BAT[0, 5:7, 4] = torch.tensor([logit(0.5), logit(0.7)])
    out.token_logits_BAT[0, 5, 1:3] = logit(0.3)
    (found,) = detections(
        out, [phrases(RED_SQUARE, RING)], [["red square", "ring"]], torch.tensor([[32, 32]])
    )
    assert found.labels_K.tolist() == [1, 0]
    assert found.scores_K[0].item() == pytest.approx(math.sqrt(0.7 * 0.81), rel=1e-5)


def test_boxes_end_at_the_unpadded_image() -> None:
    out = outputs()
    out.token_logits_BAT[0, :, 4] = logit(0.9)
    (found,) = detections(out, [phrases(RING)], [["ring"]], torch.tensor([[20, 28]]))
    assert found.boxes_K4.amin() >= 0
    assert found.boxes_K4[:, 2].amax() <= 28 and found.boxes_K4[:, 3].amax() <= 20
    assert found.scores_K.tolist() == sorted(found.scores_K.tolist(), reverse=True)


def test_weak_pairs_and_phrases_without_tokens_find_nothing() -> None:
    out = outputs()
    out.token_logits_BAT[0, 3, 4] = logit(0.04)
    sizes = torch.tensor([[32, 32]])
    (found,) = detections(out, [phrases(RING, [])], [["ring", "gone"]], sizes)
    assert len(found.scores_K) == 0 and found.boxes_K4.shape == (0, 4)
    (nothing,) = detections(out, [phrases()], [[]], sizes)
    assert len(nothing.scores_K) == 0


def test_the_score_threshold_and_texts_of_different_lengths_are_respected() -> None:
    out = outputs(batch=2)
    out.token_logits_BAT[:, 5, 4] = logit(0.5)
    maps = [phrases(RING), phrases(RING)[:, :5]]
    sizes = torch.tensor([[32, 32], [32, 32]])
    found = detections(out, maps, [["ring"], ["ring"]], sizes, score_threshold=0.6)
    assert [len(f.scores_K) for f in found] == [1, 1]
    found = detections(out, maps, [["ring"], ["ring"]], sizes, score_threshold=0.7)
    assert [len(f.scores_K) for f in found] == [0, 0]


def test_at_most_a_hundred_boxes_are_kept() -> None:
    sizes = [(16, 16)]
    out = outputs()
    out.level_sizes, out.anchors_A4 = sizes, make_anchors(sizes, strides=(8,), scale=1.0)
    out.deltas_BA4 = torch.zeros(1, 256, 4)
    out.centerness_BA = torch.zeros(1, 256)
    out.token_logits_BAT = torch.randn(1, 256, T, generator=torch.Generator().manual_seed(0))
    (found,) = detections(out, [phrases(RING)], [["ring"]], torch.tensor([[128, 128]]))
    assert len(found.scores_K) == 100
    best = out.token_logits_BAT[0, :, 4].sigmoid().topk(100).values
    torch.testing.assert_close(found.scores_K, (best * 0.5).sqrt())


def scattered(seed: int, boxes: int = 60) -> Detection:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(boxes, 2, generator=generator) * 20
    size = 5 + torch.rand(boxes, 2, generator=generator) * 20
    return Detection(
        boxes_K4=torch.cat((corner, corner + size), dim=1),
        scores_K=torch.rand(boxes, generator=generator).sort(descending=True).values,
        labels_K=torch.randint(0, 3, (boxes,), generator=generator),
        names=["a", "b", "c"],
        masks_KHW=torch.arange(boxes).view(-1, 1, 1).expand(-1, 2, 2),
    )


@pytest.mark.parametrize("overlap", [0.3, 0.6, 1.0])
def test_of_overlapping_boxes_only_the_best_keeps_its_phrase(overlap: float) -> None:
    everything = scattered(seed=3)
    iou = pairwise_iou(everything.boxes_K4.double(), everything.boxes_K4.double())
    expected: list[int] = []
    for k in range(len(iou)):
        if all(iou[k, better] <= overlap for better in expected):
            expected.append(k)
    kept = suppress_across_phrases(everything, overlap)
    assert (len(expected) < len(iou)) == (overlap < 1)
    assert torch.equal(kept.boxes_K4, everything.boxes_K4[expected])
    assert torch.equal(kept.labels_K, everything.labels_K[expected])
    assert kept.masks_KHW is not None and kept.masks_KHW[:, 0, 0].tolist() == expected


def test_merging_keeps_the_best_hundred_with_their_labels() -> None:
    parts = [scattered(seed=seed) for seed in (4, 5, 6)]
    rows = sorted(
        (-score, number, label)
        for number, part in enumerate(parts)
        for score, label in zip(part.scores_K.tolist(), part.labels_K.tolist(), strict=True)
    )[:100]
    merged = merge(parts, ["x", "y", "z"])
    assert merged.scores_K.tolist() == [-score for score, _, _ in rows]
    assert merged.phrases == ["xyz"[label] for _, _, label in rows]
