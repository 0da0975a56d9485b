"""The hand check of labels: what is written for people, and what their answers come to."""

import csv
import io
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from sample_records import record

from glipv2.jobs import cli
from glipv2.jobs.audit import Checked, read_audit, write_boxes
from glipv2.pipeline.errors import DataError
from glipv2.pipeline.records import Region

HEAD = "number,key,phrase,x0,y0,x1,y1,score,caption,right"


def checked_file(path, *answers, head=HEAD, encoding="utf-8-sig"):
    """`answers` are (score, what stands under right)."""
    rows = [f"{n},k,cat,0,0,1,1,{score},a cat,{right}" for n, (score, right) in enumerate(answers)]
    path.write_bytes("\r\n".join([head, *rows, ""]).encode(encoding))
    return str(path)


@pytest.mark.parametrize(
    ("right", "number", "low", "high"),
    [(8, 10, 0.490162, 0.943318), (0, 10, 0.0, 0.277533), (10, 10, 0.722467, 1.0),
     (157, 180, 0.815564, 0.913325), (1, 1, 0.206549, 1.0)],
)  # fmt: skip
def test_the_interval_is_wilsons(right, number, low, high):
    found = Checked(number=number, right=right).interval
    assert found == pytest.approx((low, high), abs=2e-6)
    for end in found:  # the precisions that lie just 1.96 standard errors of their own away
        if 0 < end < 1:
            distance = (right / number - end) ** 2
            assert distance == pytest.approx(1.959964**2 * end * (1 - end) / number, rel=1e-6)


def test_every_spelling_of_an_answer_counts_and_empty_is_not_checked(tmp_path):
    answers = [(0.95, "1"), (0.91, " yes"), (0.9, "Y"), (0.55, "0"), (0.5, "NO"), (0.59, "n"),
               (0.58, "YES"), (1.0, "1"), (0.7, ""), (0.7, " ")]  # fmt: skip
    audit = read_audit(checked_file(tmp_path / "a.csv", *answers))
    assert (audit.total.number, audit.total.right, audit.unchecked) == (8, 5, 2)
    bins = {tenth: (part.right, part.number) for tenth, part in audit.tenths.items()}
    assert bins == {9: (3, 3), 5: (1, 4), 10: (1, 1)}


def test_the_command_prints_precision_by_score_and_what_is_left(tmp_path, capsys):
    answers = [(0.85, 1)] * 8 + [(0.62, 0)] * 2 + [(0.9, "")] * 3
    assert cli.main(["label", "audit", checked_file(tmp_path / "a.csv", *answers)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["checked", "10", "of", "13", "boxes"]
    assert lines[1] == "precision  0.800, 95 % interval 0.490 to 0.943"
    # where all n are right the lower end is n / (n + z^2), the upper one of none z^2 / (n + z^2)
    assert lines[-2].split() == ["0.8", "to", "0.9", "8", "8", "1.000", "0.676", "to", "1.000"]
    assert lines[-1].split() == ["0.6", "to", "0.7", "2", "0", "0.000", "0.000", "to", "0.658"]


def test_its_help_teaches_the_check(capsys):
    helps = []
    for words in (["label", "audit", "--help"], ["label", "--help"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(words)
        assert ended.value.code == 0
        helps.append(capsys.readouterr().out)
    audit, label = helps
    assert "usage: glipv2 label audit FILE" in audit and "--dry-run" not in audit
    assert "1, yes or y for right" in audit and "95 % interval" in audit
    examples = [line.split()[1:] for line in audit.splitlines() if line.startswith("  glipv2 ")]
    assert [cli.parse(words).command for words in examples] == ["view", "label"]
    assert "--dry-run" in label and "glipv2 label audit check.csv" in label


def test_a_file_is_read_as_spreadsheets_store_it(tmp_path):
    german = HEAD.replace(",", ";")
    rows = "1;k;Bär;0;0;1;1;0,75;ein Bär;1\r\n2;k;x;0;0;1;1;0,25;;0\r\n;;;;;;;;;\r\n"
    path = tmp_path / "german.csv"
    path.write_bytes(f"{german}\r\n{rows}".encode("cp1252"))
    audit = read_audit(str(path))
    assert {t: (p.right, p.number) for t, p in audit.tenths.items()} == {7: (1, 1), 2: (0, 1)}


def test_a_wrong_value_is_refused_with_its_line(tmp_path, capsys):
    path = checked_file(tmp_path / "a.csv", (0.5, 1), (0.6, "maybe"), (0.7, 2), ("high", 1))
    assert cli.main(["label", "audit", path]) == 2
    said = capsys.readouterr().err
    assert "line 3: right is 'maybe', not 1, 0, yes, no, y, n or empty" in said
    assert "line 4: right is '2'" in said and "line 5: score is 'high'" in said
    for score in ("nan", "-0.1", "1.5", ""):
        with pytest.raises(DataError, match="line 2: score"):
            read_audit(checked_file(tmp_path / "b.csv", (score, 1)))
    with pytest.raises(DataError, match="line 1: no column right"):
        read_audit(checked_file(tmp_path / "c.csv", (0.5, 1), head=HEAD.replace("right", "wright")))
    with pytest.raises(DataError, match="line 2: line contains NUL|line 2: score|nothing is"):
        read_audit(checked_file(tmp_path / "d.csv", ("\0", "\0")))
    with pytest.raises(DataError, match="line 2: field larger than field limit"):
        read_audit(checked_file(tmp_path / "f.csv", ("1" * 200_000, 1)))
    with pytest.raises(DataError, match="nothing is checked yet"):
        read_audit(checked_file(tmp_path / "e.csv", (0.5, "")))
    assert cli.main(["label", "audit"]) == 2
    assert cli.main(["label", "audit", str(tmp_path / "nowhere.csv")]) == 2


def test_no_cell_is_a_formula_and_every_box_is_one_line(tmp_path):
    evil = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", " \n=1", "＝1", 'a\n=1,"2";\'3']
    boxes = [
        (number, record(number, key="-k", caption=text, regions=()), Region(box=(0, 1, 2.125, 3.5)),
         text)
        for number, text in enumerate(evil, start=1)
    ]  # fmt: skip
    url = str(tmp_path / "boxes.csv")
    write_boxes(url, boxes)
    text = Path(url).read_bytes().decode("utf-8-sig")
    assert text.count("\n") == len(evil) + 1
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    assert [row["number"] for row in rows] == [str(n) for n in range(1, len(evil) + 1)]
    for row, given in zip(rows, evil, strict=True):
        for cell in (row["key"], row["phrase"], row["caption"]):
            assert cell[0] not in "=+-@＝\t\n "
        assert row["caption"].removeprefix("'") == " ".join(given.split())
        assert (row["x0"], row["y0"], row["x1"], row["y1"]) == ("0", "1", "2.12", "3.5")
        assert (row["score"], row["right"]) == ("1.0", "")


def test_a_long_caption_is_cut_so_that_a_cell_can_hold_it(tmp_path):
    url = str(tmp_path / "boxes.csv")
    long = record(caption="word " * 50_000, regions=())
    write_boxes(url, [(1, long, Region(box=(0, 0, 1, 1), score=0.5), "word")])
    assert len(Path(url).read_bytes()) < 2000
    Path(url).write_text(Path(url).read_text("utf-8-sig").rstrip() + "yes\n")
    assert read_audit(url).total == Checked(number=1, right=1)
