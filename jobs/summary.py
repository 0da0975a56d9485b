"""The figures of a main job, gathered from what its stages left in the run folder."""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

from glipv2.jobs.stages import stage_seconds
from glipv2.pipeline import storage
from glipv2.pipeline.config import RunConfig
from glipv2.pipeline.config_loader import dump_config

TOY_METRICS = (
    "caption_seen_ap50",
    "caption_unseen_ap50",
    "caption_novel_word_ap50",
    "chunked_seen_ap50",
    "chunked_unseen_ap50",
)
RECALLS = ("recall_at_1", "recall_at_5", "recall_at_10")


def summarise(config: RunConfig) -> dict[str, Any]:
    """Write RUN/summary.json, config.yaml, versions.json and quarantine.jsonl: the report's input.

    `config` is that of the whole run. Phases that were not evaluated yet are left out.
    """
    from glipv2.jobs.doctor import versions
    from glipv2.jobs.evaluate import RANDOM, real_name, scores

    real = real_name(config)
    real_metrics = (f"{real}_ap50",) if real else ()
    found = {name: scores(config, name)["metrics"] for name in (*config.phases, RANDOM)}
    summary: dict[str, Any] = {
        phase: {
            key: round(found[phase][key], 4)
            for key in (*TOY_METRICS, *real_metrics, *RECALLS)
            if key in found[phase]
        }
        for phase in config.phases
        if found[phase]
    }
    summary["labels"] = _label_quality(config)
    summary["real_set"] = real
    for key in real_metrics:
        if key in found[RANDOM]:
            summary[f"random_weights_{key}"] = round(found[RANDOM][key], 4)
    others = [phase for phase in config.phases if phase != "teacher"]
    stages = ["prepare", "teacher", "label", *others, "evaluate", "report"]
    summary["seconds"] = stage_seconds(config.run_dir, stages)
    storage.write_json(storage.join(config.run_dir, "summary.json"), summary)
    storage.write_json(storage.join(config.run_dir, "versions.json"), versions())
    resolved = storage.join(config.run_dir, "config.yaml")
    storage.write_bytes(resolved, dump_config(config).encode())
    lines = b"".join(_quarantined(config))
    storage.write_bytes(storage.join(config.run_dir, "quarantine.jsonl"), lines)
    return summary


def _label_quality(config: RunConfig) -> dict[str, Any]:
    """Quality of the labelled sets whose truth is known (one set in the quickstart)."""
    from glipv2.eval.labels import score_labels
    from glipv2.pipeline.shard_format import MANIFEST
    from glipv2.pipeline.shard_reader import iterate_records

    quality: dict[str, Any] = {}
    for labelled, truth in config.eval.label_truth.items():
        if storage.exists(storage.join(config.set_url(labelled), MANIFEST)):
            scored = score_labels(
                iterate_records(config.set_url(labelled)), iterate_records(config.set_url(truth))
            )
            quality = dataclasses.asdict(scored)
    url = storage.join(config.run_dir, "labels", "threshold.json")
    if storage.exists(url):
        quality["threshold"] = storage.read_json(url)["threshold"]
    return quality


def _quarantined(config: RunConfig) -> Iterator[bytes]:
    """Every skipped sample of every stage, once, with the stage's name."""
    places = {"label": storage.join(config.run_dir, "labels")}
    places |= {phase: config.run_url(phase) for phase in config.phases}
    for name, folder in places.items():
        entries = storage.read_json_lines(storage.join(folder, "quarantine.jsonl"))
        lines = {json.dumps({"stage": name, **entry}) for entry in entries}
        yield from (line.encode() + b"\n" for line in sorted(lines))


def summary_table(summary: dict[str, Any]) -> str:
    """The figures of summary.json for a terminal of 80 columns."""
    own = ("labels", "seconds")
    phases = [n for n, v in summary.items() if isinstance(v, dict) and n not in own]
    lines = [f"{'':26s}" + "".join(f"{phase:>10s}" for phase in phases)]
    for key in dict.fromkeys(key for phase in phases for key in summary[phase]):
        values = (summary[phase].get(key) for phase in phases)
        cells = "".join(f"{'-':>10s}" if v is None else f"{v:10.3f}" for v in values)
        lines.append(f"{key:26s}{cells}")
    labels = summary["labels"]
    if "precision_at_50" in labels:
        lines.append(
            f"pseudo labels: precision {labels['precision_at_50']:.3f}, recall "
            f"{labels['recall_at_50']:.3f}, {labels['kept']} boxes kept on {labels['pairs']} pairs"
        )
    real = f"{summary['real_set']}_ap50"
    if f"random_weights_{real}" in summary:
        lines.append(f"random weights: {real} {summary[f'random_weights_{real}']:.3f}")
    seconds = summary["seconds"]
    stages = ", ".join(f"{name} {duration:.0f}" for name, duration in seconds.items())
    lines.append(f"seconds: {stages}; together {sum(seconds.values()):.0f}")
    return "\n".join(lines)
