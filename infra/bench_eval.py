"""Scoring random detections of COCO's and LVIS's size: time and memory of ours and of its peers.

    PYTHONPATH=infra .venv/bin/python infra/bench_eval.py [--images 5000]

The last figure is of the whole path of `glipv2 evaluate --score-only`: shards and prediction files
on disk, 1,000 boxes an image.

Every figure is that of a process of its own: processor time of the scoring alone, without making
the input, and the most memory that was resident, the input included. Ours takes detections as our
stages hold them and turns them into columns in that time; the peers are given dicts as they want.
"""

import argparse
import contextlib
import gzip
import importlib
import importlib.util
import io
import json
import os
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable
from typing import Any

import numpy as np
from bench_measure import note, peak_memory, row
from PIL import Image
from pycocotools import mask as coco_mask

from glipv2.eval.coco import coco_ap, coco_document_truth
from glipv2.eval.lvis import FIXED, lvis_ap, lvis_truth
from glipv2.eval.lvis_records import FEDERATED, lvis_document_detections
from glipv2.eval.predictions import ScoredBoxes
from glipv2.jobs.evaluate_predict import Piece, asked_of, pieces
from glipv2.jobs.evaluate_suites import score_set
from glipv2.pipeline import storage
from glipv2.pipeline.eval_config import SuiteConfig
from glipv2.pipeline.records import Record, Region
from glipv2.pipeline.shard_format import ShardSet
from glipv2.pipeline.shards import open_shard_set, read_raw, write_shard_set

SIZE = 480, 640
"""Height and width of the images."""
FOLDER = "BENCH_EVAL_FOLDER"
"""Environment variable: where "lvis files" and "lvis scored" keep the set and the predictions."""
PATH_BOXES = 1000
"""Of an image, in the files."""
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
    bench_eval(arguments.images)


def bench_eval(images: int = 5000) -> None:
    few = images // FEW
    compare(f"COCO boxes, {images} images", "coco", "pycocotools", images)
    compare(f"COCO masks, {few} images", "coco masks", "pycocotools masks", few)
    compare(f"LVIS boxes, {few} images, 300 an image", "lvis", "lvis package", few)
    whole = measure("lvis", images)
    note(f"LVIS boxes, {images} images", f"{whole['seconds']:.1f} s, {whole['mib']:.0f} MiB")
    with tempfile.TemporaryDirectory() as folder:
        os.environ[FOLDER] = folder
        measure("lvis files", images)
        whole = measure("lvis scored", images)
    note(
        f"LVIS from files, {images} images, {PATH_BOXES} each",
        f"{whole['seconds']:.1f} s, {whole['mib']:.0f} MiB",
    )


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


def lvis_files(images: int) -> dict[str, float]:
    """Write a shard set of LVIS, and what was predicted on it."""
    document, detections = random_set(images, 1203, true=11, found=PATH_BOXES)
    buffer = io.BytesIO()
    Image.new("RGB", SIZE[::-1]).save(buffer, format="JPEG")
    truths: dict[int, list[Region]] = {}
    for a in document["annotations"]:
        x, y, width, height = a["bbox"]
        box = (x, y, min(x + width, SIZE[1]), min(y + height, SIZE[0]))
        truths.setdefault(a["image_id"], []).append(Region(box=box, category=a["category_id"] - 1))
    records = (
        Record(
            key=str(image["id"]), image=buffer.getvalue(), image_format="jpg", width=SIZE[1],
            height=SIZE[0], task="detection", regions=tuple(truths[image["id"]]),
            provenance={ours: [number - 1 for number in image[theirs]]
                        for ours, theirs in FEDERATED.items()},
        )
        for image in document["images"]
    )  # fmt: skip
    categories = tuple(category["name"] for category in document["categories"])
    info = {"frequency": [category["frequency"] for category in document["categories"]]}
    folder = os.environ[FOLDER]
    data = write_shard_set(f"{folder}/set", records, categories, info)
    for number, piece in enumerate(lvis_work(data)):
        keys = [raw.key for raw in read_raw(data, number, 0, piece.images)]
        entries = {
            key: {"boxes": np.float32(detections[key].boxes).tolist(),
                  "scores": np.float32(detections[key].scores).tolist(),
                  "labels": [int(name) - 1 for name in detections[key].names]}
            for key in keys
        }  # fmt: skip
        text = json.dumps({"seconds": 1, "names": categories, "images": entries})
        storage.create_once(piece.out, gzip.compress(text.encode(), 1))
    return {"seconds": 0.0, "mib": 0.0, "ap": 0.0}


def lvis_work(data: ShardSet) -> list[Piece]:
    asked = asked_of(SuiteConfig(set="x", task="lvis"), "fp32")
    return pieces(os.environ[FOLDER], "model", "", data, asked, 0)


def lvis_scored(_: int) -> dict[str, float]:
    """What `glipv2 evaluate` does once all is predicted."""
    data = open_shard_set(f"{os.environ[FOLDER]}/set")
    suite = SuiteConfig(set="x", task="lvis")
    return timed(lambda: score_set(suite, data, lvis_work(data))[0].metrics["ap"])


WORKS: dict[str, Callable[[int], dict[str, float]]] = {
    "coco": our_coco,
    "pycocotools": pycocotools,
    "coco masks": lambda images: our_coco(images, masks=True),
    "pycocotools masks": lambda images: pycocotools(images, masks=True),
    "lvis": our_lvis,
    "lvis package": lvis_package,
    "lvis files": lvis_files,
    "lvis scored": lvis_scored,
}


if __name__ == "__main__":
    main()
