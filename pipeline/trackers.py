"""Where a run's figures go beside its own files: TensorBoard, Weights & Biases, MLflow."""

import contextlib
import importlib.util
import os
import tempfile
import time
from typing import Protocol

from glipv2.pipeline import storage
from glipv2.pipeline.config import RunConfig
from glipv2.pipeline.config_loader import as_tree
from glipv2.pipeline.errors import ConfigError

FOLDER = "tensorboard"


class Tracker(Protocol):
    def log(self, step: int, figures: dict[str, float]) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


def trackers(config: RunConfig, first_step: int) -> list[Tracker]:
    """Those that `log` asks for."""
    name = "/".join(config.run_dir.rstrip("/").split("/")[-2:])
    chosen: list[Tracker] = []
    if config.log.tensorboard:
        chosen.append(TensorBoard(config.run_dir, first_step))
    if config.log.wandb:
        chosen.append(WeightsAndBiases(config, name))
    if config.log.mlflow:
        chosen.append(MLflow(config, name))
    return chosen


def check_trackers(config: RunConfig) -> None:
    """ConfigError if the package of one that `log` asks for is not installed."""
    for name in ("wandb", "mlflow"):
        if getattr(config.log, name) and importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"log.{name} needs the package {name}, which is not installed: pip install "
                f"glipv2[{name}], or leave log.{name} empty"
            )


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

    def close(self) -> None:
        self.writer.close()
        self.flush()
        self.rest.close()


class WeightsAndBiases:
    """`log.wandb`: the project. One run for all attempts; steps run again after a kill replace."""

    def __init__(self, config: RunConfig, name: str) -> None:
        import wandb

        identity = storage.digest(config.run_dir)
        self.run = wandb.init(
            project=config.log.wandb, name=name, id=identity, resume="allow",
            config=as_tree(config),
        )  # fmt: skip

    def log(self, step: int, figures: dict[str, float]) -> None:
        self.run.log(figures, step=step)

    def flush(self) -> None: ...

    def close(self) -> None:
        self.run.finish()


class MLflow:
    """`log.mlflow`: the tracking server or file store. One run for all attempts."""

    def __init__(self, config: RunConfig, name: str) -> None:
        import mlflow

        self.client = mlflow.MlflowClient(tracking_uri=config.log.mlflow)
        experiment = self.client.get_experiment_by_name("glipv2")
        number = experiment.experiment_id if experiment else self.client.create_experiment("glipv2")
        own = f"tags.run_dir = '{config.run_dir}'"
        found = self.client.search_runs([number], own, max_results=1)
        tags = {"run_dir": config.run_dir, "mlflow.runName": name}
        self.run = (found[0] if found else self.client.create_run(number, tags=tags)).info.run_id
        self.metric = mlflow.entities.Metric

    def log(self, step: int, figures: dict[str, float]) -> None:
        now = int(time.time() * 1000)
        metrics = [self.metric(name, value, now, step) for name, value in figures.items()]
        self.client.log_batch(self.run, metrics=metrics)

    def flush(self) -> None: ...

    def close(self) -> None:
        self.client.set_terminated(self.run)
