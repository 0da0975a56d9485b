"""glipv2 run RECIPE: the main job. Prepare, teacher, label, student, control, evaluate, report.

The phase `teacher` is trained first and labels the pairs; every other phase of the recipe follows
in the recipe's order. Every stage finds out for itself what is already done, so the same command
resumes the whole job.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from glipv2.pipeline import storage
from glipv2.pipeline.config import RunConfig
from glipv2.pipeline.config_loader import dump_config, load_config
from glipv2.pipeline.errors import ConfigError

NEEDED_PHASES = ("teacher", "student", "control")
SUMMARY_METRICS = {
    "caption_seen_ap50": "caption_seen_ap50",
    "caption_unseen_ap50": "caption_unseen_ap50",
    "caption_novel_word_ap50": "caption_novel_word_ap50",
    "chunked_seen_ap50": "chunked_seen_ap50",
    "chunked_unseen_ap50": "chunked_unseen_ap50",
    "bccd_ap50": "real_ap50",
    "recall_at_1": "recall_at_1",
    "recall_at_5": "recall_at_5",
    "recall_at_10": "recall_at_10",
}
"""Key in summary.json -> key in the metrics of a model."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="YAML file with the phases teacher, student and control")
    parser.add_argument("overrides", nargs="*", help="section.key=value, applied last")


def run(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.recipe, arguments.overrides)
    _check(config)
    phases = {p: load_config(arguments.recipe, arguments.overrides, p) for p in config.phases}
    summary = main_job(config, phases)
    print(summary_table(summary))  # noqa: T201 - the answer of the command
    print(f"report: {storage.join(config.run_dir, 'report.html')}")  # noqa: T201
    return 0


def main_job(config: RunConfig, phases: dict[str, RunConfig]) -> dict[str, Any]:
    """All stages in order; returns the summary that is also written to RUN/summary.json."""
    from glipv2.jobs.evaluate import RANDOM, evaluate
    from glipv2.jobs.label import label
    from glipv2.jobs.prepare import prepare_set
    from glipv2.jobs.pretrain import CONFIG, check_same_run, pretrain
    from glipv2.jobs.report import write_report

    for phase_config in phases.values():
        check_same_run(phase_config)
    storage.write_bytes(storage.join(config.run_dir, CONFIG), dump_config(config).encode())
    with stage(config, "prepare"):
        for name, options in config.prepare.items():
            prepare_set(config.set_url(name), options)
    with stage(config, "teacher"):
        pretrain(phases["teacher"])
    with stage(config, "label"):
        label(config)
    for phase in phases:
        if phase != "teacher":
            with stage(config, phase):
                pretrain(phases[phase])
    with stage(config, "evaluate"):
        models = {name: phase.run_dir for name, phase in phases.items()}
        metrics = evaluate(config, {**models, RANDOM: RANDOM}, curves=models)
    with stage(config, "report"):
        summarise(config, metrics)
        write_report(config.run_dir)
    return summarise(config, metrics)  # now with the seconds of the report itself


def _check(config: RunConfig) -> None:
    missing = [phase for phase in NEEDED_PHASES if phase not in config.phases]
    if missing:
        raise ConfigError(f"the main job needs the phases {', '.join(missing)} in its recipe")


@contextmanager
def stage(config: RunConfig, name: str) -> Iterator[None]:
    """Note how long the run of a stage that completed it took; later runs keep that figure."""
    url = storage.join(config.run_dir, "seconds.json")
    started = time.monotonic()
    yield
    seconds = json.loads(storage.read_bytes(url)) if storage.exists(url) else {}
    if name not in seconds:
        seconds[name] = round(time.monotonic() - started, 1)
        storage.write_bytes(url, json.dumps(seconds, indent=1).encode())


def summarise(config: RunConfig, metrics: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Write RUN/summary.json, versions.json and quarantine.jsonl from what the stages left."""
    from glipv2.jobs.doctor import versions

    seconds_url = storage.join(config.run_dir, "seconds.json")
    summary: dict[str, Any] = {
        phase: {
            key: round(metrics[phase][source], 4)
            for key, source in SUMMARY_METRICS.items()
            if source in metrics[phase]
        }
        for phase in config.phases
    }
    summary["labels"] = _label_quality(config)
    summary["random_weights_bccd_ap50"] = round(metrics["random"].get("real_ap50", 0.0), 4)
    summary["seconds"] = json.loads(storage.read_bytes(seconds_url))
    _write_json(config, "summary.json", summary)
    _write_json(config, "versions.json", versions())
    lines = b"".join(_quarantined(config))
    storage.write_bytes(storage.join(config.run_dir, "quarantine.jsonl"), lines)
    return summary


def _label_quality(config: RunConfig) -> dict[str, Any]:
    """Quality of the labelled sets whose truth is known (one set in the quickstart)."""
    from glipv2.eval.labels import score_labels
    from glipv2.pipeline.shard_reader import iterate_records

    quality: dict[str, Any] = {}
    for labelled, truth in config.eval.label_truth.items():
        scored = score_labels(
            iterate_records(config.set_url(labelled)), iterate_records(config.set_url(truth))
        )
        quality = dataclasses.asdict(scored)
    url = storage.join(config.run_dir, "labels", "threshold.json")
    if storage.exists(url):
        quality["threshold"] = json.loads(storage.read_bytes(url))["threshold"]
    return quality


def _quarantined(config: RunConfig) -> Iterator[bytes]:
    """Every skipped sample of every stage, once, with the stage's name."""
    places = {"label": storage.join(config.run_dir, "labels")}
    places |= {phase: config.run_url(phase) for phase in config.phases}
    for name, folder in places.items():
        url = storage.join(folder, "quarantine.jsonl")
        if storage.exists(url):
            for line in sorted(set(storage.read_bytes(url).splitlines())):
                yield json.dumps({"stage": name, **json.loads(line)}).encode() + b"\n"


def _write_json(config: RunConfig, name: str, content: Any) -> None:
    url = storage.join(config.run_dir, name)
    storage.write_bytes(url, json.dumps(content, indent=1).encode())


def summary_table(summary: dict[str, Any]) -> str:
    """The figures of summary.json for a terminal of 80 columns."""
    phases = [n for n, v in summary.items() if isinstance(v, dict) and SUMMARY_METRICS.keys() & v]
    lines = [f"{'':26s}" + "".join(f"{phase:>10s}" for phase in phases)]
    for key in SUMMARY_METRICS:
        if key in summary[phases[0]]:
            values = "".join(f"{summary[phase][key]:10.3f}" for phase in phases)
            lines.append(f"{key:26s}{values}")
    labels = summary["labels"]
    if "precision_at_50" in labels:
        lines.append(
            f"pseudo labels: precision {labels['precision_at_50']:.3f}, recall "
            f"{labels['recall_at_50']:.3f}, {labels['kept']} boxes kept on {labels['pairs']} pairs"
        )
    lines.append(f"random weights: bccd_ap50 {summary['random_weights_bccd_ap50']:.3f}")
    total = sum(summary["seconds"].values())
    stages = ", ".join(f"{name} {seconds:.0f}" for name, seconds in summary["seconds"].items())
    lines.append(f"seconds: {stages}; together {total:.0f}")
    return "\n".join(lines)
