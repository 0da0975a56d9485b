"""What `glipv2 adapt` found, for the report: shots by ways of tuning, and what it cost.

Reads RUN/adapt.json.
"""

from dataclasses import dataclass
from typing import Any

from glipv2.jobs.adapt import AVERAGE, RESULT, cell_text
from glipv2.jobs.adapt_cell import ZERO_SHOT, shots_name
from glipv2.jobs.report_suites import Row, published_rows
from glipv2.pipeline import storage

ODINW13 = "odinw13"
TUNED = ("full tuning", "linear probe", "prompt tuning")
"""Published settings that a way of tuning may stand beside."""


@dataclass(frozen=True, kw_only=True)
class AdaptTable:
    """One set, or the average of all."""

    name: str
    metric: str
    shots: list[str]
    ours: list[Row]
    published: list[Row]


@dataclass(frozen=True, kw_only=True)
class Adapted:
    tables: list[AdaptTable]
    failed: list[str]
    models: int
    device_hours: float
    images: int
    """Different ones that models were tuned on, counted once per model."""


def adapted(run_dir: str) -> Adapted | None:
    """None for a run that tuned nothing."""
    url = storage.join(run_dir, RESULT)
    if not storage.exists(url):
        return None
    found = storage.read_json(url)
    tuned = [cell for cell in found["cells"] if "train_seconds" in cell]
    seconds = sum(cell["train_seconds"] * cell["devices"] for cell in tuned)
    return Adapted(
        tables=_tables(found["summary"], found["cells"]),
        failed=[f"{cell['run']}: {cell['error']}" for cell in found["cells"] if "error" in cell],
        models=len(tuned),
        device_hours=seconds / 3600,
        images=sum(cell["images"] for cell in tuned),
    )


def _tables(summary: list[dict[str, Any]], cells: list[dict[str, Any]]) -> list[AdaptTable]:
    metric = next((cell["first"] for cell in cells if "first" in cell), "")
    shots = list(dict.fromkeys(row["shots"] for row in summary if row["way"] != ZERO_SHOT))
    names = list(dict.fromkeys(row["set"] for row in summary))
    sets = {cell["set"] for cell in cells}
    return [
        AdaptTable(
            name=name,
            metric=metric,
            shots=[shots_name(number) for number in shots],
            ours=_rows([row for row in summary if row["set"] == name], shots),
            published=_published(sets, shots) if name == AVERAGE else [],
        )
        for name in sorted(names, key=lambda name: name != AVERAGE)
    ]


def _rows(summary: list[dict[str, Any]], shots: list[int]) -> list[Row]:
    """A row per way; zero-shot stands in every column, being the same for any number."""
    rows = []
    for way in dict.fromkeys(row["way"] for row in summary):
        own = {row["shots"]: cell_text(row) for row in summary if row["way"] == way}
        cells = [own.get(0 if way == ZERO_SHOT else number, "–") for number in shots]
        seeds = max(row["seeds"] for row in summary if row["way"] == way)
        source = "" if way == ZERO_SHOT else f"mean ± deviation of {seeds} seeds"
        rows.append(Row(name=way, cells=cells, source=source if seeds > 1 else ""))
    return rows


def _published(sets: set[str], shots: list[int]) -> list[Row]:
    """Those of ODinW-13, where these are its sets."""
    from glipv2.eval.odinw import odinw_sets
    from glipv2.eval.published import published

    if sets != {own.name for own in odinw_sets(13)}:
        return []
    metrics = [f"ap_{number}_shot" if number else "ap" for number in shots]
    return published_rows((f for f in published(ODINW13) if f.setting in TUNED), metrics)
