"""The few-shot tables of a report: ours above those that were published of the same sets."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from page_parser import shown  # noqa: E402

from glipv2.eval.odinw import odinw_sets  # noqa: E402
from glipv2.jobs.adapt import RESULT, summarise  # noqa: E402
from glipv2.jobs.report import write_report  # noqa: E402
from glipv2.jobs.report_adapt import adapted  # noqa: E402

GLIP_T = {
    "full tuning": ["0.511", "0.564", "0.649"],
    "linear probe": ["0.489", "0.504", "0.551"],
    "prompt tuning": ["0.499", "0.555", "0.624"],
}
"""With 1 and 5 shots and all images, as the paper prints them."""


def write_cells(run: Path, names: list[str]) -> str:
    cells = [
        {"set": name, "way": way, "shots": shots, "seed": seed, "first": "ap", "images": 9,
         "metrics": {"ap": 0.25}, "train_seconds": 36.0, "devices": 1, "run": "x"}
        for name in names
        for way in ("full", "probe")
        for shots in (1, 5, 0)
        for seed in (3, 30)
    ]  # fmt: skip
    run.mkdir()
    (run / RESULT).write_text(json.dumps({"summary": summarise(cells), "cells": cells}))
    return str(run)


def test_published_few_shot_figures_stand_below_the_average_of_the_same_sets(
    tmp_path: Path,
) -> None:
    run = write_cells(tmp_path / "run", [own.name for own in odinw_sets(13)])
    found = adapted(run)
    assert found is not None
    average, *single = found.tables
    assert (average.name, average.shots) == ("average", ["1-shot", "5-shot", "all"])
    published = {
        way: row.cells
        for row in average.published
        for way in GLIP_T
        if row.name == "GLIP-T" and way in row.source
    }
    assert published == GLIP_T
    dyhead = next(row for row in average.published if row.name == "DyHead-T (O365)")
    assert dyhead.cells == ["0.338", "0.464", "0.608"]
    assert len(single) == 13 and not any(table.published for table in single)
    page = shown(Path(write_report(run)))
    assert "Published figures, none measured here" in page.text
    cells = ["".join(cell["text"].split()) for cell in page.all("td")]
    for row in GLIP_T.values():
        assert any(cells[place : place + 3] == row for place in range(len(cells)))


def test_other_sets_have_no_published_figures(tmp_path: Path) -> None:
    run = write_cells(tmp_path / "run", [own.name for own in odinw_sets(13)][1:])
    found = adapted(run)
    assert found is not None and not any(table.published for table in found.tables)
    assert "Published figures" not in shown(Path(write_report(run))).text
