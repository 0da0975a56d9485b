"""What a run trains for: places of words, questions or captions; and the texts of the latter two.

Each has its own loss and its own way through the model, so a batch is for one of them on every
rank. GLIPv2 is tuned for questions and for captions one by one (facts H.3), and so it is here: all
sets of a mixture are for one thing.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from glipv2.model.batch import BatchTask
from glipv2.pipeline.answers import normal_answer, soft_targets
from glipv2.pipeline.errors import BadSample, ConfigError
from glipv2.pipeline.record_json import parse_record
from glipv2.pipeline.records import Record, Task
from glipv2.pipeline.shard_format import ShardSet
from glipv2.pipeline.shard_reader import raw_samples

BATCH_TASKS: dict[Task, BatchTask] = {
    "detection": "grounding",
    "grounding": "grounding",
    "referring": "grounding",
    "vqa": "vqa",
    "captioning": "captioning",
}
"""What records are trained for; those of other tasks can't be."""
LOOKED_AT = 8
"""Samples at the start of a set that may be unreadable without hiding what it is for."""


def batch_task(source: str, record: Record) -> BatchTask:
    """What a record is for; ConfigError when nothing can be learned from its kind."""
    if record.task not in BATCH_TASKS:
        raise ConfigError(
            f"data.mixture: {source} holds records of task {record.task} ({record.key}), "
            "which say nothing of places: run `glipv2 label` on it and train on the result"
        )
    return BATCH_TASKS[record.task]


def mixture_task(
    sets: Mapping[str, ShardSet], answers: Sequence[str] = (), captions: bool = False
) -> BatchTask:
    """What all sets are for, as the first record of each says.

    ConfigError, with the cure, when they are for different things, or for one that a model with
    these `answers`, and with or without `captions`, has no head for.
    """
    firsts = {name: first_records(shard_set) for name, shard_set in sets.items()}
    found = {name: batch_task(name, records[0]) for name, records in firsts.items() if records}
    if len(set(found.values())) > 1:
        listed = ", ".join(f"{name} is for {task}" for name, task in found.items())
        raise ConfigError(
            f"data.mixture: {listed}, and a run is for one of these; train for one after the "
            "other, each run starting from the last (train.init)"
        )
    task: BatchTask = next(iter(found.values()), "grounding")
    if task == "vqa" and not answers:
        raise ConfigError(
            f"data.mixture: {', '.join(found)} asks questions, and the model knows no answers: set "
            "model.answers to the file of `glipv2 prepare answers`"
        )
    if task == "captioning" and not captions:
        raise ConfigError(
            f"data.mixture: {', '.join(found)} is for captioning, and the model has no head for "
            "it: set model.captions to true"
        )
    return task


def first_records(shard_set: ShardSet) -> list[Record]:
    """Those of the first LOOKED_AT that can be read."""
    found = []
    filled = [number for number, shard in enumerate(shard_set.shards) if shard.samples]
    for raw in raw_samples(shard_set, filled[0], 0, LOOKED_AT) if filled else ():
        with suppress(BadSample):
            found.append(parse_record(raw))
    return found


@dataclass(frozen=True, kw_only=True)
class WholeText:
    """A text that is read as it is: nothing is added to it, and no word is hidden."""

    text: str
    said: str
    """All that is claimed of the picture."""
    targets_V: np.ndarray | None = None
    """float32, how right each answer is that the model knows; None for captions."""


def draw_question(
    record: Record, numbers: Mapping[str, int], rng: np.random.Generator
) -> WholeText:
    """One of the record's questions and how right each answer is; `numbers` are the model's.

    A question that nobody answered in words of the model is passed over, as FIBER does: its
    targets would all be 0, which teaches only to say nothing. BadSample if none is left.
    """
    known = [
        question
        for question in record.questions
        if any(normal_answer(answer) in numbers for answer in question.answers)
    ]
    if not known:
        raise BadSample("answer_unknown", "no question has an answer that is in model.answers")
    question = known[rng.integers(len(known))]
    return WholeText(
        text=question.text,
        said=" ".join([question.text, *question.answers]),
        targets_V=soft_targets(question.answers, numbers),
    )


def draw_caption(record: Record, rng: np.random.Generator) -> WholeText:
    """One of the record's captions."""
    captions = [text for text in record.captions if text.strip()] or [record.caption]
    caption = captions[rng.integers(len(captions))]
    return WholeText(text=caption, said=caption)
