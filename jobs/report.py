"""glipv2 report: one static page that tells what a run, or several, found and cost.

Reads only what the run folder holds; a part whose file is missing says so and the rest is shown.
"""

import argparse
import json
from collections import Counter
from typing import Any

from glipv2.jobs.page import render
from glipv2.jobs.plots import Plot, Series, line_plot
from glipv2.jobs.report_adapt import adapted
from glipv2.jobs.report_numbers import (
    MODELS,
    columns,
    duration,
    headline_facts,
    result_rows,
    verdict,
)
from glipv2.jobs.report_pictures import Gallery, examples, gallery
from glipv2.jobs.report_runs import costs, loss_key, loss_plots, trained_runs
from glipv2.jobs.report_scored import alerts, run_name
from glipv2.jobs.report_suites import suite_tables
from glipv2.pipeline import storage
from glipv2.pipeline.errors import ConfigError, DataError

SHOWN = ("costs", "suites", "alerts", "adapted")
"""Parts of which a run without phases needs one."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `glipv2 report`."""
    parser.add_argument(
        "run_dir",
        nargs="+",
        help="run folder; several are compared: losses, costs, scores on suites",
    )
    parser.add_argument("--out", help="the page (default: report.html in the one run's folder)")


def run(args: argparse.Namespace) -> int:
    """Write the page and say where it is."""
    runs = [url.rstrip("/") for url in args.run_dir]
    if len(runs) == 1:
        where = write_report(runs[0], args.out)
    elif args.out:
        where = write_comparison(runs, args.out)
    else:
        raise ConfigError("say where the page about several runs should go: --out page.html")
    print(f"report: {where}")  # noqa: T201 - the answer of the command
    return 0


def write_comparison(run_dirs: list[str], out: str) -> str:
    """A page about several runs, side by side: training and scores; returns `out`."""
    if len(set(run_dirs)) < len(run_dirs):
        raise ConfigError("a run is given twice")
    scored = parts(run_dirs)
    if not any(scored[part] for part in SHOWN):
        raise DataError(
            f"none of {', '.join(run_dirs)} was trained (glipv2 pretrain) or scored on a suite "
            "(glipv2 evaluate, glipv2 schedule), so there is nothing to compare"
        )
    names = " and ".join(run_name(url, run_dirs) for url in run_dirs)
    storage.write_bytes(out, render("scores.html", name=names, **scored))
    return out


def parts(run_dirs: list[str]) -> dict[str, Any]:
    """What `scores.html` shows of training, of suites and of tuning."""
    runs = trained_runs(run_dirs)
    return {
        "several": len(run_dirs) > 1,
        "costs": costs(run_dirs),
        "training": loss_plots(runs),
        "training_key": loss_key(runs),
        "suites": suite_tables(run_dirs),
        "alerts": alerts(run_dirs),
        "adapted": adapted(run_dirs[0]) if len(run_dirs) == 1 else None,
    }


def write_report(run_dir: str, out: str | None = None) -> str:
    """RUN/report.html (or `out`) from what the run folder holds; returns its path.

    The page is one self-contained file: no script, nothing loaded from elsewhere. Of a run that is
    no main job it shows its training, the scores of its checkpoints, and of models that were tuned
    to new sets.
    """
    summary = _json(run_dir, "summary.json")
    path = out or storage.join(run_dir, "report.html")
    name = str(run_dir).rstrip("/").rsplit("/", 1)[-1]
    scored = parts([run_dir])
    if summary is None and any(scored[part] for part in SHOWN):
        storage.write_bytes(path, render("scores.html", name=name, **scored))
        return path
    if summary is None:
        raise DataError(
            f"{storage.join(run_dir, 'summary.json')} is missing, so there is nothing to report: "
            "is this a run folder? glipv2 run and glipv2 evaluate RECIPE write it; a run without "
            "phases needs a training or scores (glipv2 pretrain, evaluate, schedule, adapt)"
        )
    config_text = _text(run_dir, "config.yaml")
    config = _yaml(config_text, storage.join(run_dir, "config.yaml"))
    threshold = _json(run_dir, "labels/threshold.json")
    page = render(
        "report.html",
        name=name,
        **scored,
        verdict=verdict(summary),
        facts=headline_facts(summary),
        columns=columns(summary),
        rows=result_rows(summary),
        losses=loss_plots({name: storage.join(run_dir, name) for name in MODELS}, MODELS),
        curves=_curve_plots(run_dir),
        labels=summary.get("labels") or {},
        threshold=threshold,
        threshold_plot=_threshold_plot(threshold),
        galleries=_galleries(run_dir, config),
        examples=examples(run_dir, _set_url(run_dir, config, _validation_set(config))),
        skipped=_skipped(run_dir),
        times=_times(summary.get("seconds", {})),
        total_time=duration(sum(summary.get("seconds", {}).values())),
        config=config_text,
        summary=json.dumps(summary, indent=1),
        versions=_json(run_dir, "versions.json"),
    )
    storage.write_bytes(path, page)
    return path


