"""What `glipv2 evaluate` and `glipv2 schedule` found in runs: curves, figures, alerts.

Reads RUN/eval/step-N/SUITE.json of one run or several, and of their phases if they have any; and
RUN/eval/MODEL-DIGEST/SUITE.json, where models are scored that are no step of the run.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from glipv2.jobs.evaluate_suites import read_result
from glipv2.jobs.plots import Plot, Series, line_plot
from glipv2.jobs.report_details import Detail, detail
from glipv2.model.folders import STEP_NAME
from glipv2.pipeline import storage

if TYPE_CHECKING:
    from glipv2.eval.published import Published

STYLES = ("accent", "second", "teacher", "control")
PERCENT = 100.0
"""Published figures are in percent, ours in [0, 1]."""
COUNT = 20
"""What is larger is no share of anything, but a number of things."""
SHOWN = 8
"""Metrics of a suite in the table; all are in its result files."""
OTHER_MODEL = re.compile(r"(.+)-[0-9a-f]{8}")


@dataclass(frozen=True, kw_only=True)
class Scored:
    """One model on one suite."""

    run: str
    """Name of the run, empty for the only one."""
    run_dir: str
    model: str
    """What it is called among those of its run: step 200, or a name."""
    step: int | None
    result: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.run} {self.model}".strip()

    def value(self, metric: str) -> float | None:
        found: float | None = self.result["metrics"].get(metric)
        return found


@dataclass(frozen=True, kw_only=True)
class Row:
    """A model's figures."""

    name: str
    cells: list[str]
    source: str = ""
    """Of a published one: setting, where it is from, and how sure that is."""


@dataclass(frozen=True, kw_only=True)
class SuiteTable:
    """One suite: a curve of its first metric, and figures beside the published ones."""

    name: str
    plot: Plot | None
    key: list[tuple[str, str]]
    """Name and style of each line of the plot."""
    metrics: list[str]
    ours: list[Row]
    published: list[Row]
    detail: Detail | None
    """Of the step that is best by the first metric."""


def suite_tables(run_dirs: Sequence[str]) -> list[SuiteTable]:
    """One a suite that has results, in alphabetical order."""
    found: dict[str, list[Scored]] = {}
    for name, url in scored_runs(run_dirs).items():
        for suite, scored in _results(name, url):
            found.setdefault(suite, []).append(scored)
    return [_table(suite, found[suite]) for suite in sorted(found)]


def alerts(run_dirs: Sequence[str]) -> list[dict[str, Any]]:
    """What the scheduler reported, oldest first, of the runs and their phases."""
    urls = (storage.join(url, "eval", "alerts.jsonl") for url in scored_runs(run_dirs).values())
    return sorted((e for url in urls for e in storage.read_json_lines(url)), key=lambda e: e["at"])


def scored_runs(run_dirs: Sequence[str]) -> dict[str, str]:
    """Name -> run folders with results: the runs themselves, and folders in them."""
    return name_runs(run_dirs, lambda url: bool(_folders(url)))


def name_runs(run_dirs: Sequence[str], counts: Callable[[str], bool]) -> dict[str, str]:
    """Name -> those of the run folders, and of the folders in them, that count. The name of one
    run alone is empty."""
    found: dict[str, str] = {}
    for run_dir in run_dirs:
        own = "" if len(run_dirs) == 1 else run_name(run_dir, run_dirs)
        for name in ("", *storage.list_names(run_dir)):
            url = storage.join(run_dir, name) if name else run_dir
            if counts(url):
                found["/".join(part for part in (own, name) if part)] = url
    return found


def run_name(run_dir: str, run_dirs: Sequence[str]) -> str:
    """Its folder's name, or as much of its path as tells it from the others."""
    parts = run_dir.rstrip("/").split("/")
    others = [other.rstrip("/").split("/") for other in run_dirs if other != run_dir]
    for count in range(1, len(parts)):
        if all(other[-count:] != parts[-count:] for other in others):
            return "/".join(parts[-count:])
    return run_dir


def _folders(url: str) -> dict[str, str]:
    """Of RUN/eval: the folders of results."""
    folder = storage.join(url, "eval")
    names = storage.list_names(folder)
    fitting = [n for n in names if STEP_NAME.fullmatch(n) or OTHER_MODEL.fullmatch(n)]
    return {name: storage.join(folder, name) for name in fitting}


