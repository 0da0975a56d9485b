"""COCO AP of boxes and masks against pycocotools: all 12 numbers, every category's, every curve."""

import contextlib
import dataclasses
import io
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from glipv2.eval.coco import coco_ap, coco_document_truth, coco_truth
from glipv2.eval.predictions import ScoredBoxes, scored_boxes
from glipv2.jobs.prepare import prepare_set
from glipv2.pipeline.config import PrepareConfig
from glipv2.pipeline.errors import DataError
from glipv2.pipeline.records import Record, Region
from glipv2.pipeline.shard_reader import iterate_records

HEIGHT, WIDTH = 150, 200
NAMES = (
    "ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large",
    "ar_1", "ar_10", "ar_100", "ar_small", "ar_medium", "ar_large",
)  # fmt: skip
SIDES = [4, 31, 32, 33, 95, 96, 97, 140]
"""At the edges of the area ranges."""


def rectangle(box):
    x0, y0, x1, y1 = (int(side) for side in box)
    mask_HW = np.zeros((HEIGHT, WIDTH), dtype=np.uint8, order="F")
    mask_HW[y0:y1, x0:x1] = 1
    runs = coco_mask.encode(mask_HW)
    return {"size": [HEIGHT, WIDTH], "counts": runs["counts"].decode()}


def random_box(rng):
    side = rng.choice(SIDES)
    x0, y0 = rng.integers(0, [WIDTH - side, HEIGHT - side])
    width, height = np.maximum(rng.integers(-4, 4, 2) + side, 1)
    return tuple(float(v) for v in (x0, y0, min(x0 + width, WIDTH), min(y0 + height, HEIGHT)))


def record(key, *regions, **changes):
    fields = {"image": b"", "image_format": "jpg", "width": WIDTH, "height": HEIGHT}
    return Record(**{**fields, "key": key, "task": "detection", "regions": regions, **changes})


def random_case(seed, images=5, categories=5, most=25, crowds=0.2):
    """Sides of whole pixels and ten different scores: many ties of overlap, area and score.

    The last category is in no image, the one before is never found; image 0 is empty.
    """
    rng = np.random.default_rng(seed)
    names = [f"c{n}" for n in range(categories)]
    records, found = [], {}
    for number in range(images):
        regions, rows = [], []
        for category in range(categories - 1) if number else ():
            for _ in range(rng.integers(0, 4)):
                box = random_box(rng)
                regions.append(
                    Region(
                        box=box,
                        category=category,
                        crowd=bool(rng.random() < crowds),
                        # a mask may be smaller than its box, and so of another area range
                        mask=rectangle(random_box(rng) if rng.random() < 0.2 else box),
                    )
                )
                for _ in range(rng.integers(0, 4) if category < categories - 2 else 0):
                    moved = np.clip(np.array(box) + rng.integers(-2, 3, 4), 0, [WIDTH, HEIGHT] * 2)
                    rows.append((moved.tolist(), rng.integers(10) / 10, names[category]))
        for _ in range(rng.integers(0, most)):
            rows.append((random_box(rng), rng.integers(10) / 10, str(rng.choice(names))))
        rows = [rows[row] for row in rng.permutation(len(rows))]
        records.append(record(f"k{number}", *regions))
        found[f"k{number}"] = ScoredBoxes(
            boxes=[row[0] for row in rows],
            scores=[row[1] for row in rows],
            names=[row[2] for row in rows],
            masks=[rectangle(row[0]) for row in rows],
        )
    return records, found, names


def document(records, names):
    """The records as a COCO file would have them."""
    annotations = []
    for number, own in enumerate(records):
        for region in own.regions:
            x0, y0, x1, y1 = region.box
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": region.category,
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": float(coco_mask.area(region.mask)),
                    "iscrowd": int(region.crowd),
                    "segmentation": region.mask,
                }
            )
    return {
        "images": [{"id": n, "height": HEIGHT, "width": WIDTH} for n in range(len(records))],
        "categories": [{"id": n, "name": name} for n, name in enumerate(names)],
        "annotations": annotations,
    }


