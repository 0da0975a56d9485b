"""The page of a run that was scored on suites: curves, figures, reports, published rows."""

import gzip
import json
import shutil
import sys
from pathlib import Path
from statistics import fmean

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))
from page_parser import EVIL, assert_self_contained, shown  # noqa: E402
from scored_runs import (  # noqa: E402
    IMAGES,
    SHARDS,
    counting_map,
    write_result,
    write_scored_runs,
    write_scored_tasks,
)

from glipv2.eval.odinw import odinw_sets  # noqa: E402
from glipv2.eval.published import published  # noqa: E402
from glipv2.jobs.cli import main  # noqa: E402
from glipv2.jobs.report import write_report  # noqa: E402
from glipv2.jobs.report_runs import costs  # noqa: E402
from glipv2.jobs.report_scored import alerts, run_name  # noqa: E402
from glipv2.jobs.report_suites import suite_tables  # noqa: E402
from glipv2.pipeline import ray_map  # noqa: E402
from glipv2.pipeline.shard_reader import iterate_records  # noqa: E402


@pytest.fixture
def run(tmp_path):
    """A run without phases, scored at three steps on two suites."""
    for step, ap in ((100, 0.2), (200, 0.4), (300, 0.31)):
        for suite, first in (("coco", "ap"), ("shapes", "recall_at_1")):
            write_result(tmp_path / "run", suite, {first: ap, "ap50": ap + 0.1}, step=step)
        evalai = tmp_path / "run" / "eval" / f"step-{step:06d}" / "coco.evalai.json"
        evalai.write_text('[{"question_id": 1, "answer": "x"}]')
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
    assert own[1:] == [f"{glip.value / 100:.3f}"]
    of_shapes = table[table.index(["Model", "recall_at_1", "ap50"]) :]
    names = [row[0] for row in of_shapes]
    assert names == ["Model", "step 300", "step 200, best", "Run", "this run"]
    assert "shapes: recall_at_1" in page.html


def test_a_model_that_is_no_step_of_the_run_has_a_row_of_its_own(run):
    for folder in ("glip-t-0123abcd", "not-a-result"):
        write_result(run, "coco", {"ap": 0.9, "ap50": 1.0}, folder=folder)
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


@pytest.fixture(scope="module")
def scored_once(tmp_path_factory):
    """Two runs that were really scored, on boxes and on phrases."""
    folder = tmp_path_factory.mktemp("scored")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray_map, "map_on_ray", counting_map([]))
        write_scored_runs(folder)
    return folder


@pytest.fixture
def scored(scored_once, tmp_path):
    """Them, to be changed at will."""
    return shutil.copytree(scored_once, tmp_path / "scored")


def assert_curve(line, precision_R):
    """Each point is at the mean precision of the recalls that it stands for."""
    places = [tuple(map(float, point.split(","))) for point in line.points.split()]
    points = [((x - 44) / (350 - 44), (174 - y) / (174 - 10)) for x, y in places]
    assert (points[0][0], points[-1][0]) == pytest.approx((0, 1), abs=0.01) and len(points) > 70
    for recall, precision in points:
        near = [p for r, p in enumerate(precision_R) if abs(r / 100 - recall) < 0.011]
        assert min(near) - 1e-3 <= precision <= max(near) + 1e-3, recall


def test_categories_curves_and_pictures_are_those_of_the_best_step(scored):
    [toy, words] = suite_tables([str(scored / "one")])
    [detail], [of_words] = toy.details, words.details
    assert not of_words.categories and of_words.examples  # phrases have no categories
    result = json.loads((scored / "one" / "eval" / "step-000020" / "toy.json").read_text())
    per_category = {k: v for k, v in result["sets"]["toy"]["per_category"].items()
                    if v["ap"] is not None}  # fmt: skip
    aps = [f"{per_category[name]['ap']:.3f}" for name, _, _ in detail.categories]
    assert aps == sorted(aps, reverse=True) == [ap for _, ap, _ in detail.categories]
    assert len(aps) == len(per_category) > 1
    mean, first, last = detail.plot.lines
    names = [name for name, _, _ in detail.categories]
    assert [name for name, _ in detail.key] == ["all categories", names[0], names[-1]]
    curves = [own["precision"] for own in per_category.values()]
    assert_curve(mean, [fmean(column) for column in zip(*curves, strict=True)])
    assert_curve(first, per_category[names[0]]["precision"])
    assert_curve(last, per_category[names[-1]]["precision"])
    assert f"the first {SHARDS * IMAGES} images, boxes scored" in detail.examples.note
    (_, best), (_, false), (_, missed) = detail.examples.groups
    truth = {record.key: record for record in iterate_records(str(scored / "val"))}
    for mistake in (*best, *false, *missed):
        assert mistake.picture.uri.startswith("data:image/jpeg")
        assert mistake.picture.width == truth[mistake.key].width
    assert missed or false
    page = shown(Path(write_report(str(scored / "one"))))
    assert_self_contained(page)
    drawn = [line["points"] for line in page.all("polyline")]
    assert {line.points for line in (mean, first, last)} <= set(drawn)
    assert "Precision over recall, IoU 0.5" in page.text
    assert ("Objects it came least near to" in page.text) == bool(missed)
    for gone in (scored / "one" / "eval" / "predictions").rglob("*.gz"):
        gone.unlink()
    [toy, words] = suite_tables([str(scored / "one")])
    assert toy.details[0].examples is None and toy.details[0].categories and not words.details


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


