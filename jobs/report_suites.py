"""What `glipv2 evaluate` and `glipv2 schedule` found in runs: curves, figures, and published ones.

What was scored with other data or settings shares no curve with the rest, and is never the best.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import yaml

from glipv2.jobs.plots import Plot, Series, line_plot
from glipv2.jobs.report_details import Detail, details
from glipv2.jobs.report_scored import Scored, results_by_suite

if TYPE_CHECKING:
    from glipv2.eval.published import Published

STYLES = ("accent", "second", "teacher", "control")
PERCENT = 100.0
"""Published figures are in percent, ours in [0, 1]."""
COUNTS = ("phrases", "expressions", "questions", "images")
"""Metrics that are no shares but numbers of things."""
SHOWN = {
    "detection": ("ap50", "ap75", "ap_small", "ap_medium", "ap_large",
                  "mask_ap", "mask_ap50", "mask_ap75"),
    "lvis": ("ap_rare", "ap_common", "ap_frequent", "ap50",
             "classic_ap", "classic_ap_rare", "classic_ap_common", "classic_ap_frequent",
             "mask_ap", "mask_ap_rare", "mask_ap_common", "mask_ap_frequent"),
    "phrases": ("recall_at_5", "recall_at_10", "merged_recall_at_1", "merged_recall_at_5",
                "merged_recall_at_10", "phrases"),
    "referring": ("accuracy_*", "expressions"),
    "segmentation": ("cumulative_iou", "precision_at_*", "phrases"),
    "vqa": ("accuracy_*", "questions"),
    "captioning": ("bleu_4", "meteor", "rouge_l", "spice", "images"),
}  # fmt: skip
"""Task -> metrics in the table beside its first and that one's median; the files have all."""
FALLBACK = 12
"""Metrics of a result that does not say its task."""
OTHER = ", other settings"


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
    left_out: int
    """Steps that were scored with other data or settings than their run's newest."""
    published_metrics: list[str]
    published: list[Row]
    by_set: "SetTable | None"
    """Of a suite of several sets."""
    settings: list[tuple[str, str]]
    """Whose, and data and settings as YAML; several where runs differ."""
    details: list[Detail]
    """Of each set, by the step that is best by the first metric."""


@dataclass(frozen=True, kw_only=True)
class SetTable:
    """The first metric of each set: our best step and published models."""

    metric: str
    models: list[tuple[str, str]]
    """Name and source, which is empty for ours."""
    rows: list[Row]
    """One a set."""


def suite_tables(run_dirs: Sequence[str]) -> list[SuiteTable]:
    """One a suite that has results, in alphabetical order."""
    return [_table(suite, scored) for suite, scored in results_by_suite(run_dirs).items()]


def _table(suite: str, scored: list[Scored]) -> SuiteTable:
    runs = [
        _current([one for one in scored if one.run == run])
        for run in dict.fromkeys(one.run for one in scored)
    ]
    newest = _newest(runs[0])
    first, task, protocol = newest.result["first"], newest.result.get("task", ""), newest.protocol
    shown = [one for own in runs for one in own]
    metrics = _metrics(task, first, (name for one in shown for name in one.result["metrics"]))
    series = [
        _curve(own, first, STYLES[number % len(STYLES)], protocol)
        for number, own in enumerate(runs)
    ]
    several = any(len(one.points) > 1 for one in series)
    plot = line_plot(f"{suite}: {first}", series, "step") if several else None
    key = [(s.name, s.style) for s in series] if plot and len(series) > 1 else []
    best = _best([one for one in shown if one.protocol == protocol], first)
    published_metrics, published = _published(suite, task, first)
    return SuiteTable(
        name=suite,
        plot=plot,
        key=key,
        metrics=metrics,
        ours=[row for own in runs for row in _rows(own, first, metrics, protocol)],
        left_out=len(scored) - len(shown),
        published_metrics=published_metrics,
        published=published,
        by_set=_by_set(suite, [_best(_of_run(own), first) for own in runs], first, protocol),
        settings=_settings(runs),
        details=details(best.result, best.run_dir, best.name),
    )


def _current(own: list[Scored]) -> list[Scored]:
    """Of one run: the steps that were scored as its newest was, and models that are no step."""
    protocol = _newest(own).protocol
    return [one for one in own if one.step is None or one.protocol == protocol]


def _newest(own: list[Scored]) -> Scored:
    """The run's newest step; if it has none, its last model."""
    return max(own, key=lambda one: -1 if one.step is None else one.step)


def _of_run(own: list[Scored]) -> list[Scored]:
    """Its steps; if it has none, its models."""
    return [one for one in own if one.step is not None] or own


