"""What a labelling will do, before it is done: teacher, threshold, settings, work that is left."""

import dataclasses
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from glipv2.pipeline import storage
from glipv2.pipeline.config import LabelConfig, RunConfig
from glipv2.pipeline.errors import ConfigError, DataError

if TYPE_CHECKING:
    from glipv2.pipeline.shard_format import ShardInfo, ShardSet

log = logging.getLogger(__name__)

CALIBRATION_FLOOR = 0.05
"""Lowest score that is looked at when the threshold is chosen."""
SETTINGS = "label.json"
"""In a labelled set's folder: what decides its content. Written before the first shard, and once
there is one changed by --force only."""
BEFORE = "before"
"""In it: what shards were made with before --force, by the digest that these shards carry."""
DIGEST = "label_settings"
"""In every record and commit record: of what decided its content."""
DECIDING = ("score_threshold", "max_boxes", "cross_phrase_nms", "keep_empty", "precision")
READERS = 16
"""Commit records that are read at once."""


@dataclass(frozen=True, kw_only=True)
class Gold:
    """How the chosen threshold does on the gold set."""

    threshold: float
    precision: float
    recall: float
    target_precision: float
    reached: bool

    def __str__(self) -> str:
        return (
            f"threshold {self.threshold:.2f}: precision {self.precision:.2f}, "
            f"recall {self.recall:.2f} on gold"
        )

    @property
    def missed(self) -> str:
        """What to say where no threshold reaches the target; else empty."""
        if self.reached:
            return ""
        return (
            f"no threshold reaches label.target_precision {self.target_precision:g} on "
            f"label.calibration; the most precise is taken, with {self.precision:.2f}. Train the "
            "teacher longer, or take another"
        )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A labelling whose teacher and threshold are settled."""

    config: RunConfig
    settings: LabelConfig
    """The recipe's, with the teachers resolved and the threshold chosen."""
    deciding: dict[str, Any]
    """What decides which boxes a set holds (not where or how fast it is made)."""
    gold: "Gold | None" = None
    """With `label.calibration`."""
    force: bool = False
    """Go on with sets that were begun with other settings; what is committed stays."""

    @property
    def stamp(self) -> dict[str, str]:
        """What every record and commit record says of its making."""
        return stamp_of(self.deciding)


def stamp_of(deciding: dict[str, Any]) -> dict[str, str]:
    return {
        "teacher": deciding["teacher"],
        "parser": deciding["parser"],
        DIGEST: storage.digest(deciding),
    }


def what_decides(settings: LabelConfig) -> dict[str, Any]:
    """Of a labelling's content, with teacher, parser and code as this machine has them."""
    from glipv2.data_prep.labelling import VERSION
    from glipv2.data_prep.phrases import parser_version
    from glipv2.data_prep.teachers import teacher_digest

    return {
        "version": VERSION,
        "teacher": teacher_digest((settings.teacher, *settings.ensemble)),
        "parser": parser_version(settings.phrases),
        **{f"phrases.{key}": value for key, value in dataclasses.asdict(settings.phrases).items()},
        **{key: getattr(settings, key) for key in DECIDING},
    }


def make_plan(config: RunConfig, force: bool = False) -> Plan:
    """Resolve the teachers and choose the threshold; ConfigError or DataError when that fails."""
    given = config.label
    if not given.teacher or not given.inputs:
        raise ConfigError("label.teacher and label.inputs must be set")
    _check_inputs(config)
    teacher, *ensemble = (_resolved(config, name) for name in (given.teacher, *given.ensemble))
    settings = dataclasses.replace(given, teacher=teacher, ensemble=tuple(ensemble))
    deciding = what_decides(settings)
    gold = None
    if given.calibration:
        gold = _calibrated(config, settings, deciding)
        settings = dataclasses.replace(settings, score_threshold=gold.threshold)
        deciding["score_threshold"] = gold.threshold
    return Plan(config=config, settings=settings, deciding=deciding, gold=gold, force=force)


def _check_inputs(config: RunConfig) -> None:
    """ConfigError or DataError unless every set of pairs is there and has an output set of its
    own."""
    from glipv2.pipeline.shard_reader import open_shard_set

    urls = [config.set_url(name) for pair in config.label.inputs.items() for name in pair]
    if len(set(urls)) < len(urls):
        [(twice, _)] = Counter(urls).most_common(1)
        raise ConfigError(f"label.inputs names {twice} twice; each set needs a folder of its own")
    for source in config.label.inputs:
        try:
            open_shard_set(config.set_url(source))
        except DataError as error:
            raise DataError(f"label.inputs: {error}") from error


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


def _calibrated(config: RunConfig, settings: LabelConfig, deciding: dict[str, Any]) -> Gold:
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
        return _gold(known)
    floor = dataclasses.replace(settings, score_threshold=CALIBRATION_FLOOR, keep_empty=False)
    tasks = [ShardTask(number=number) for number in range(len(gold.shards))]
    at_floor = {key: getattr(floor, key) for key in DECIDING}
    done = label_on_ray(floor, gold, tasks, stamp=stamp_of({**deciding, **at_floor}))
    results = progress(done, len(tasks), "calibrate")
    labelled = [record for _, records in results for record in records]
    judged = judge_labels(labelled, iterate_records(gold.url))
    chosen = choose_threshold(judged, settings.target_precision)
    found = dataclasses.asdict(chosen)
    storage.write_json(url, {"key": key, **found})
    return _gold(found)


