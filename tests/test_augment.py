import numpy as np
import torch

from glipv2.pipeline.augment import Augmentation, augment


def test_a_picture_whose_text_names_a_side_is_never_mirrored():
    image_3HW = torch.arange(12, dtype=torch.uint8).reshape(1, 2, 6).expand(3, 2, 6)
    boxes_N4 = torch.tensor([[0.0, 0.0, 2.0, 2.0]])
    always = Augmentation(short_sides=(2,), long_side=6, flip=1.0)
    rng = np.random.default_rng(0)
    same, boxes = augment(image_3HW, boxes_N4, "the man on the Left", always, rng)
    assert torch.equal(same, image_3HW)
    assert torch.equal(boxes, boxes_N4)
    mirrored, boxes = augment(image_3HW, boxes_N4, "a bright light", always, rng)
    assert torch.equal(mirrored, image_3HW.flip(2))
    assert boxes.tolist() == [[4.0, 0.0, 6.0, 2.0]]
