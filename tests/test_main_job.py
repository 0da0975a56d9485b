"""The whole main job by its commands, small: real Ray, real DeepSpeed with two processes."""

import json
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from commands import SMOKE, finish  # noqa: E402
from page_parser import assert_self_contained, shown  # noqa: E402

from glipv2.data_prep.toy import toy_record  # noqa: E402

METRICS = {
    "caption_seen_ap50", "caption_unseen_ap50", "chunked_seen_ap50", "chunked_unseen_ap50",
    "bccd_ap50", "recall_at_1",
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("main") / "run"
    said = finish("run", SMOKE, f"run_dir={folder}")
    assert f"report: {folder}/report.html" in said
    return folder


@pytest.fixture(scope="module")
def summary(run: Path) -> dict[str, dict[str, float]]:
    return json.loads((run / "summary.json").read_text())


def test_the_summary_has_every_figure(summary: dict[str, dict[str, float]]) -> None:
    for phase in ("teacher", "student", "control"):
        assert set(summary[phase]) >= METRICS
        assert all(0 <= summary[phase][name] <= 1 for name in METRICS)
    assert {"precision_at_50", "recall_at_50", "kept", "pairs"} <= set(summary["labels"])
    assert summary["labels"]["pairs"] == 24
    assert 0 <= summary["random_weights_bccd_ap50"] < 0.02
    stages = {"prepare", "teacher", "label", "student", "control", "evaluate", "report"}
    assert stages <= set(summary["seconds"])


def test_the_report_is_one_page_that_needs_nothing_else(run: Path) -> None:
    assert_self_contained(shown(run / "report.html"))


def test_run_again_it_reuses_everything(run: Path, summary: dict[str, dict[str, float]]) -> None:
    before = (run / "teacher" / "losses.jsonl").stat().st_mtime_ns
    started = time.monotonic()
    finish("run", SMOKE, f"run_dir={run}")
    assert time.monotonic() - started < 60
    assert (run / "teacher" / "losses.jsonl").stat().st_mtime_ns == before
    assert json.loads((run / "summary.json").read_text()) == summary


def test_any_checkpoint_grounds_a_picture(run: Path, tmp_path: Path) -> None:
    picture = tmp_path / "toy.jpg"
    picture.write_bytes(toy_record("toy_val", 0, seed=1, size=64).image)
    # the hardly trained step 4 may find nothing above GLIP's least probability of 0.05
    at_least = {"teacher": 1, "step-000004": 0}
    for checkpoint in (run / "teacher", run / "teacher" / "checkpoints" / "step-000004"):
        out = tmp_path / checkpoint.name
        finish(
            "ground", "--checkpoint", checkpoint, "--image", picture, "--threshold", 0,
            "--text", "a red square. a blue circle.", "--out", out,
        )  # fmt: skip
        found = json.loads(Path(f"{out}.json").read_text())["regions"]
        assert len(found) >= at_least[checkpoint.name]
        assert {region["phrase"] for region in found} <= {"red square", "blue circle"}
        assert Path(f"{out}.png").stat().st_size > 1000
    said = finish(
        "ground", "--checkpoint", run / "teacher", "--image", picture, "--categories", " , ", code=2
    )  # fmt: skip
    assert "names no category" in said


def test_a_shard_set_can_be_looked_at(run: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    finish("view", run / "data" / "toy_labelled", "--out", page)
    assert "toy_pairs-" in page.read_text()


def test_the_steps_run_one_by_one_as_well(run: Path) -> None:
    said = finish("evaluate", SMOKE, f"run_dir={run}", "--phase", "student")
    assert "caption_seen_ap50" in said
    finish("report", run)
    assert "everything needed is here" in finish("doctor")