def _metrics(task: str, first: str, names: Iterable[str]) -> list[str]:
    """Of `names` those that are shown, in the order of the table."""
    every = list(dict.fromkeys(names))
    others = SHOWN.get(task, every[:FALLBACK])
    wanted = (first, f"{first}_median", *others)
    return list(dict.fromkeys(n for one in wanted for n in every if fnmatchcase(n, one)))


def _curve(own: list[Scored], metric: str, style: str, protocol: str) -> Series:
    values = ((one.step, one.value(metric)) for one in own)
    points = [(step, value) for step, value in values if step is not None and value is not None]
    said = (own[0].run or "this run") + _marked(_newest(own), protocol)
    return Series(name=said, style=style, points=points)


def _rows(own: list[Scored], first: str, metrics: list[str], protocol: str) -> list[Row]:
    """Of one run: its newest step and its best, then models that are no step of it."""
    steps = [one for one in own if one.step is not None]
    rows = []
    if steps:
        newest, best = steps[-1], _best(steps, first)
        rows += [] if newest is best else [_row(newest, metrics, protocol)]
        rows += [_row(best, metrics, protocol, best=True)]
    return rows + [_row(one, metrics, protocol) for one in own if one.step is None]


def _best(scored: list[Scored], metric: str) -> Scored:
    """The first of equals."""
    return max(scored, key=lambda one: -1.0 if (v := one.value(metric)) is None else v)


def _row(one: Scored, metrics: list[str], protocol: str, best: bool = False) -> Row:
    said = one.name + (", best" if best else "") + _marked(one, protocol)
    return Row(name=said, cells=_cells(one.result["metrics"], metrics, 1.0))


def _marked(one: Scored, protocol: str) -> str:
    return "" if one.protocol == protocol else OTHER


def _by_set(suite: str, ours: list[Scored], first: str, protocol: str) -> SetTable | None:
    """None for a suite of one set."""
    from glipv2.eval.published import published

    names = list(dict.fromkeys(name for one in ours for name in one.result["sets"]))
    if len(names) < 2:
        return None
    columns: dict[tuple[str, str], dict[str, float]] = {}
    for one in ours:
        sets = one.result["sets"].items()
        values = {n: PERCENT * own["metrics"][first] for n, own in sets if first in own["metrics"]}
        columns[one.name + _marked(one, protocol), ""] = values
    for figure in published(suite):
        if figure.set and figure.metric == first:
            columns.setdefault((figure.model, _source(figure)), {})[figure.set] = figure.value
    rows = []
    for name in names:
        cells = [_cells(values, [name], PERCENT)[0] for values in columns.values()]
        rows.append(Row(name=name, cells=cells))
    return SetTable(metric=first, models=list(columns), rows=rows)


def _settings(runs: list[list[Scored]]) -> list[tuple[str, str]]:
    """Of each protocol, under the name of the first run that has it."""
    found: dict[str, tuple[str, str]] = {}
    for one in map(_newest, runs):
        if "settings" in one.result:
            data = {name: own["url"] for name, own in one.result["sets"].items()}
            tree: dict[str, Any] = {"data": data, "settings": one.result["settings"]}
            found.setdefault(one.protocol, (one.run, yaml.safe_dump(tree, sort_keys=False)))
    return list(found.values())


def _published(suite: str, task: str, first: str) -> tuple[list[str], list[Row]]:
    """Metrics and rows of a suite with the name of a published one."""
    from glipv2.eval.published import published

    figures = published(suite)
    metrics = _metrics(task, first, (figure.metric for figure in figures if not figure.set))
    return metrics, published_rows(figures, metrics)


def published_rows(figures: "Iterable[Published]", metrics: list[str]) -> list[Row]:
    """Figures of whole suites: a row for each model and setting, a cell for each metric."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for figure in figures:
        if figure.metric in metrics and not figure.set:
            found.setdefault((figure.model, _source(figure)), {})[figure.metric] = figure.value
    return [
        Row(name=model, source=source, cells=_cells(values, metrics, PERCENT))
        for (model, source), values in found.items()
    ]


def _source(figure: "Published") -> str:
    doubt = "" if figure.tag == "paper" else f", {figure.tag}"
    return f"published, {figure.setting}, {figure.source}{doubt}"


def _cells(values: dict[str, float], metrics: list[str], whole: float) -> list[str]:
    return [_cell(name, values[name] / whole) if name in values else "–" for name in metrics]


def _cell(metric: str, value: float) -> str:
    return f"{value:,.0f}" if metric in COUNTS else f"{value:.3f}"
