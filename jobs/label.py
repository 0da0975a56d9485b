"""glipv2 label RECIPE: image-text pairs -> grounded shards, one output shard per input shard."""

import argparse
import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from glipv2.jobs.stages import add_recipe_arguments, recipe_config, stage, use_cluster
from glipv2.pipeline import storage
from glipv2.pipeline.config import LabelConfig, RunConfig
from glipv2.pipeline.errors import BadSample, ConfigError
from glipv2.pipeline.launch import exclusive
from glipv2.pipeline.records import Record

log = logging.getLogger(__name__)

CALIBRATION_FLOOR = 0.05
"""Lowest score that is looked at when the threshold is chosen."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_arguments(parser, phase="a phase of the recipe", cluster=True)


def run(arguments: argparse.Namespace) -> int:
    use_cluster(arguments.address)
    config = recipe_config(arguments, arguments.phase)
    with stage(config.run_dir, "label"):
        label(config)
    return 0


def label(config: RunConfig) -> None:
    """Label every set of `label.inputs` with the teacher; finished shards are never redone."""
    from glipv2.pipeline.checkpoint import MODEL_FILES, read_checkpoint, resolve_checkpoint

    settings = config.label
    if not settings.teacher or not settings.inputs:
        raise ConfigError("label.teacher and label.inputs must be set")
    teacher = resolve_checkpoint(config.run_url(settings.teacher))
    files = read_checkpoint(teacher, MODEL_FILES)
    teacher_digest = storage.digest({name: storage.crc32c(data) for name, data in files.items()})
    with exclusive(storage.join(config.run_dir, "labels")):
        threshold = choose_threshold(config, teacher, teacher_digest)
        settings = dataclasses.replace(settings, teacher=teacher, score_threshold=threshold)
        digest = storage.digest({**_kept_settings(settings), "teacher": teacher_digest})
        for source, target in settings.inputs.items():
            stamp = {"teacher": teacher_digest, "label_settings": digest}
            label_set(config, settings, source, target, stamp)


def _kept_settings(settings: LabelConfig) -> dict[str, Any]:
    """What decides what a labelled shard holds (not where or how fast it is made)."""
    from glipv2.data_prep.noun_phrases import parser_version

    names = ("score_threshold", "max_boxes", "cross_phrase_nms")
    return {name: getattr(settings, name) for name in names} | {"parser": parser_version()}


def choose_threshold(config: RunConfig, teacher: str, teacher_digest: str) -> float:
    """The score threshold: the recipe's, or the one that `label.calibration` asks for.

    The choice is written to RUN/labels/threshold.json with its precision-recall curve and reused.
    """
    from glipv2.eval.labels import choose_threshold as choose
    from glipv2.eval.labels import judge_labels
    from glipv2.pipeline.shard_reader import iterate_records, open_shard_set

    settings = config.label
    if not settings.calibration:
        return settings.score_threshold
    url = storage.join(config.run_dir, "labels", "threshold.json")
    gold = open_shard_set(config.set_url(settings.calibration))
    key = storage.digest(
        [teacher_digest, gold.digest, settings.target_precision, _kept_settings(settings)]
    )
    if storage.exists(url) and (known := storage.read_json(url))["key"] == key:
        return float(known["threshold"])
    floor = dataclasses.replace(settings, teacher=teacher, score_threshold=CALIBRATION_FLOOR)
    labelled: list[Record] = []
    make = partial(ShardLabeller, gold.url, floor, {})
    for _, records in _map(config, make, range(len(gold.shards)), "calibrate"):
        labelled.extend(records)
    judged = judge_labels(labelled, iterate_records(gold.url))
    chosen = choose(judged, settings.target_precision)
    storage.write_json(url, {"key": key, **dataclasses.asdict(chosen)})
    return chosen.threshold


def label_set(
    config: RunConfig, settings: LabelConfig, source: str, target: str, stamp: dict[str, str]
) -> None:
    """One set of pairs -> one labelled set with the same shard names."""
    from glipv2.pipeline.shard_reader import open_shard_set
    from glipv2.pipeline.shards import committed_shard, write_manifest

    pairs = open_shard_set(config.set_url(source))
    out = config.set_url(target)
    todo = [
        number
        for number, shard in enumerate(pairs.shards)
        if not _already_labelled(out, shard.name, stamp, pairs.digest)
    ]
    make = partial(ShardLabeller, pairs.url, settings, stamp, out, pairs.digest)
    for _ in _map(config, make, todo, f"label {source}"):
        pass
    committed = [committed_shard(out, shard.name) for shard in pairs.shards]
    shards = [shard for shard in committed if shard is not None]
    counts: Counter[str] = Counter()
    for shard in shards:
        counts.update(shard.stats.get("counts", {}))
    info = {"source": source, "input": pairs.digest, **stamp, "counts": dict(counts)}
    write_manifest(out, shards, (), info)
    for shard in shards:
        _quarantine_all(config, source, shard)


def _already_labelled(out: str, name: str, stamp: dict[str, str], digest: str) -> bool:
    from glipv2.pipeline.shards import committed_shard

    info = committed_shard(out, name)
    if info is None:
        return False
    found = {key: info.stats.get(key) for key in (*stamp, "input")}
    wanted = {**stamp, "input": digest}
    if found != wanted:
        raise ConfigError(
            f"{out}/{name} was labelled with other settings (there: {found}, now: {wanted}); "
            "choose another output set, or delete that folder to label again"
        )
    return True


def _quarantine_all(config: RunConfig, source: str, shard: Any) -> None:
    from glipv2.pipeline.quarantine import Quarantine

    quarantine = Quarantine(storage.join(config.run_dir, "labels", "quarantine.jsonl"))
    for key, reason, detail in shard.stats.get("bad", []):
        quarantine(source, shard.name, key, BadSample(reason, detail))


def _map(config: RunConfig, make: Callable[[], Any], items: Any, text: str) -> Iterator[Any]:
    from glipv2.pipeline.progress import progress
    from glipv2.pipeline.ray_map import map_on_ray

    settings = config.label
    done = map_on_ray(
        make, list(items), num_actors=settings.num_actors, gpus_per_actor=settings.gpus_per_actor
    )
    return progress(done, len(items), text)


class ShardLabeller:
    """The worker of one actor: loads the teacher once, then labels shard after shard.

    Without `out` the labelled records are returned; with it they are committed as the shard of the
    same name and only the name is returned.
    """

    def __init__(
        self,
        pairs_url: str,
        settings: LabelConfig,
        stamp: dict[str, str],
        out: str | None = None,
        input_digest: str = "",
    ) -> None:
        import torch

        from glipv2.model.grounder import Grounder
        from glipv2.pipeline.checkpoint import load_model
        from glipv2.pipeline.dist import local_device
        from glipv2.pipeline.shard_reader import open_shard_set

        torch.set_num_threads(1)
        model, tokenizer = load_model(settings.teacher)
        self.grounder = Grounder(model.to(local_device()), tokenizer)
        self.pairs = open_shard_set(pairs_url)
        self.settings, self.stamp, self.out = settings, stamp, out
        self.input_digest = input_digest

    def __call__(self, number: int) -> Any:
        from glipv2.pipeline.shards import write_shard

        shard = self.pairs.shards[number]
        counts: Counter[str] = Counter()
        bad: list[tuple[str, str, str]] = []
        records = self._label(number, counts, bad)
        if self.out is None:
            return list(records)
        stats = {"counts": counts, "bad": bad, "input": self.input_digest, **self.stamp}
        write_shard(self.out, shard.name, records, stats)
        return shard.name

    def _label(
        self, number: int, counts: Counter[str], bad: list[tuple[str, str, str]]
    ) -> Iterator[Record]:
        batch: list[tuple[Record, Any, Any]] = []
        for prepared in self._prepare(number, counts, bad):
            batch.append(prepared)
            if len(batch) == self.settings.batch_size:
                yield from self._ground(batch, counts)
                batch = []
        yield from self._ground(batch, counts)

    def _prepare(
        self, number: int, counts: Counter[str], bad: list[tuple[str, str, str]]
    ) -> Iterator[tuple[Record, Any, Any]]:
        """Readable pairs with at least one noun phrase, their image decoded."""
        from glipv2.data_prep.noun_phrases import noun_phrases
        from glipv2.pipeline.images import decode_image
        from glipv2.pipeline.record_json import parse_record
        from glipv2.pipeline.shard_reader import read_raw

        samples = self.pairs.shards[number].samples
        for raw in read_raw(self.pairs, number, 0, samples):
            counts["pairs"] += 1
            try:
                record = parse_record(raw)
                image = decode_image(record.image)
            except BadSample as error:
                counts[error.reason] += 1
                bad.append((raw.key, error.reason, error.detail))
                continue
            phrases = noun_phrases(record.caption)
            if not phrases:
                counts["no_phrase"] += 1
                continue
            yield record, image, phrases

    def _ground(
        self, batch: list[tuple[Record, Any, Any]], counts: Counter[str]
    ) -> Iterator[Record]:
        from glipv2.data_prep.pseudo_labels import select_regions

        if not batch:
            return
        prompts = [(r.caption, [((p.start, p.end),) for p in phrases]) for r, _, phrases in batch]
        detections = self.grounder.ground([image for _, image, _ in batch], prompts)
        for (record, _, phrases), detection in zip(batch, detections, strict=True):
            regions = select_regions(
                detection,
                phrases,
                score_threshold=self.settings.score_threshold,
                cross_phrase_nms=self.settings.cross_phrase_nms,
                max_boxes=self.settings.max_boxes,
            )
            counts["phrases"] += len(phrases)
            if not regions:
                counts["no_box"] += 1
                continue
            counts["images"] += 1
            counts["boxes"] += len(regions)
            yield dataclasses.replace(
                record,
                task="grounding",
                regions=regions,
                provenance={**record.provenance, **self.stamp},
            )
