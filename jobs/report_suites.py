"""What `glipv2 evaluate` and `glipv2 schedule` found in a run: curves, figures, alerts.

Reads RUN/eval/step-N/SUITE.json of the run, and of its phases if it has any.
"""

from dataclasses import dataclass
from typing import Any

from glipv2.jobs.evaluate_suites import read_result
from glipv2.jobs.plots import Plot, Series, line_plot
from glipv2.model.folders import STEP_NAME
from glipv2.pipeline import storage

STYLES = ("accent", "second", "teacher", "control")
PERCENT = 100.0
"""Published figures are in percent, ours in [0, 1]."""
COUNT = 20
"""What is larger is no share of anything, but a number of things."""
SHOWN = 8
"""Metrics of a suite in the table; all are in its result files."""


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


def suite_tables(run_dir: str) -> list[SuiteTable]:
    """One a suite that has results, in alphabetical order."""
    found: dict[str, dict[str, dict[int, dict[str, Any]]]] = {}
    for name, url in _runs(run_dir).items():
        for step, own in _results(url).items():
            for suite, result in own.items():
                found.setdefault(suite, {}).setdefault(name, {})[step] = result
    return [_table(suite, found[suite]) for suite in sorted(found)]


def alerts(run_dir: str) -> list[dict[str, Any]]:
    """What the scheduler reported, oldest first, of the run and its phases."""
    urls = (storage.join(url, "eval", "alerts.jsonl") for url in _runs(run_dir).values())
    return sorted((e for url in urls for e in storage.read_json_lines(url)), key=lambda e: e["at"])


def _runs(run_dir: str) -> dict[str, str]:
    """Name -> run folders with results: the run itself, and folders in it."""
    names = ["", *storage.list_names(run_dir)]
    urls = {name: storage.join(run_dir, name) if name else run_dir for name in names}
    return {name: url for name, url in urls.items() if _steps(url)}


def _steps(url: str) -> dict[int, str]:
    folder = storage.join(url, "eval")
    matches = {name: STEP_NAME.fullmatch(name) for name in storage.list_names(folder)}
    return {int(m[1]): storage.join(folder, name) for name, m in matches.items() if m}


def _results(url: str) -> dict[int, dict[str, dict[str, Any]]]:
    """Step -> suite -> result."""
    found: dict[int, dict[str, dict[str, Any]]] = {}
    for step, folder in sorted(_steps(url).items()):
        files = [file for file in storage.list_names(folder) if file.endswith(".json")]
        read = {file[:-5]: read_result(storage.join(folder, file)) for file in files}
        found[step] = {
            name: own for name, own in read.items() if isinstance(own, dict) and "metrics" in own
        }
    return found


def _table(suite: str, runs: dict[str, dict[int, dict[str, Any]]]) -> SuiteTable:
    any_run = next(iter(runs.values()))
    newest = any_run[max(any_run)]
    first, names = newest["first"], list(newest["metrics"])
    metrics = [first, *(name for name in names if name != first)][:SHOWN]
    series, rows = [], []
    for number, (run, by_step) in enumerate(runs.items()):
        points = [(s, r["metrics"][first]) for s, r in by_step.items() if first in r["metrics"]]
        style = STYLES[number % len(STYLES)]
        series.append(Series(name=run or "this run", style=style, points=points))
        best = max(points, key=lambda point: point[1], default=(max(by_step), 0.0))[0]
        for step in dict.fromkeys((max(by_step), int(best))):
            said = f"{run} step {step}".strip() + (", best" if step == best else "")
            rows.append(Row(name=said, cells=_cells(by_step[step]["metrics"], metrics, 1.0)))
    plot = line_plot(f"{suite}: {first}", series, "step")
    key = [(s.name, s.style) for s in series] if len(series) > 1 else []
    return SuiteTable(name=suite, plot=plot, key=key, metrics=metrics, ours=rows,
                      published=_published(suite, metrics))  # fmt: skip


def _published(suite: str, metrics: list[str]) -> list[Row]:
    """Those of a suite with the name of a published one, a row for each model and setting."""
    from glipv2.eval.published import published

    found: dict[tuple[str, str], dict[str, float]] = {}
    for figure in published(suite):
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
