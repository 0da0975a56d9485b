"""How the main job scores its phases: fixed protocols, whose figures go to summary.json.

Apart from `eval.suites` because they compare groups of words (seen, unseen) that only the toy world
has, draw a curve over the steps of a run, and leave pictures for the report. "caption" prompts an
image with the categories it shows, "chunked" with all categories of the set, `eval.chunk_size` at a
time; "phrases" grounds the phrases of the caption; "real" is "chunked" on the second detection set,
whose categories fit one prompt.
"""

import re
from typing import TYPE_CHECKING, Any

from glipv2.jobs.evaluate_predict import (
    RANDOM,
    Piece,
    as_detection,
    asked_of,
    pieces,
    predict,
    read_predictions,
    read_records,
)
from glipv2.pipeline import storage
from glipv2.pipeline.config import RunConfig
from glipv2.pipeline.config_loader import as_tree
from glipv2.pipeline.eval_config import SuiteConfig
from glipv2.pipeline.records import Record
from glipv2.pipeline.rounds import rounds_of
from glipv2.pipeline.shard_reader import open_shard_set

if TYPE_CHECKING:
    from glipv2.model.batch import Detection

SPLIT = re.compile(r"[_-](train|val|minival|test|dev|heldout)$")
"""The end of a set's name that says which part of the data it is."""
Work = dict[str, list[Piece]]
"""Protocol (or, of a curve, step) -> what is to be predicted."""


def all_models(config: RunConfig) -> dict[str, str]:
    """What the main job scores: every phase of the recipe, and random weights.

    Without the students of rounds that came to nothing.
    """
    from glipv2.pipeline.checkpoint import committed_steps

    later = rounds_of(config)[1:]
    phases = {phase: config.run_url(phase) for phase in config.phases}
    trained = {p: url for p, url in phases.items() if p not in later or committed_steps(url)}
    return {**trained, RANDOM: RANDOM}


def evaluate_main(config: RunConfig, models: dict[str, str]) -> dict[str, dict[str, float]]:
    """Score models (name -> URL or RANDOM) with every protocol the recipe has data for.

    Of a run folder every kept checkpoint is also scored on a few images, for the curve over steps.
    Writes RUN/eval/metrics-NAME.json and predictions-NAME.json. What was scored before with the
    same checkpoints, data and settings is not scored again.
    """
    keys = {name: cache_key(config, url) for name, url in models.items()}
    todo = {n: url for n, url in models.items() if scores(config, n)["key"] != keys[n]}
    work = {name: _work(config, url) for name, url in todo.items()}
    curves = {name: _curve_work(config, url) for name, url in todo.items()}
    every = [p for own in (*work.values(), *curves.values()) for part in own.values() for p in part]
    predict(config, every, "evaluate")
    for name in todo:
        content = {
            "key": keys[name],
            "metrics": _score(config, name, work[name]),
            "curve": _curve(curves[name]),
        }
        storage.write_json(_eval_url(config, f"metrics-{name}.json"), content)
    return {name: scores(config, name)["metrics"] for name in models}


def scores(config: RunConfig, name: str) -> dict[str, Any]:
    """RUN/eval/metrics-NAME.json: the key of what was scored, its metrics and its curve, if any."""
    url = _eval_url(config, f"metrics-{name}.json")
    return storage.read_json(url) if storage.exists(url) else {"key": "", "metrics": {}}


def _eval_url(config: RunConfig, name: str) -> str:
    return storage.join(config.run_dir, "eval", name)


def real_name(config: RunConfig) -> str:
    """What the figures on `eval.real_detection` are called: `bccd` for `bccd_heldout`."""
    return SPLIT.sub("", config.eval.real_detection.rstrip("/").rpartition("/")[2])


def _protocols(config: RunConfig) -> dict[str, SuiteConfig]:
    chunk, found = config.eval.chunk_size, {}
    if own := config.eval.detection:
        found = {
            "caption": SuiteConfig(set=own, ask="shown"),
            "chunked": SuiteConfig(set=own, chunk_size=chunk),
            "phrases": SuiteConfig(set=own, task="phrases"),
        }
    if real := config.eval.real_detection:
        found["real"] = SuiteConfig(set=real, chunk_size=chunk)
    return found


def _work(config: RunConfig, checkpoint: str) -> Work:
    protocols = _protocols(config)
    return {name: _pieces(config, checkpoint, suite) for name, suite in protocols.items()}


def _curve_work(config: RunConfig, checkpoint: str) -> Work:
    if not config.eval.detection:
        return {}
    limit = config.eval.curve_images
    few = SuiteConfig(set=config.eval.detection, ask="shown", limit=limit)
    return {str(s): _pieces(config, url, few) for s, url in _kept_steps(checkpoint).items()}


