"""LVIS AP against a case worked out on paper and against the package `lvis`."""

import importlib.util
import json
import sys
import types
from dataclasses import replace

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from glipv2.eval.lvis import CLASSIC, FIXED, Cap, LvisDetections, lvis_ap, lvis_truth
from glipv2.pipeline.errors import DataError

HEIGHT, WIDTH = 150, 200
CAT, DOG, EMU, FOX = 3, 5, 8, 9
FIELDS = {
    "AP": "ap",
    "AP50": "ap50",
    "AP75": "ap75",
    "APs": "ap_small",
    "APm": "ap_medium",
    "APl": "ap_large",
    "APr": "ap_rare",
    "APc": "ap_common",
    "APf": "ap_frequent",
}

SMALL, MEDIUM, LARGE = (0, 0, 10, 10), (20, 20, 60, 60), (80, 0, 180, 100)
PART_OF_SMALL = (0, 0, 10, 6)  # IoU 0.6
NOWHERE = (0, 110, 40, 150)


def image(number, negative=(), not_exhaustive=()):
    return {
        "id": number,
        "height": HEIGHT,
        "width": WIDTH,
        "neg_category_ids": list(negative),
        "not_exhaustive_category_ids": list(not_exhaustive),
    }


def annotation(number, image_number, category, box):
    x0, y0, x1, y1 = box
    return {
        "id": number,
        "image_id": image_number,
        "category_id": category,
        "bbox": [x0, y0, x1 - x0, y1 - y0],
        "area": (x1 - x0) * (y1 - y0),
        "segmentation": [[x0, y0, x0, y1, x1, y1, x1, y0]],
    }


def paper_document():
    return {
        "categories": [
            {"id": EMU, "frequency": "r"},
            {"id": CAT, "frequency": "f"},
            {"id": DOG, "frequency": "c"},
            {"id": FOX, "frequency": "r"},  # never annotated: not in any mean
        ],
        "images": [
            image(1, negative=[DOG]),
            image(2, not_exhaustive=[DOG]),
            image(7, negative=[CAT, FOX]),
        ],
        "annotations": [
            annotation(1, 1, CAT, SMALL),
            annotation(2, 1, CAT, LARGE),
            annotation(3, 2, DOG, MEDIUM),
            annotation(4, 7, EMU, SMALL),
        ],
    }


def detections(*rows, masks=None):
    """Rows are (image, category, score, box)."""
    images, categories, scores, boxes = zip(*rows, strict=True) if rows else ((), (), (), ())
    return LvisDetections(
        image_ids_K=np.array(images, dtype=np.int64),
        category_ids_K=np.array(categories, dtype=np.int64),
        scores_K=np.array(scores, dtype=np.float64),
        boxes_K4=np.array(boxes, dtype=np.float64).reshape(-1, 4),
        masks_K=masks,
    )


def rectangle(box):
    x0, y0, x1, y1 = (int(side) for side in box)
    mask_HW = np.zeros((HEIGHT, WIDTH), dtype=np.uint8, order="F")
    mask_HW[y0:y1, x0:x1] = 1
    runs = coco_mask.encode(mask_HW)
    return {"size": [HEIGHT, WIDTH], "counts": runs["counts"].decode()}


