"""One model tuned to one set: trained, its checkpoint chosen, scored; all in one worker.

Nothing but files says what is done, so a cell that was cut off goes on, and a finished one is
only read.
"""

import logging
from dataclasses import dataclass
from typing import Any

from glipv2.jobs.evaluate_predict import Predictor, missing
from glipv2.jobs.evaluate_suites import evaluate_suite, make_job, open_suite, step_of
from glipv2.jobs.pretrain import pretrain
from glipv2.jobs.stages import stage, stage_seconds
from glipv2.model.folders import step_url
from glipv2.pipeline.checkpoint import committed_steps
from glipv2.pipeline.config import RunConfig
from glipv2.pipeline.errors import DataError, PreemptedError

log = logging.getLogger(__name__)

ZERO_SHOT = "zero-shot"
"""Instead of a way of tuning: the model that all start from."""
TUNE = "tune"
"""The stage whose seconds are a cell's cost."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A set, a way of tuning, a number of shots and a seed."""

    set: str
    way: str
    shots: int
    """0 for the whole set."""
    seed: int
    suite: str
    val: str
    images: int
    """What it is tuned on has so many, repeated ones not counted."""
    config: RunConfig

    def __str__(self) -> str:
        if self.way == ZERO_SHOT:
            return f"{self.set}, {ZERO_SHOT}"
        return f"{self.set}, {self.way}, {shots_name(self.shots)}, seed {self.seed}"


def shots_name(shots: int) -> str:
    return f"{shots}-shot" if shots else "all"


class Tuner:
    """The worker: a cell -> what came of it; a failure is a result too, for the others to go on."""

    def __call__(self, cell: Cell) -> dict[str, Any]:
        known = {"set": cell.set, "way": cell.way, "shots": cell.shots, "seed": cell.seed}
        try:
            return {**known, **_tune(cell)}
        except PreemptedError:  # told to stop, which is no failure of the cell: it goes on later
            raise
        except Exception as error:  # a GPU without memory left, too
            log.warning("%s failed", cell, exc_info=True)
            why = str(error) or type(error).__name__
            return {**known, "run": cell.config.run_dir, "error": why}


def _tune(cell: Cell) -> dict[str, Any]:
    config = cell.config
    if cell.way == ZERO_SHOT:
        assert config.train.init
        return {"model": config.train.init, **_score(cell, config.train.init, cell.suite)}
    with stage(config.run_dir, TUNE):
        run = pretrain(config)
    chosen = step_url(run, committed_steps(run)[-1])
    if cell.val:
        chosen = _best(cell, run)
    return {
        "run": run,
        "step": step_of(chosen),
        "images": cell.images,
        "devices": config.train.processes,
        "train_seconds": stage_seconds(run, [TUNE])[TUNE],
        **_score(cell, chosen, cell.suite),
    }


def _best(cell: Cell, run: str) -> str:
    """The kept step that is best on the validation suite, the latest of equals."""
    scores = {}
    for step in committed_steps(run):
        found = _score(cell, step_url(run, step), cell.val)
        scores[step] = found["metrics"][found["first"]]
    return step_url(run, max(scores, key=lambda step: (scores[step], step)))


def _score(cell: Cell, checkpoint: str, suite: str) -> dict[str, Any]:
    """`first` metric, and all, of a checkpoint on a suite; predicted in this process."""
    job = make_job(cell.config, open_suite(cell.config, suite), checkpoint, cell.config.run_dir)
    if job.result() is None:
        predictor = Predictor(cell.config)
        for piece in missing([piece for own in job.work().values() for piece in own]):
            predictor(piece)
    result = evaluate_suite(job)
    if result["first"] not in result["metrics"]:
        raise DataError(f"eval.suites.{suite} has no truth to compare models by")
    return {
        "first": result["first"],
        "metrics": result["metrics"],
        "predict_seconds": result["seconds"]["predict"],
    }