def _pieces(config: RunConfig, checkpoint: str, suite: SuiteConfig) -> list[Piece]:
    from glipv2.pipeline.checkpoint import model_digest, resolve_checkpoint

    data = open_shard_set(config.set_url(suite.set))
    if checkpoint == RANDOM:
        url, model = RANDOM, storage.digest([as_tree(config.model), config.seed])
    else:
        url = resolve_checkpoint(checkpoint)
        model = model_digest(url)
    folder, asked = storage.join(config.run_dir, "eval"), asked_of(suite, config.eval.precision)
    return pieces(folder, model, url, data, asked, suite.limit)


def _kept_steps(checkpoint: str) -> dict[int, str]:
    """Step -> URL of the checkpoints that a run folder keeps; nothing else has any."""
    from glipv2.model.folders import step_url
    from glipv2.pipeline.checkpoint import committed_steps

    steps = [] if checkpoint == RANDOM else committed_steps(checkpoint)
    return {s: step_url(checkpoint, s) for s in steps}


def _curve(work: Work) -> list[dict[str, float]]:
    """Caption AP50 of each checkpoint of a run, on the first images of the set."""
    from glipv2.eval.detection import average_precision

    points = []
    for step, own in work.items():
        records, categories = _records(own)
        result = average_precision(records, _found(own), categories)
        points.append({"step": int(step), "caption_ap50": result.ap50})
    return points


def _records(work: list[Piece]) -> tuple[list[Record], tuple[str, ...]]:
    """The records that were looked at, in order, and their set's categories."""
    data = open_shard_set(work[0].set_url)
    return [r for p in work for r in read_records(data, p.shard, 0, p.images)], data.categories


def _found(work: list[Piece]) -> "dict[str, Detection]":
    return {k: as_detection(e) for _, own in read_predictions(work) for k, e in own.items()}


def _score(config: RunConfig, name: str, work: Work) -> dict[str, float]:
    """Metrics of one model from its predictions."""
    from glipv2.eval.detection import average_precision, category_groups
    from glipv2.eval.grounding import PhraseRecall

    metrics: dict[str, float] = {}
    if config.eval.detection:
        records, categories = _records(work["caption"])
        groups = category_groups(records, categories)
        for protocol in ("caption", "chunked"):
            found = _found(work[protocol])
            result = average_precision(records, found, categories)
            metrics[f"{protocol}_ap50"] = result.ap50
            for group, members in sorted(groups.items()):
                metrics[f"{protocol}_{group}_ap50"] = result.over(members).ap50
                metrics[f"{protocol}_{group}_ap"] = result.over(members).ap
            if protocol == "caption":
                examples = _examples(records, found, categories)
                storage.write_json(_eval_url(config, f"predictions-{name}.json"), examples)
        recall, phrases = PhraseRecall(), _found(work["phrases"])
        for record in records:
            recall.add_record(record, phrases[record.key])
        metrics.update(recall.metrics())
    if config.eval.real_detection:
        records, categories = _records(work["real"])
        result = average_precision(records, _found(work["real"]), categories)
        real = real_name(config)
        metrics[f"{real}_ap50"], metrics[f"{real}_ap"] = result.ap50, result.ap
        metrics |= {f"{real}_{n}_ap50": ap50 for n, (_, ap50) in result.per_category.items()}
    return metrics


def _examples(
    records: list[Record], detections: "dict[str, Detection]", categories: tuple[str, ...]
) -> list[dict[str, Any]]:
    """Truth and predictions side by side, for the pictures of the report."""
    from glipv2.eval.detection import scored_boxes

    examples = []
    for record in records:
        plain = scored_boxes(detections[record.key])
        rows = zip(plain.boxes, plain.names, plain.scores, strict=True)
        examples.append(
            {
                "key": record.key,
                "truth": [
                    {"box": list(r.box), "name": categories[r.category]}
                    for r in record.regions
                    if r.category is not None
                ],
                "predicted": [
                    {"box": [round(v, 1) for v in box], "name": name, "score": round(score, 4)}
                    for box, name, score in rows
                    if score >= 0.2
                ],
            }
        )
    return examples


def cache_key(config: RunConfig, checkpoint: str) -> str:
    """Digest of everything that decides the metrics of a checkpoint and the curve of a run."""
    from glipv2.pipeline.checkpoint import resolve_checkpoint, weights_identity

    if checkpoint == RANDOM:
        identity: Any = [as_tree(config.model), config.seed]
    else:
        urls = [resolve_checkpoint(checkpoint), *_kept_steps(checkpoint).values()]
        identity = [weights_identity(url) for url in urls]
    settings = config.eval
    names = (settings.detection, settings.real_detection)
    digests = [name and open_shard_set(config.set_url(name)).digest for name in names]
    decisive = [real_name(config), settings.chunk_size, settings.curve_images, settings.precision]
    return storage.digest([identity, digests, decisive])