def test_federated_case_worked_out_on_paper():
    rows = [
        (1, CAT, 0.9, SMALL),
        (7, CAT, 0.8, SMALL),
        (2, CAT, 0.7, SMALL),
        (1, CAT, 0.6, LARGE),
        (2, DOG, 0.9, NOWHERE),
        (1, DOG, 0.8, SMALL),
        (2, DOG, 0.7, MEDIUM),
        (7, EMU, 0.5, PART_OF_SMALL),
        (7, FOX, 0.5, SMALL),
    ]
    # Cat, 2 truths. Right; wrong (verified negative in 7); not judged (2 says nothing of cats);
    # right. Precision 1, 1/2, 2/3 at recall 1/2, 1/2, 1. Of 101 recall points 0, .01, ..., 51 reach
    # 1/2 with precision 1, the other 50 have 2/3.
    cat = (51 + 50 * 2 / 3) / 101
    # Dog, 1 truth. Ignored (unmatched, and 2 may hold more dogs); wrong (negative in 1); right:
    # precision 0, 1/2, so 1/2 at every recall.
    dog = 1 / 2
    # Emu, 1 truth, found with IoU 0.6: right at .50, .55, .60 of ten overlaps.
    emu = 3 / 10
    # By area. Small: of cat the right .9 and the wrong .8, but the .6 belongs to a large truth, so
    # precision 1; emu 3/10; no small dog. Medium: dog alone, its wrong detection is small and so
    # ignored: 1. Large: cat alone, its small detections are ignored: 1.
    truth = lvis_truth(paper_document())
    masks = [rectangle(box) for *_, box in rows]
    for by in ("box", "mask"):
        for cap in (FIXED, CLASSIC):
            result = lvis_ap(truth, detections(*rows, masks=masks), cap, by=by)
            own = result.per_category
            assert {c: one.ap for c, one in own.items()} == pytest.approx(
                {CAT: cat, DOG: dog, EMU: emu}
            )
            assert own[CAT].precision_R == pytest.approx([1] * 51 + [2 / 3] * 50)
            assert own[DOG].precision_R == pytest.approx([1 / 2] * 101)
            assert (own[CAT].ap50, own[DOG].ap50, own[EMU].ap50) == pytest.approx((cat, dog, 1))
            assert result.ap == pytest.approx((cat + dog + emu) / 3)
            assert result.ap50 == pytest.approx((cat + dog + 1) / 3)
            assert result.ap75 == pytest.approx((cat + dog + 0) / 3)
            by_area = result.ap_small, result.ap_medium, result.ap_large
            assert by_area == pytest.approx(((1 + 0.3) / 2, 1, 1))
            by_frequency = result.ap_rare, result.ap_common, result.ap_frequent
            assert by_frequency == pytest.approx((emu, dog, cat))
            assert (result.nan_scores, result.empty) == (0, 0)


def test_means_over_no_category_are_none_and_finding_nothing_is_zero():
    document = paper_document()
    document["annotations"] = document["annotations"][:1]  # one small frequent cat
    result = lvis_ap(lvis_truth(document), detections())
    assert (result.ap, result.ap_small, result.ap_frequent) == (0, 0, 0)
    assert result.ap_medium is result.ap_large is result.ap_rare is result.ap_common is None


def test_only_classic_ap_loses_what_is_behind_300_better_detections_of_its_image():
    truth = lvis_truth(paper_document())
    better = [(2, FOX, 0.9, NOWHERE)] * 299
    found = detections(*better, (2, DOG, 0.1, MEDIUM))
    assert lvis_ap(truth, found, CLASSIC).per_category[DOG].ap == pytest.approx(1)
    found = detections(*better, (2, FOX, 0.9, SMALL), (2, DOG, 0.1, MEDIUM))
    assert lvis_ap(truth, found, CLASSIC).per_category[DOG].ap == 0
    assert lvis_ap(truth, found, FIXED).per_category[DOG].ap == pytest.approx(1)


def test_fixed_ap_keeps_the_best_10_000_of_a_category_judged_or_not():
    truth = lvis_truth(paper_document())
    elsewhere = [(7, DOG, 0.9, SMALL)] * 9_999  # nothing is known of dogs in image 7
    found = detections(*elsewhere, (2, DOG, 0.1, MEDIUM), (1, CAT, 0.01, SMALL))
    assert lvis_ap(truth, found).per_category[DOG].ap == pytest.approx(1)
    found = detections(*elsewhere, (7, DOG, 0.9, SMALL), (2, DOG, 0.1, MEDIUM))
    assert lvis_ap(truth, found).per_category[DOG].ap == 0
    assert lvis_ap(truth, found, replace(FIXED, count=10_001)).per_category[
        DOG
    ].ap == pytest.approx(1)


def test_a_nan_score_ranks_last_and_boxes_without_area_are_left_out_both_counted():
    truth = lvis_truth(paper_document())
    nan = float("nan")
    wrong = (1, CAT, 0.0, NOWHERE)
    result = lvis_ap(truth, detections((1, CAT, nan, SMALL), wrong))
    assert result.per_category[CAT].ap == pytest.approx(51 / 2 / 101)  # precision 1/2 to recall 1/2
    assert result.nan_scores == 1
    capped = lvis_ap(truth, detections((1, CAT, nan, SMALL), wrong), Cap(per="category", count=1))
    assert capped.per_category[CAT].ap == 0
    flat = [(1, CAT, 0.9, box) for box in [(5, 5, 5, 9), (9, 5, 5, 9), (0, 0, nan, 9)]]
    result = lvis_ap(truth, detections(*flat, (1, CAT, 0.1, SMALL)))
    assert result.per_category[CAT].ap == pytest.approx(51 / 101)
    assert result.empty == 3


