"""A run folder like the one a finished main job leaves, shared by tests of its report."""

import json
from pathlib import Path

from page_parser import (
    BOX_A,
    BOX_B,
    CIRCLE,
    CIRCLE_FOUND,
    EVIL,
    MIXED_UP,
    SQUARE,
    SQUARE_FOUND,
    pair,
    prediction,
)

from glipv2.pipeline.records import Record, Region
from glipv2.pipeline.shards import write_shard_set

CATEGORIES = ("red square", "blue circle")


def figures(seen: float, unseen: float) -> dict[str, float]:
    return {
        "caption_seen_ap50": 0.9, "caption_unseen_ap50": 0.8, "chunked_seen_ap50": seen,
        "chunked_unseen_ap50": unseen, "bccd_ap50": 0.5, "recall_at_1": 0.7, "recall_at_5": 0.8,
        "recall_at_10": 0.9,
    }  # fmt: skip


SUMMARY = {
    "teacher": figures(0.25, 0.2),
    "student": figures(0.3, 0.341),
    "control": figures(0.35, 0.29),
    "labels": {
        "precision_at_50": 0.875, "recall_at_50": 0.625, "kept": 1234, "pairs": 500,
        "by_group": {
            "novel_word": {"precision_at_50": None, "recall_at_50": 0.1, "kept": 0, "mentioned": 9}
        },
    },
    "real_set": "bccd",
    "random_weights_bccd_ap50": 0.0012,
    "seconds": {"prepare": 30.0, "teacher": 200.4},
}  # fmt: skip
QUARANTINE = [
    {"stage": "label", "source": "web", "shard": "shard-000000", "key": f"w{i}",
     "reason": "image_too_large", "detail": f"30000x30000 {EVIL}"}
    for i in range(2)
] + [
    {"stage": "teacher", "source": "cells", "shard": "shard-000001", "key": "c1",
     "reason": "crc_mismatch", "detail": ""}
]  # fmt: skip


def scene(key: str) -> Record:
    """A validation record: a square at A, a circle at B."""
    regions = (
        Region(box=BOX_A, spans=(SQUARE,), phrase="red square", category=0),
        Region(box=BOX_B, spans=(CIRCLE,), phrase="blue circle", category=1),
    )
    return pair(key, regions=regions)


def write_finished_run(run: Path) -> None:
    """A run folder as the main job leaves it, with four validation images and two labelled sets."""
    data = run / "data"
    write_shard_set(str(data / "toy_val"), [scene(f"v-{i}") for i in range(4)], CATEGORIES, {})
    write_shard_set(str(data / "toy_labelled"), [pair(f"toy-{i}") for i in range(3)], (), {})
    web = [pair("web-0"), pair("web-1", regions=())]
    write_shard_set(str(data / "web_labelled"), web, (), {})
    for folder in ("eval", "labels", "teacher", "student", "control"):
        (run / folder).mkdir()
    right = {f"v-{i}": (SQUARE_FOUND, CIRCLE_FOUND) for i in range(4)}
    teacher = {**right, "v-1": (SQUARE_FOUND, MIXED_UP), "v-2": ()}
    student = {**right, "v-3": (MIXED_UP,)}
    for model, found in (("teacher", teacher), ("student", student)):
        content = [prediction(key, *rows) for key, rows in found.items()]
        (run / "eval" / f"predictions-{model}.json").write_text(json.dumps(content))
        terms = {"box": 1.0, "centerness": 0.6, "token": 0.4, "inter_image": 0.3, "mlm": 2.0}
        lines = [{"step": s, "lr": 1e-3, "loss": 5 / (s + 1), **terms} for s in range(40)]
        (run / model / "losses.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    for model in ("teacher", "student", "control"):
        points = [{"step": s, "caption_ap50": s / 40} for s in (10, 20)]
        content = {"key": "", "metrics": {}, "curve": points}
        (run / "eval" / f"metrics-{model}.json").write_text(json.dumps(content))
    curve = [{"threshold": t / 10, "precision": t / 10, "recall": 1 - t / 10, "kept": 10}
             for t in range(10)]  # fmt: skip
    chosen = {"threshold": 0.4, "precision": 0.91, "recall": 0.6, "target_precision": 0.9,
              "reached": True, "curve": curve}  # fmt: skip
    (run / "labels" / "threshold.json").write_text(json.dumps(chosen))
    (run / "summary.json").write_text(json.dumps(SUMMARY))
    (run / "config.yaml").write_text(f'seed: 7\nname: "{EVIL}"\n')
    (run / "versions.json").write_text(json.dumps({"torch": "2.11.0"}))
    (run / "quarantine.jsonl").write_text("".join(json.dumps(q) + "\n" for q in QUARANTINE))
