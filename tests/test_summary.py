"""summary.json and the table of it, from run folders that hold more or less."""

import json
from pathlib import Path

import pytest

from glipv2.jobs.evaluate_main import real_name
from glipv2.jobs.summary import summarise, summary_table
from glipv2.pipeline.config import RunConfig
from glipv2.pipeline.errors import DataError
from glipv2.pipeline.eval_config import EvalConfig

FULL = {
    "caption_seen_ap50": 0.98764,
    "chunked_seen_ap50": 0.5,
    "cells_ap50": 0.25,
    "cells_ap": 0.1,
    "recall_at_1": 0.75,
}


def scored(folder: Path, **metrics: dict[str, float]) -> None:
    for name, values in metrics.items():
        path = folder / "eval" / f"metrics-{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"key": "k", "metrics": values, "curve": []}))


def config(folder: Path, real: str = "data/cells_heldout") -> RunConfig:
    phases = {"teacher": {}, "student": {}}
    return RunConfig(
        run_dir=str(folder), phases=phases, eval=EvalConfig(detection="val", real_detection=real)
    )


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("bccd_heldout", "bccd"),
        ("s3://bucket/coco-val/", "coco"),
        ("/data/my_cells_test", "my_cells"),
        ("lvis", "lvis"),
        ("", ""),
    ],
)
def test_figures_on_real_images_are_called_after_their_set(
    tmp_path: Path, url: str, name: str
) -> None:
    assert real_name(config(tmp_path, url)) == name


def test_the_summary_holds_what_was_measured_and_no_more(tmp_path: Path) -> None:
    scored(tmp_path, teacher=FULL, random={"cells_ap50": 0.0012, "recall_at_1": 0.2})
    summary = summarise(config(tmp_path))
    assert summary == {
        "teacher": {
            "caption_seen_ap50": 0.9876,
            "chunked_seen_ap50": 0.5,
            "cells_ap50": 0.25,
            "recall_at_1": 0.75,
        },
        "labels": {},
        "real_set": "cells",
        "random_weights_cells_ap50": 0.0012,
        "seconds": {},
        "rounds": [],
    }
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    for name in ("config.yaml", "versions.json", "quarantine.jsonl"):
        assert (tmp_path / name).exists()


def test_skipped_samples_come_once_with_their_stage_and_a_cut_off_line_is_left_out(
    tmp_path: Path,
) -> None:
    line = json.dumps({"key": "a", "reason": "crc_mismatch"})
    for stage in ("labels", "teacher"):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "quarantine.jsonl").write_text(f'{line}\n{line}\n{{"key": "b", "re')
    summarise(config(tmp_path))
    lines = (tmp_path / "quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"stage": stage, "key": "a", "reason": "crc_mismatch"} for stage in ("label", "teacher")
    ]
    (tmp_path / "teacher" / "quarantine.jsonl").write_text(f"{line[:9]}\n{line}\n")
    with pytest.raises(DataError, match=r"teacher/quarantine\.jsonl, line 1 "):
        summarise(config(tmp_path))


def rows(summary: dict[str, object]) -> list[str]:
    table = summary_table(summary)
    assert max(map(len, table.splitlines())) <= 80
    return [" ".join(line.split()) for line in table.splitlines()]


def test_the_table_has_a_column_a_phase_and_a_line_a_figure() -> None:
    labels = {"precision_at_50": 0.9, "recall_at_50": 0.8, "kept": 7, "pairs": 5, "threshold": 0.3}
    summary = {
        "teacher": {"caption_seen_ap50": 0.98, "bccd_ap50": 0.5, "recall_at_1": 0.75},
        "student": {"caption_seen_ap50": 0.97, "bccd_ap50": 0.6, "recall_at_1": 1.0},
        "labels": labels,
        "real_set": "bccd",
        "random_weights_bccd_ap50": 0.0012,
        "seconds": {"prepare": 19.4, "teacher": 100.0},
        "rounds": [{"gold": {"precision": 0.9, "recall": 0.5, "f1": 0.643}}],
    }
    assert rows(summary) == [
        "teacher student",
        "caption_seen_ap50 0.980 0.970",
        "bccd_ap50 0.500 0.600",
        "recall_at_1 0.750 1.000",
        "pseudo labels: precision 0.900, recall 0.800, 7 boxes kept on 5 pairs",
        "round 1: labels on gold: precision 0.900, recall 0.500, F1 0.643",
        "random weights: bccd_ap50 0.001",
        "seconds: prepare 19, teacher 100; together 119",
    ]


def test_the_table_without_toy_truth_or_real_images_leaves_those_lines_out() -> None:
    without_recall = {"bccd_ap50": 0.5}
    summary = {
        "teacher": without_recall,
        "control": {},
        "labels": {"threshold": 0.4},  # no truth of the labels is known
        "real_set": "",
        "seconds": {},
        "rounds": [],
    }
    assert rows(summary) == ["teacher control", "bccd_ap50 0.500 -", "seconds: ; together 0"]