def test_of_two_truths_overlapped_alike_the_later_annotation_is_taken():
    # The wide box overlaps both halves with IoU 0.5. If it takes the left one, nothing is left for
    # the second detection: precision 1, 1/2 and recall 1/2, so 51 points of 101. Else both are
    # right at IoU .50.
    left, right = (0, 0, 10, 10), (10, 0, 20, 10)
    found = detections((1, CAT, 0.9, (0, 0, 20, 10)), (1, CAT, 0.8, left))
    for halves, ap50 in [((left, right), 1), ((right, left), 51 / 101)]:
        document = paper_document()
        document["annotations"] = [annotation(n, 1, CAT, box) for n, box in enumerate(halves, 1)]
        assert lvis_ap(lvis_truth(document), found).ap50 == pytest.approx(ap50)


def test_frequency_comes_from_the_count_of_training_images_if_not_given():
    document = paper_document()
    for category, images in zip(document["categories"], (9, 100, 99, 10), strict=True):
        del category["frequency"]
        category["image_count"] = images
    assert lvis_truth(document).frequency_C.tolist() == ["f", "c", "r", "c"]  # cat, dog, emu, fox


def test_what_cannot_be_scored_is_a_data_error():
    truth = lvis_truth(paper_document())
    with pytest.raises(DataError, match="image 4"):
        lvis_ap(truth, detections((4, CAT, 0.5, SMALL)))
    with pytest.raises(DataError, match="category 99"):
        lvis_ap(truth, detections((1, 99, 0.5, SMALL)))
    with pytest.raises(DataError, match="no masks"):
        lvis_ap(truth, detections((1, CAT, 0.5, SMALL)), by="mask")
    turned = {**rectangle(SMALL), "size": [WIDTH, HEIGHT]}
    for bad in (turned, None, [], {}):
        with pytest.raises(DataError, match="image 1 of 150 x 200"):
            lvis_ap(truth, detections((1, CAT, 0.5, SMALL), masks=[bad]), by="mask")
    with pytest.raises(DataError, match="undefined"):
        lvis_ap(lvis_truth({**paper_document(), "annotations": []}), detections())
    coco = paper_document()
    del coco["images"][0]["neg_category_ids"]
    with pytest.raises(DataError, match="neg_category_ids"):
        lvis_truth(coco)


# ----- the package lvis as the judge ---------------------------------------------------------


@pytest.fixture(scope="module")
def lvis():
    """The modules of `lvis` that evaluate: its __init__ would import OpenCV and matplotlib."""
    with pytest.MonkeyPatch.context() as patch:
        package = types.ModuleType("lvis")
        package.__path__ = list(importlib.util.find_spec("lvis").submodule_search_locations)
        patch.setitem(sys.modules, "lvis", package)
        patch.setattr(np, "float", float, raising=False)  # 0.5.3 is older than NumPy 1.24
        yield importlib.import_module("lvis.eval")


def judge(lvis, tmp_path, document, found, cap, by):
    """The nine figures of `lvis`, None for its -1, and its precision (T, R) of each category."""
    (tmp_path / "truth.json").write_text(json.dumps(document))
    rows = []
    for row, (x0, y0, x1, y1) in enumerate(found.boxes_K4.tolist()):
        shape = {"bbox": [x0, y0, x1 - x0, y1 - y0]}
        if by == "mask":
            shape = {"segmentation": dict(found.masks_K[row])}
        numbers = {
            "image_id": int(found.image_ids_K[row]),
            "category_id": int(found.category_ids_K[row]),
            "score": float(found.scores_K[row]),
        }
        rows.append({**numbers, **shape})
    per_image = cap.count
    if cap.per == "category":
        by_category = {}
        for row in rows:
            by_category.setdefault(row["category_id"], []).append(row)
        for group in by_category.values():
            if len(group) > cap.count:  # Python can't sort NaN
                group.sort(key=lambda row: row["score"], reverse=True)
        rows = [row for group in by_category.values() for row in group[: cap.count]]
        per_image = -1
    truth = lvis.LVIS(str(tmp_path / "truth.json"))
    results = lvis.LVISResults(truth, rows, max_dets=per_image)
    evaluation = lvis.LVISEval(truth, results, iou_type={"box": "bbox", "mask": "segm"}[by])
    evaluation.run()
    figures = {name: evaluation.get_results()[name] for name in FIELDS}
    precision_TRC = evaluation.eval["precision"][..., 0]
    by_category = dict(
        zip(evaluation.params.cat_ids, precision_TRC.transpose(2, 0, 1), strict=True)
    )
    return {
        **{name: None if value == -1 else value for name, value in figures.items()},
        "precision": {n: own for n, own in by_category.items() if own[0, 0] != -1},
    }


