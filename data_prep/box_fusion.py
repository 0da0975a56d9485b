"""Several teachers as one: weighted box fusion (Solovyev, Wang and Gabruseva 2021).

Where the paper gathers all overlapping boxes, a cluster here takes one box of each teacher: what a
teacher's own suppression has kept apart are two objects to it. So one teacher alone stays as it
is, and a fused score, the sum of its members' over the number of teachers, never exceeds 1.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from glipv2.data_prep.teachers import Finder
from glipv2.model.batch import Detection
from glipv2.model.boxes import pairwise_iou, suppress
from glipv2.model.image_input import Images, read_images
from glipv2.model.postprocess import NMS_THRESHOLD, merge
from glipv2.model.prompts import Caption

SAME_OBJECT = 0.55
"""Overlap from which boxes of different teachers are one object: the paper's threshold."""


class Ensemble:
    """Asks all teachers and fuses their boxes, phrase by phrase."""

    def __init__(self, teachers: Sequence[Finder]) -> None:
        self.teachers = list(teachers)

    def ground(
        self, images: Images, captions: Sequence[Caption], batch_size: int = 8
    ) -> list[Detection]:
        """See `Finder.ground`."""
        pixels = list(read_images(images))
        answers = [teacher.ground(pixels, captions, batch_size) for teacher in self.teachers]
        return [fuse(found) for found in zip(*answers, strict=True)]


def fuse(found: Sequence[Detection]) -> Detection:
    """What several teachers found in one image for the same phrases, as one teacher's finding.

    A fused box is the mean of its members, weighted by their scores; where a box lacks the
    agreement of all teachers, its score falls by as much. Scores must be positive. The order of
    the teachers doesn't matter: among equal scores, which the paper leaves open, that teacher goes
    first whose `_rows` are the lowest.
    """
    found = sorted(found, key=_rows)
    boxes_K4 = torch.cat([detection.boxes_K4 for detection in found]).double()
    scores_K = torch.cat([detection.scores_K for detection in found]).double()
    labels_K = torch.cat([detection.labels_K for detection in found])
    teachers_K = torch.cat([torch.full_like(d.labels_K, n) for n, d in enumerate(found)])
    fused = [(boxes_K4[:0], scores_K[:0], labels_K[:0])]
    for label in labels_K.unique():
        own = labels_K == label
        fused_C4, sums_C = _fuse_phrase(boxes_K4[own], scores_K[own], teachers_K[own], len(found))
        fused.append((fused_C4, sums_C / len(found), label.expand(len(sums_C))))
    boxes_C4, scores_C, labels_C = (torch.cat(parts) for parts in zip(*fused, strict=True))
    kept = suppress(boxes_C4, scores_C, labels_C, NMS_THRESHOLD)
    separate = Detection(
        boxes_K4=boxes_C4[kept].float(),
        scores_K=scores_C[kept].float(),
        labels_K=labels_C[kept],
        names=found[0].names,
    )
    return merge([separate], separate.names)


def _fuse_phrase(
    boxes_K4: Tensor, scores_K: Tensor, teachers_K: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """Mean boxes (C, 4) and summed scores (C,) of the clusters of one phrase's boxes.

    From the best box to the worst, each joins the cluster whose mean it overlaps most, of those
    that it overlaps enough and that have none of its teacher's; else it begins one.
    """
    weighted_C4, sums_C = boxes_K4.new_zeros(0, 4), scores_K.new_zeros(0)
    member_CN = torch.zeros(0, count, dtype=torch.bool)
    for k in scores_K.argsort(descending=True, stable=True).tolist():
        overlap_C = pairwise_iou(boxes_K4[k : k + 1], weighted_C4 / sums_C[:, None])[0]
        overlap_C = overlap_C.masked_fill(member_CN[:, teachers_K[k]], -1)
        if len(sums_C) and overlap_C.max() >= SAME_OBJECT:
            cluster = int(overlap_C.argmax())
        else:
            cluster = len(sums_C)
            weighted_C4 = torch.cat([weighted_C4, boxes_K4.new_zeros(1, 4)])
            sums_C = torch.cat([sums_C, scores_K.new_zeros(1)])
            member_CN = torch.cat([member_CN, member_CN.new_zeros(1, count)])
        weighted_C4[cluster] += scores_K[k] * boxes_K4[k]
        sums_C[cluster] += scores_K[k]
        member_CN[cluster, teachers_K[k]] = True
    return weighted_C4 / sums_C[:, None], sums_C


def _rows(detection: Detection) -> list[list[float]]:
    """Score, label and box of everything found, best first: equal for equal findings only."""
    labels_K, scores_K = detection.labels_K[:, None], detection.scores_K[:, None]
    return torch.cat([scores_K, labels_K, detection.boxes_K4], dim=1).tolist()