def _results(run: str, url: str) -> Iterable[tuple[str, Scored]]:
    """(suite, a model's result), steps in their order, then other models."""
    for name, folder in sorted(_folders(url).items(), key=lambda item: _order(item[0])):
        step = STEP_NAME.fullmatch(name)
        other = OTHER_MODEL.fullmatch(name)
        model = f"step {int(step[1])}" if step else other[1] if other else name
        for file in storage.list_names(folder):
            own = read_result(storage.join(folder, file)) if file.endswith(".json") else None
            if isinstance(own, dict) and "metrics" in own:
                yield (
                    file.removesuffix(".json"),
                    Scored(run=run, run_dir=url, model=model, result=own,
                           step=int(step[1]) if step else None),
                )  # fmt: skip


def _order(folder: str) -> tuple[bool, int, str]:
    step = STEP_NAME.fullmatch(folder)
    return (step is None, int(step[1]) if step else 0, folder)


def _table(suite: str, scored: list[Scored]) -> SuiteTable:
    last = max(scored, key=lambda one: one.step if one.step is not None else -1).result
    first = last["first"]
    metrics = [first, *(name for name in last["metrics"] if name != first)][:SHOWN]
    series, rows = [], []
    for number, run in enumerate(dict.fromkeys(one.run for one in scored)):
        own = [one for one in scored if one.run == run]
        series.append(_curve(own, first, STYLES[number % len(STYLES)]))
        rows += _rows(own, first, metrics)
    several = any(len(one.points) > 1 for one in series)
    plot = line_plot(f"{suite}: {first}", series, "step") if several else None
    key = [(s.name, s.style) for s in series] if plot and len(series) > 1 else []
    best = _best(scored, first)
    return SuiteTable(
        name=suite,
        plot=plot,
        key=key,
        metrics=metrics,
        ours=rows,
        published=_published(suite, metrics),
        detail=detail(best.result, best.run_dir, best.name),
    )


def _curve(scored: list[Scored], metric: str, style: str) -> Series:
    values = ((one.step, one.value(metric)) for one in scored)
    points = [(step, value) for step, value in values if step is not None and value is not None]
    return Series(name=scored[0].run or "this run", style=style, points=points)


def _rows(scored: list[Scored], first: str, metrics: list[str]) -> list[Row]:
    """Of one run: its newest step and its best, then models that are no step of it."""
    steps = [one for one in scored if one.step is not None]
    rows = []
    if steps:
        newest, best = steps[-1], _best(steps, first)
        rows += [] if newest is best else [_row(newest, metrics)]
        rows += [_row(best, metrics, best=True)]
    return rows + [_row(one, metrics) for one in scored if one.step is None]


def _best(scored: list[Scored], metric: str) -> Scored:
    """The first of equals."""
    return max(scored, key=lambda one: -1.0 if (v := one.value(metric)) is None else v)


def _row(one: Scored, metrics: list[str], best: bool = False) -> Row:
    said = one.name + (", best" if best else "")
    return Row(name=said, cells=_cells(one.result["metrics"], metrics, 1.0))


def _published(suite: str, metrics: list[str]) -> list[Row]:
    """Those of a suite with the name of a published one."""
    from glipv2.eval.published import published

    return published_rows(published(suite), metrics)


def published_rows(figures: "Iterable[Published]", metrics: list[str]) -> list[Row]:
    """Figures of whole suites: a row for each model and setting, a cell for each metric."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for figure in figures:
        if figure.metric in metrics and not figure.set:
            doubt = "" if figure.tag == "paper" else f", {figure.tag}"
            source = f"published, {figure.setting}, {figure.source}{doubt}"
            found.setdefault((figure.model, source), {})[figure.metric] = figure.value
    return [
        Row(name=model, source=source, cells=_cells(values, metrics, PERCENT))
        for (model, source), values in found.items()
    ]


def _cells(values: dict[str, float], metrics: list[str], whole: float) -> list[str]:
    found = (values[m] / whole if m in values else None for m in metrics)
    return ["–" if v is None else f"{v:,.0f}" if v > COUNT else f"{v:.3f}" for v in found]
