"""What a labelling will do, before it is done: teacher, threshold, settings, work that is left."""

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from glipv2.pipeline import storage
from glipv2.pipeline.config import LabelConfig, RunConfig
from glipv2.pipeline.errors import ConfigError, DataError

if TYPE_CHECKING:
    from glipv2.pipeline.shard_format import ShardInfo, ShardSet

CALIBRATION_FLOOR = 0.05
"""Lowest score that is looked at when the threshold is chosen."""
SETTINGS = "label.json"
"""In a labelled set's folder: what decides its content. Written before the first shard, and not
changed once there is one."""
DECIDING = ("score_threshold", "max_boxes", "cross_phrase_nms", "keep_empty", "precision")
READERS = 16
"""Commit records that are read at once."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A labelling whose teacher and threshold are settled."""

    config: RunConfig
    settings: LabelConfig
    """The recipe's, with the teachers resolved and the threshold chosen."""
    deciding: dict[str, Any]
    """What decides which boxes a set holds (not where or how fast it is made)."""

    @property
    def stamp(self) -> dict[str, str]:
        """What every record and commit record says of its making."""
        return stamp_of(self.deciding)


def stamp_of(deciding: dict[str, Any]) -> dict[str, str]:
    return {"teacher": deciding["teacher"], "label_settings": storage.digest(deciding)}


def what_decides(settings: LabelConfig) -> dict[str, Any]:
    """Of a labelling's content, with teacher and parser as this machine has them."""
    from glipv2.data_prep.phrases import parser_version
    from glipv2.data_prep.teachers import teacher_digest

    return {
        "teacher": teacher_digest((settings.teacher, *settings.ensemble)),
        "parser": parser_version(settings.phrases),
        **{f"phrases.{key}": value for key, value in dataclasses.asdict(settings.phrases).items()},
        **{key: getattr(settings, key) for key in DECIDING},
    }


def make_plan(config: RunConfig) -> Plan:
    """Resolve the teachers and choose the threshold; ConfigError or DataError when that fails."""
    given = config.label
    if not given.teacher or not given.inputs:
        raise ConfigError("label.teacher and label.inputs must be set")
    _check_inputs(config)
    teacher, *ensemble = (_resolved(config, name) for name in (given.teacher, *given.ensemble))
    settings = dataclasses.replace(given, teacher=teacher, ensemble=tuple(ensemble))
    deciding = what_decides(settings)
    if given.calibration:
        threshold = _calibrated(config, settings, deciding)
        settings = dataclasses.replace(settings, score_threshold=threshold)
        deciding["score_threshold"] = threshold
    return Plan(config=config, settings=settings, deciding=deciding)


def _check_inputs(config: RunConfig) -> None:
    """ConfigError unless every set of pairs has an output set of its own."""
    urls = [config.set_url(name) for pair in config.label.inputs.items() for name in pair]
    if len(set(urls)) < len(urls):
        [(twice, _)] = Counter(urls).most_common(1)
        raise ConfigError(f"label.inputs names {twice} twice; each set needs a folder of its own")


def _resolved(config: RunConfig, name: str) -> str:
    from glipv2.pipeline.checkpoint import resolve_checkpoint

    if name.startswith("hf:"):
        return name
    try:
        return resolve_checkpoint(config.run_url(name))
    except DataError as error:
        phase = name in config.phases
        cure = f": glipv2 pretrain RECIPE --phase {name}" if phase else ""
        raise DataError(f"label.teacher: {error}{cure}") from error


def _calibrated(config: RunConfig, settings: LabelConfig, deciding: dict[str, Any]) -> float:
    """The lowest threshold that reaches `label.target_precision` on the gold set.

    The choice is written to RUN/labels/threshold.json with its precision-recall curve and reused.
    """
    from glipv2.data_prep.labelling import ShardTask
    from glipv2.eval.labels import choose_threshold, judge_labels
    from glipv2.jobs.label import label_on_ray
    from glipv2.pipeline.progress import progress
    from glipv2.pipeline.shard_reader import iterate_records, open_shard_set

    url = storage.join(config.run_dir, "labels", "threshold.json")
    gold = open_shard_set(config.set_url(settings.calibration))
    key = storage.digest([gold.digest, settings.target_precision, deciding])
    if storage.exists(url) and (known := storage.read_json(url))["key"] == key:
        return float(known["threshold"])
    floor = dataclasses.replace(settings, score_threshold=CALIBRATION_FLOOR, keep_empty=False)
    tasks = [ShardTask(number=number) for number in range(len(gold.shards))]
    at_floor = {key: getattr(floor, key) for key in DECIDING}
    done = label_on_ray(floor, gold, tasks, stamp=stamp_of({**deciding, **at_floor}))
    results = progress(done, len(tasks), "calibrate")
    labelled = [record for _, records in results for record in records]
    judged = judge_labels(labelled, iterate_records(gold.url))
    chosen = choose_threshold(judged, settings.target_precision)
    storage.write_json(url, {"key": key, **dataclasses.asdict(chosen)})
    return chosen.threshold


def gold_quality(config: RunConfig) -> dict[str, float]:
    """Of the teacher's labels on `label.calibration`: threshold, precision, recall and their F1."""
    make_plan(config)
    found = storage.read_json(storage.join(config.run_dir, "labels", "threshold.json"))
    quality = {key: float(found[key]) for key in ("threshold", "precision", "recall")}
    both = quality["precision"] + quality["recall"]
    return {**quality, "f1": 2 * quality["precision"] * quality["recall"] / both if both else 0.0}


def claim(plan: Plan, pairs: "ShardSet", out: str) -> None:
    """Write down what decides the set's content; ConfigError when it was begun with other settings.

    The message names each setting that differs. A claim without a committed shard gives way.
    """
    url, commits = storage.join(out, SETTINGS), storage.list_names(storage.join(out, "commits"))
    begun = any(name.endswith(".json") for name in commits)
    if begun and not storage.exists(url):
        raise ConfigError(
            f"{out} holds shards but no {SETTINGS}: `glipv2 label` did not make them, or it was "
            "deleted; choose another output set, or delete that folder to label again"
        )
    written = storage.canonical_json({"input": pairs.digest, **plan.deciding})
    storage.create_once(url, written)
    mine, there = json.loads(written), storage.read_json(url)
    differing = [
        f"  {key}: {there.get(key)!r} there, {mine.get(key)!r} now"
        for key in sorted({*there, *mine})
        if there.get(key) != mine.get(key)
    ]
    if differing and begun:
        raise ConfigError(
            f"{out} was labelled with other settings:\n" + "\n".join(differing) + "\n"
            "choose another output set, or delete that folder to label again"
        )
    if differing:
        storage.write_bytes(url, written)


def check_made_so(plan: Plan, out: str, shard: "ShardInfo") -> None:
    """ConfigError for a shard that was labelled with other settings, by whoever claimed the set at
    the same time."""
    if shard.stats.get("label_settings") != plan.stamp["label_settings"]:
        raise ConfigError(
            f"{out}: {shard.name} was labelled with other settings, at the same time as this "
            "command began; choose another output set, or delete that folder to label again"
        )


def committed(out: str, names: Iterable[str]) -> Iterator["ShardInfo | None"]:
    """Each shard if it is committed."""
    from glipv2.pipeline.shards import committed_shard

    with ThreadPoolExecutor(READERS) as threads:
        yield from threads.map(partial(committed_shard, out), names)
