"""The static pages in a real browser: they fit a phone and a screen, complain of nothing, and ask
nobody for anything.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from chromium import Browser, needs_chromium, running  # noqa: E402
from finished_run import write_finished_run  # noqa: E402
from page_parser import pair  # noqa: E402
from scored_runs import counting_map, write_result, write_scored_runs  # noqa: E402

from glipv2.eval.odinw import odinw_sets  # noqa: E402
from glipv2.jobs import view  # noqa: E402
from glipv2.jobs.adapt import RESULT, summarise  # noqa: E402
from glipv2.jobs.report import write_comparison, write_report  # noqa: E402
from glipv2.pipeline import ray_map  # noqa: E402
from glipv2.pipeline.shards import write_shard_set  # noqa: E402

pytestmark = needs_chromium
LONG = "a_run_with_the_long_name_that_people_give_to_runs_2026_11_30_batch_64_rate_1e-4"
OVERFLOW = """[...document.querySelectorAll("body *")]
    .filter(e => !e.closest(".scroll, .trio, pre, svg"))
    .filter(e => e.getBoundingClientRect().right > innerWidth + 0.5)
    .map(e => e.tagName + "." + e.className + " " + e.textContent.trim().slice(0, 40))"""

COVERED = """[...document.querySelectorAll(".scroll")]
    .filter(s => s.scrollWidth > s.clientWidth)
    .flatMap(s => [...s.querySelectorAll("tbody th")])
    .filter(e => e.offsetWidth > 0.7 * e.closest(".scroll").clientWidth)
    .map(e => e.textContent)"""
"""Names that stay beside the figures, and would hide them."""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with running(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


def write_benchmarks(run: Path) -> None:
    """Figures of some suites over steps, with old settings among them, and what was reported."""
    names = [one.name for one in odinw_sets(13)]
    for step in (1000, 2000, 3000):
        ap = step / 10000
        every = {"ap": ap, "ap_median": ap, "ap50": ap, "ap75": ap, "mask_ap": ap}
        by_set = {name: {"ap": ap + n / 100} for n, name in enumerate(names)}
        write_result(run, "odinw13", every, step=step, sets=by_set, task="detection")
        lvis = {f"{kind}ap{group}": ap for kind in ("", "classic_", "mask_")
                for group in ("", "_rare", "_common", "_frequent")}  # fmt: skip
        protocol = "old" if step == 1000 else "new"
        write_result(run, "lvis-minival", lvis, step=step, task="lvis", protocol=protocol)
    text = f"lvis-minival.ap fell from 0.3000 at step 2000 to 0.2000 at step 3000 of {LONG}"
    told = {"event": "fall", "at": 1.0, "text": text}
    (run / "eval" / "alerts.jsonl").write_text(json.dumps(told) + "\n")


def write_adapted(run: Path) -> None:
    cells = [
        {"set": one.name, "way": way, "shots": shots, "seed": seed, "first": "ap", "images": 9,
         "metrics": {"ap": seed / 1000}, "train_seconds": 36.0, "devices": 1, "run": LONG}
        for one in odinw_sets(13)
        for way in ("full tuning", "linear probe", "prompt tuning")
        for shots in (1, 3, 5, 10, 0)
        for seed in (3, 30, 300)
    ]  # fmt: skip
    failed = {**cells[0], "error": f"rank 0 was killed: /runs/{LONG}/dice/full/1-shot/seed-3"}
    run.mkdir()
    (run / RESULT).write_text(json.dumps({"summary": summarise(cells), "cells": [*cells, failed]}))


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("pages")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray_map, "map_on_ray", counting_map([]))
        write_scored_runs(folder)
    one = (folder / "one").rename(folder / LONG)
    write_benchmarks(one)
    write_finished_run(folder / "main")
    write_benchmarks(folder / "main" / "student")
    write_adapted(folder / "adapted")
    records = [pair(f"p-{n}", score=n / 10) for n in range(9)]
    write_shard_set(str(folder / LONG / "set"), records, ("cell",), {})
    view.view(str(folder / LONG / "set"), str(folder / "view.html"), 9, 0)
    return {
        "main": write_report(str(folder / "main")),
        "scores": write_report(str(one)),
        "adapt": write_report(str(folder / "adapted")),
        "comparison": write_comparison(
            [str(one), str(folder / "two"), str(folder / "main")], str(folder / "both.html")
        ),
        "view": str(folder / "view.html"),
    }


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("name", ["main", "scores", "adapt", "comparison", "view"])
def test_a_page_fits_its_window_and_loads_nothing(
    browser: Browser, pages: dict[str, str], name: str, width: int
) -> None:
    url = Path(pages[name]).as_uri()
    page = browser.open(url, width)
    page.value("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.value("innerWidth") == width
    assert page.value(OVERFLOW) == [] and page.value(COVERED) == []
    assert page.value("document.documentElement.scrollWidth") <= width
    broken = "[...document.images].filter(i => !i.complete || !i.naturalWidth).length"
    assert page.value(broken) == 0
    assert page.errors == [] and page.requests == [url]
    page.close()
