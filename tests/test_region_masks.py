import numpy as np
import pytest
from pycocotools import mask as coco_mask

from glipv2.model.batch import UNKNOWN_MASK
from glipv2.pipeline.errors import BadSample
from glipv2.pipeline.records import Record, Region
from glipv2.pipeline.region_masks import decode_mask, mask_in_box, region_masks


def encode(mask_HW):
    runs = coco_mask.encode(np.asfortranarray(mask_HW.astype(np.uint8)))
    return {"size": [int(side) for side in runs["size"]], "counts": runs["counts"].decode()}


def blobs(rng, height=37, width=53):
    """A few rectangles: long and short runs, some of them at the edges."""
    mask_HW = np.zeros((height, width), dtype=bool)
    for _ in range(4):
        y, x = rng.integers(0, height), rng.integers(0, width)
        mask_HW[y : y + rng.integers(1, 20), x : x + rng.integers(1, 30)] ^= True
    return mask_HW


@pytest.mark.parametrize("seed", range(8))
def test_masks_are_read_as_pycocotools_wrote_them(seed):
    rng = np.random.default_rng(seed)
    for mask_HW in (blobs(rng), rng.random((37, 53)) < 0.5, np.ones((37, 53)), np.zeros((37, 53))):
        assert np.array_equal(decode_mask(encode(mask_HW), 53, 37), mask_HW)


@pytest.mark.parametrize(
    "change",
    [
        {"counts": "01"},
        {"counts": "\x00\x01"},
        {"counts": "oooooooooooooooo"},
        {"counts": b"01"},
        {"counts": ""},
        {"counts": [10, 20]},
        {"size": [53, 37]},
        {"size": None},
        {"counts": "0" * 100 + "PPPP"},
    ],
)
def test_broken_run_lengths_are_a_bad_sample(change):
    good = encode(blobs(np.random.default_rng(0)))
    with pytest.raises(BadSample, match="mask_invalid"):
        decode_mask({**good, **change}, 53, 37)


@pytest.mark.parametrize(
    "box", [(3.0, 5.0, 31.0, 33.0), (0.4, 2.3, 52.7, 36.9), (7.2, 1.1, 9.9, 4)]
)
def test_a_cell_is_set_if_half_of_its_area_is(box):
    mask_HW = blobs(np.random.default_rng(3))
    found = mask_in_box(mask_HW, box, side=8)
    fine = 40  # looks per cell and axis
    x0, y0, x1, y1 = box
    for row in range(8):
        for column in range(8):
            step = (np.arange(fine) + 0.5) / fine
            y = (y0 + (row + step) * (y1 - y0) / 8).astype(int)
            x = (x0 + (column + step) * (x1 - x0) / 8).astype(int)
            share = mask_HW[np.ix_(y, x)].mean()
            if abs(share - 0.5) > 0.06:  # the looks are no exact area
                assert found[row, column] == (share > 0.5), (row, column, share)


def test_regions_without_a_mask_are_unknown():
    mask_HW = np.zeros((60, 80), dtype=bool)
    mask_HW[20:50, 10:25] = True  # the left half of the box
    regions = (
        Region(box=(10.0, 20.0, 40.0, 50.0), category=0),
        Region(box=(10.0, 20.0, 40.0, 50.0), category=0, mask=encode(mask_HW)),
    )
    record = Record(
        key="k", image=b"", image_format="jpg", width=80, height=60, task="detection",
        regions=regions,
    )  # fmt: skip
    unknown, known = region_masks(record, side=4)
    assert (unknown == UNKNOWN_MASK).all()
    assert known.tolist() == [[1, 1, 0, 0]] * 4
    assert region_masks(Record(**{**vars(record), "regions": ()})).shape == (0, 56, 56)