def random_case(seed, images=12, categories=9, found_per_image=60):
    """Sides of whole pixels and few different scores: many ties of overlap, area and score.

    One category has no annotations, another is in no image at all; ids have gaps, no order.
    """
    rng = np.random.default_rng(seed)
    image_ids = rng.permutation(1000)[:images].tolist()
    category_ids = rng.permutation(100)[:categories].tolist()
    document = {"images": [], "annotations": []}
    document["categories"] = [
        {"id": number, "frequency": "rrcf"[index % 4]} for index, number in enumerate(category_ids)
    ]
    rows = []
    for image_id in image_ids:
        present = rng.permutation(category_ids[:-2])[:3].tolist()
        absent = [c for c in category_ids[:-1] if c not in present]
        known_absent = rng.permutation(absent)[:3].tolist()
        document["images"].append(
            image(image_id, known_absent, not_exhaustive=[*present[:1], *known_absent[:1]])
        )
        for category in present:
            for _ in range(rng.integers(1, 5)):
                box = random_box(rng)
                drawn = annotation(len(document["annotations"]) + 1, image_id, category, box)
                if rng.random() < 0.3:  # the area of a mask is not that of its box
                    drawn["area"] = int(rng.choice([32**2, 96**2, 0]))
                if rng.random() < 0.5:
                    drawn["segmentation"] = rectangle(box)
                document["annotations"].append(drawn)
                for _ in range(rng.integers(0, 5)):
                    shifted = np.array(box) + rng.integers(-2, 3, 4)
                    rows.append((image_id, category, rng.integers(10) / 10, shifted.clip(0)))
        for _ in range(rng.integers(0, found_per_image)):
            box = random_box(rng, smallest=0)
            rows.append((image_id, int(rng.choice(category_ids)), rng.integers(10) / 10, box))
    rows = [rows[row] for row in rng.permutation(len(rows))]
    return document, detections(*rows, masks=[rectangle(row[-1]) for row in rows])


def random_box(rng, smallest=1):
    side = rng.choice([4, 31, 32, 33, 95, 96, 97, 140])
    x0, y0 = rng.integers(0, [WIDTH - side, HEIGHT - side])
    width, height = np.maximum(rng.integers(-4, 4, 2) + side, smallest)
    return tuple(int(v) for v in (x0, y0, min(x0 + width, WIDTH), min(y0 + height, HEIGHT)))


def assert_same(result, expected):
    for name, field in FIELDS.items():
        assert getattr(result, field) == pytest.approx(expected[name], abs=1e-6), name
    assert set(result.per_category) == set(expected["precision"])
    for category, own in result.per_category.items():
        precision_TR = expected["precision"][category]
        assert own.ap == pytest.approx(precision_TR.mean(), abs=1e-6)
        assert own.ap50 == pytest.approx(precision_TR[0].mean(), abs=1e-6)
        assert own.precision_R == pytest.approx(precision_TR[0], abs=1e-6)


@pytest.mark.parametrize("by", ["box", "mask"])
@pytest.mark.parametrize(
    "cap",
    [FIXED, CLASSIC, Cap(per="category", count=20), Cap(per="image", count=15)],
    ids=["fixed", "classic", "20 per category", "15 per image"],
)
@pytest.mark.parametrize("seed", range(6))
def test_all_nine_figures_are_those_of_lvis(lvis, tmp_path, seed, cap, by):
    document, found = random_case(seed)
    result = lvis_ap(lvis_truth(document), found, cap, by=by)
    assert 0 < result.ap < 1
    assert_same(result, judge(lvis, tmp_path, document, found, cap, by))


@pytest.mark.parametrize("seed", range(3))
def test_a_crowded_image_and_nan_scores_are_scored_as_by_lvis(lvis, tmp_path, seed):
    document, found = random_case(seed, images=3, categories=5, found_per_image=900)
    assert np.bincount(found.image_ids_K).max() > 300
    truth = lvis_truth(document)
    classic, fixed = lvis_ap(truth, found, CLASSIC), lvis_ap(truth, found, FIXED)
    assert abs(classic.ap - fixed.ap) > 1e-6
    assert_same(classic, judge(lvis, tmp_path, document, found, CLASSIC, "box"))
    assert_same(fixed, judge(lvis, tmp_path, document, found, FIXED, "box"))
    broken = np.where(np.random.default_rng(seed).random(len(found.scores_K)) < 0.2, np.nan, 1)
    found = replace(found, scores_K=found.scores_K * broken)
    result = lvis_ap(truth, found, FIXED)
    assert result.nan_scores > 0
    assert_same(result, judge(lvis, tmp_path, document, found, FIXED, "box"))
