"""Where a run's figures go beside its own files: TensorBoard, Weights & Biases, MLflow."""

import contextlib
import importlib.util
import logging
import os
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue
from typing import Any, Protocol

from glipv2.pipeline import storage
from glipv2.pipeline.config import RunConfig
from glipv2.pipeline.config_loader import as_tree
from glipv2.pipeline.errors import ConfigError

log = logging.getLogger(__name__)

FOLDER, IDENTITY = "tensorboard", "tracker.json"
STEP = "step"
"""The figure by which trackers order the others."""
PATIENCE = 60.0
"""Seconds that the end of a run waits for servers to take what is left."""
LONGEST_SETTING = 6000
"""Characters of a value that MLflow takes."""
AT_ONCE = 100
"""Settings that MLflow takes in one request."""


class Tracker(Protocol):
    def log(self, step: int, figures: dict[str, float]) -> None: ...

    def flush(self) -> None: ...

    def close(self, finished: bool) -> None:
        """`finished`: whether the run is at its last step, and not only this start of it."""


def trackers(config: RunConfig, first_step: int) -> list[Tracker]:
    """Those that `log` asks for."""
    chosen: list[Tracker] = []
    if config.log.tensorboard:
        chosen.append(TensorBoard(config.run_dir, first_step))
    if config.log.wandb:
        begin = partial(WeightsAndBiases, config, identity(config.run_dir))
        chosen.append(Aside(begin, f"log.wandb={config.log.wandb}"))
    if config.log.mlflow:
        begin_mlflow = partial(MLflow, config, identity(config.run_dir))
        chosen.append(Aside(begin_mlflow, f"log.mlflow={config.log.mlflow}"))
    return chosen


def identity(run_dir: str) -> str:
    """What trackers know a run by: the same after a kill, another where a run is begun anew in a
    folder of the same name, here or by somebody else."""
    url = storage.join(run_dir, IDENTITY)
    if not storage.exists(url):
        storage.write_json(url, {"id": uuid.uuid4().hex})
    return str(storage.read_json(url)["id"])


def check_trackers(config: RunConfig) -> None:
    """ConfigError for what no rank could begin to log to: what needs a server is found out later,
    and costs a warning."""
    for name in ("wandb", "mlflow"):
        if getattr(config.log, name) and importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"log.{name} needs the package {name}, which is not installed: pip install "
                f"glipv2[{name}], or leave log.{name} empty"
            )
    if config.log.wandb:
        _check_key(config.log.wandb)
    if config.log.mlflow:
        _check_uri(config.log.mlflow)


def _check_key(project: str) -> None:
    import requests
    import wandb

    settings = wandb.setup().settings
    wandb.teardown()
    known = (
        settings.api_key
        or getattr(settings, "identity_token_file", None)
        or requests.utils.get_netrc_auth(settings.base_url)
    )
    if settings.mode == "online" and not known:
        raise ConfigError(
            f"log.wandb={project}: Weights & Biases has no key here: run `wandb login`, or set "
            "WANDB_API_KEY, or WANDB_MODE=offline"
        )


def _check_uri(uri: str) -> None:
    import mlflow

    try:
        mlflow.MlflowClient(tracking_uri=uri)
    except ImportError as error:
        raise ConfigError(f"log.mlflow={uri} needs another package: {error}") from error
    except mlflow.exceptions.MlflowException as error:
        if error.error_code == "INVALID_PARAMETER_VALUE":
            raise ConfigError(f"log.mlflow={uri}: {error}") from error


class TensorBoard:
    """Event files in RUN/tensorboard; those of a run on an object store are copied at a flush."""

    def __init__(self, run_dir: str, first_step: int) -> None:
        from tensorboardX import SummaryWriter

        self.url = storage.join(run_dir, FOLDER)
        self.rest = contextlib.ExitStack()
        if storage.is_local(run_dir):
            self.folder = storage.local_path(self.url)
        else:
            self.folder = self.rest.enter_context(tempfile.TemporaryDirectory())
        self.writer = SummaryWriter(self.folder, purge_step=first_step or None)

    def log(self, step: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)

    def flush(self) -> None:
        self.writer.flush()
        if not storage.is_local(self.url):
            for name in os.listdir(self.folder):
                storage.upload(os.path.join(self.folder, name), storage.join(self.url, name))

    def close(self, finished: bool) -> None:
        self.writer.close()
        self.flush()
        self.rest.close()


