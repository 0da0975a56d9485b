"""The figures of the report: its verdict, its results table, the numbers under the title."""

from dataclasses import dataclass
from typing import Any

MODELS = ("teacher", "student", "control")
TOY_METRICS = (
    ("Caption prompts, AP50", "caption_seen_ap50", "seen"),
    ("Caption prompts, AP50", "caption_unseen_ap50", "unseen"),
    ("All classes prompted, AP50", "chunked_seen_ap50", "seen"),
    ("All classes prompted, AP50", "chunked_unseen_ap50", "unseen"),
)
"""(column group, key in summary.json, column)."""
RECALLS = tuple(("Phrase recall", f"recall_at_{k}", f"@{k}") for k in (1, 5, 10))
VERDICT_METRIC = "chunked_unseen_ap50"
CLEAR = 0.01
"""A difference below this is not called one."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Did self-training help: student minus control on what the gold data never shows."""

    text: str
    direction: str
    """up, down, or empty."""
    difference: str
    """With its sign, or empty."""
    detail: str


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the results table."""

    name: str
    kind: str
    """hero, delta, or empty."""
    cells: tuple[tuple[str, str], ...]
    """(text, class) a metric."""


def columns(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The columns of the results table, as TOY_METRICS; real images have one if there are any."""
    real = summary.get("real_set")
    own = [("Real images, AP50", f"{real}_ap50", real)] if real else []
    return [*TOY_METRICS, *own, *RECALLS]


def verdict(summary: dict[str, Any]) -> Verdict:
    """One line on student against control, from VERDICT_METRIC."""
    student, control = (summary.get(m, {}).get(VERDICT_METRIC) for m in ("student", "control"))
    if student is None or control is None:
        missing = "student" if student is None else "control"
        detail = f"{VERDICT_METRIC} of the {missing} is missing in summary.json."
        return Verdict(text="No verdict on self-training yet", direction="", difference="",
                       detail=detail)  # fmt: skip
    difference = student - control
    detail = (
        f"Average precision at IoU 0.5, all classes prompted: student {student:.3f}, "
        f"control {control:.3f}. Both train equally long; only the student also learns from "
        "captions that the teacher labelled. One run, so small differences mean little."
    )
    if difference >= CLEAR:
        text, direction = "Self-training helped on unseen combinations", "up"
    elif difference <= -CLEAR:
        text, direction = "Self-training hurt on unseen combinations", "down"
    else:
        text, direction = "Self-training made no clear difference on unseen combinations", ""
    return Verdict(text=text, direction=direction, difference=signed(difference), detail=detail)


def result_rows(summary: dict[str, Any]) -> list[Row]:
    """Teacher, student, control, their difference, and random weights."""
    figures = {m: summary.get(m, {}) for m in MODELS}
    keys = [key for _, key, _ in columns(summary)]
    rows = []
    for model in MODELS:
        cells = []
        for key in keys:
            value = figures[model].get(key)
            best = max((f[key] for f in figures.values() if f.get(key) is not None), default=None)
            cells.append(_cell(value, "best" if value is not None and value == best else ""))
        kind = "hero" if model == "student" else ""
        rows.append(Row(name=model.capitalize(), kind=kind, cells=tuple(cells)))
    differences = []
    for key in keys:
        values = [figures[m].get(key) for m in ("student", "control")]
        if None in values:
            differences.append(("–", "none"))
            continue
        difference = values[0] - values[1]
        color = "none" if abs(difference) < CLEAR else "up" if difference > 0 else "down"
        differences.append((signed(difference), color))
    rows.append(Row(name="Student − control", kind="delta", cells=tuple(differences)))
    cells = [_cell(summary.get(f"random_weights_{key}")) for key in keys]
    rows.append(Row(name="Random weights", kind="", cells=tuple(cells)))
    return rows


def signed(difference: float) -> str:
    """`+0.051`, with a true minus sign."""
    return f"{difference:+.3f}".replace("-", "−")


def duration(seconds: float) -> str:
    """`42 s`, `3 min 20 s`, `1 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _cell(value: float | None, color: str = "") -> tuple[str, str]:
    return ("–", "none") if value is None else (f"{value:.3f}", color)


def headline_facts(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The few numbers under the title: (label, value, small print)."""
    facts = []
    student, labels = summary.get("student", {}), summary.get("labels") or {}
    if "caption_unseen_ap50" in student:
        seen = student.get("caption_seen_ap50")
        small = f"seen {seen:.3f}" if seen is not None else ""
        facts.append(("Unseen, caption prompts", f"{student['caption_unseen_ap50']:.3f}", small))
    real = summary.get("real_set")
    if f"{real}_ap50" in student:
        chance = summary.get(f"random_weights_{real}_ap50")
        small = f"random weights {chance:.3f}" if chance is not None else ""
        facts.append((f"Real images ({real}) AP50", f"{student[f'{real}_ap50']:.3f}", small))
    if "precision_at_50" in labels:
        small = f"recall {labels['recall_at_50']:.0%}"
        facts.append(("Label precision", f"{labels['precision_at_50']:.0%}", small))
        facts.append(("Labels kept", f"{labels['kept']:,}", f"on {labels['pairs']:,} pairs"))
    if summary.get("seconds"):
        facts.append(("Time", duration(sum(summary["seconds"].values())), "all stages"))
    return facts
