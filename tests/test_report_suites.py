"""The page of a run that was scored on suites: curves, figures, reports, published rows."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from page_parser import EVIL, assert_self_contained, shown  # noqa: E402

from glipv2.eval.published import published  # noqa: E402
from glipv2.jobs.report import write_report  # noqa: E402


@pytest.fixture
def run(tmp_path):
    """A run without phases, scored at three steps on two suites."""
    for step, ap in ((100, 0.2), (200, 0.4), (300, 0.31)):
        folder = tmp_path / "run" / "eval" / f"step-{step:06d}"
        folder.mkdir(parents=True)
        for suite, first in (("coco", "ap"), ("shapes", "recall_at_1")):
            metrics = {first: ap, "ap50": ap + 0.1}
            result = {"suite": suite, "first": first, "metrics": metrics, "key": "", "protocol": ""}
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
