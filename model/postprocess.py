"""From outputs to boxes with phrases and scores (facts D.1)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from glipv2.model.batch import Detection, Outputs
from glipv2.model.boxes import clip, decode, suppress

MIN_PROBABILITY = 0.05
"""Region-phrase probability below which a location is not looked at, before centerness."""
MAX_PER_LEVEL = 1000
NMS_THRESHOLD = 0.6
MAX_DETECTIONS = 100


def detections(
    outputs: Outputs,
    phrase_tokens: Sequence[Tensor],
    names: Sequence[list[str]],
    sizes_B2: Tensor,
    score_threshold: float = 0.0,
) -> list[Detection]:
    """The boxes of each image, at most 100 and those tied with the last of them.

    `phrase_tokens[b]` is the bool (P, T) map of phrases to tokens of text b and `names[b]` its P
    phrases; a phrase without tokens finds nothing. Boxes are in pixels of the resized image, inside
    (height, width) `sizes_B2[b]`. score = sqrt(mean token probability x centerness); overlaps of
    one phrase are suppressed, overlaps of different phrases are not.
    """
    boxes_BA4 = decode(outputs.deltas_BA4.float(), outputs.anchors_A4)
    centerness_BA = outputs.centerness_BA.float().sigmoid()
    anchors_per_level = [h * w for h, w in outputs.level_sizes]
    found = []
    for b, (tokens_PT, phrases) in enumerate(zip(phrase_tokens, names, strict=True)):
        tokens_PT = tokens_PT.to(centerness_BA.device)
        probability_AP = _phrase_probability(
            outputs.token_logits_BAT[b, :, : tokens_PT.shape[1]], tokens_PT
        )
        places, labels = _candidates(probability_AP, centerness_BA[b], anchors_per_level)
        scores = (probability_AP[places, labels] * centerness_BA[b, places]).sqrt()
        height, width = sizes_B2[b].tolist()
        boxes = clip(boxes_BA4[b, places], height, width)
        kept = suppress(boxes, scores, labels, NMS_THRESHOLD)
        kept = _best(kept, scores, score_threshold)
        found.append(
            Detection(
                boxes_K4=boxes[kept].cpu(),
                scores_K=scores[kept].cpu(),
                labels_K=labels[kept].cpu(),
                names=list(phrases),
            )
        )
    return found


def _phrase_probability(logits_AT: Tensor, tokens_PT: Tensor) -> Tensor:
    """Mean of the token probabilities of each phrase: (A, P)."""
    weights_TP = tokens_PT.float().T
    weights_TP = weights_TP / weights_TP.sum(dim=0).clamp(min=1)
    return logits_AT.float().sigmoid() @ weights_TP


def _candidates(
    probability_AP: Tensor, centerness_A: Tensor, anchors_per_level: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Anchors and phrases of each level's best pairs above MIN_PROBABILITY."""
    P = probability_AP.shape[1]
    ranking_AP = torch.where(
        probability_AP > MIN_PROBABILITY, probability_AP * centerness_A[:, None], -1.0
    )
    chosen, first = [], 0
    for count in anchors_per_level:
        level = ranking_AP[first : first + count].flatten()
        values, index = level.topk(min(MAX_PER_LEVEL, len(level)))
        chosen.append(index[values >= 0] + first * P)
        first += count
    pairs = torch.cat(chosen)
    return pairs // max(P, 1), pairs % max(P, 1)


def _best(kept: Tensor, scores: Tensor, score_threshold: float) -> Tensor:
    """The first 100 of `kept`, which is sorted, those tied with the last, above the threshold."""
    limit = score_threshold
    if len(kept) > MAX_DETECTIONS:
        limit = max(limit, float(scores[kept[MAX_DETECTIONS - 1]]))
    return kept[scores[kept] >= limit]
