"""The results of suites that runs hold, for the report: of which model, on which settings; alerts.

Reads RUN/eval/step-N/SUITE.json of one run or several, and of their phases if they have any; and
RUN/eval/MODEL-DIGEST/SUITE.json, where models are scored that are no step of the run.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from glipv2.jobs.evaluate_suites import read_result
from glipv2.model.folders import STEP_NAME
from glipv2.pipeline import storage

OTHER_MODEL = re.compile(r"(.+)-[0-9a-f]{8}")
ALERTS = "alerts.jsonl"


@dataclass(frozen=True, kw_only=True)
class Scored:
    """One model on one suite."""

    run: str
    """Name of the run, empty for the only one."""
    run_dir: str
    model: str
    """What it is called among those of its run: step 200, or a name."""
    step: int | None
    result: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.run} {self.model}".strip()

    @property
    def protocol(self) -> str:
        """Digest of data and settings: figures are compared where it is the same."""
        found: str = self.result["protocol"]
        return found

    @property
    def images(self) -> int:
        return sum(own.get("images", 0) for own in self.result["sets"].values())

    @property
    def seconds(self) -> float:
        """That its predictions took, of all workers together."""
        spent: float = self.result.get("seconds", {}).get("predict", 0.0)
        return spent

    def value(self, metric: str) -> float | None:
        found: float | None = self.result["metrics"].get(metric)
        return found


@dataclass(frozen=True, kw_only=True)
class Alert:
    """One report of a scheduler."""

    run: str
    """Name of the run, empty for the only one."""
    event: str
    text: str


def results_by_suite(run_dirs: Sequence[str]) -> dict[str, list[Scored]]:
    """Suite, in alphabetical order -> its results, those of one run after the other."""
    found: dict[str, list[Scored]] = {}
    for name, url in scored_runs(run_dirs).items():
        for suite, scored in results(name, url):
            found.setdefault(suite, []).append(scored)
    return {suite: found[suite] for suite in sorted(found)}


def alerts(run_dirs: Sequence[str]) -> list[Alert]:
    """What the scheduler reported, oldest first, of the runs and their phases; also of those none
    of whose steps could be scored."""
    told = name_runs(run_dirs, lambda url: storage.exists(storage.join(url, "eval", ALERTS)))
    entries = [
        (entry["at"], Alert(run=name, event=entry["event"], text=entry["text"]))
        for name, url in told.items()
        for entry in storage.read_json_lines(storage.join(url, "eval", ALERTS))
    ]
    return [alert for _, alert in sorted(entries, key=lambda entry: entry[0])]


def scored_runs(run_dirs: Sequence[str]) -> dict[str, str]:
    """Name -> run folders with results: the runs themselves, and folders in them."""
    return name_runs(run_dirs, lambda url: bool(_folders(url)))


def name_runs(run_dirs: Sequence[str], counts: Callable[[str], bool]) -> dict[str, str]:
    """Name -> those of the run folders, and of the folders in them, that count. The name of one
    run alone is empty."""
    found: dict[str, str] = {}
    for run_dir in run_dirs:
        own = "" if len(run_dirs) == 1 else run_name(run_dir, run_dirs)
        for name in ("", *storage.list_names(run_dir)):
            url = storage.join(run_dir, name) if name else run_dir
            if counts(url):
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


def results(run: str, url: str) -> Iterable[tuple[str, Scored]]:
    """(suite, a model's result) of one run: steps in their order, then other models."""
    for name, folder in sorted(_folders(url).items(), key=lambda item: _order(item[0])):
        step = STEP_NAME.fullmatch(name)
        other = OTHER_MODEL.fullmatch(name)
        model = f"step {int(step[1])}" if step else other[1] if other else name
        for file in storage.list_names(folder):
            own = read_result(storage.join(folder, file)) if file.endswith(".json") else None
            if isinstance(own, dict) and "metrics" in own:
                yield (
                    file.removesuffix(".json"),
                    Scored(run=run, run_dir=url, model=model, result=own,
                           step=int(step[1]) if step else None),
                )  # fmt: skip


def _folders(url: str) -> dict[str, str]:
    """Of RUN/eval: the folders of results."""
    folder = storage.join(url, "eval")
    names = storage.list_names(folder)
    fitting = [n for n in names if STEP_NAME.fullmatch(n) or OTHER_MODEL.fullmatch(n)]
    return {name: storage.join(folder, name) for name in fitting}


def _order(folder: str) -> tuple[bool, int, str]:
    step = STEP_NAME.fullmatch(folder)
    return (step is None, int(step[1]) if step else 0, folder)
