"""Tiny sets, models and runs to evaluate, shared by the tests of evaluate and schedule."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch

from glipv2.data_prep.toy import toy_record
from glipv2.jobs.evaluate import evaluate_suites
from glipv2.jobs.prepare import prepare_set
from glipv2.model.config import InputConfig, preset
from glipv2.model.folders import step_url
from glipv2.model.glip import build_model
from glipv2.model.tokenizer import Tokenizer, tiny_vocab
from glipv2.model.weights import model_files
from glipv2.pipeline.checkpoint import write_folder
from glipv2.pipeline.config import PrepareConfig, RunConfig
from glipv2.pipeline.config_loader import config_from_tree
from glipv2.pipeline.records import Question, Record, Region
from glipv2.pipeline.shards import write_shard_set

SHARDS, IMAGES = 4, 3
"""Of the detection set: shards, and images of each."""
HEADS: dict[str, Any] = {"masks": True, "answers": ("red", "blue", "two"), "captions": True}


@cache
def tiny_model(seed: int, heads: bool = False, glip: bool = False) -> dict[str, bytes]:
    """The files of a model with random weights that is sure of itself; `glip` as of GLIP's own."""
    settings = InputConfig(short_side=64, long_side=64, pad_to=(64, 64))
    own = {"input": settings, "glip_compatible": glip, **(HEADS if heads else {})}
    config = dataclasses.replace(preset("tiny"), **own)
    model = build_model(config, seed)
    torch.nn.init.zeros_(model.alignment_head.bias0)
    tokenizer = Tokenizer.from_vocab(tiny_vocab(), model.config.text_encoder.max_tokens)
    return model_files(model, tokenizer)


def save_step(run: str, step: int, seed: int | None = None) -> str:
    """A committed step of a run; its weights follow from the step, or from `seed`."""
    url = step_url(run, step)
    write_folder(url, tiny_model(step if seed is None else seed), step)
    return url


def write_detection(folder: Path) -> str:
    """A set of SHARDS x IMAGES toy scenes."""
    options = PrepareConfig(source="toy", set="toy_val", count=SHARDS * IMAGES, size=64, seed=1)
    prepare_set(str(folder), options, samples_per_shard=IMAGES)
    return str(folder)


def scene(number: int, **changes: Any) -> Record:
    """A toy picture with one true region, for tasks other than detection."""
    whole = toy_record("toy_val", number, seed=1, size=64)
    region = dataclasses.replace(whole.regions[0], category=None)
    return dataclasses.replace(whole, regions=(region,), provenance={}, **changes)


def write_tasks(folder: Path) -> dict[str, str]:
    """Task -> a small set of that kind."""
    referring = []
    for number in range(4):
        plain = scene(number, task="referring")
        [region] = plain.regions
        words = plain.caption[slice(*region.spans[0])]
        own = Region(box=region.box, spans=((0, len(words)),), phrase=words, mask=region.mask)
        referring.append(dataclasses.replace(plain, caption=words, regions=(own,)))
    asked = [
        scene(n, task="vqa", caption="", questions=(
            Question(id=f"{n}1", text="what colour is it", answers=("red",) * 7 + ("blue",) * 3),
            Question(id=f"{n}2", text="how many", answers=("two",) * 10),
        ))
        for n in range(3)
    ]  # fmt: skip
    told = [
        scene(n, task="captioning", caption="a red square", captions=("a red square", "a shape"))
        for n in range(3)
    ]
    secret = [
        dataclasses.replace(
            record,
            questions=tuple(dataclasses.replace(own, answers=()) for own in record.questions),
        )
        for record in asked
    ]
    spanless = [
        dataclasses.replace(
            record,
            task="captioning",
            regions=tuple(dataclasses.replace(region, spans=()) for region in record.regions),
        )
        for record in referring
    ]
    several = [dataclasses.replace(record, regions=record.regions * 2) for record in referring]
    sets = {"referring": referring, "vqa": asked, "captioning": told, "secret": secret,
            "secret2": secret[:2], "spanless": spanless, "several": several}  # fmt: skip
    few = [
        dataclasses.replace(
            r, task="detection", caption="",
            regions=(dataclasses.replace(r.regions[0], category=1, spans=(), phrase=""),),
            provenance={"neg_categories": [0], "not_exhaustive_categories": []},
        )
        for r in referring
    ]  # fmt: skip
    sets |= {"few": few, "lvis": few}
    info = {"lvis": {"frequency": ["r", "c", "f"]}}
    for name, records in sets.items():
        categories = ("cat", "blue_dog", "cow") if records is few else ()
        if name in ("vqa", "captioning", "secret", "secret2"):
            records = [dataclasses.replace(record, regions=()) for record in records]
        write_shard_set(
            str(folder / name), records, categories, info.get(name, {}), samples_per_shard=2
        )
    return {name: str(folder / name) for name in sets}


