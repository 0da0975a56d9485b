"""The training of runs, for the report: loss curves side by side, costs, configurations.

Reads RUN/losses.jsonl, RUN/metrics.jsonl and RUN/config.yaml of runs and of their phases; of what
scoring cost, the results of their suites.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from glipv2.jobs.plots import Plot, Series, line_plot
from glipv2.jobs.report_scored import name_runs, results, scored_runs
from glipv2.jobs.report_suites import STYLES
from glipv2.pipeline import storage
from glipv2.pipeline.runlog import LOSSES, METRICS, read_losses

LOSS_TERMS = {
    "loss": "Total loss",
    "box": "Localisation (box)",
    "centerness": "Centerness",
    "token": "Region-word alignment",
    "inter_image": "Inter-image contrast",
    "mlm": "Masked language modelling",
    "mask": "Masks",
    "answer": "Question answering",
    "caption": "Captions",
}
CONFIG = "config.yaml"


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one run; zeros where it was not trained, or not scored on a suite."""

    name: str
    steps: int
    images: int
    """That went through the model, repetitions counted."""
    device_hours: float
    """Of the steps that stand: without set-up, checkpoints and steps that were made again."""
    images_scored: int
    """By all results there are, an image counted once for each."""
    scoring_hours: float
    """Of the workers that made the predictions."""
    config: str
    """The resolved configuration as YAML, empty if it is gone."""


def trained_runs(run_dirs: Sequence[str]) -> dict[str, str]:
    """Name -> run folders that hold a training: the runs themselves, and folders in them."""
    return name_runs(run_dirs, lambda url: storage.exists(storage.join(url, LOSSES)))


def costs(run_dirs: Sequence[str]) -> list[Cost]:
    """A row for each run that was trained, or scored on suites."""
    trained, scored = trained_runs(run_dirs), scored_runs(run_dirs)
    every = name_runs(run_dirs, lambda url: url in {*trained.values(), *scored.values()})
    found = {url: _cost(name, url) for name, url in every.items()}
    return [own for url, own in found.items() if own.images_scored or url in trained.values()]


def _cost(name: str, url: str) -> Cost:
    losses = read_losses(url)
    steps = losses[-1]["step"] + 1 if losses else 0
    config_url = storage.join(url, CONFIG)
    there = storage.exists(config_url)
    text = storage.read_bytes(config_url).decode(errors="replace") if there else ""
    scored = [one for _, one in results(name, url)]
    return Cost(
        name=name or "this run",
        steps=steps,
        images=steps * _global_batch(text),
        device_hours=device_hours(storage.read_json_lines(storage.join(url, METRICS)), steps),
        images_scored=sum(one.images for one in scored),
        scoring_hours=sum(one.seconds for one in scored) / 3600,
        config=text,
    )


def _global_batch(config: str) -> int:
    try:
        tree = yaml.safe_load(config) or {}
        return int(tree["train"]["global_batch"])
    except (yaml.YAMLError, KeyError, TypeError, ValueError):
        return 0


def device_hours(metrics: Sequence[dict[str, Any]], steps: int) -> float:
    """Hours that `steps` steps took, times the ranks that took them; each line of metrics.jsonl
    speaks for the steps up to it, the last one also for those that follow."""
    known = [entry for entry in metrics if "step_seconds" in entry]
    ends = [entry["step"] + 1 for entry in known[:-1]] + [steps]
    begins = [0, *ends[:-1]]
    taken = zip(known, begins, ends, strict=False)
    return sum(e["step_seconds"] * e["devices"] * (end - begin) for e, begin, end in taken) / 3600


def loss_plots(runs: dict[str, str], styles: Sequence[str] = STYLES) -> list[Plot]:
    """One plot a term of the loss, one line a run; `runs`: name -> run folder."""
    logs = {name: read_losses(url) for name, url in runs.items()}
    style = dict(_styled(runs, styles))
    plots = [
        line_plot(
            title,
            [
                Series(
                    name=name or "this run",
                    style=style[name],
                    points=[(e["step"], e[term]) for e in log if term in e],
                )
                for name, log in logs.items()
            ],
            "step",
        )
        for term, title in LOSS_TERMS.items()
    ]
    return [plot for plot in plots if plot]


def loss_key(runs: dict[str, str]) -> list[tuple[str, str]]:
    """Name and style of each line, where there are several."""
    return _styled(runs, STYLES) if len(runs) > 1 else []


def _styled(runs: dict[str, str], styles: Sequence[str]) -> list[tuple[str, str]]:
    return [(name, styles[number % len(styles)]) for number, name in enumerate(runs)]
