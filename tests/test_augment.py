import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from glipv2.model.decoding import decode_image
from glipv2.pipeline.augment import Augmentation, View, cropped, draw_view, picture
from glipv2.pipeline.records import Record, Region

ALWAYS = Augmentation(short_sides=(40,), long_side=80, flip=1.0)


def record(size=(80, 40), boxes=((10, 5, 30, 25),)):
    """Black with white boxes, each with its own mask; stored without loss."""
    width, height = size
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    regions = []
    for x0, y0, x1, y1 in boxes:
        pixels[y0:y1, x0:x1] = 255
        inside = np.zeros((height, width), dtype=np.uint8, order="F")
        inside[y0 : (y0 + y1) // 2, x0:x1] = 1  # the upper half
        encoded = coco_mask.encode(inside)
        mask = {"size": [height, width], "counts": encoded["counts"].decode()}
        regions.append(Region(box=(x0, y0, x1, y1), category=0, mask=mask))
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return Record(key="one", image=buffer.getvalue(), image_format="png", width=width,
                  height=height, task="detection", regions=tuple(regions))  # fmt: skip


def whole(size, short_side, mirrored=False):
    return View(crop=(0, 0, *size), short_side=short_side, long_side=999, mirrored=mirrored)


def white_box(image_3HW):
    """Edges of the white part, to half a pixel."""
    on = image_3HW[0] >= 128
    y, x = on.any(dim=1).nonzero(), on.any(dim=0).nonzero()
    return [int(x[0]), int(y[0]), int(x[-1]) + 1, int(y[-1]) + 1]


def test_a_picture_whose_text_names_a_side_is_never_mirrored():
    rng = np.random.default_rng(0)
    assert not draw_view((80, 40), "the man on the Left", ALWAYS, rng).mirrored
    assert draw_view((80, 40), "a bright light", ALWAYS, rng).mirrored
    never = replace(ALWAYS, flip=0.0)
    assert not any(draw_view((80, 40), "a dog", never, rng).mirrored for _ in range(20))


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("short_side", [20, 40, 60])
def test_boxes_stay_on_what_they_name(short_side, mirrored):
    seen = picture(record(), whole((80, 40), short_side, mirrored))
    assert seen.image_3HW.shape == (3, short_side, 2 * short_side)
    assert seen.boxes_N4[0].tolist() == pytest.approx(white_box(seen.image_3HW), abs=1)


def test_masks_are_mirrored_with_their_picture():
    asked = whole((80, 40), 40)
    masks_NSS = picture(record(), asked, masks=True).masks_NSS
    turned_NSS = picture(record(), replace(asked, mirrored=True), masks=True).masks_NSS
    assert np.array_equal(turned_NSS, masks_NSS[:, :, ::-1])
    assert masks_NSS[0, 0].all() and not masks_NSS[0, -1].any()


@pytest.mark.parametrize("seed", range(8))
def test_a_crop_moves_boxes_and_masks_with_the_pixels(seed):
    rng = np.random.default_rng(seed)
    asked = draw_view((80, 40), "", replace(ALWAYS, crop=1.0, flip=0.0), rng)
    shown = cropped(record(), asked)
    x0, y0, x1, y1 = asked.crop
    assert 0 <= x0 < x1 <= 80 and 0 <= y0 < y1 <= 40 and (x1 - x0) >= 40 and (y1 - y0) >= 20
    seen = picture(shown, asked, masks=True)
    assert seen.image_3HW.shape[1:] == asked.size
    for box, region, mask in zip(seen.boxes_N4, shown.regions, seen.masks_NSS, strict=True):
        assert box.tolist() == pytest.approx(white_box(seen.image_3HW), abs=2)
        middle, top, bottom = 15, region.box[1], region.box[3]
        upper = (min(middle, bottom) - min(middle, top)) / (bottom - top)  # of what is left of it
        assert mask.mean() == pytest.approx(upper, abs=0.03)


def test_what_a_crop_halves_becomes_a_crowd_and_what_it_loses_goes():
    boxes = ((0, 0, 10, 10), (22, 0, 30, 10), (18, 0, 30, 10), (40, 0, 50, 10))
    asked = View(crop=(25, 0, 75, 40), short_side=40, long_side=99, mirrored=False)
    shown = cropped(record(boxes=boxes), asked)
    assert [(r.box, r.crowd) for r in shown.regions] == [
        ((25, 0, 30, 10), False),
        ((25, 0, 30, 10), True),
        ((40, 0, 50, 10), False),
    ]


def test_a_large_photograph_is_decoded_at_a_fraction_of_its_size():
    rng = np.random.default_rng(1)
    smooth = Image.fromarray(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8)).resize((1600, 1200))
    buffer = io.BytesIO()
    smooth.save(buffer, "JPEG", quality=95)
    data = buffer.getvalue()
    assert decode_image(data, at_least=(200, 250)).shape == (3, 300, 400)
    assert decode_image(data, at_least=(301, 250)).shape[1] >= 301
    photo = replace(
        record(), image=data, image_format="jpg", width=1600, height=1200,
        regions=(Region(box=(160, 0, 1600, 600), category=0),),
    )  # fmt: skip
    seen = picture(photo, whole((1600, 1200), 240))
    assert seen.image_3HW.shape == (3, 240, 320)
    assert seen.boxes_N4.tolist() == [[32, 0, 320, 120]]
    exact = torch.from_numpy(np.asarray(smooth.resize((320, 240), Image.Resampling.BOX)).copy())
    assert (seen.image_3HW.permute(1, 2, 0).float() - exact).abs().mean() < 2
