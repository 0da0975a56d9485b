"""glipv2 evaluate RECIPE: checkpoints -> predictions on Ray actors -> metrics on the driver.

Protocols: "caption" prompts an image with the categories it shows, "chunked" with all categories of
the set, split into prompts of `eval.chunk_size`; "phrases" grounds the phrases of the caption;
"real" is "chunked" on the second detection set, whose categories fit one prompt.
"""

import argparse
import dataclasses
import json
import os
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from typing import Any

from glipv2.pipeline import storage
from glipv2.pipeline.config import EvalConfig, RunConfig
from glipv2.pipeline.config_loader import as_tree, load_config
from glipv2.pipeline.errors import ConfigError
from glipv2.pipeline.records import Record

Found = dict[tuple[str, str], dict[str, Any]]
"""(model, protocol) -> record key -> Detection."""

RANDOM = "random"
"""Instead of a checkpoint: the recipe's model with random weights, the floor of every table."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="YAML file, see infra/recipes/")
    parser.add_argument("overrides", nargs="*", help="section.key=value, applied last")
    parser.add_argument("--phase", help="a phase of the recipe; its newest checkpoint is scored")
    parser.add_argument("--checkpoint", help="run folder or step folder to score instead")
    parser.add_argument("--address", help="Ray cluster to run on, for example auto")


def run(arguments: argparse.Namespace) -> int:
    if arguments.address:
        os.environ["RAY_ADDRESS"] = arguments.address
    config = load_config(arguments.recipe, arguments.overrides, arguments.phase)
    name = arguments.phase or "model"
    metrics = evaluate(config, {name: arguments.checkpoint or config.run_dir})[name]
    for key, value in metrics.items():
        print(f"{key:32s} {value:.4f}")  # noqa: T201 - the answer of the command
    return 0


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


def evaluate(
    config: RunConfig, models: dict[str, str], curves: dict[str, str] | None = None
) -> dict[str, dict[str, float]]:
    """Score checkpoints (name -> URL or RANDOM) with every protocol the recipe has data for.

    `curves` names runs (name -> run folder) of which every kept checkpoint is scored on a few
    images, for RUN/eval/curves.json. Writes RUN/eval/metrics-NAME.json and predictions-NAME.json.
    What was scored before with the same data and settings is not scored again.
    """
    if not config.eval.detection and not config.eval.real_detection:
        raise ConfigError("nothing to evaluate: set eval.detection or eval.real_detection")
    known = {name: _cached(config, name, _cache_key(config, url)) for name, url in models.items()}
    todo = {name: url for name, url in models.items() if known[name] is None}
    work = [item for name, url in todo.items() for item in _plan(config, name, url)]
    curve_work = _curve_plan(config, curves or {})
    found = predict(config, work + [item for items in curve_work.values() for item in items])
    scored = {}
    for name, url in todo.items():
        scored[name] = _score(config, name, found)
        content = {"key": _cache_key(config, url), "metrics": scored[name]}
        _write(config, f"metrics-{name}.json", content)
    if curve_work:
        _write(config, "curves.json", {n: _curve(config, w, found) for n, w in curve_work.items()})
    return {name: scored[name] if name in scored else known[name] or {} for name in models}


def _curve_plan(config: RunConfig, runs: dict[str, str]) -> dict[str, list[Work]]:
    """Per run, one piece of work a kept checkpoint; nothing if the curves are there already."""
    from glipv2.pipeline.checkpoint import committed_steps, step_name

    done = storage.exists(storage.join(config.run_dir, "eval", "curves.json"))
    if done or not config.eval.detection:
        return {}
    url = config.set_url(config.eval.detection)
    return {
        name: [
            Work(
                model=f"{name}-{step}",
                checkpoint=storage.join(run_dir, "checkpoints", step_name(step)),
                protocol="caption",
                set_url=url,
                shard=0,
                limit=config.eval.curve_images,
            )
            for step in committed_steps(run_dir)
        ]
        for name, run_dir in runs.items()
    }


def _curve(config: RunConfig, work: list[Work], found: Found) -> list[dict[str, float]]:
    """Caption AP50 of each checkpoint of a run, on the first images of the set."""
    from glipv2.eval.detection import average_precision

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
        from glipv2.model.glip import build_model
        from glipv2.model.grounder import Grounder
        from glipv2.model.tokenizer import Tokenizer, tiny_vocab
        from glipv2.pipeline.checkpoint import load_model
        from glipv2.pipeline.dist import local_device

        if self.loaded[0] != checkpoint:
            if checkpoint == RANDOM:
                model = build_model(self.config.model, self.config.seed).eval()
                max_tokens = self.config.model.text_encoder.max_tokens
                tokenizer = Tokenizer.from_vocab(tiny_vocab(), max_tokens)
            else:
                model, tokenizer = load_model(checkpoint)
            self.loaded = (checkpoint, Grounder(model.to(local_device()), tokenizer))
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
        _write(config, f"predictions-{name}.json", examples)
    if config.eval.real_detection:
        records, categories = _records(config.set_url(config.eval.real_detection))
        result = average_precision(records, found[name, "real"], categories)
        metrics["real_ap50"], metrics["real_ap"] = result.ap50, result.ap
        metrics.update({f"real_{n}_ap50": ap50 for n, (_, ap50) in result.per_category.items()})
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


def _cache_key(config: RunConfig, checkpoint: str) -> str:
    """Digest of everything that decides the metrics of a checkpoint."""
    from glipv2.pipeline.checkpoint import COMMIT, resolve_checkpoint
    from glipv2.pipeline.shard_reader import open_shard_set

    if checkpoint == RANDOM:
        identity: Any = [as_tree(config.model), config.seed]
    else:
        commit = storage.join(resolve_checkpoint(checkpoint), COMMIT)
        identity = json.loads(storage.read_bytes(commit))["files"]["model.safetensors"]
    names = [n for n in (config.eval.detection, config.eval.real_detection) if n]
    digests = [open_shard_set(config.set_url(name)).digest for name in names]
    settings = dataclasses.replace(config.eval, num_actors=1, batch_size=1)
    return storage.digest([identity, digests, as_tree(settings)])


def _cached(config: RunConfig, name: str, key: str) -> dict[str, float] | None:
    url = storage.join(config.run_dir, "eval", f"metrics-{name}.json")
    if not storage.exists(url):
        return None
    content = json.loads(storage.read_bytes(url))
    return content["metrics"] if content["key"] == key else None


def _write(config: RunConfig, name: str, content: Any) -> None:
    url = storage.join(config.run_dir, "eval", name)
    storage.write_bytes(url, json.dumps(content, indent=1, sort_keys=True).encode())
