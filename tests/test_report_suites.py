"""The page of a run that was scored on suites: curves, figures, reports, published rows."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from page_parser import EVIL, assert_self_contained, shown  # noqa: E402
from scored_runs import (  # noqa: E402
    IMAGES,
    SHARDS,
    counting_map,
    save_step,
    scored_config,
    write_detection,
)

from glipv2.eval.published import published  # noqa: E402
from glipv2.jobs.cli import main  # noqa: E402
from glipv2.jobs.evaluate import evaluate_suites  # noqa: E402
from glipv2.jobs.report import write_report  # noqa: E402
from glipv2.jobs.report_suites import run_name, suite_tables  # noqa: E402
from glipv2.pipeline import ray_map  # noqa: E402
from glipv2.pipeline.shard_reader import iterate_records  # noqa: E402


@pytest.fixture
def run(tmp_path):
    """A run without phases, scored at three steps on two suites."""
    for step, ap in ((100, 0.2), (200, 0.4), (300, 0.31)):
        folder = tmp_path / "run" / "eval" / f"step-{step:06d}"
        folder.mkdir(parents=True)
        for suite, first in (("coco", "ap"), ("shapes", "recall_at_1")):
            metrics = {first: ap, "ap50": ap + 0.1}
            result = {"suite": suite, "first": first, "metrics": metrics, "key": "", "protocol": "",
                      "sets": {suite: {"per_category": {}}}}  # fmt: skip
            (folder / f"{suite}.json").write_text(json.dumps(result))
        (folder / "coco.evalai.json").write_text('[{"question_id": 1, "answer": "x"}]')
    told = {"event": "fall", "at": 1.0, "text": f"coco.ap fell {EVIL}"}
    (tmp_path / "run" / "eval" / "alerts.jsonl").write_text(json.dumps(told) + "\n")
    return tmp_path / "run"


def rows(page):
    found = []
    for element in page.elements:
        if element["tag"] == "tr":
            found.append([])
        elif element["tag"] in ("td", "th") and found:
            found[-1].append(" ".join(element["text"].split()))
    return found


def test_newest_and_best_steps_stand_above_what_was_published(run):
    page = shown(Path(write_report(str(run))))
    assert_self_contained(page)
    assert EVIL not in page.html and "coco.ap fell" in page.html
    table = rows(page)
    assert table[:3] == [["Model", "ap", "ap50"], ["step 300", "0.310", "0.410"],
                         ["step 200, best", "0.400", "0.500"]]  # fmt: skip
    glip = next(f for f in published("coco") if f.model == "GLIP-T" and f.tag == "paper")
    said = f"published, {glip.setting}, {glip.source}"
    own = next(row for row in table if row[0].replace(" ", "") == f"GLIP-T{said}".replace(" ", ""))
    assert own[1:] == [f"{glip.value / 100:.3f}", "–"]
    of_shapes = table[table.index(["Model", "recall_at_1", "ap50"]) :]
    assert len(of_shapes) == 3 and not any("published" in row[0] for row in of_shapes)
    assert "shapes: recall_at_1" in page.html


def test_a_model_that_is_no_step_of_the_run_has_a_row_of_its_own(run):
    best = {"suite": "coco", "first": "ap", "metrics": {"ap": 0.9, "ap50": 1.0}, "key": "",
            "protocol": "", "sets": {"coco": {"per_category": {}}}}  # fmt: skip
    for folder in ("glip-t-0123abcd", "not-a-result"):
        (run / "eval" / folder).mkdir()
        (run / "eval" / folder / "coco.json").write_text(json.dumps(best))
    coco = next(table for table in suite_tables([str(run)]) if table.name == "coco")
    assert [row.name for row in coco.ours] == ["step 300", "step 200, best", "glip-t"]
    assert coco.ours[-1].cells == ["0.900", "1.000"]
    assert len(coco.plot.lines) == 1 and len(coco.plot.lines[0].points.split()) == 3
    for step in (100, 200, 300):  # a folder with other models alone
        (run / "eval" / f"step-{step:06d}" / "coco.json").unlink()
    [coco, _] = suite_tables([str(run)])
    assert [row.name for row in coco.ours] == ["glip-t"] and coco.plot is None


def test_the_phases_of_a_main_job_share_a_plot(run, tmp_path):
    whole = tmp_path / "whole"
    (whole / "teacher").mkdir(parents=True)
    (run / "eval").rename(whole / "teacher" / "eval")
    student = whole / "student" / "eval" / "step-000050"
    student.mkdir(parents=True)
    result = (whole / "teacher" / "eval" / "step-000100" / "shapes.json").read_text()
    (student / "shapes.json").write_text(result)
    (whole / "summary.json").write_text(json.dumps({"teacher": {}, "student": {}}))
    page = shown(Path(write_report(str(whole))))
    names = [row[0] for row in rows(page)]
    assert {"teacher step 300", "teacher step 200, best", "student step 50, best"} <= set(names)
    assert 'href="#suites"' in page.html


@pytest.fixture
def scored(tmp_path, monkeypatch):
    """Two runs that were really scored, on boxes and on phrases."""
    monkeypatch.setattr(ray_map, "map_on_ray", counting_map([]))
    write_detection(tmp_path / "val")
    suites = {"toy": {"set": str(tmp_path / "val"), "chunk_size": 5},
              "words": {"set": str(tmp_path / "val"), "task": "phrases"}}  # fmt: skip
    for name, seed in (("one", 1), ("two", 2)):
        save_step(str(tmp_path / name), 20, seed=seed)
        config = scored_config(tmp_path / name, suites)
        evaluate_suites(config, {"model": str(tmp_path / name)})
    return tmp_path


def test_categories_curves_and_pictures_are_those_of_the_best_step(scored):
    [toy, words] = suite_tables([str(scored / "one")])
    assert words.detail is None  # phrases have no categories
    result = json.loads((scored / "one" / "eval" / "step-000020" / "toy.json").read_text())
    per_category = {k: v for k, v in result["sets"]["toy"]["per_category"].items()
                    if v["ap"] is not None}  # fmt: skip
    aps = [f"{per_category[name]['ap']:.3f}" for name, _, _ in toy.detail.categories]
    assert aps == sorted(aps, reverse=True) == [ap for _, ap, _ in toy.detail.categories]
    assert len(aps) == len(per_category) > 1
    assert [name for name, _ in toy.detail.key][0] == "all categories"
    shown_examples = toy.detail.examples
    assert shown_examples.images == SHARDS * IMAGES
    truth = {record.key: record for record in iterate_records(str(scored / "val"))}
    for mistake in (*shown_examples.false, *shown_examples.missed):
        assert mistake.picture.uri.startswith("data:image/jpeg")
        assert mistake.picture.width == truth[mistake.key].width
    assert shown_examples.missed or shown_examples.false
    page = shown(Path(write_report(str(scored / "one"))))
    assert_self_contained(page)
    assert "Objects it came least near to" in page.html or "Wrong boxes" in page.html
    for gone in (scored / "one" / "eval" / "predictions").rglob("*.gz"):
        gone.unlink()
    [toy, _] = suite_tables([str(scored / "one")])
    assert toy.detail.examples is None and toy.detail.categories


def test_several_runs_stand_side_by_side(scored, capsys):
    out = str(scored / "both.html")
    runs = [str(scored / "one"), str(scored / "two")]
    assert main(["report", *runs, "--out", out]) == 0
    page = shown(Path(out))
    assert_self_contained(page)
    table = rows(page)
    named = [row[0] for row in table if "step 20" in row[0]]
    assert named[:2] == ["one step 20, best", "two step 20, best"]
    assert main(["report", *runs]) == 2
    assert "--out page.html" in capsys.readouterr().err
    assert main(["report", runs[0], runs[0], "--out", out]) == 2
    assert "given twice" in capsys.readouterr().err
    assert main(["report", str(scored), str(scored / "val"), "--out", out]) == 0  # phases count


def test_runs_are_called_by_what_tells_them_apart():
    runs = ["a/x/run", "b/x/run", "s3://bucket/other"]
    assert [run_name(url, runs) for url in runs] == ["a/x/run", "b/x/run", "other"]
