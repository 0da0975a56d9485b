"""What `glipv2 evaluate` and `glipv2 schedule` found in runs: curves, figures, alerts.

Reads RUN/eval/step-N/SUITE.json of one run or several, and of their phases if they have any.
"""

from collections.abc import Iterable, Sequence
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
    runs = scored_runs(run_dirs)
    found: dict[str, dict[str, dict[int, dict[str, Any]]]] = {}
    for name, url in runs.items():
        for step, own in _results(url).items():
            for suite, result in own.items():
                found.setdefault(suite, {}).setdefault(name, {})[step] = result
    return [_table(suite, found[suite], runs) for suite in sorted(found)]


def alerts(run_dirs: Sequence[str]) -> list[dict[str, Any]]:
    """What the scheduler reported, oldest first, of the runs and their phases."""
    urls = (storage.join(url, "eval", "alerts.jsonl") for url in scored_runs(run_dirs).values())
    return sorted((e for url in urls for e in storage.read_json_lines(url)), key=lambda e: e["at"])


def scored_runs(run_dirs: Sequence[str]) -> dict[str, str]:
    """Name -> run folders with results: the runs themselves, and folders in them. The name of one
    run alone is empty."""
    found: dict[str, str] = {}
    for run_dir in run_dirs:
        own = "" if len(run_dirs) == 1 else run_name(run_dir, run_dirs)
        for name in ("", *storage.list_names(run_dir)):
            url = storage.join(run_dir, name) if name else run_dir
            if _steps(url):
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


def _table(
    suite: str, runs: dict[str, dict[int, dict[str, Any]]], urls: dict[str, str]
) -> SuiteTable:
    any_run = next(iter(runs.values()))
    newest = any_run[max(any_run)]
    first, names = newest["first"], list(newest["metrics"])
    metrics = [first, *(name for name in names if name != first)][:SHOWN]
    series, rows, tops = [], [], []
    for number, (run, by_step) in enumerate(runs.items()):
        points = [(s, r["metrics"][first]) for s, r in by_step.items() if first in r["metrics"]]
        style = STYLES[number % len(STYLES)]
        series.append(Series(name=run or "this run", style=style, points=points))
        best, top = max(points, key=lambda point: point[1], default=(max(by_step), 0.0))
        tops.append((top, run, int(best)))
        for step in dict.fromkeys((max(by_step), int(best))):
            said = f"{run} step {step}".strip() + (", best" if step == best else "")
            rows.append(Row(name=said, cells=_cells(by_step[step]["metrics"], metrics, 1.0)))
    several = any(len(one.points) > 1 for one in series)
    plot = line_plot(f"{suite}: {first}", series, "step") if several else None
    key = [(s.name, s.style) for s in series] if plot and len(series) > 1 else []
    _, run, step = max(tops, key=lambda top: top[0])
    closely = detail(runs[run][step], urls[run], f"{run} step {step}".strip())
    return SuiteTable(name=suite, plot=plot, key=key, metrics=metrics, ours=rows,
                      published=_published(suite, metrics), detail=closely)  # fmt: skip


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