def judge(tree, found_by_image, names, by):
    """What pycocotools makes of it: the 12 numbers and the precision table."""
    rows = []
    for image, own in found_by_image.items():
        for place, (x0, y0, x1, y1) in enumerate(own.boxes):
            shape = {"bbox": [x0, y0, x1 - x0, y1 - y0]}
            if by == "mask":
                shape = {"segmentation": dict(own.masks[place])}
            category = names.index(own.names[place])
            score = own.scores[place]
            rows.append({"image_id": image, "category_id": category, "score": score, **shape})
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = tree
        truth.createIndex()
        found = truth.loadRes(rows)
        evaluation = COCOeval(truth, found, {"box": "bbox", "mask": "segm"}[by])
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats, evaluation.eval["precision"]


def assert_same(result, stats, precision_TRKAM, names):
    for name, expected in zip(NAMES, stats, strict=True):
        value = getattr(result, name)
        assert (-1 if value is None else value) == pytest.approx(expected, abs=1e-9), name
    assert set(result.per_category) == {
        name for column, name in enumerate(names) if precision_TRKAM[0, 0, column, 0, -1] > -1
    }
    for name, own in result.per_category.items():
        precision_TR = precision_TRKAM[:, :, names.index(name), 0, -1]
        assert own.ap == pytest.approx(precision_TR.mean(), abs=1e-9)
        assert own.ap50 == pytest.approx(precision_TR[0].mean(), abs=1e-9)
        assert own.precision_R == pytest.approx(precision_TR[0].tolist(), abs=1e-9)


@pytest.mark.parametrize("by", ["box", "mask"])
@pytest.mark.parametrize("seed", range(8))
def test_all_numbers_are_those_of_pycocotools(seed, by):
    records, found, names = random_case(seed)
    result = coco_ap(coco_truth(records, names), found, by)
    assert 0 < result.ap < 1
    expected = judge(document(records, names), dict(enumerate(found.values())), names, by)
    assert_same(result, *expected, names)


@pytest.mark.parametrize("by", ["box", "mask"])
def test_more_than_100_detections_of_an_image_and_category(by):
    records, found, names = random_case(3, images=3, categories=4, most=900, crowds=0.3)
    assert max(own.names.count("c0") for own in found.values()) > 150
    result = coco_ap(coco_truth(records, names), found, by)
    expected = judge(document(records, names), dict(enumerate(found.values())), names, by)
    assert_same(result, *expected, names)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(100, 10**6),
    images=st.integers(2, 4),
    categories=st.integers(3, 4),
    most=st.integers(1, 12),
    crowds=st.sampled_from([0, 0.5, 0.9]),
    by=st.sampled_from(["box", "mask"]),
)
def test_any_random_set_scores_as_by_pycocotools(seed, images, categories, most, crowds, by):
    records, found, names = random_case(seed, images, categories, most, crowds)
    alone = [r for own in records for r in own.regions if not r.crowd]
    if not alone or not any(own.boxes for own in found.values()):
        return  # undefined; pycocotools can't load no detections
    result = coco_ap(coco_truth(records, names), found, by)
    expected = judge(document(records, names), dict(enumerate(found.values())), names, by)
    assert_same(result, *expected, names)


