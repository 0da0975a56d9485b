"""One checkpoint on one suite of `eval.suites`: predictions, figures, RUN/eval/step-N/SUITE.json.

What was scored before with the same model, data and settings is not scored again.
"""

import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from typing import Any
from uuid import uuid4

from glipv2.eval.captions import check_java
from glipv2.eval.vqa import question_kinds
from glipv2.jobs import evaluate_score
from glipv2.jobs.evaluate_predict import (
    Asked,
    Piece,
    as_detection,
    asked_of,
    missing,
    pieces,
    predict,
    read_predictions,
    read_records,
)
from glipv2.jobs.evaluate_score import FIRST, Scores
from glipv2.model.config import config_from_dict
from glipv2.model.folders import COMMIT, CONFIG, STEP_NAME
from glipv2.pipeline import storage
from glipv2.pipeline.checkpoint import model_digest, open_checkpoint, resolve_checkpoint
from glipv2.pipeline.config import RunConfig
from glipv2.pipeline.errors import ConfigError, DataError, StoreError
from glipv2.pipeline.eval_config import EvalTask, SuiteConfig
from glipv2.pipeline.pins import pin, unpin
from glipv2.pipeline.records import Record
from glipv2.pipeline.shard_format import ShardSet
from glipv2.pipeline.shard_reader import open_shard_set
from glipv2.pipeline.tasks import first_records

STEP_OF_RUN = re.compile(rf"(.+)/checkpoints/{STEP_NAME.pattern}")
HEADS = {"segmentation": "masks", "vqa": "answers", "captioning": "captions"}
"""Task -> the head that it needs, as the model's configuration names it."""
NEEDS: dict[EvalTask, tuple[str, Callable[[ShardSet, list[Record]], object]]] = {
    "detection": ("categories", lambda data, _: data.categories),
    "lvis": ("frequencies of categories, as the source lvis gives them",
             lambda data, _: data.categories and "frequency" in data.info),
    "phrases": ("captions with boxes of their phrases", lambda _, records: any(
        region.spans for record in records for region in record.regions)),
    "referring": ("expressions of one box each", lambda _, records: all(
        record.caption and len(record.regions) == 1 for record in records)),
    "segmentation": ("expressions with masks", lambda _, records: all(
        record.caption and record.regions and all(region.mask for region in record.regions)
        for record in records)),
    "vqa": ("questions", lambda _, records: any(record.questions for record in records)),
    "captioning": ("captions", lambda _, records: all(
        record.captions or record.caption for record in records)),
}  # fmt: skip
"""Task -> what a set must have for it, and whether it does by its first records."""
PIN_SECONDS = 900.0
"""For which a checkpoint that is being read is kept, after its reader's last sign of life."""


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A suite whose sets were opened: all that decides figures beside the model."""

    name: str
    config: SuiteConfig
    sets: Mapping[str, ShardSet]
    asked: Mapping[str, Asked]
    """Of each set."""

    @property
    def digest(self) -> str:
        """Figures of different models are comparable where it is the same."""
        own, sets = self.config, self.sets.items()
        scoring = [own.task, own.mask_score, own.java, own.annotations, own.odinw, own.limit]
        data = [[name, opened.digest, self.asked[name].digest] for name, opened in sets]
        return storage.digest([evaluate_score.VERSION, scoring, data])

    @property
    def first(self) -> str:
        """The metric by which models are compared."""
        return FIRST[self.config.task]


def open_suite(config: RunConfig, name: str) -> Suite:
    """ConfigError or DataError where the recipe or a shard set lacks something."""
    own = config.eval.suite(name)
    parts = _odinw(config, own) if own.odinw else {
        part: (config.set_url(given), own) for part, given in (own.sets or {name: own.set}).items()
    }  # fmt: skip
    if own.java:
        check_java()
    asked = {part: asked_of(suite, config.eval.precision) for part, (_, suite) in parts.items()}
    sets = {part: open_shard_set(url) for part, (url, _) in parts.items()}
    for part, data in sets.items():
        check_fits(name, own, data)
        if unknown := sorted(set(asked[part].prompts) - set(data.categories)):
            raise ConfigError(
                f"eval.suites.{name}: the prompts are for categories that {data.url} does not "
                f"have: {', '.join(unknown)}"
            )
    if own.annotations:
        _check_annotations(name, own.annotations, sets)
    return Suite(name=name, config=own, sets=sets, asked=asked)


def check_fits(name: str, suite: SuiteConfig, data: ShardSet) -> None:
    """ConfigError when a set has not what the suite's task scores."""
    needs, has = NEEDS[suite.task]
    records = first_records(data)
    if records and has(data, records):
        return
    raise ConfigError(
        f"eval.suites.{name} is of task {suite.task}, which needs {needs}, and {data.url} has none"
        ": give another set, or the task that this one is for"
    )


