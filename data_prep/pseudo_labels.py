"""From a teacher's boxes to the regions that are kept: the rules of caption self-training."""

from collections.abc import Sequence

import torch
from torch import Tensor

from glipv2.data_prep.noun_phrases import Phrase
from glipv2.model.batch import Detection
from glipv2.model.boxes import suppress
from glipv2.pipeline.records import Region

SUREST = 0.9999
"""Highest score of a label: 1 is the score of what people drew."""


def finite(detection: Detection) -> Tensor:
    """(K,) which boxes are numbers."""
    return torch.isfinite(detection.scores_K) & torch.isfinite(detection.boxes_K4).all(dim=1)


def select_regions(
    detection: Detection,
    phrases: Sequence[Phrase],
    *,
    score_threshold: float,
    cross_phrase_nms: float,
    max_boxes: int,
) -> tuple[Region, ...]:
    """Keep the confident boxes of one caption's phrases, best score first.

    `detection.labels_K` index `phrases`; its boxes have been through NMS per phrase. Of boxes that
    overlap by more than `cross_phrase_nms` only the best stays, whatever their phrases: one object
    is named once (1 keeps all, as GLIP does; glip_facts F).
    """
    kept = torch.nonzero(finite(detection) & (detection.scores_K >= score_threshold)).flatten()
    boxes_K4, scores_K = detection.boxes_K4[kept].float(), detection.scores_K[kept].float()
    best_first = (
        suppress(boxes_K4, scores_K, torch.zeros_like(kept), cross_phrase_nms)
        if cross_phrase_nms < 1
        else torch.argsort(scores_K, descending=True, stable=True)
    )
    regions = []
    for index in best_first[:max_boxes].tolist():
        phrase = phrases[int(detection.labels_K[kept[index]])]
        x0, y0, x1, y1 = (round(value, 2) for value in boxes_K4[index].tolist())
        if x1 <= x0 or y1 <= y0:
            continue
        regions.append(
            Region(
                box=(x0, y0, x1, y1),
                spans=((phrase.start, phrase.end),),
                phrase=phrase.text,
                score=min(round(scores_K[index].item(), 4), SUREST),
            )
        )
    return tuple(regions)