def test_steps_of_other_settings_share_no_curve_and_are_never_best(run):
    write_result(run, "coco", {"ap": 0.95, "ap50": 0.96}, step=200, protocol="old")
    write_result(run, "coco", {"ap": 0.9, "ap50": 1.0}, folder="glip-t-0123abcd", protocol="old")
    [coco, shapes] = suite_tables([str(run)])
    assert [row.name for row in coco.ours] == ["step 300, best", "glip-t, other settings"]
    assert len(coco.plot.lines[0].points.split()) == 2 and coco.left_out == 1
    assert shapes.left_out == 0
    page = shown(Path(write_report(str(run))))
    assert page.text.count("1 step is left out: scored with other data or settings") == 1


def test_of_several_runs_those_of_other_settings_are_marked(run, tmp_path):
    for step, ap in ((10, 0.7), (20, 0.8)):
        write_result(tmp_path / "other", "coco", {"ap": ap}, step=step, protocol="new")
        write_result(tmp_path / "other", "shapes", {"recall_at_1": ap}, step=step)
    [coco, shapes] = suite_tables([str(run), str(tmp_path / "other")])
    named = ["run step 300", "run step 200, best"]
    assert [row.name for row in coco.ours] == [*named, "other step 20, best, other settings"]
    assert [name for name, _ in coco.key] == ["run", "other, other settings"]
    assert [row.name for row in shapes.ours] == [*named, "other step 20, best"]
    assert [name for name, _ in shapes.key] == ["run", "other"] and coco.left_out == 0


def test_a_run_whose_every_step_failed_shows_what_was_reported(tmp_path, run, capsys):
    failed = tmp_path / "failed" / "student"
    (failed / "eval").mkdir(parents=True)
    told = {"event": "failure", "at": 0.5, "text": "step 10: the checkpoint is damaged"}
    (failed / "eval" / "alerts.jsonl").write_text(json.dumps(told) + "\n")
    page = shown(Path(write_report(str(tmp_path / "failed"))))
    assert "student, failure: step 10: the checkpoint is damaged" in page.text
    both = [str(run), str(tmp_path / "failed")]
    assert [alert.run for alert in alerts(both)] == ["failed/student", "run"]
    assert main(["report", *both, "--out", str(tmp_path / "both.html")]) == 0
    text = shown(tmp_path / "both.html").text
    assert "failed/student, failure: step 10" in text and "run, fall: coco.ap fell" in text


def test_sets_of_a_suite_stand_beside_what_was_published_of_them(tmp_path):
    names = [one.name for one in odinw_sets(13)]
    for step, ap in ((100, 0.25), (200, 0.5), (300, 0.375)):
        by_set = {name: {"ap": ap + n / 100} for n, name in enumerate(names)}
        mean = fmean(own["ap"] for own in by_set.values())
        metrics = {"ap": mean, "ap50": 0.6, "ap_median": 0.123}
        write_result(tmp_path, "odinw13", metrics, step=step, sets=by_set, task="detection")
    [table] = suite_tables([str(tmp_path)])
    assert table.metrics == ["ap", "ap_median", "ap50"] and table.published_metrics == ["ap"]
    papers = ["GLIP-T(A)", "GLIP-T(B)", "GLIP-T(C)", "GLIP-T", "GLIP-L"]
    assert [name for name, _ in table.by_set.models] == ["step 200", *papers]
    of_glip_t = {f.set: f.value for f in published("odinw13") if f.set and f.model == "GLIP-T"}
    for number, row in enumerate(table.by_set.rows):
        assert row.name == names[number] and row.cells[0] == f"{0.5 + number / 100:.3f}"
        assert row.cells[4] == f"{of_glip_t[row.name] / 100:.3f}"
    page = shown(Path(write_report(str(tmp_path))))
    assert_self_contained(page)
    assert "Each set of odinw13" in [e["text"] for e in page.all("summary")]
    assert [names[3], *table.by_set.rows[3].cells] in rows(page)


