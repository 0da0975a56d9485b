"""From outputs to boxes with phrases and scores (facts D.1)."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from glipv2.model.batch import Detection, Outputs, run_lengths
from glipv2.model.boxes import clip, decode, suppress
from glipv2.model.mask_head import paste_masks

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
    max_boxes: int = MAX_DETECTIONS,
    min_probability: float = MIN_PROBABILITY,
) -> list[Detection]:
    """The boxes of each image, at most `max_boxes` and those tied with the last of them.

    `phrase_tokens[b]` is the bool (P, T) map of phrases to tokens of text b and `names[b]` its P
    phrases; a phrase without tokens finds nothing. Boxes are in pixels of the resized image, inside
    (height, width) `sizes_B2[b]`. score = sqrt(mean token probability x centerness); overlaps of
    one phrase are suppressed, overlaps of different phrases are not.
    """
    found = []
    for b, (tokens_PT, phrases) in enumerate(zip(phrase_tokens, names, strict=True)):
        boxes, scores, labels = candidates(outputs, b, tokens_PT, sizes_B2[b], min_probability)
        kept = suppress(boxes, scores, labels, NMS_THRESHOLD)
        kept = _best(kept, scores, score_threshold, max_boxes)
        found.append(
            Detection(
                boxes_K4=boxes[kept].cpu(),
                scores_K=scores[kept].cpu(),
                labels_K=labels[kept].cpu(),
                names=list(phrases),
            )
        )
    return found


def candidates(
    outputs: Outputs,
    image: int,
    tokens_PT: Tensor,
    size_2: Tensor,
    min_probability: float = MIN_PROBABILITY,
) -> tuple[Tensor, Tensor, Tensor]:
    """What one image offers before suppression: boxes (K, 4), scores (K,) and phrases (K,)."""
    tokens_PT = tokens_PT.to(outputs.token_logits_BAT.device)
    centerness_A = outputs.centerness_BA[image].float().sigmoid()
    probability_AP = _phrase_probability(
        outputs.token_logits_BAT[image, :, : tokens_PT.shape[1]], tokens_PT
    )
    anchors_per_level = [h * w for h, w in outputs.level_sizes]
    places_K, labels_K = _best_pairs(
        probability_AP, centerness_A, anchors_per_level, min_probability
    )
    scores_K = (probability_AP[places_K, labels_K] * centerness_A[places_K]).sqrt()
    boxes_A4 = decode(outputs.deltas_BA4[image].float(), outputs.anchors_A4)
    height, width = size_2.tolist()
    return clip(boxes_A4[places_K], height, width), scores_K, labels_K


def suppress_across_phrases(detection: Detection, overlap: float) -> Detection:
    """Of boxes that overlap more than this only the best stays, whatever their phrases.

    One object is named once, so a phrase for something absent can't claim what another names.
    """
    one_phrase_K = torch.zeros_like(detection.labels_K)
    kept = suppress(detection.boxes_K4, detection.scores_K, one_phrase_K, overlap)
    return _choose(detection, kept)


def merge(
    parts: Sequence[Detection], names: list[str], max_boxes: int | None = MAX_DETECTIONS
) -> Detection:
    """The best boxes of several detections in one image, labelled with the same `names`; with None
    all of them."""
    masks = [part.masks_KHW for part in parts if part.masks_KHW is not None]
    everything = Detection(
        boxes_K4=torch.cat([part.boxes_K4 for part in parts]),
        scores_K=torch.cat([part.scores_K for part in parts]),
        labels_K=torch.cat([part.labels_K for part in parts]),
        names=names,
        masks_KHW=torch.cat(masks) if masks else None,
    )
    order = everything.scores_K.argsort(descending=True, stable=True)
    return _choose(everything, order[:max_boxes])


def in_own_pixels(
    detection: Detection,
    resized: tuple[int, int],
    own: tuple[int, int],
    as_run_lengths: bool = False,
) -> Detection:
    """A detection in a resized image, in pixels of the image as given; sizes are (height, width).

    Its masks, if any, are those of `mask_head.region_masks`; as run lengths they are made one by
    one, for of thousands the maps alone take gigabytes.
    """
    ratio_xy = torch.tensor([own[1] / resized[1], own[0] / resized[0]])
    boxes_K4 = detection.boxes_K4 * ratio_xy.repeat(2)
    masks_KSS = detection.masks_KHW
    if masks_KSS is None:
        return replace(detection, boxes_K4=boxes_K4)
    on_device_K4 = boxes_K4.to(masks_KSS.device)
    if as_run_lengths:
        encoded = [
            run_lengths(paste_masks(masks_KSS[k : k + 1], on_device_K4[k : k + 1], *own)[0])
            for k in range(len(masks_KSS))
        ]
        return replace(detection, boxes_K4=boxes_K4, masks_KHW=None, run_lengths_K=encoded)
    masks_KHW = paste_masks(masks_KSS, on_device_K4, *own).cpu()
    return replace(detection, boxes_K4=boxes_K4, masks_KHW=masks_KHW)


def _choose(detection: Detection, index_K: Tensor) -> Detection:
    masks_KHW, encoded_K = detection.masks_KHW, detection.run_lengths_K
    return replace(
        detection,
        boxes_K4=detection.boxes_K4[index_K],
        scores_K=detection.scores_K[index_K],
        labels_K=detection.labels_K[index_K],
        masks_KHW=None if masks_KHW is None else masks_KHW[index_K],
        run_lengths_K=None if encoded_K is None else [encoded_K[k] for k in index_K.tolist()],
    )


def _phrase_probability(logits_AT: Tensor, tokens_PT: Tensor) -> Tensor:
    """Mean of the token probabilities of each phrase: (A, P)."""
    weights_TP = tokens_PT.float().T
    weights_TP = weights_TP / weights_TP.sum(dim=0).clamp(min=1)
    return logits_AT.float().sigmoid() @ weights_TP


def _best_pairs(
    probability_AP: Tensor,
    centerness_A: Tensor,
    anchors_per_level: Sequence[int],
    min_probability: float,
) -> tuple[Tensor, Tensor]:
    """Anchors and phrases of each level's best pairs above the probability."""
    P = probability_AP.shape[1]
    ranking_AP = torch.where(
        probability_AP > min_probability, probability_AP * centerness_A[:, None], -1.0
    )
    chosen, first = [], 0
    for count in anchors_per_level:
        level = ranking_AP[first : first + count].flatten()
        values, index = level.topk(min(MAX_PER_LEVEL, len(level)))
        chosen.append(index[values >= 0] + first * P)
        first += count
    pairs = torch.cat(chosen)
    return pairs // max(P, 1), pairs % max(P, 1)


def _best(kept: Tensor, scores: Tensor, score_threshold: float, max_boxes: int) -> Tensor:
    """The first `max_boxes` of `kept`, which is sorted, and those tied with the last, above the
    threshold."""
    limit = score_threshold
    if len(kept) > max_boxes:
        limit = max(limit, float(scores[kept[max_boxes - 1]]))
    return kept[scores[kept] >= limit]