def test_a_coco_file_is_scored_as_it_is_polygons_areas_and_all():
    records, found, names = random_case(11)
    tree = document(records, names)
    ids = {0: 70, 1: 7, 2: 31, 3: 5, 4: 12}  # neither in order nor without gaps
    for image in tree["images"]:
        image["id"] = ids[image["id"]]
    rng = np.random.default_rng(0)
    for annotation in tree["annotations"]:
        annotation["image_id"] = ids[annotation["image_id"]]
        annotation["area"] = float(rng.choice([900, 1024, 1025.5, 9216, 20000]))
        x, y, width, height = annotation["bbox"]
        if not annotation["iscrowd"]:
            corners = [x, y, x, y + height, x + width, y + height, x + width, y]
            annotation["segmentation"] = [corners, [1, 1, 5, 1, 5, 5.5]]
        elif rng.random() < 0.5:
            mask_HW = coco_mask.decode(annotation["segmentation"])
            runs = np.flatnonzero(np.diff(mask_HW.T.ravel(), prepend=0, append=2))
            counts = np.diff(runs, prepend=0).tolist()
            annotation["segmentation"] = {"size": [HEIGHT, WIDTH], "counts": counts}
    keys = {image: f"k{number}" for number, image in ids.items()}
    by_image = {ids[number]: own for number, own in enumerate(found.values())}
    for by in ("box", "mask"):
        result = coco_ap(coco_document_truth(tree, keys), found, by)
        assert_same(result, *judge(tree, by_image, names, by), names)
    by_id = {str(image): own for image, own in by_image.items()}
    assert coco_ap(coco_document_truth(tree), by_id, "mask") == result


@pytest.mark.parametrize("by", ["box", "mask"])
def test_a_prepared_coco_file_is_scored_by_the_areas_that_it_states(tmp_path, by):
    rng = np.random.default_rng(4)
    records, found, names = random_case(4)
    tree = document(records, names)
    for annotation in tree["annotations"]:  # on the other side of an edge than the mask's pixels
        annotation["area"] = float(rng.choice([0, 1023.5, 1024.5, 9215.25, 9216.75, 20000]))
    for image in tree["images"]:
        image["file_name"] = f"{image['id']}.jpg"
        Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / image["file_name"])
    (tmp_path / "instances.json").write_text(json.dumps(tree))
    options = PrepareConfig(
        source="coco", annotations=(str(tmp_path / "instances.json"),), images=(str(tmp_path),)
    )
    prepare_set(str(tmp_path / "set"), options)
    read = list(iterate_records(str(tmp_path / "set")))
    assert [record.provenance["image_id"] for record in read] == list(range(len(records)))
    assert {region.area for record in read for region in record.regions} > {0, 1023.5}
    found_by_key = {r.key: own for r, own in zip(read, found.values(), strict=True)}
    result = coco_ap(coco_truth(read, names), found_by_key, by)
    stats, precision = judge(tree, dict(enumerate(found.values())), names, by)
    assert_same(result, stats, precision, names)


def test_equal_scores_keep_the_order_of_the_images_then_of_the_boxes():
    box, elsewhere = (0, 0, 10, 10), (50, 50, 60, 60)
    hit = ScoredBoxes(boxes=[box], scores=[0.5], names=["a"])
    miss = ScoredBoxes(boxes=[elsewhere], scores=[0.5], names=["a"])
    with_box, without = record("x", Region(box=box, category=0)), record("y")
    found = {"x": hit, "y": miss}
    assert coco_ap(coco_truth([with_box, without], ["a"]), found).ap == pytest.approx(1)
    assert coco_ap(coco_truth([without, with_box], ["a"]), found).ap == pytest.approx(0.5)


@pytest.mark.parametrize("by", ["box", "mask"])
def test_detections_without_a_score_are_dropped_and_the_others_scored_as_by_pycocotools(by):
    records, found, names = random_case(31)
    rng = np.random.default_rng(7)
    given, others, dropped = {}, [], 0
    for key, own in found.items():
        lost = rng.random(len(own.scores)) < 0.2
        scores = np.where(lost, math.nan, own.scores).tolist()
        given[key] = dataclasses.replace(own, scores=scores)
        keep = np.flatnonzero(~lost).tolist()
        columns = (own.boxes, own.scores, own.names, own.masks)
        boxes, scores, called, masks = ([column[row] for row in keep] for column in columns)
        others.append(ScoredBoxes(boxes=boxes, scores=scores, names=called, masks=masks))
        dropped += int(lost.sum())
    result = coco_ap(coco_truth(records, names), given, by)
    assert result.dropped == dropped > 10
    stats, precision = judge(document(records, names), dict(enumerate(others)), names, by)
    assert_same(result, stats, precision, names)


