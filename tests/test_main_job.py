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
from glipv2.jobs import pretrain  # noqa: E402
from glipv2.jobs.cli import main  # noqa: E402
from glipv2.jobs.evaluate_main import cache_key  # noqa: E402
from glipv2.jobs.run import main_job  # noqa: E402
from glipv2.pipeline.config_loader import load_config  # noqa: E402
from glipv2.pipeline.ray_cluster import start_ray  # noqa: E402

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


def test_any_checkpoint_grounds_a_picture(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "toy.jpg"
    picture.write_bytes(toy_record("toy_val", 0, seed=1, size=64).image)
    # the hardly trained step 4 may find nothing above GLIP's least probability of 0.05
    at_least = {"teacher": 1, "step-000004": 0}
    for checkpoint in (run / "teacher", run / "teacher" / "checkpoints" / "step-000004"):
        out = tmp_path / checkpoint.name
        asked = ["--checkpoint", str(checkpoint), "--image", str(picture), "--threshold", "0"]
        told = ["--text", "a red square. a blue circle.", "--out", str(out)]
        assert main(["ground", *asked, *told]) == 0
        found = json.loads(Path(f"{out}.json").read_text())["regions"]
        assert len(found) >= at_least[checkpoint.name]
        assert {region["phrase"] for region in found} <= {"red square", "blue circle"}
        assert Path(f"{out}.png").stat().st_size > 1000
    asked = ["--checkpoint", str(run / "teacher"), "--image", str(picture)]
    assert main(["ground", *asked, "--categories", " , "]) == 2
    assert "names no category" in capfd.readouterr().err


def test_a_shard_set_can_be_looked_at(run: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert main(["view", str(run / "data" / "toy_labelled"), "--out", str(page)]) == 0
    assert "toy_pairs-" in page.read_text()


@pytest.mark.slow
def test_the_steps_one_by_one_leave_the_same_files_and_figures(
    run: Path, summary: dict[str, dict[str, float]]
) -> None:
    files = content(run)
    for name in files:
        if name.parts[0] in ("eval", "seconds") or len(name.parts) == 1:
            (run / name).unlink()
    own = (SMOKE, f"run_dir={run}")
    finish("prepare", "recipe", *own)
    finish("pretrain", *own, "--phase", "teacher")
    finish("label", *own)
    for phase in ("student", "control"):
        finish("pretrain", *own, "--phase", phase)
    start_ray(2)
    import ray

    try:
        address = ray.get_runtime_context().gcs_address
        one = finish("evaluate", *own, "--phase", "student", "--address", address)
    finally:
        ray.shutdown()
    assert f"caption_seen_ap50{'':15s} {summary['student']['caption_seen_ap50']:.4f}" in one
    alone = json.loads((run / "summary.json").read_text())
    assert alone["student"] == summary["student"] and "control" not in alone
    table = finish("evaluate", *own)
    assert "teacher   student   control" in table
    assert "report.html" in finish("report", run)
    again = json.loads((run / "summary.json").read_text())
    stages = ["prepare", "teacher", "label", "student", "control", "evaluate"]
    assert list(again.pop("seconds")) == stages
    assert again == {name: value for name, value in summary.items() if name != "seconds"}
    assert content(run) == files - {Path("seconds/report.json")}


def test_phases_are_trained_on_the_cluster_that_was_named(
    run: Path, summary: dict[str, dict[str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str | None]] = []
    monkeypatch.setattr(
        pretrain, "pretrain", lambda config, address=None: asked.append((config.run_dir, address))
    )
    config = load_config(str(SMOKE), [f"run_dir={run}"])
    phases = {p: load_config(str(SMOKE), [f"run_dir={run}"], p) for p in config.phases}
    assert main_job(config, phases, "10.0.0.1:6379") == summary
    assert asked == [(f"{run}/{phase}", "10.0.0.1:6379") for phase in config.phases]


def content(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}


def test_the_curve_of_a_run_follows_its_checkpoints(run: Path) -> None:
    scored = json.loads((run / "eval" / "metrics-student.json").read_text())
    assert [point["step"] for point in scored["curve"]] == [2, 4]
    config = load_config(str(SMOKE), [f"run_dir={run}"])
    assert scored["key"] == cache_key(config, str(run / "student"))
    earlier = run / "student" / "checkpoints" / "step-000002"
    earlier.rename(run / "away")
    try:
        assert scored["key"] != cache_key(config, str(run / "student"))
    finally:
        (run / "away").rename(earlier)


def test_an_address_without_a_cluster_is_refused(run: Path) -> None:
    (run / "eval").rename(run / "away")
    try:
        said = finish("evaluate", SMOKE, f"run_dir={run}", "--address", "127.0.0.1:9", code=2)
    finally:
        (run / "away").rename(run / "eval")
    assert "no Ray cluster can be joined at 127.0.0.1:9" in said


def test_nothing_is_missing_here() -> None:
    assert "everything needed is here" in finish("doctor")