class Aside:
    """A tracker on a thread of its own: a server that fails or never answers costs its figures and
    one warning, and no step of the run."""

    def __init__(self, begin: Callable[[], Tracker], where: str) -> None:
        self.begin, self.where = begin, where
        self.todo: SimpleQueue[Callable[[Tracker], None] | None] = SimpleQueue()
        self.warned = False
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def log(self, step: int, figures: dict[str, float]) -> None:
        self.todo.put(lambda tracker: tracker.log(step, figures))

    def flush(self) -> None: ...

    def close(self, finished: bool) -> None:
        self.todo.put(lambda tracker: tracker.close(finished))
        self.todo.put(None)
        self.thread.join(PATIENCE)
        if self.thread.is_alive():
            self._warn(f"no answer within {PATIENCE:.0f} s")

    def _work(self) -> None:
        try:
            tracker = self.begin()
        except Exception as error:
            self._warn(error)
            return
        for act in iter(self.todo.get, None):
            try:
                act(tracker)
            except Exception as error:
                self._warn(error)

    def _warn(self, problem: object) -> None:
        if not self.warned:
            self.warned = True
            log.warning("%s misses figures (%s); the run goes on, and RUN/metrics.jsonl has them",
                        self.where, problem)  # fmt: skip


class WeightsAndBiases:
    """`log.wandb`: the project. One run for all attempts.

    Its own count of steps never goes back, so the step is a figure: those made again after a kill
    or a loss spike are further points at the same step, the last of which is the one that counts.
    """

    def __init__(self, config: RunConfig, identity: str) -> None:
        import wandb

        os.environ.setdefault("WANDB_FINISH_TIMEOUT", f"{PATIENCE * 0.8:.0f}")
        self.run = wandb.init(
            project=config.log.wandb, name=_name(config), id=identity, resume="allow",
            config=as_tree(config),
        )  # fmt: skip
        self.run.define_metric(STEP)
        self.run.define_metric("*", step_metric=STEP)

    def log(self, step: int, figures: dict[str, float]) -> None:
        self.run.log({STEP: step, **figures})

    def flush(self) -> None: ...

    def close(self, finished: bool) -> None:
        if not finished:
            self.run.mark_preempting()
        self.run.finish(exit_code=0 if finished else 1)


class MLflow:
    """`log.mlflow`: the tracking server or database. One run for all attempts.

    It replaces no point: of a step made again after a kill or a loss spike the first one stays.
    """

    def __init__(self, config: RunConfig, identity: str) -> None:
        import mlflow

        self.client = mlflow.MlflowClient(tracking_uri=config.log.mlflow)
        experiment = self.client.get_experiment_by_name("glipv2")
        number = experiment.experiment_id if experiment else self.client.create_experiment("glipv2")
        found = self.client.search_runs([number], f"tags.glipv2 = '{identity}'", max_results=1)
        tags = {"glipv2": identity, "run_dir": config.run_dir, "mlflow.runName": _name(config)}
        run = found[0] if found else self.client.create_run(number, tags=tags)
        self.run = run.info.run_id
        self.newest = run.data.metrics.get(STEP, -1)
        self.metric = mlflow.entities.Metric
        self.client.update_run(self.run, status="RUNNING")
        missing = [
            mlflow.entities.Param(key, str(value)[:LONGEST_SETTING])
            for key, value in _settings(as_tree(config)).items()
            if key not in run.data.params
        ]
        for first in range(0, len(missing), AT_ONCE):
            self.client.log_batch(self.run, params=missing[first : first + AT_ONCE])

    def log(self, step: int, figures: dict[str, float]) -> None:
        if step <= self.newest:
            return
        now = int(time.time() * 1000)
        named = {STEP: float(step), **figures}
        metrics = [self.metric(name, value, now, step) for name, value in named.items()]
        self.client.log_batch(self.run, metrics=metrics)

    def flush(self) -> None: ...

    def close(self, finished: bool) -> None:
        self.client.set_terminated(self.run, status="FINISHED" if finished else "KILLED")


def _name(config: RunConfig) -> str:
    return "/".join(config.run_dir.rstrip("/").split("/")[-2:])


def _settings(tree: dict[str, Any]) -> dict[str, Any]:
    """`section.key` -> value."""
    flat: dict[str, Any] = {}
    for name, section in tree.items():
        if isinstance(section, dict):
            flat |= {f"{name}.{key}": value for key, value in section.items()}
        else:
            flat[name] = section
    return flat
