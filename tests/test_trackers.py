"""Weights & Biases and MLflow over kills, resumes, rollbacks and servers that fail.

Most tests have modules in their place that note what they are asked; where the packages are
installed, they themselves run too, without a server.
"""

import importlib.util
import os
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from glipv2.pipeline import storage, trackers
from glipv2.pipeline.config import RunConfig
from glipv2.pipeline.errors import ConfigError
from glipv2.pipeline.recorder import Recorder, StepTimes
from glipv2.pipeline.trackers import check_trackers
from glipv2.pipeline.train_config import LogConfig, TrainConfig

WORKER = Path(__file__).parent / "workers" / "tracked_worker.py"
STEPS = 12


def config(run_dir: str, **log: str) -> RunConfig:
    return RunConfig(
        run_dir=run_dir,
        train=TrainConfig(steps=STEPS),
        log=LogConfig(every=1, tensorboard=False, **log),  # type: ignore[arg-type]
    )


def make_steps(own: Recorder, first: int, last: int, loss: float = 1.0) -> None:
    for step in range(first, last):
        own.step(step, {"lr": 0.1, "loss": loss * step}, StepTimes(1.0, 0.0, 100))


def kill(own: Recorder) -> None:
    """Nobody closes anything; what was logged has arrived."""
    for tracker in own.trackers:
        assert isinstance(tracker, trackers.Aside)
        arrived = threading.Event()
        tracker.todo.put(lambda _, arrived=arrived: arrived.set())
        assert arrived.wait(10)


@dataclass
class WandbRun:
    """As the real one it drops what is logged at a step below its own."""

    settings: dict[str, Any]
    metrics: list[tuple[str, str | None]] = field(default_factory=list)
    points: list[dict[str, float]] = field(default_factory=list)
    ended: list[str | int] = field(default_factory=list)

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.metrics.append((name, step_metric))

    def log(self, figures: dict[str, float], step: int | None = None) -> None:
        at = len(self.points) if step is None else step
        if at >= len(self.points):
            self.points.append(figures)

    def mark_preempting(self) -> None:
        self.ended.append("preempting")

    def finish(self, exit_code: int | None = None) -> None:
        self.ended.append(exit_code or 0)


