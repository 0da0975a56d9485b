"""What tests of `glipv2 schedule` share: steps of a run, a scheduler, a stand-in for scoring."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from scored_runs import scored_config  # noqa: E402

from glipv2.jobs import schedule  # noqa: E402
from glipv2.jobs.schedule import Scheduler  # noqa: E402
from glipv2.model.folders import step_url  # noqa: E402
from glipv2.pipeline import storage  # noqa: E402
from glipv2.pipeline.checkpoint import write_folder  # noqa: E402

STORES = ["local", "memory", pytest.param("s3", marks=pytest.mark.slow)]


def run_on_store(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty run folder on the store, one of STORES, that the fixture is asked for."""
    if request.param == "s3":
        return f"{request.getfixturevalue('s3_folder')}/run"
    name = request.node.name.replace("[", "-").replace("]", "")
    return str(tmp_path / "run") if request.param == "local" else f"memory://{name}/run"


def commit_step(run: str, step: int, content: bytes = b"weights") -> None:
    files = {"model.safetensors": content + str(step).encode(), "config.json": b"{}",
             "vocab.txt": b"a"}  # fmt: skip
    write_folder(step_url(run, step), files, step)


class Scoring:
    """Stands in for `evaluate_suite`: AP is step / 1000, or what `values` say."""

    def __init__(self) -> None:
        self.scored: list[tuple[str, int]] = []
        self.values: dict[int, float] = {}
        self.during: Callable[[Any, int], None] = lambda job, step: None

    def __call__(self, job: Any) -> dict[str, Any]:
        step = int(job.checkpoint[-6:])
        self.during(job, step)
        self.scored.append((job.suite.name, step))
        metrics = {"ap": self.values.get(step, step / 1000)}
        own = {"metrics": metrics, "per_category": {}, "url": "x", "images": 2}
        result = {
            "suite": job.suite.name, "first": "ap", "metrics": metrics, "key": job.key,
            "sets": {job.suite.name: own}, "protocol": job.suite.digest,
            "seconds": {"predict": 0.0, "score": 0.0},
        }  # fmt: skip
        storage.write_json(job.url, result)
        return result


def scored_by_table(monkeypatch: pytest.MonkeyPatch) -> Scoring:
    """The stand-in, from now on what schedulers score with."""
    stand_in = Scoring()
    monkeypatch.setattr(schedule, "evaluate_suite", stand_in)
    return stand_in


def scheduler(run: str, val: str, once: bool = True, **settings: Any) -> Scheduler:
    suites = {"coco": {"set": val}, "short": {"set": val, "limit": 1}}
    settings.setdefault("suites", ["coco"])
    return Scheduler(scored_config(run, suites, **settings), once=once)


def alerts(run: str) -> list[dict[str, Any]]:
    return storage.read_json_lines(f"{run}/eval/alerts.jsonl")
