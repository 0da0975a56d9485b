"""The report of a run folder like the one a finished main job leaves, parsed."""

import argparse
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from finished_run import SUMMARY, write_finished_run  # noqa: E402
from page_parser import BOX_A, BOX_B, EVIL, Page, assert_self_contained, boxes, shown  # noqa: E402

from glipv2.jobs import report  # noqa: E402
from glipv2.jobs.report_numbers import duration, result_rows, verdict  # noqa: E402
from glipv2.pipeline.errors import DataError  # noqa: E402


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "quick"
    write_finished_run(run)
    return run


@pytest.fixture(scope="module")
def page(finished_run):
    path = report.write_report(str(finished_run))
    assert path == str(finished_run / "report.html")
    return shown(finished_run / "report.html")


def part(page, name):
    """One section of a page, parsed."""
    return Page(re.search(rf'<section id="{name}">.*?</section>', page.html, re.S).group())


def table(page):
    """Rows of cells as text, white space squeezed."""
    rows, cells = [], {"td", "th"}
    for element in page.elements:
        if element["tag"] == "tr":
            rows.append([])
        elif element["tag"] in cells and rows:
            rows[-1].append(" ".join(element["text"].split()))
    return rows


def test_the_report_is_one_page_that_loads_and_runs_nothing(page):
    assert_self_contained(page)
    assert EVIL not in page.html
    targets = {e["href"][1:] for e in page.all("a")}
    assert targets == {e["id"] for e in page.all("section")}


def test_the_title_is_the_verdict(page):
    assert page.all("h1")[0]["text"] == (
        "Self-training helped on unseen combinations: +0.051\xa0AP50"
    )
    assert "student 0.341, control 0.290" in page.text


@pytest.mark.parametrize(
    ("student", "control", "text", "direction"),
    [
        (0.3, 0.2, "helped", "up"),
        (0.2, 0.3, "hurt", "down"),
        (0.3, 0.295, "no clear difference", ""),
        (None, 0.3, "No verdict", ""),
    ],
)
def test_the_verdict_follows_student_minus_control(student, control, text, direction):
    summary = {
        name: {} if value is None else {"chunked_unseen_ap50": value}
        for name, value in (("student", student), ("control", control))
    }
    given = verdict(summary)
    assert text in given.text and given.direction == direction


def test_the_results_table_holds_every_figure(page):
    rows = table(part(page, "results"))
    assert rows[1] == ["Model", "seen", "unseen", "seen", "unseen", "bccd", "@1", "@5", "@10"]
    assert rows[3] == [
        "Student",
        "0.900",
        "0.800",
        "0.300",
        "0.341",
        "0.500",
        "0.700",
        "0.800",
        "0.900",
    ]
    assert rows[5][1:6] == ["+0.000", "+0.000", "−0.050", "+0.051", "+0.000"]
    assert rows[6] == ["Random weights", "–", "–", "–", "–", "0.001", "–", "–", "–"]


def test_the_best_figure_of_each_column_is_marked_and_clear_differences_are_coloured():
    rows = {row.name: row.cells for row in result_rows(SUMMARY)}
    assert [rows[m][2][1] for m in ("Teacher", "Student", "Control")] == ["", "", "best"]
    assert [rows[m][3][1] for m in ("Teacher", "Student", "Control")] == ["", "best", ""]
    assert [cell[1] for cell in rows["Student − control"][:4]] == ["none", "none", "down", "up"]


def test_training_shows_each_loss_term_and_the_precision_over_steps(page):
    section = part(page, "training")
    titles = [e["text"] for e in section.all("figcaption")]
    assert titles == [
        "Total loss", "Localisation (box)", "Centerness", "Region-word alignment",
        "Inter-image contrast", "Masked language modelling", "Caption AP50",
    ]  # fmt: skip
    lines = [e["class"] for e in section.all("polyline")]
    assert lines == ["line teacher", "line student"] * 6 + [
        "line teacher", "line student", "line control"
    ]  # fmt: skip


def test_labels_show_quality_the_threshold_and_both_galleries(page):
    section = part(page, "labels")
    assert table(section)[1] == ["All", "0.875", "0.625", "1,234", "9"]
    assert table(section)[2] == ["Novel word", "–", "0.100", "0", "9"]
    assert "the lowest threshold that reaches it is 0.4" in section.text
    assert len(section.all("line", class_="marker")) == 1
    assert "6 boxes kept on 3 of 3 images" in section.text
    assert "2 boxes kept on 1 of 2 images" in section.text
    keys = re.findall(r"(?:toy|web)-\d", section.text)
    assert sorted(keys[:3]) == ["toy-0", "toy-1", "toy-2"]
    assert keys[3:] == ["web-0", "web-1"]  # the one with boxes first
    assert sorted(boxes(section)) == sorted(
        (*box, color)
        for box, color in zip([BOX_B, BOX_A] * 4, [b[4] for b in boxes(section)], strict=True)
    )
    assert "CC BY 4.0" in section.text


