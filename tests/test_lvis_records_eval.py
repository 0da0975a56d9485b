"""LVIS AP of our records and of an annotation file: the same detections score the same."""

from dataclasses import replace

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from glipv2.eval.lvis import CLASSIC, FIXED, LvisDetections, lvis_ap, lvis_truth
from glipv2.eval.lvis_records import (
    lvis_document_detections,
    lvis_records_ap,
    lvis_records_truth,
)
from glipv2.eval.predictions import ScoredBoxes
from glipv2.pipeline.errors import DataError
from glipv2.pipeline.records import Record, Region

HEIGHT, WIDTH = 60, 80
CATEGORIES = ("cat", "dog", "emu", "fox")
FREQUENCY = ("f", "c", "r", "r")
SMALL, LARGE = (0, 0, 10, 10), (20, 10, 70, 50)


def rectangle(box):
    x0, y0, x1, y1 = box
    mask_HW = np.zeros((HEIGHT, WIDTH), dtype=np.uint8, order="F")
    mask_HW[y0:y1, x0:x1] = 1
    return {
        "size": [HEIGHT, WIDTH],
        "counts": coco_mask.encode(mask_HW)["counts"].decode(),
    }


def record(key, regions=(), negative=(), not_exhaustive=()):
    return Record(
        key=key,
        image=b"",
        image_format="jpg",
        width=WIDTH,
        height=HEIGHT,
        task="detection",
        regions=tuple(Region(box=b, category=c, mask=rectangle(b)) for b, c in regions),
        provenance={
            "neg_categories": list(negative),
            "not_exhaustive_categories": list(not_exhaustive),
        },
    )


def boxes(*rows):
    """Rows are (box, score, name)."""
    return ScoredBoxes(
        boxes=[row[0] for row in rows],
        scores=[row[1] for row in rows],
        names=[row[2] for row in rows],
        masks=[rectangle([int(v) if v == v else 0 for v in row[0]]) for row in rows],
    )


RECORDS = [
    record("a", [(SMALL, 0), (LARGE, 0)], negative=[1]),
    record("b", [(LARGE, 1)], not_exhaustive=[1]),
    record("c", negative=[0, 3]),
]
NAN = float("nan")
FOUND = {
    "a": boxes((SMALL, 0.9, "cat"), (LARGE, 0.3, "cat"), (SMALL, 0.5, "dog"), (LARGE, NAN, "cat")),
    "b": boxes((SMALL, 0.9, "dog"), (LARGE, 0.4, "dog"), (LARGE, 0.95, "cat"), (SMALL, 1, "fox")),
    "c": boxes((SMALL, 0.6, "cat"), ((0, 0, NAN, 9), 0.8, "cat")),
}
# Cat: right .9, wrong .6 (a verified negative of c; b says nothing of cats), right .3: precision 1
# up to recall 1/2, then 2/3. Dog: .9 is ignored (b may hold more dogs), .5 is wrong (a negative of
# a), .4 right: 1/2 everywhere. Fox and emu are never annotated.
CAT, DOG = (51 + 50 * 2 / 3) / 101, 1 / 2


@pytest.mark.parametrize("by", ["box", "mask"])
@pytest.mark.parametrize("cap", [FIXED, CLASSIC], ids=["fixed", "classic"])
def test_federated_records_worked_out_by_hand(cap, by):
    result = lvis_records_ap(RECORDS, FOUND, CATEGORIES, FREQUENCY, cap, by)
    assert {n: own.ap for n, own in result.per_category.items()} == pytest.approx({1: CAT, 2: DOG})
    figures = result.to_dict()
    assert figures["ap"] == pytest.approx((CAT + DOG) / 2)
    assert (figures["ap_frequent"], figures["ap_common"]) == pytest.approx((CAT, DOG))
    assert "ap_rare" not in figures  # no rare category has an annotation
    assert (figures["dropped"], figures["nan_scores"], figures["empty"]) == (2, 0, 0)


def test_an_annotation_file_with_ids_of_its_own_scores_the_same():
    names = {"cat": 30, "dog": 7, "emu": 12, "fox": 2}
    ids = {"a": 900, "b": 44, "c": 5}
    annotations = [
        {
            "image_id": ids[own.key],
            "category_id": names[CATEGORIES[region.category]],
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "area": (x1 - x0) * (y1 - y0),
            "segmentation": [[x0, y0, x0, y1, x1, y1, x1, y0]],
        }
        for own in RECORDS
        for region in own.regions
        for x0, y0, x1, y1 in [region.box]
    ]
    listed = {"neg_category_ids": "neg_categories"}
    listed["not_exhaustive_category_ids"] = "not_exhaustive_categories"
    document = {
        "images": [
            {
                "id": ids[own.key],
                "height": HEIGHT,
                "width": WIDTH,
                **{t: [names[CATEGORIES[n]] for n in own.provenance[o]] for t, o in listed.items()},
            }
            for own in RECORDS
        ],
        "categories": [
            {"id": number, "name": name, "frequency": FREQUENCY[CATEGORIES.index(name)]}
            for name, number in names.items()
        ],
        "annotations": annotations,
    }
    keys = {number: key for key, number in ids.items()}
    for by in ("box", "mask"):
        found = lvis_document_detections(document, FOUND, keys, masks=by == "mask")
        assert isinstance(found, LvisDetections)
        result = lvis_ap(lvis_truth(document), found, FIXED, by)
        expected = lvis_records_ap(RECORDS, FOUND, CATEGORIES, FREQUENCY, FIXED, by)
        assert result.to_dict() == pytest.approx(expected.to_dict())
        aps = {number: own.ap for number, own in result.per_category.items()}
        assert aps == pytest.approx({30: CAT, 7: DOG})


def test_the_area_that_the_file_states_decides_the_size():
    small, *others = RECORDS
    regions = tuple(replace(region, area=2000.0) for region in small.regions)
    stated = [replace(small, regions=regions), *others]
    plain, own = (
        lvis_records_truth(given, CATEGORIES, FREQUENCY).areas_N for given in (RECORDS, stated)
    )
    assert sorted(plain) == [100, 2000, 2000] and sorted(own) == [2000, 2000, 2000]


def test_what_is_no_lvis_set_or_was_not_looked_at_is_refused():
    bare = Record(key="x", image=b"", image_format="jpg", width=9, height=9, task="detection")
    with pytest.raises(DataError, match="x: no neg_categories"):
        lvis_records_ap([bare], {"x": boxes()}, CATEGORIES, FREQUENCY)
    with pytest.raises(ValueError, match="1 frequencies for 4"):
        lvis_records_ap(RECORDS, FOUND, CATEGORIES, "f")
    with pytest.raises(DataError, match="image b: was it evaluated"):
        lvis_records_ap(RECORDS, {"a": FOUND["a"]}, CATEGORIES, FREQUENCY)
    with pytest.raises(DataError, match="'yak', which is no category"):
        lvis_records_ap(RECORDS, {**FOUND, "c": boxes((SMALL, 1, "yak"))}, CATEGORIES, FREQUENCY)
