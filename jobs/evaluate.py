"""glipv2 evaluate RECIPE: checkpoints -> predictions on Ray actors -> metrics on the driver.

Protocols: "caption" prompts an image with the categories it shows, "chunked" with all categories of
the set, split into prompts of `eval.chunk_size`; "phrases" grounds the phrases of the caption;
"real" is "chunked" on the second detection set, whose categories fit one prompt.
"""

import argparse
import re
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from typing import Any

from glipv2.jobs.stages import add_recipe_arguments, recipe_config, stage, use_cluster
from glipv2.pipeline import storage
from glipv2.pipeline.config import EvalConfig, RunConfig
from glipv2.pipeline.config_loader import as_tree
from glipv2.pipeline.errors import ConfigError
from glipv2.pipeline.records import Record
from glipv2.pipeline.rounds import rounds_of

Found = dict[tuple[str, str], dict[str, Any]]
"""(model, protocol) -> record key -> Detection."""

RANDOM = "random"
"""Instead of a checkpoint: the recipe's model with random weights, the floor of every table."""
SPLIT = re.compile(r"[_-](train|val|minival|test|dev|heldout)$")
"""The end of a set's name that says which part of the data it is."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    which = "only this phase of the recipe; without it all phases, and random weights"
    add_recipe_arguments(parser, phase=which, cluster=True)
    parser.add_argument("--checkpoint", help="run folder or step folder to score instead")


def run(arguments: argparse.Namespace) -> int:
    from glipv2.jobs.summary import summarise, summary_table

    use_cluster(arguments.address)
    phase, checkpoint = arguments.phase, arguments.checkpoint
    if phase and checkpoint:
        raise ConfigError("--phase and --checkpoint name two things to score; give one of them")
    config = recipe_config(arguments)
    if config.phases and not phase and not checkpoint:
        with stage(config.run_dir, "evaluate"):
            evaluate(config, all_models(config))
        print(summary_table(summarise(config)))  # noqa: T201 - the answer of the command
        return 0
    name = phase or "model"
    url = checkpoint or recipe_config(arguments, phase).run_dir
    for key, value in evaluate(config, {name: url})[name].items():
        print(f"{key:32s} {value:.4f}")  # noqa: T201
    if phase:
        summarise(config)
    return 0


def all_models(config: RunConfig) -> dict[str, str]:
    """What the main job scores: every phase of the recipe, and random weights.

    Without the students of rounds that came to nothing.
    """
    from glipv2.pipeline.checkpoint import committed_steps

    later = rounds_of(config)[1:]
    phases = {phase: config.run_url(phase) for phase in config.phases}
    trained = {p: url for p, url in phases.items() if p not in later or committed_steps(url)}
    return {**trained, RANDOM: RANDOM}


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one actor does in one go: one model, one protocol, one shard."""

    model: str
    checkpoint: str
    protocol: str
    set_url: str
    shard: int
    limit: int | None = None
    """Only the first images of the shard."""


