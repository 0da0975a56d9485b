import torch
from original import assign_by_anchor
from torch import Tensor

from glipv2.model.anchors import make_anchors
from glipv2.model.assign import assign

SIZES = [(12, 16), (6, 8), (3, 4)]
COUNTS = [h * w for h, w in SIZES]
ANCHORS = make_anchors(SIZES, strides=(8, 16, 32), scale=3.5)
LAST_PIXEL = torch.tensor([0.0, 0, 1, 1])


def assign_one_by_one(boxes: Tensor) -> list[int]:
    """The original's procedure for one image, in loops, with its corners."""
    corners = (ANCHORS - LAST_PIXEL).tolist(), (boxes - LAST_PIXEL).tolist()
    return assign_by_anchor(corners[0], COUNTS, corners[1])


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


def test_of_equal_boxes_the_first_wins() -> None:
    twice = scene(0, 3)[[0, 1, 0, 2]]
    matched = assign(ANCHORS, COUNTS, twice[None], torch.ones(1, 4, dtype=torch.bool))[0]
    assert matched.tolist() == assign_one_by_one(twice)
    assert 0 in matched and 2 not in matched


def test_crowded_images_are_assigned_like_one_after_the_other() -> None:
    boxes = torch.stack([scene(seed, 40) for seed in (7, 8)])
    matched = assign(ANCHORS, COUNTS, boxes, torch.ones(2, 40, dtype=torch.bool))
    for row, own in zip(matched, boxes, strict=True):
        assert row.tolist() == assign_one_by_one(own)


def test_no_boxes_at_all_is_all_background() -> None:
    matched = assign(ANCHORS, COUNTS, torch.zeros(2, 0, 4), torch.zeros(2, 0, dtype=torch.bool))
    assert matched.shape == (2, len(ANCHORS)) and (matched == -1).all()


def test_a_pyramid_of_one_location_has_no_nan_threshold() -> None:
    anchors = make_anchors([(1, 1)], strides=(8,), scale=3.5)
    boxes = anchors[None] + 0.0
    assert assign(anchors, [1], boxes, torch.ones(1, 1, dtype=torch.bool)).tolist() == [[0]]