def _curve_plots(run_dir: str) -> list[Plot]:
    scores = {m: _json(run_dir, f"eval/metrics-{m}.json") or {} for m in MODELS}
    curves = {m: own["curve"] for m, own in scores.items() if own.get("curve")}
    points = [point for own in curves.values() for point in own]
    metrics = dict.fromkeys(key for point in points for key in point if key != "step")
    plots = [
        line_plot(
            metric.replace("_", " ").capitalize().replace("ap50", "AP50"),
            [
                Series(name=m, style=m, points=[(p["step"], p[metric]) for p in own if metric in p])
                for m, own in curves.items()
            ],
            "step",
            y_range=(0, 1),
        )
        for metric in metrics
    ]
    return [plot for plot in plots if plot]


def _threshold_plot(threshold: dict[str, Any] | None) -> Plot | None:
    if not threshold:
        return None
    curve = threshold["curve"]
    return line_plot(
        "Precision and recall of what a threshold keeps",
        [
            Series(name=name, style=style, points=[(p["threshold"], p[name]) for p in curve])
            for name, style in (("precision", "accent"), ("recall", "second"))
        ],
        "score threshold",
        y_range=(0, 1),
        marker=(threshold["threshold"], f"{threshold['threshold']:g}"),
    )


def _galleries(run_dir: str, config: dict[str, Any]) -> list[Gallery]:
    """One a labelled set, in the order of the configuration."""
    data = _data_root(run_dir, config)
    names = list((config.get("label", {}).get("inputs") or {}).values())
    if not names:
        names = [name for name in storage.list_names(data) if name.endswith("_labelled")]
    judged = config.get("eval", {}).get("label_truth") or {}
    found = (gallery(_set_url(run_dir, config, name), name in judged) for name in names)
    return [shown for shown in found if shown]


def _skipped(run_dir: str) -> list[dict[str, Any]] | None:
    """Quarantined samples by stage and reason, most frequent first; None without the file."""
    url = storage.join(run_dir, "quarantine.jsonl")
    if not storage.exists(url):
        return None
    lines = storage.read_json_lines(url)
    counts = Counter((line["stage"], line["reason"]) for line in lines)
    first = {(line["stage"], line["reason"]): line for line in reversed(lines)}
    return [
        {"stage": stage, "reason": reason, "count": count, "example": first[stage, reason]}
        for (stage, reason), count in counts.most_common()
    ]


def _times(seconds: dict[str, float]) -> list[tuple[str, str, float]]:
    """(stage, duration, share of the longest in percent)."""
    longest = max(seconds.values(), default=0) or 1
    return [(name, duration(s), round(100 * s / longest, 1)) for name, s in seconds.items()]


def _data_root(run_dir: str, config: dict[str, Any]) -> str:
    return config.get("data", {}).get("root") or storage.join(run_dir, "data")


def _validation_set(config: dict[str, Any]) -> str:
    return config.get("eval", {}).get("detection") or "toy_val"


def _set_url(run_dir: str, config: dict[str, Any], name: str) -> str:
    return name if "/" in name else storage.join(_data_root(run_dir, config), name)


def _text(run_dir: str, name: str) -> str | None:
    url = storage.join(run_dir, name)
    return storage.read_bytes(url).decode(errors="replace") if storage.exists(url) else None


def _json(run_dir: str, name: str) -> Any:
    url = storage.join(run_dir, name)
    return storage.read_json(url) if storage.exists(url) else None


def _yaml(text: str | None, url: str) -> dict[str, Any]:
    import yaml

    try:
        return yaml.safe_load(text or "") or {}
    except yaml.YAMLError as error:
        raise DataError(f"{url} is no valid YAML: {error}") from error