def _gold(found: dict[str, Any]) -> Gold:
    return Gold(**{field.name: found[field.name] for field in dataclasses.fields(Gold)})


def gold_quality(config: RunConfig) -> dict[str, float]:
    """Of the teacher's labels on `label.calibration`: threshold, precision, recall and their F1."""
    found = make_plan(config).gold
    assert found is not None, "rounds have label.calibration"
    quality = {key: getattr(found, key) for key in ("threshold", "precision", "recall")}
    both = quality["precision"] + quality["recall"]
    return {**quality, "f1": 2 * quality["precision"] * quality["recall"] / both if both else 0.0}


def check_claims(plan: Plan) -> None:
    """`check_claim` of all sets, before hours go into the first; warns of what is forced."""
    from glipv2.pipeline.shard_reader import open_shard_set

    for source, target in plan.settings.inputs.items():
        pairs = open_shard_set(plan.config.set_url(source))
        if forced := check_claim(plan, pairs, plan.config.set_url(target)):
            log.warning(forced)


def check_claim(plan: Plan, pairs: "ShardSet", out: str) -> str:
    """ConfigError when the set was begun with other settings, each that differs named; a look that
    touches nothing. With --force it is returned, for a warning, unless the set is of other pairs.
    """
    url = storage.join(out, SETTINGS)
    if not _begun(out):
        return ""
    if not storage.exists(url):
        raise ConfigError(
            f"{out} holds shards but no {SETTINGS}: `glipv2 label` did not make them, or it was "
            "deleted; choose another output set, or delete that folder to label again"
        )
    mine, there = _claim_of(plan, pairs), read_claim(url).deciding
    differing = {
        key: f"  {key}: {there.get(key)!r} there, {mine.get(key)!r} now"
        for key in sorted({*there, *mine})
        if there.get(key) != mine.get(key)
    }
    if not differing:
        return ""
    said = f"{out} was labelled with other settings:\n" + "\n".join(differing.values()) + "\n"
    if plan.force and "input" not in differing:
        return f"{said}its shards stay as they are; any that are missing are labelled as asked now"
    go_on = "" if "input" in differing else ", or keep its shards and label the rest by --force"
    raise ConfigError(
        f"{said}choose another output set, or delete that folder to label again{go_on}"
    )


@dataclass(frozen=True)
class Claim:
    """What label.json says: what decides a set's content, and what did before --force."""

    deciding: dict[str, Any]
    """With the digest of the pairs, as `input`; as it is read from JSON."""
    before: dict[str, Any] = field(default_factory=dict)
    """By the digest that shards carry."""

    @property
    def stamp(self) -> dict[str, str]:
        return stamp_of({key: value for key, value in self.deciding.items() if key != "input"})

    @property
    def accepted(self) -> set[str]:
        """Digests of the settings that shards of the set may be made with."""
        return {self.stamp[DIGEST], *self.before}

    def to_json(self) -> bytes:
        before = {BEFORE: self.before} if self.before else {}
        return storage.canonical_json(self.deciding | before)


def claim(plan: Plan, pairs: "ShardSet", out: str, complete: bool) -> Claim:
    """Write down what decides the set's content; ConfigError when it was begun with other settings.

    A claim without a committed shard gives way, and one of a `complete` set stays what it is.
    """
    check_claim(plan, pairs, out)
    url, mine = storage.join(out, SETTINGS), Claim(_claim_of(plan, pairs))
    if storage.create_once(url, mine.to_json()):
        return mine
    if _begun(out):
        check_claim(plan, pairs, out)  # whoever was faster may have begun
        there = read_claim(url)
        if complete or there.deciding == mine.deciding:
            return there
        mine = Claim(mine.deciding, there.before | {there.stamp[DIGEST]: there.deciding})
    storage.write_bytes(url, mine.to_json())
    return mine


def _begun(out: str) -> bool:
    commits = storage.list_names(storage.join(out, "commits"))
    return any(name.endswith(".json") for name in commits)


def _claim_of(plan: Plan, pairs: "ShardSet") -> dict[str, Any]:
    claimed: dict[str, Any] = json.loads(
        storage.canonical_json({"input": pairs.digest, **plan.deciding})
    )
    return claimed


def read_claim(url: str) -> Claim:
    """Of the label.json at `url`; DataError when that is damaged."""
    there = None
    with suppress(DataError):
        there = storage.read_json(url)
    if not isinstance(there, dict) or not {"teacher", "parser"} <= there.keys():
        raise DataError(
            f"{url} is no record of a labelling; restore it, or delete the folder to label again"
        )
    return Claim(there, there.pop(BEFORE, {}))


def check_made_so(claimed: Claim, out: str, shard: "ShardInfo") -> None:
    """ConfigError for a shard that was labelled with other settings, by whoever claimed the set at
    the same time."""
    if shard.stats.get(DIGEST) not in claimed.accepted:
        raise ConfigError(
            f"{out}: {shard.name} was labelled with other settings, at the same time as this "
            "command began; choose another output set, or delete that folder to label again"
        )


def committed(out: str, names: Iterable[str]) -> Iterator["ShardInfo | None"]:
    """Each shard if it is committed."""
    from glipv2.pipeline.shards import committed_shard

    with ThreadPoolExecutor(READERS) as threads:
        yield from threads.map(partial(committed_shard, out), names)