@pytest.fixture(scope="module")
def by_task(tmp_path_factory):
    """Suite -> its table, of a model that was really scored on a suite of each task."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray_map, "map_on_ray", counting_map([]))
        run = write_scored_tasks(tmp_path_factory.mktemp("tasks"))
    [captions] = (run / "eval").glob("*/coco-captions.json")
    result = json.loads(captions.read_text())
    result["metrics"] |= {"meteor": 0.25, "spice": 0.125}  # as with java: true
    captions.write_text(json.dumps(result))
    return {table.name: table for table in suite_tables([str(run)])}


ASKED_FOR = {
    "coco": "ap ap50 ap75 mask_ap mask_ap50",
    "lvis-minival": "ap classic_ap mask_ap",
    "flickr30k": "recall_at_1 recall_at_5 recall_at_10 merged_recall_at_1 merged_recall_at_5 "
                 "merged_recall_at_10 phrases",
    "refcoco": "accuracy expressions",
    "phrasecut": "mean_iou cumulative_iou precision_at_50 phrases",
    "vqav2": "accuracy questions",
    "coco-captions": "cider_d bleu_4 meteor rouge_l spice images",
}  # fmt: skip


@pytest.mark.parametrize("suite", ASKED_FOR)
def test_the_figures_that_a_task_is_known_by_are_shown(by_task, suite):
    table, wanted = by_task[suite], ASKED_FOR[suite].split()
    assert [name for name in table.metrics if name in wanted] == wanted
    assert "dropped" not in table.metrics and len(table.metrics) <= 13
    [row] = table.ours
    values = dict(zip(table.metrics, row.cells, strict=True))
    assert "–" not in row.cells
    if suite == "coco-captions":
        assert (values["spice"], values["images"]) == ("0.125", "3")


def test_of_lvis_the_three_frequencies_are_shown_as_they_were_published(by_task):
    table = by_task["lvis-minival"]
    assert table.metrics[1].startswith("ap_")  # as many as have ground truth
    wanted = ["ap", "ap_rare", "ap_common", "ap_frequent", "mask_ap"]
    assert table.published_metrics == wanted
    glip = next(row for row in table.published if row.name == "GLIP-T" and "H.1" in row.source)
    assert glip.cells == ["0.260", "0.208", "0.214", "0.310", "–"]


def test_settings_and_the_cost_of_scoring_are_told(scored, scored_once):
    [toy, _] = suite_tables([str(scored / "one"), str(scored / "two")])
    [(_, text)] = toy.settings  # both runs have the same
    tree = yaml.safe_load(text)
    assert tree["data"] == {"toy": str(scored_once / "val")} and tree["settings"]["chunk_size"] == 5
    results = [json.loads(path.read_text()) for path in scored.glob("one/eval/step-*/*.json")]
    seconds = sum(result["seconds"]["predict"] for result in results)
    [one, _] = costs([str(scored / "one"), str(scored / "two")])
    assert (one.name, one.images_scored) == ("one", 2 * SHARDS * IMAGES)
    assert one.scoring_hours == pytest.approx(seconds / 3600) and seconds > 0
    page = shown(Path(write_report(str(scored / "one"))))
    assert ["this run", "–", "–", "–", "24", "under 0.01"] in rows(page)
    assert "Data and settings of toy" in [e["text"] for e in page.all("summary")]


def test_best_found_are_the_images_with_most_right(scored):
    """Predictions: the truth of three images, of a fourth too much, of the others nothing."""
    run = scored / "one"
    truth = {record.key: record for record in iterate_records(str(scored / "val"))}
    *good, mixed = sorted(truth)[:4]
    for file in (run / "eval" / "predictions").rglob("*.gz"):
        tree = json.loads(gzip.decompress(file.read_bytes()))
        if "labels" not in next(iter(tree["images"].values())):
            continue
        for key in tree["images"]:
            regions = truth[key].regions if key in (*good, mixed) else ()
            boxes = [list(region.box) for region in regions]
            labels = [region.category for region in regions]
            if key == mixed:
                boxes, labels = [*boxes, [0.0, 0.0, 1.0, 1.0]], [*labels, labels[0]]
            scores = [0.9] * len(boxes)
            tree["images"][key] = {"boxes": boxes, "scores": scores, "labels": labels}
        file.write_bytes(gzip.compress(json.dumps(tree).encode()))
    [toy, _] = suite_tables([str(run)])
    [(_, (*best, last)), *_] = toy.details[0].examples.groups
    counts = [len(truth[own.key].regions) for own in best]
    assert sorted(own.key for own in best) == good and counts == sorted(counts, reverse=True)
    for own, count in zip(best, counts, strict=True):
        assert len(own.picture.marks) == count and not any(m.dashed for m in own.picture.marks)
        assert own.text.endswith(f": {count} of {count} object{'' if count == 1 else 's'} found.")
    assert last.key == mixed and [mark.dashed for mark in last.picture.marks].count(True) == 1
    assert "Best found" in shown(Path(write_report(str(run)))).text


def test_runs_are_called_by_what_tells_them_apart():
    runs = ["a/x/run", "b/x/run", "s3://bucket/other"]
    assert [run_name(url, runs) for url in runs] == ["a/x/run", "b/x/run", "other"]
