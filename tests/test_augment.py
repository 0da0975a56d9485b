import numpy as np
import torch

from glipv2.pipeline.augment import Augmentation, Picture, augment

ALWAYS = Augmentation(short_sides=(2,), long_side=6, flip=1.0)


def picture(masks_NSS=None):
    image_3HW = torch.arange(12, dtype=torch.uint8).reshape(1, 2, 6).expand(3, 2, 6)
    boxes_N4 = torch.tensor([[0.0, 0.0, 2.0, 2.0]])
    return Picture(image_3HW=image_3HW, boxes_N4=boxes_N4, masks_NSS=masks_NSS)


def test_a_picture_whose_text_names_a_side_is_never_mirrored():
    rng = np.random.default_rng(0)
    same = augment(picture(), "the man on the Left", ALWAYS, rng)
    assert torch.equal(same.image_3HW, picture().image_3HW)
    assert torch.equal(same.boxes_N4, picture().boxes_N4)
    mirrored = augment(picture(), "a bright light", ALWAYS, rng)
    assert torch.equal(mirrored.image_3HW, picture().image_3HW.flip(2))
    assert mirrored.boxes_N4.tolist() == [[4.0, 0.0, 6.0, 2.0]]


def test_masks_are_mirrored_with_their_picture():
    masks_NSS = np.array([[[1, 0, 0], [1, 1, 0], [255, 0, 1]]], dtype=np.uint8)
    rng = np.random.default_rng(0)
    same = augment(picture(masks_NSS), "its left side", ALWAYS, rng)
    assert same.masks_NSS.tolist() == masks_NSS.tolist()
    mirrored = augment(picture(masks_NSS), "a dog", ALWAYS, rng)
    assert mirrored.masks_NSS.tolist() == [[[0, 0, 1], [0, 1, 1], [1, 0, 255]]]
