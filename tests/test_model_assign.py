import torch
from torch import Tensor
from torchvision.ops import box_iou

from glipv2.model.anchors import make_anchors
from glipv2.model.assign import assign

SIZES = [(12, 16), (6, 8), (3, 4)]
COUNTS = [h * w for h, w in SIZES]
ANCHORS = make_anchors(SIZES, strides=(8, 16, 32), scale=3.5)


def assign_one_by_one(boxes: Tensor) -> list[int]:
    """The original's procedure for one image, in loops."""
    iou = box_iou(boxes, ANCHORS)
    centres = (ANCHORS[:, :2] + ANCHORS[:, 2:]) / 2
    best, winner = [0.0] * len(ANCHORS), [-1] * len(ANCHORS)
    for n, box in enumerate(boxes):
        distance = (centres - (box[:2] + box[2:]) / 2).pow(2).sum(1)
        candidates, first = [], 0
        for count in COUNTS:
            level = distance[first : first + count]
            candidates += (level.topk(min(9, count), largest=False).indices + first).tolist()
            first += count
        overlaps = iou[n, candidates]
        threshold = overlaps.mean() + overlaps.std()
        for a in candidates:
            x, y = (centres[a] - 0.5).tolist()
            inside = min(x - box[0], y - box[1], box[2] - 1 - x, box[3] - 1 - y) > 0.01
            if iou[n, a] >= threshold and inside and iou[n, a] > best[a]:
                best[a], winner[a] = float(iou[n, a]), n
    return winner


def scene(seed: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * torch.tensor([90.0, 60.0])
    return torch.cat((corner, corner + 10 + 40 * torch.rand(count, 2, generator=generator)), 1)


def test_a_batch_is_assigned_like_one_image_after_the_other() -> None:
    scenes = [scene(seed, count) for seed, count in enumerate((5, 1, 0, 3))]
    boxes = torch.zeros(4, 5, 4)
    mask = torch.zeros(4, 5, dtype=torch.bool)
    for row, own in enumerate(scenes):
        boxes[row, : len(own)] = own
        mask[row, : len(own)] = True
    matched = assign(ANCHORS, COUNTS, boxes, mask)
    for row, own in enumerate(scenes):
        expected = assign_one_by_one(own) if len(own) else [-1] * len(ANCHORS)
        assert matched[row].tolist() == expected
    assert (matched[0] >= 0).sum() > 5


def test_padded_boxes_win_nothing_whatever_they_hold() -> None:
    boxes = torch.stack([scene(0, 3), scene(0, 3)])
    mask = torch.tensor([[True, True, True], [True, False, True]])
    boxes[1, 1] = torch.tensor([0.0, 0, 128, 96])
    matched = assign(ANCHORS, COUNTS, boxes, mask)
    assert 1 in matched[0] and 1 not in matched[1]


def test_an_anchor_wanted_twice_goes_to_the_box_it_overlaps_most() -> None:
    exact = ANCHORS[70]  # a square around an anchor of the finest level
    boxes = torch.stack([exact + torch.tensor([-3.0, -3, 3, 3]), exact])[None]
    matched = assign(ANCHORS, COUNTS, boxes, torch.ones(1, 2, dtype=torch.bool))
    assert matched[0, 70] == 1


def test_no_boxes_at_all_is_all_background() -> None:
    matched = assign(ANCHORS, COUNTS, torch.zeros(2, 0, 4), torch.zeros(2, 0, dtype=torch.bool))
    assert matched.shape == (2, len(ANCHORS)) and (matched == -1).all()


def test_a_pyramid_of_one_location_has_no_nan_threshold() -> None:
    anchors = make_anchors([(1, 1)], strides=(8,), scale=3.5)
    boxes = anchors[None] + 0.0
    assert assign(anchors, [1], boxes, torch.ones(1, 1, dtype=torch.bool)).tolist() == [[0]]
