"""The part of the page about training: loss curves, images, device-hours, configurations."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from page_parser import EVIL, Page, assert_self_contained, shown  # noqa: E402

from glipv2.jobs.cli import main  # noqa: E402
from glipv2.jobs.report_runs import costs, device_hours, trained_runs  # noqa: E402

TERMS = {"loss": 3.0, "token": 1.0, "mlm": 2.0}


def write_run(
    folder: Path, steps: int, batch: int = 8, every: int = 10, seconds: float = 36
) -> str:
    """A run of two ranks, without scores."""
    folder.mkdir(parents=True)
    losses = [{"step": step, **TERMS} for step in range(steps)]
    metrics = [
        {"step": step, "step_seconds": seconds, "devices": 2.0}
        for step in range(every - 1, steps, every)
    ]
    for name, lines in (("losses", losses), ("metrics", metrics)):
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(own)}\n" for own in lines))
    (folder / "config.yaml").write_text(f"train: {{global_batch: {batch}}}  # {EVIL}\n")
    return str(folder)


def page_of(*words: str, out: Path) -> Page:
    assert main(["report", *words, "--out", str(out)]) == 0
    page = shown(out)
    assert_self_contained(page)
    return page


def titles(page: Page) -> list[str]:
    return [element["text"] for element in page.all("figcaption")]


def test_every_step_that_stands_costs_what_its_line_says() -> None:
    quick, slow = ({"step_seconds": s, "devices": 4.0} for s in (1.0, 9.0))
    lines = [{"step": 9, **quick}, {"step": 19, **slow}]
    assert device_hours(lines, 20) == pytest.approx((10 * 1 + 10 * 9) * 4 / 3600)
    assert device_hours(lines, 25) == pytest.approx((10 * 1 + 15 * 9) * 4 / 3600)
    assert device_hours([{"step": 9}], 10) == device_hours([], 10) == 0  # of an older version


def test_a_run_without_scores_shows_its_training(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=25)
    [row] = costs([run])
    assert (row.name, row.steps, row.images) == ("this run", 25, 200)
    assert row.device_hours == pytest.approx(25 * 36 * 2 / 3600)
    page = page_of(run, out=tmp_path / "page.html")
    assert EVIL not in page.html and "global_batch: 8" in page.html
    assert titles(page) == ["Total loss", "Region-word alignment", "Masked language modelling"]
    cells = [" ".join(element["text"].split()) for element in page.all("td")]
    assert cells == ["25", "200", "0.50"]


def test_runs_are_drawn_into_one_plot_and_phases_count(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", steps=20)
    write_run(tmp_path / "two" / "teacher", steps=10)
    write_run(tmp_path / "two" / "student", steps=10)
    two = str(tmp_path / "two")
    assert list(trained_runs([one, two])) == ["one", "two/student", "two/teacher"]
    page = page_of(one, two, out=tmp_path / "page.html")
    lines = [element["class"] for element in page.all("polyline")]
    assert len(lines) == 3 * len(titles(page)) and len(set(lines)) == 3
    assert page.text.count("Configuration of") == 3


def test_a_folder_without_any_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in ([str(tmp_path)], [str(tmp_path), str(tmp_path / "x"), "--out", "page.html"]):
        assert main(["report", *words]) == 2
        assert "glipv2 pretrain" in capsys.readouterr().err