def _check_annotations(name: str, url: str, sets: Mapping[str, ShardSet]) -> None:
    """ConfigError when the file is not there, is none of VQAv2, or is that of other questions."""
    where = f"eval.suites.{name}.annotations"
    try:
        kinds = question_kinds(storage.read_json(url))
    except DataError as error:
        raise ConfigError(f"{where}: {url}: {error}") from error
    for data in sets.values():
        for question in (asked for record in first_records(data) for asked in record.questions):
            if question.answers and question.id not in kinds:
                raise ConfigError(
                    f"{where}: {url} does not tell the kind of question {question.id} of {data.url}"
                    ": give the file that the set was made of"
                )


def _odinw(config: RunConfig, own: SuiteConfig) -> dict[str, tuple[str, SuiteConfig]]:
    """Of each set of ODinW: where it is, and what is asked about it."""
    from glipv2.eval.odinw import odinw_sets

    assert own.odinw
    root = config.set_url(own.set)
    return {
        one.name: (
            storage.join(root, one.name),
            replace(own, odinw=0, prompts=one.prompts if own.odinw_prompts else {}),
        )
        for one in odinw_sets(own.odinw)
    }


@dataclass(frozen=True, kw_only=True)
class Job:
    """One model on one suite."""

    config: RunConfig
    suite: Suite
    checkpoint: str
    """The model's folder."""
    model: str
    """Digest of the model's files."""
    folder: str
    """RUN/eval: where all that is made goes."""

    @property
    def key(self) -> str:
        return storage.digest([self.model, self.suite.digest])

    @property
    def url(self) -> str:
        """Of the result. A step of the run has a folder of its own; any other model one with its
        name and digest."""
        name, run = self.checkpoint.rpartition("/")[2], run_of(self.checkpoint)
        own = run is not None and _place(run) == _place(self.folder.removesuffix("/eval"))
        folder = name if own else f"{name}-{self.model[:8]}"
        return storage.join(self.folder, folder, f"{self.suite.name}.json")

    def work(self) -> dict[str, list[Piece]]:
        """Set name -> the predictions that it takes."""
        limit = self.suite.config.limit
        return {
            name: pieces(
                self.folder, self.model, self.checkpoint, data, self.suite.asked[name], limit
            )
            for name, data in self.suite.sets.items()
        }

    def result(self) -> dict[str, Any] | None:
        """What was written for the same model, data and settings."""
        found = read_result(self.url)
        return found if found and found["key"] == self.key else None


def read_result(url: str) -> dict[str, Any] | None:
    with suppress(storage.MissingFileError):
        found: dict[str, Any] = storage.read_json(url)
        return found
    return None


def make_job(config: RunConfig, suite: Suite, checkpoint: str, out: str = "") -> Job:
    """`checkpoint`: a run (its newest step), a step, or a model. What is made is kept with the run
    that it is a step of, else with the recipe's; or in the run folder `out`.

    DataError when there is none. A step that was pruned will do if it was scored before: it is
    known by its result, for its figures to be computed again.
    """
    url = checkpoint.rstrip("/")
    with suppress(DataError):
        url = resolve_checkpoint(url).rstrip("/")
    folder = storage.join(out or run_of(url) or config.run_dir, "eval")
    gone = Job(config=config, suite=suite, checkpoint=url, model="", folder=folder)
    there = storage.exists(storage.join(url, COMMIT))
    known = None if there or run_of(url) is None else read_result(gone.url)
    model = known["checkpoint"]["digest"] if known else model_digest(resolve_checkpoint(url))
    return replace(gone, model=model)


def check_head(job: Job) -> None:
    """ConfigError when the model has no head for what the suite asks."""
    own, name = job.suite.config, job.suite.name
    head = HEADS.get(own.task) or ("masks" if own.masks else "")
    url = storage.join(job.checkpoint, CONFIG)
    if head and not getattr(config_from_dict(storage.read_json(url)), head):
        raise ConfigError(
            f"eval.suites.{name} needs a model with model.{head}, and {job.checkpoint} has none: "
            "score one that was tuned for it, or name the other suites (--suite, schedule.suites)"
        )