def test_undefined_numbers_are_left_out_and_broken_ones_dropped_and_counted():
    truth = coco_truth([record("x", Region(box=(0, 0, 10, 10), category=0))], ["a", "b"])
    boxes = [(0, 0, 10, 10), (0, 0, math.nan, 5), (0, 0, 10, 10)]
    found = ScoredBoxes(boxes=boxes, scores=[math.nan, 0.9, 0.3], names=["a"] * 3)
    result = coco_ap(truth, {"x": found})
    assert result.dropped == 2
    assert result.to_dict() == pytest.approx(
        {
            "ap": 1, "ap50": 1, "ap75": 1, "ap_small": 1, "dropped": 2,
            "ar_1": 1, "ar_10": 1, "ar_100": 1, "ar_small": 1,
        }
    )  # fmt: skip
    none = ScoredBoxes(boxes=[], scores=[], names=[], masks=[])
    box = (0, 0, 10, 10)
    drawn = coco_truth([record("x", Region(box=box, category=0, mask=rectangle(box)))], ["a"])
    for nothing in (coco_ap(truth, {"x": none}), coco_ap(drawn, {"x": none}, "mask")):
        assert (nothing.ap, nothing.ar_100, nothing.per_category["a"].ap50) == (0, 0, 0)


def test_what_cannot_be_scored_is_refused():
    truth = coco_truth([record("x", Region(box=(0, 0, 9, 9), category=0))], ["a"])
    found = ScoredBoxes(boxes=[(0, 0, 9, 9)], scores=[0.5], names=["a"])
    with pytest.raises(DataError, match="no masks"):
        coco_ap(truth, {"x": found}, "mask")
    turned = {"size": [WIDTH, HEIGHT], "counts": rectangle((0, 0, 9, 9))["counts"]}
    masked = ScoredBoxes(boxes=found.boxes, scores=[0.5], names=["a"], masks=[turned])
    drawn = record("x", Region(box=(0, 0, 9, 9), category=0, mask=rectangle((0, 0, 9, 9))))
    with pytest.raises(DataError, match="image x of 150 x 200 pixels"):
        coco_ap(coco_truth([drawn], ["a"]), {"x": masked}, "mask")
    with pytest.raises(DataError, match="image x of 150 x 200 pixels"):  # the truth has no mask
        coco_ap(truth, {"x": ScoredBoxes(boxes=[], scores=[], names=[], masks=[])}, "mask")
    crowd = record("x", Region(box=(0, 0, 9, 9), category=0, crowd=True))
    with pytest.raises(DataError, match="crowds"):
        coco_ap(coco_truth([crowd], ["a"]), {"x": found})
    with pytest.raises(DataError, match="several of the image 'x'"):
        coco_truth([crowd, crowd], ["a"])
    with pytest.raises(DataError, match="several of the category 'a'"):
        coco_truth([crowd], ["a", "a"])
    with pytest.raises(DataError, match="not a COCO annotation file"):
        coco_document_truth({"images": [], "annotations": []})
    with pytest.raises(ValueError, match="one score"):
        coco_ap(truth, {"x": ScoredBoxes(boxes=[], scores=[0.5], names=[])})


def test_boxes_survive_json_and_masks_of_a_detection_are_encoded():
    import json

    import torch

    from glipv2.model.batch import Detection

    mask_HW = torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
    mask_HW[3:9, 2:7] = True
    detection = Detection(
        boxes_K4=torch.tensor([[2.1, 3.0, 7.0, 9.0]]),
        scores_K=torch.tensor([0.1]),
        labels_K=torch.tensor([1]),
        names=["a", "b"],
        masks_KHW=mask_HW[None],
    )
    plain = scored_boxes(detection)
    assert plain.masks == [rectangle((2, 3, 7, 9))]
    assert plain.names == ["b"]
    assert ScoredBoxes.from_dict(json.loads(json.dumps(plain.to_dict()))) == plain