def test_comparisons_show_gains_first_and_mark_wrong_boxes(page):
    section = part(page, "examples")
    assert re.findall(r"v-\d", section.text) == ["v-2", "v-1", "v-3"]
    notes = [e["text"] for e in section.all("figcaption")]
    assert notes[:3] == ["Truth2 objects", "Teacher2 missed", "Studentall right"]
    assert notes[3:5] == ["Truth2 objects", "Teacher1 right, 1 wrong, 1 missed"]
    assert len(section.all("g", class_="box dashed")) == 2  # v-1 of the teacher, v-3 of the student


def test_the_worst_mistakes_of_the_student_are_explained(page):
    section = part(page, "mistakes")
    assert [" ".join(e["text"].split()) for e in section.all("p", class_="reason")] == [
        "“blue circle” 0.85: the truth here is “red square”.",
        "“blue circle” was not found: no box here.",
    ]
    wrong = [rect["stroke"] for rect in section.all("rect", class_="edge")][2]
    assert wrong == "#d32f2f"


def test_what_was_skipped_is_counted_by_stage_and_reason(page):
    rows = table(part(page, "skipped"))
    assert rows[1] == ["label", "2", "image too large", f"w0 30000x30000 {EVIL}"]
    assert rows[2] == ["teacher", "1", "crc mismatch", "c1"]


def test_the_run_shows_times_configuration_and_versions(page):
    section = part(page, "run")
    assert "Time by stage: 3 min 50 s" in section.text
    assert [e["style"] for e in section.all("i")] == ["width:15.0%", "width:100.0%"]
    summaries = [e["text"] for e in section.all("summary")]
    assert summaries == ["Resolved configuration", "All figures (summary.json)", "Versions"]
    assert f'name: "{EVIL}"' in section.text and "2.11.0" in section.text


MISSING = {
    "config.yaml": "config.yaml is missing",
    "versions.json": "versions.json is missing",
    "quarantine.jsonl": "quarantine.jsonl is missing",
    "labels/threshold.json": "labels/threshold.json is missing",
    "eval/metrics-teacher.json": "teacher",
    "teacher/losses.jsonl": "teacher",
    "eval/predictions-teacher.json": "Nothing to compare",
    "eval/predictions-student.json": "Of the teacher, on validation images",
    "data/toy_val/dataset.json": "toy_val is missing",
    "data/toy_labelled/dataset.json": "web_labelled",
}


@pytest.mark.parametrize("name", MISSING)
def test_a_missing_input_costs_only_its_own_part(finished_run, name):
    file = finished_run / name
    hidden = file.with_name(file.name + ".away")
    file.rename(hidden)
    try:
        report.write_report(str(finished_run))
        text = shown(finished_run / "report.html").text
    finally:
        hidden.rename(file)
    assert MISSING[name] in " ".join(text.split())
    assert "Self-training helped" in text and "The run" in text


def test_a_bare_summary_is_enough_and_says_what_is_missing(tmp_path):
    (tmp_path / "summary.json").write_text("{}")
    report.write_report(str(tmp_path))
    bare = shown(tmp_path / "report.html")
    assert len(bare.all("p", class_="missing")) == 11
    assert "No verdict" in bare.text


def test_without_a_summary_or_with_a_broken_one_the_user_is_told(tmp_path):
    with pytest.raises(DataError, match=r"summary.json is missing.*glipv2 run"):
        report.write_report(str(tmp_path))
    (tmp_path / "summary.json").write_text('{"teacher": ')
    with pytest.raises(DataError, match=r"summary.json is no valid JSON"):
        report.write_report(str(tmp_path))


def test_report_is_a_command(finished_run, capsys):
    parser = argparse.ArgumentParser()
    report.add_arguments(parser)
    assert report.run(parser.parse_args([str(finished_run)])) == 0
    assert capsys.readouterr().out == f"report: {finished_run / 'report.html'}\n"


def test_durations_are_read_at_a_glance():
    assert [duration(s) for s in (0.4, 59.4, 61, 3900)] == [
        "0 s",
        "59 s",
        "1 min 01 s",
        "1 h 05 min",
    ]
