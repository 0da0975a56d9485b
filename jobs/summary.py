"""The figures of a main job, gathered from what its stages left in the run folder."""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

from glipv2.jobs.stages import stage_seconds
from glipv2.pipeline import storage
from glipv2.pipeline.config import RunConfig
from glipv2.pipeline.config_loader import dump_config
from glipv2.pipeline.rounds import round_name

TOY_METRICS = (
    "caption_seen_ap50",
    "caption_unseen_ap50",
    "caption_novel_word_ap50",
    "chunked_seen_ap50",
    "chunked_unseen_ap50",
)
LABEL_FIGURES = ("precision_at_50", "recall_at_50", "kept", "by_group")
RECALLS = ("recall_at_1", "recall_at_5", "recall_at_10")


def summarise(config: RunConfig) -> dict[str, Any]:
    """Write RUN/summary.json, config.yaml, versions.json and quarantine.jsonl: the report's input.

    `config` is that of the whole run. Phases that were not evaluated yet are left out.
    """
    from glipv2.jobs.doctor import versions
    from glipv2.jobs.evaluate_main import real_name, scores
    from glipv2.jobs.evaluate_predict import RANDOM

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
    summary["rounds"] = _rounds(config)
    summary["real_set"] = real
    for key in real_metrics:
        if key in found[RANDOM]:
            summary[f"random_weights_{key}"] = round(found[RANDOM][key], 4)
    others = [s for p in config.phases if p != "teacher" for s in (f"label_{p}", p)]
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
    """Quality of the first round's labels, of the set whose truth is known."""
    first = list(config.label.inputs.values())
    judged = (_judged(config, name) for name in config.eval.label_truth if name in first)
    quality: dict[str, Any] = next(filter(None, judged), {})
    url = storage.join(config.run_dir, "labels", "threshold.json")
    if storage.exists(url):
        quality["threshold"] = storage.read_json(url)["threshold"]
    return quality


def _judged(config: RunConfig, labelled: str) -> dict[str, Any]:
    """A labelled set against its truth; empty where the set is not there yet."""
    from glipv2.eval.labels import score_labels
    from glipv2.pipeline.shard_format import MANIFEST
    from glipv2.pipeline.shard_reader import iterate_records

    url, truth = config.set_url(labelled), config.set_url(config.eval.label_truth[labelled])
    if not storage.exists(storage.join(url, MANIFEST)):
        return {}
    return dataclasses.asdict(score_labels(iterate_records(url), iterate_records(truth)))


def _rounds(config: RunConfig) -> list[dict[str, Any]]:
    """Of each round: its student, what its teacher's labels were worth on the gold set and, where
    the truth is known, on the pairs."""
    url = storage.join(config.run_dir, "rounds.json")
    if not storage.exists(url):
        return []
    rounds = []
    for number, (student, gold) in enumerate(storage.read_json(url).items(), start=1):
        own = [round_name(name, number) for name in config.label.inputs.values()]
        judged = (_judged(config, name) for name in own if name in config.eval.label_truth)
        found = next(filter(None, judged), {})
        labels = {key: found[key] for key in LABEL_FIGURES if found}
        rounds.append({"student": student, "gold": gold, "labels": labels})
    return rounds


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
    for number, found in enumerate(summary["rounds"], start=1):
        gold = found["gold"]
        lines.append(
            f"round {number}: labels on gold: precision {gold['precision']:.3f}, recall "
            f"{gold['recall']:.3f}, F1 {gold['f1']:.3f}"
        )
    real = f"{summary['real_set']}_ap50"
    if f"random_weights_{real}" in summary:
        lines.append(f"random weights: {real} {summary[f'random_weights_{real}']:.3f}")
    seconds = summary["seconds"]
    stages = ", ".join(f"{name} {duration:.0f}" for name, duration in seconds.items())
    lines.append(f"seconds: {stages}; together {sum(seconds.values()):.0f}")
    return "\n".join(lines)