def evaluate_suite(job: Job, score_only: bool = False) -> dict[str, Any]:
    """The result, which is also written to RUN/eval/step-N/SUITE.json.

    With `score_only` figures are computed again from predictions, which must all be there.
    """
    known = job.result()
    if known and not score_only:
        return known
    work = job.work()
    every = list({piece.out: piece for own in work.values() for piece in own}.values())
    todo = missing(every)
    if todo and score_only:
        raise DataError(
            f"{len(todo)} of {len(every)} prediction files of {job.suite.name} are missing, the "
            f"first {todo[0].out}; evaluate without --score-only"
        )
    if todo:
        with kept(job.checkpoint):
            predict(job.config, todo, job.suite.name)
    started = time.monotonic()
    scores, images, spent = {}, {}, 0.0
    for name, data in job.suite.sets.items():
        scores[name], images[name], seconds = score_set(job.suite.config, data, work[name])
        spent += seconds
    result = _result(job, scores, images)
    result["seconds"] = {
        "predict": round(spent, 1),  # of all workers together
        "score": round(time.monotonic() - started, 1),
    }
    for name, own in scores.items():
        for kind, value in own.exports.items():
            part = f".{name}" if len(scores) > 1 else ""
            storage.write_json(f"{job.url.removesuffix('.json')}{part}.{kind}.json", value)
    storage.write_json(job.url, result)
    return result


def score_set(suite: SuiteConfig, data: ShardSet, work: list[Piece]) -> tuple[Scores, int, float]:
    """Of one set: its figures, its images, and the seconds that its predictions took."""
    found: dict[str, Any] = {}
    seconds = 0.0
    for spent, images in read_predictions(work):
        seconds += spent
        found |= {key: _lean(entry) for key, entry in images.items()}
    records = [
        replace(record, image=b"")
        for piece in work
        for record in read_records(data, piece.shard, 0, piece.images)
    ]
    return evaluate_score.score(suite, data, records, found), len(records), seconds


def _lean(entry: Any) -> Any:
    return as_detection(entry) if isinstance(entry, dict) and "boxes" in entry else entry


def _result(job: Job, scores: dict[str, Scores], images: dict[str, int]) -> dict[str, Any]:
    suite = job.suite
    asked = next(iter(suite.asked.values()))
    settings = {
        **asdict(suite.config),
        "max_boxes": asked.max_boxes,
        "max_boxes_per_prompt": asked.max_boxes_per_prompt,
        "precision": job.config.eval.precision,
    }
    return {
        "suite": suite.name,
        "task": suite.config.task,
        "first": suite.first,
        "metrics": evaluate_score.averages(suite.config.task, scores, suite.config.odinw),
        "sets": {
            name: {
                "url": suite.sets[name].url,
                "digest": suite.sets[name].digest,
                "images": images[name],
                "asked": suite.asked[name].digest,
                "metrics": own.metrics,
                "per_category": own.per_category,
            }
            for name, own in scores.items()
        },
        "checkpoint": {"url": job.checkpoint, "digest": job.model, "step": step_of(job.checkpoint)},
        "settings": settings,
        "protocol": suite.digest,
        "key": job.key,
    }


def run_of(checkpoint: str) -> str | None:
    """The run folder of a step's folder; None for any other."""
    match = STEP_OF_RUN.fullmatch(checkpoint)
    return match[1] if match else None


def step_of(checkpoint: str) -> int | None:
    match = STEP_OF_RUN.fullmatch(checkpoint)
    return int(match[2]) if match else None


def _place(folder: str) -> str:
    return storage.local_path(folder) if storage.is_local(folder) else folder


@contextmanager
def kept(checkpoint: str) -> Iterator[None]:
    """Keep a run's trainer from pruning a step while it is read; DataError if it is gone already.

    Of a run folder that can't be written to nothing is kept.
    """
    run, step = run_of(checkpoint), step_of(checkpoint)
    if run is None or step is None:
        yield
        return
    name, ended = f"eval-{uuid4().hex[:8]}", threading.Event()

    def hold() -> None:
        while not ended.wait(PIN_SECONDS / 10):
            with suppress(DataError, StoreError):  # the next one may come through
                pin(run, name, step, PIN_SECONDS)

    with suppress(DataError):
        pin(run, name, step, PIN_SECONDS)
    try:
        open_checkpoint(checkpoint)
        thread = threading.Thread(target=hold, name="pin", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
    finally:
        with suppress(DataError, StoreError):  # it expires anyway
            unpin(run, name)
