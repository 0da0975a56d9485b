"""Scoring random detections of COCO's and LVIS's size: time and memory of ours and of its peers.

    PYTHONPATH=infra .venv/bin/python infra/bench_eval.py [--images 5000]

Every figure is that of a process of its own: processor time of the scoring alone, without making
the input, and the most memory that was resident, the input included. Ours takes detections as our
stages hold them and turns them into columns in that time; the peers are given dicts as they want.
"""

import argparse
import contextlib
import importlib
import importlib.util
import io
import json
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable
from typing import Any

import numpy as np
from bench_measure import note, peak_memory, row
from pycocotools import mask as coco_mask

from glipv2.eval.coco import coco_ap, coco_document_truth
from glipv2.eval.lvis import FIXED, lvis_ap, lvis_truth
from glipv2.eval.lvis_records import lvis_document_detections
from glipv2.eval.predictions import ScoredBoxes

SIZE = 480, 640
"""Height and width of the images."""
FEW = 10
"""The LVIS package is given this part of the images: it takes hours for all."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--work", choices=WORKS, help="in a process of its own: one of these")
    arguments = parser.parse_args()
    if arguments.work:
        print(json.dumps(WORKS[arguments.work](arguments.images)))  # noqa: T201
        return
    images, few = arguments.images, arguments.images // FEW
    compare(f"COCO boxes, {images} images", "coco", "pycocotools", images)
    compare(f"COCO masks, {few} images", "coco masks", "pycocotools masks", few)
    compare(f"LVIS boxes, {few} images, 300 an image", "lvis", "lvis package", few)
    whole = measure("lvis", images)
    note(f"LVIS boxes, {images} images", f"{whole['seconds']:.1f} s, {whole['mib']:.0f} MiB")


def compare(name: str, ours: str, peer: str, images: int) -> None:
    one, other = measure(ours, images), measure(peer, images)
    assert abs(one["ap"] - other["ap"]) < 1e-9, (one, other)
    row(name, one["seconds"], other["seconds"], peer)
    row(f"{name}: peak memory", one["mib"], other["mib"], peer, "MiB")


def measure(work: str, images: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--images", str(images), "--work", work]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def timed(score: Callable[[], float]) -> dict[str, float]:
    start = time.process_time()
    ap = score()
    return {"seconds": time.process_time() - start, "mib": peak_memory(), "ap": float(ap)}


def boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    """(count, 4) x, y, width, height, small ones most often."""
    height, width = SIZE
    sides = np.exp(rng.uniform(np.log(8), np.log(400), (count, 2)))
    corners = rng.random((count, 2)) * (np.array([width, height]) - sides).clip(min=1)
    return np.concatenate([corners, sides], axis=1).round(1)


def random_set(
    images: int, categories: int, true: int, found: int, masks: bool = False
) -> tuple[dict[str, Any], dict[str, ScoredBoxes]]:
    """An annotation file, of COCO and LVIS at once, and detections: half of them near a truth.

    `true` and `found` are numbers for each image. Objects are of 3 categories in an image, and
    detections of these and of 7 others.
    """
    rng = np.random.default_rng(0)
    height, width = SIZE
    document: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [
            {"id": c, "name": str(c), "frequency": "rcf"[c % 3]} for c in range(1, categories + 1)
        ],
    }
    detections = {}
    for image in range(1, images + 1):
        near = rng.choice(categories, 10, replace=False) + 1
        truth_N4, kinds_N = boxes(rng, true), rng.choice(near[:3], true)
        document["images"].append(
            {
                "id": image,
                "height": height,
                "width": width,
                "neg_category_ids": near[3:].tolist(),
                "not_exhaustive_category_ids": near[:1].tolist(),
            }
        )
        for box, kind in zip(truth_N4.tolist(), kinds_N.tolist(), strict=True):
            document["annotations"].append(
                {
                    "id": len(document["annotations"]) + 1,
                    "image_id": image,
                    "category_id": kind,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                    "segmentation": rectangle(box),
                }
            )
        copies = rng.integers(0, true, found // 2)
        moved_K4 = truth_N4[copies] + rng.normal(0, 4, (len(copies), 4))
        all_K4 = np.concatenate([moved_K4, boxes(rng, found - len(copies))])
        all_K4[:, 2:] = all_K4[:, 2:].clip(min=2)
        kinds_K = np.concatenate([kinds_N[copies], rng.choice(near, found - len(copies))])
        corners = all_K4.copy()
        corners[:, 2:] += corners[:, :2]
        detections[str(image)] = ScoredBoxes(
            boxes=corners.tolist(),
            scores=rng.random(found).round(3).tolist(),
            names=kinds_K.astype(str).tolist(),
            masks=[run_lengths(rectangle(box)) for box in all_K4.tolist()] if masks else None,
        )
    return document, detections


def rectangle(box: list[float]) -> list[list[float]]:
    x, y, width, height = box
    return [[x, y, x, y + height, x + width, y + height, x + width, y]]


def run_lengths(polygons: list[list[float]]) -> dict[str, Any]:
    code = coco_mask.merge(coco_mask.frPyObjects(polygons, *SIZE))
    return {"size": list(SIZE), "counts": code["counts"].decode()}


def dicts(detections: dict[str, ScoredBoxes], masks: bool = False) -> list[dict[str, Any]]:
    rows = []
    for key, own in detections.items():
        for place, (x0, y0, x1, y1) in enumerate(own.boxes):
            shape: dict[str, Any] = {"bbox": [x0, y0, x1 - x0, y1 - y0]}
            if masks:
                assert own.masks is not None
                shape = {"segmentation": own.masks[place]}
            category, score = int(own.names[place]), own.scores[place]
            rows.append({"image_id": int(key), "category_id": category, "score": score, **shape})
    return rows


def our_coco(images: int, masks: bool = False) -> dict[str, float]:
    document, detections = random_set(images, 80, true=7, found=100, masks=masks)
    by = "mask" if masks else "box"
    return timed(lambda: coco_ap(coco_document_truth(document), detections, by).ap)


def pycocotools(images: int, masks: bool = False) -> dict[str, float]:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    document, detections = random_set(images, 80, true=7, found=100, masks=masks)
    rows = dicts(detections, masks)

    def score() -> float:
        with contextlib.redirect_stdout(io.StringIO()):
            truth = COCO()
            truth.dataset = document
            truth.createIndex()
            evaluation = COCOeval(truth, truth.loadRes(rows), "segm" if masks else "bbox")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        return float(evaluation.stats[0])

    return timed(score)


def our_lvis(images: int) -> dict[str, float]:
    document, detections = random_set(images, 1203, true=11, found=300)
    return timed(
        lambda: (
            lvis_ap(lvis_truth(document), lvis_document_detections(document, detections), FIXED).ap
        )
    )


def lvis_package(images: int) -> dict[str, float]:
    """Its modules that evaluate: its __init__ would import OpenCV and matplotlib."""
    found = importlib.util.find_spec("lvis")
    assert found is not None
    package = types.ModuleType("lvis")
    package.__path__ = list(found.submodule_search_locations or ())
    sys.modules["lvis"] = package
    np.float = float  # type: ignore[attr-defined]  # 0.5.3 is older than NumPy 1.24
    lvis = importlib.import_module("lvis.eval")
    document, detections = random_set(images, 1203, true=11, found=300)
    rows = dicts(detections)
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(document, file)
        file.flush()

        def score() -> float:
            truth = lvis.LVIS(file.name)
            evaluation = lvis.LVISEval(truth, lvis.LVISResults(truth, rows, max_dets=-1), "bbox")
            evaluation.run()
            return float(evaluation.get_results()["AP"])

        return timed(score)


WORKS: dict[str, Callable[[int], dict[str, float]]] = {
    "coco": our_coco,
    "pycocotools": pycocotools,
    "coco masks": lambda images: our_coco(images, masks=True),
    "pycocotools masks": lambda images: pycocotools(images, masks=True),
    "lvis": our_lvis,
    "lvis package": lvis_package,
}


if __name__ == "__main__":
    main()