def write_scored_tasks(folder: Path) -> Path:
    """FOLDER/run, where a model was really scored on a suite of each task."""
    (folder / "model-x").mkdir()
    for name, content in tiny_model(0, heads=True).items():
        (folder / "model-x" / name).write_bytes(content)
    own = write_tasks(folder)
    suites = {
        "coco": {"set": write_detection(folder / "val"), "masks": True, "limit": 3},
        "lvis-minival": {"set": own["lvis"], "task": "lvis", "masks": True},
        "flickr30k": {"set": str(folder / "val"), "task": "phrases", "limit": 3},
        "refcoco": {"set": own["referring"], "task": "referring"},
        "phrasecut": {"set": own["referring"], "task": "segmentation"},
        "vqav2": {"set": own["vqa"], "task": "vqa"},
        "coco-captions": {"set": own["captioning"], "task": "captioning", "beams": 1},
    }
    config = scored_config(folder / "run", suites)
    evaluate_suites(config, {"model": str(folder / "model-x")})
    return folder / "run"


def write_result(
    run: Path,
    suite: str,
    metrics: dict[str, float],
    *,
    step: int = 0,
    folder: str = "",
    protocol: str = "",
    sets: dict[str, dict[str, float]] | None = None,
    task: str = "",
) -> None:
    """RUN/eval/step-N/SUITE.json (or in `folder`) with these figures; the first one leads."""
    where = run / "eval" / (folder or f"step-{step:06d}")
    where.mkdir(parents=True, exist_ok=True)
    every = {name: {"metrics": own, "per_category": {}, "url": name, "images": 2}
             for name, own in (sets or {suite: metrics}).items()}  # fmt: skip
    result = {"suite": suite, "first": next(iter(metrics)), "metrics": metrics, "key": "",
              "protocol": protocol, "sets": every, **({"task": task} if task else {})}  # fmt: skip
    (where / f"{suite}.json").write_text(json.dumps(result))


def write_scored_runs(folder: Path) -> None:
    """FOLDER/one and FOLDER/two, a step each, scored on boxes and on phrases of FOLDER/val."""
    write_detection(folder / "val")
    suites = {"toy": {"set": str(folder / "val"), "chunk_size": 5},
              "words": {"set": str(folder / "val"), "task": "phrases"}}  # fmt: skip
    for name, seed in (("one", 1), ("two", 2)):
        save_step(str(folder / name), 20, seed=seed)
        config = scored_config(folder / name, suites)
        evaluate_suites(config, {"model": str(folder / name)})


def scored_config(run_dir: object, eval_suites: dict[str, Any], **schedule: Any) -> RunConfig:
    """A recipe that scores `run_dir` on suites."""
    tree = {"run_dir": str(run_dir), "eval": {"suites": eval_suites, "num_actors": 2},
            "schedule": schedule}  # fmt: skip
    return config_from_tree(tree, [])


def counting_map(
    done: list[Any], pools: list[dict[str, Any]] | None = None
) -> Callable[..., Iterator[tuple[Any, Any]]]:
    """`map_on_ray` in this process; every item that was done, and what pool was asked for, is added
    to the lists."""

    def run(make_worker: Any, items: Iterable[Any], **pool: Any) -> Iterator[tuple[Any, Any]]:
        if pools is not None:
            pools.append(pool)
        worker = make_worker()
        for item in items:
            result = worker(item)
            done.append(item)
            yield item, result

    return run


def spy(call: Any, asked: list[Any]) -> Any:
    """A method of Grounder that notes what it is asked."""

    def wrapped(self: Any, images: Any, texts: Any, **named: Any) -> Any:
        asked.append(texts)
        return call(self, images, texts, **named)

    return wrapped