def evaluate(config: RunConfig, models: dict[str, str]) -> dict[str, dict[str, float]]:
    """Score checkpoints (name -> URL or RANDOM) with every protocol the recipe has data for.

    Of a run folder every kept checkpoint is also scored on a few images, for the curve over steps.
    Writes RUN/eval/metrics-NAME.json and predictions-NAME.json. What was scored before with the
    same checkpoints, data and settings is not scored again.
    """
    if not config.eval.detection and not config.eval.real_detection:
        raise ConfigError("nothing to evaluate: set eval.detection or eval.real_detection")
    keys = {name: cache_key(config, url) for name, url in models.items()}
    todo = {n: url for n, url in models.items() if scores(config, n)["key"] != keys[n]}
    curves = {name: _curve_plan(config, name, url) for name, url in todo.items()}
    work = [item for name, url in todo.items() for item in _plan(config, name, url) + curves[name]]
    found = predict(config, work)
    for name in todo:
        content = {
            "key": keys[name],
            "metrics": _score(config, name, found),
            "curve": _curve(config, curves[name], found),
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


def _curve_plan(config: RunConfig, name: str, checkpoint: str) -> list[Work]:
    """One piece of work a kept checkpoint."""
    if not config.eval.detection:
        return []
    return [
        Work(
            model=f"{name}-{step}",
            checkpoint=url,
            protocol="caption",
            set_url=config.set_url(config.eval.detection),
            shard=0,
            limit=config.eval.curve_images,
        )
        for step, url in _kept_steps(checkpoint).items()
    ]


def _kept_steps(checkpoint: str) -> dict[int, str]:
    """Step -> URL of the checkpoints that a run folder keeps; nothing else has any."""
    from glipv2.pipeline.checkpoint import committed_steps, step_name

    steps = [] if checkpoint == RANDOM else committed_steps(checkpoint)
    return {s: storage.join(checkpoint, "checkpoints", step_name(s)) for s in steps}


def _curve(config: RunConfig, work: list[Work], found: Found) -> list[dict[str, float]]:
    """Caption AP50 of each checkpoint of a run, on the first images of the set."""
    from glipv2.eval.detection import average_precision

    if not work:
        return []
    url = config.set_url(config.eval.detection)
    records, categories = _records(url, config.eval.curve_images, shard=0)
    points = []
    for item in work:
        result = average_precision(records, found[item.model, "caption"], categories)
        step = int(item.model.rpartition("-")[2])
        points.append({"step": step, "caption_ap50": result.ap50})
    return points


def predict(config: RunConfig, work: list[Work]) -> Found:
    """All the work, spread over Ray actors."""
    from glipv2.pipeline.progress import progress
    from glipv2.pipeline.ray_map import map_on_ray

    make = partial(Predictor, config)
    found: Found = defaultdict(dict)
    done = map_on_ray(
        make,
        work,
        num_actors=config.eval.num_actors,
        gpus_per_actor=config.eval.gpus_per_actor,
    )
    for item, detections in progress(done, len(work), "evaluate"):
        found[item.model, item.protocol].update(detections)
    return found


class Predictor:
    """The worker of one actor; keeps the last model it loaded."""

    def __init__(self, config: RunConfig) -> None:
        import torch

        torch.set_num_threads(1)
        self.config = config
        self.loaded: tuple[str, Any] = ("", None)

    def __call__(self, work: Work) -> dict[str, Any]:
        from glipv2.pipeline.images import decode_image

        grounder = self._grounder(work.checkpoint)
        records, categories = _records(work.set_url, work.limit, work.shard)
        images = [decode_image(record.image) for record in records]
        settings = self.config.eval
        detections = _detect(grounder, images, records, categories, work.protocol, settings)
        return {record.key: d for record, d in zip(records, detections, strict=True)}

    def _grounder(self, checkpoint: str) -> Any:
        from glipv2.model.grounder import Grounder
        from glipv2.pipeline.checkpoint import load_model
        from glipv2.pipeline.dist import local_device
        from glipv2.pipeline.initial_model import random_model

        if self.loaded[0] != checkpoint:
            if checkpoint == RANDOM:
                model, tokenizer = random_model(self.config)
            else:
                model, tokenizer = load_model(checkpoint)
            self.loaded = (checkpoint, Grounder(model.eval().to(local_device()), tokenizer))
        return self.loaded[1]


def _detect(
    grounder: Any,
    images: list[Any],
    records: list[Record],
    categories: tuple[str, ...],
    protocol: str,
    settings: EvalConfig,
) -> list[Any]:
    from glipv2.eval.grounding import phrases_of

    if protocol == "phrases":
        prompts = [(r.caption, [p.spans for p in phrases_of(r)]) for r in records]
        return grounder.ground(images, prompts, batch_size=settings.batch_size)
    if protocol == "caption":
        shown = [
            sorted({categories[g.category] for g in r.regions if g.category is not None})
            for r in records
        ]
        return grounder.detect(images, shown, batch_size=settings.batch_size)
    return grounder.detect(
        images,
        list(categories),
        max_categories_per_prompt=settings.chunk_size,
        batch_size=settings.batch_size,
    )


def _plan(config: RunConfig, name: str, checkpoint: str) -> list[Work]:
    from glipv2.pipeline.shard_reader import open_shard_set

    sets = {}
    if config.eval.detection:
        url = config.set_url(config.eval.detection)
        sets = {protocol: url for protocol in ("caption", "chunked", "phrases")}
    if config.eval.real_detection:
        sets["real"] = config.set_url(config.eval.real_detection)
    return [
        Work(model=name, checkpoint=checkpoint, protocol=protocol, set_url=url, shard=shard)
        for protocol, url in sets.items()
        for shard in range(len(open_shard_set(url).shards))
    ]


def _records(
    url: str, limit: int | None = None, shard: int | None = None
) -> tuple[list[Record], tuple[str, ...]]:
    """The records of a set (or of one of its shards) in order, and the set's categories.

    An evaluation set must be whole: a bad sample raises.
    """
    from glipv2.pipeline.record_json import parse_record
    from glipv2.pipeline.shard_reader import open_shard_set, read_raw

    opened = open_shard_set(url)
    numbers = range(len(opened.shards)) if shard is None else [shard]
    records = []
    for number in numbers:
        raw_samples = read_raw(opened, number, 0, opened.shards[number].samples)
        records += [parse_record(raw) for raw in raw_samples]
        if limit is not None and len(records) >= limit:
            break
    return records[:limit], opened.categories


def _score(config: RunConfig, name: str, found: Found) -> dict[str, float]:
    """Metrics of one model from its predictions."""
    from glipv2.eval.detection import average_precision, category_groups
    from glipv2.eval.grounding import PhraseRecall

    metrics: dict[str, float] = {}
    if config.eval.detection:
        records, categories = _records(config.set_url(config.eval.detection))
        groups = category_groups(records, categories)
        for protocol in ("caption", "chunked"):
            result = average_precision(records, found[name, protocol], categories)
            metrics[f"{protocol}_ap50"] = result.ap50
            for group, members in sorted(groups.items()):
                metrics[f"{protocol}_{group}_ap50"] = result.over(members).ap50
                metrics[f"{protocol}_{group}_ap"] = result.over(members).ap
        recall = PhraseRecall()
        for record in records:
            recall.add_record(record, found[name, "phrases"][record.key])
        metrics.update(recall.metrics())
        examples = _examples(records, found[name, "caption"], categories)
        storage.write_json(_eval_url(config, f"predictions-{name}.json"), examples)
    if config.eval.real_detection:
        records, categories = _records(config.set_url(config.eval.real_detection))
        result = average_precision(records, found[name, "real"], categories)
        real = real_name(config)
        metrics[f"{real}_ap50"], metrics[f"{real}_ap"] = result.ap50, result.ap
        metrics |= {f"{real}_{n}_ap50": ap50 for n, (_, ap50) in result.per_category.items()}
    return metrics


def _examples(
    records: list[Record], detections: dict[str, Any], categories: tuple[str, ...]
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
    from glipv2.pipeline.shard_reader import open_shard_set

    if checkpoint == RANDOM:
        identity: Any = [as_tree(config.model), config.seed]
    else:
        urls = [resolve_checkpoint(checkpoint), *_kept_steps(checkpoint).values()]
        identity = [weights_identity(url) for url in urls]
    settings = config.eval
    names = (settings.detection, settings.real_detection)
    digests = [name and open_shard_set(config.set_url(name)).digest for name in names]
    decisive = [real_name(config), settings.chunk_size, settings.curve_images]
    return storage.digest([identity, digests, decisive])