class Wandb(ModuleType):
    """Runs live on in it as they do on the server."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.runs: dict[str, WandbRun] = {}
        self.settings = SimpleNamespace(mode="online", api_key="k", base_url="https://none.invalid")

    def setup(self) -> Any:
        return self

    def teardown(self) -> None: ...

    def init(self, **settings: Any) -> WandbRun:
        assert settings["resume"] == "allow"
        return self.runs.setdefault(settings["id"], WandbRun(settings))


@dataclass
class MlflowRun:
    tags: dict[str, str]
    status: str = "RUNNING"
    params: dict[str, str] = field(default_factory=dict)
    points: list[tuple[str, float, int]] = field(default_factory=list)


class Mlflow(ModuleType):
    def __init__(self) -> None:
        super().__init__("mlflow")
        self.runs: list[MlflowRun] = []
        self.failing = False
        self.entities = SimpleNamespace(
            Metric=lambda name, value, at, step: (name, value, step),
            Param=lambda key, value: (key, value),
        )
        self.exceptions = SimpleNamespace(MlflowException=RefusedError)
        self.MlflowClient = lambda tracking_uri: MlflowClient(self, tracking_uri)


class RefusedError(Exception):
    error_code = "INVALID_PARAMETER_VALUE"


class MlflowClient:
    def __init__(self, server: Mlflow, uri: str) -> None:
        if uri.startswith("nothing:"):
            raise RefusedError("unsupported URI")
        self.server = server

    def get_experiment_by_name(self, name: str) -> Any:
        return SimpleNamespace(experiment_id="1") if self.server.runs else None

    def create_experiment(self, name: str) -> str:
        return "1"

    def search_runs(self, experiments: list[str], own: str, max_results: int) -> list[Any]:
        name, value = own.removeprefix("tags.").split(" = ")
        found = [r for r, run in enumerate(self.server.runs) if run.tags[name] == value.strip("'")]
        return [self._seen(run) for run in found]

    def create_run(self, experiment: str, tags: dict[str, str]) -> Any:
        self.server.runs.append(MlflowRun(tags))
        return self._seen(len(self.server.runs) - 1)

    def _seen(self, number: int) -> Any:
        run = self.server.runs[number]
        latest = {name: value for name, value, _ in sorted(run.points, key=lambda point: point[2])}
        data = SimpleNamespace(metrics=latest, params=dict(run.params))
        return SimpleNamespace(info=SimpleNamespace(run_id=number), data=data)

    def update_run(self, number: int, status: str) -> None:
        self.server.runs[number].status = status

    def log_batch(self, number: int, metrics: Any = (), params: Any = ()) -> None:
        if self.server.failing:
            raise ConnectionError("503")
        run = self.server.runs[number]
        assert len(params) <= 100 and not {key for key, _ in params} & set(run.params)
        run.params |= dict(params)
        run.points += metrics

    def set_terminated(self, number: int, status: str) -> None:
        self.server.runs[number].status = status


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Wandb:
    return _in_place(Wandb(), monkeypatch)


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> Mlflow:
    return _in_place(Mlflow(), monkeypatch)


def _in_place(module: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setitem(sys.modules, module.__name__, module)
    module.__spec__ = importlib.util.spec_from_loader(module.__name__, None)
    return module


def test_steps_made_again_reach_weights_and_biases(wandb: Wandb, tmp_path: Path) -> None:
    own = config(str(tmp_path), wandb="p")
    first = Recorder(own, 0)
    make_steps(first, 0, 8)
    kill(first)
    spiked = Recorder(own, 4)
    make_steps(spiked, 4, 10)
    spiked.close(10)  # to go back from
    again = Recorder(own, 6)
    make_steps(again, 6, STEPS, loss=2.0)
    again.close(STEPS)
    [run] = wandb.runs.values()
    assert run.settings["project"] == "p" and run.settings["config"]["train"]["steps"] == STEPS
    assert set(run.metrics) == {("step", None), ("*", "step")}
    made = [*range(8), *range(4, 10), *range(6, STEPS)]
    assert [point["step"] for point in run.points] == made
    newest = {point["step"]: point["loss"] for point in run.points}
    assert newest == {step: step * (1.0 if step < 6 else 2.0) for step in range(STEPS)}
    assert run.ended == ["preempting", 1, 0]


def test_mlflow_has_each_step_once_and_settings_once_and_says_how_it_stands(
    mlflow: Mlflow, tmp_path: Path
) -> None:
    own = config(str(tmp_path), mlflow="http://none.invalid")
    first = Recorder(own, 0)
    make_steps(first, 0, 8)
    kill(first)
    [run] = mlflow.runs
    assert run.status == "RUNNING" and run.params["train.steps"] == str(STEPS)
    assert run.params["seed"] == "0" and len(run.params) > 100
    second = Recorder(own, 4)
    make_steps(second, 4, 10)
    second.close(10)
    assert run.status == "KILLED"
    last = Recorder(own, 10)
    kill(last)
    assert run.status == "RUNNING"
    make_steps(last, 10, STEPS)
    last.close(STEPS)
    assert run.status == "FINISHED" and len(mlflow.runs) == 1
    points = [(value, step) for name, value, step in run.points if name == "loss"]
    assert points == [(float(step), step) for step in range(STEPS)]


def test_a_run_begun_anew_under_the_same_path_is_another_run(
    wandb: Wandb, mlflow: Mlflow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for colleague in ("a", "b", "a"):
        (tmp_path / colleague).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / colleague)
        own = Recorder(config("runs/glip_t", wandb="p", mlflow="sqlite:///x"), 0)
        make_steps(own, 0, 1)
        own.close(1)
    assert len(wandb.runs) == len(mlflow.runs) == 2
    assert {run.settings["name"] for run in wandb.runs.values()} == {"runs/glip_t"}
    storage.delete("runs/glip_t/tracker.json")
    Recorder(config("runs/glip_t", wandb="p"), 0).close(0)
    assert len(wandb.runs) == 3


def test_a_server_that_fails_costs_its_figures_one_warning_and_no_step(
    mlflow: Mlflow, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = Recorder(config(str(tmp_path), mlflow="http://none.invalid"), 0)
    make_steps(own, 0, 3)
    kill(own)
    mlflow.failing = True
    make_steps(own, 3, 6)
    kill(own)
    mlflow.failing = False
    make_steps(own, 6, 9)
    own.close(9)
    [run] = mlflow.runs
    assert [step for name, _, step in run.points if name == "loss"] == [0, 1, 2, 6, 7, 8]
    [warning] = [record.getMessage() for record in caplog.records]
    assert "log.mlflow=http://none.invalid misses figures (503); the run goes on" in warning
    assert len(storage.read_json_lines(str(tmp_path / "metrics.jsonl"))) == 9


def test_a_tracker_that_can_not_begin_is_a_warning(
    wandb: Wandb, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**settings: object) -> None:
        raise RuntimeError("api_key not configured (no-tty)")

    monkeypatch.setattr(wandb, "init", init)
    own = Recorder(config(str(tmp_path), wandb="p"), 0)
    make_steps(own, 0, STEPS)
    own.close(STEPS)
    [warning] = [record.getMessage() for record in caplog.records]
    assert "log.wandb=p misses figures (api_key not configured (no-tty))" in warning


def test_a_server_that_never_answers_holds_nobody_up(
    wandb: Wandb, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = threading.Event()
    monkeypatch.setattr(wandb, "init", lambda **_: answer.wait(60))
    monkeypatch.setattr(trackers, "PATIENCE", 0.2)
    own = Recorder(config(str(tmp_path), wandb="p"), 0)
    make_steps(own, 0, STEPS)
    own.close(STEPS)
    answer.set()
    assert "no answer within 0 s" in caplog.text
    assert (tmp_path / "pretrain.json").exists()


def test_what_no_rank_could_begin_is_refused_with_the_cure(
    wandb: Wandb, mlflow: Mlflow, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    check_trackers(config("memory://none", wandb="p", mlflow="http://none.invalid"))
    wandb.settings.api_key = None
    with pytest.raises(ConfigError, match=r"log\.wandb=p: .* no key here: run `wandb login`"):
        check_trackers(config("memory://none", wandb="p"))
    (tmp_path / "netrc").write_text("machine none.invalid login user password k\n")
    check_trackers(config("memory://none", wandb="p"))
    (tmp_path / "netrc").unlink()
    wandb.settings.mode = "offline"
    check_trackers(config("memory://none", wandb="p"))
    with pytest.raises(ConfigError, match=r"log\.mlflow=nothing://x: unsupported URI"):
        check_trackers(config("memory://none", mlflow="nothing://x"))


def test_a_tracker_whose_package_is_missing_is_refused_with_the_cure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_trackers(config("memory://none"))
    for name in ("wandb", "mlflow"):
        with pytest.raises(ConfigError, match=rf"log\.{name}.*pip install glipv2\[{name}\]"):
            check_trackers(config("memory://none", **{name: "mine"}))


def starts(folder: Path, *settings: str) -> None:
    """A run that is killed after its 8th step, resumes after its 4th, is stopped, and ends."""
    for first, last, how in ((0, 8, ["killed"]), (4, 8, []), (8, STEPS, [])):
        words = [WORKER, "runs/one", first, last, STEPS, *settings, *how]
        subprocess.run(
            [sys.executable, *map(str, words)],
            cwd=folder,
            env=os.environ | {"WANDB_MODE": "offline"},
            check=not how,
            timeout=240,
        )


@pytest.mark.slow
def test_the_real_mlflow_keeps_one_run_of_all_starts(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    starts(tmp_path, f"mlflow={uri}")
    client = mlflow.MlflowClient(tracking_uri=uri)
    [run] = client.search_runs([client.get_experiment_by_name("glipv2").experiment_id])
    assert run.info.status == "FINISHED" and run.data.params["train.steps"] == str(STEPS)
    points = client.get_metric_history(run.info.run_id, "loss")
    assert [(p.step, p.value) for p in points] == [(step, 100.0 - step) for step in range(STEPS)]
    for wrong in (f"file://{tmp_path}/mlruns", "nothing://x"):
        with pytest.raises(ConfigError, match="log.mlflow="):
            check_trackers(config("memory://none", mlflow=wrong))


@pytest.mark.slow
def test_the_real_weights_and_biases_writes_all_starts_under_one_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    starts(tmp_path, "wandb=glipv2")
    identity = storage.read_json(str(tmp_path / "runs/one/tracker.json"))["id"]
    files = sorted((tmp_path / "wandb").glob(f"offline-run-*-{identity}/run-{identity}.wandb"))
    assert len(files) == 3
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ConfigError, match="no key here"):
        check_trackers(config("memory://none", wandb="p"))
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    check_trackers(config("memory://none", wandb="p"))
