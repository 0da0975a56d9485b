"""What a checkpoint predicts on shard sets: made on Ray actors, one file a shard, never made twice.

    RUN/eval/predictions/CHECKPOINT/SET-ASKED/shard-000000.json.gz

The three names are digests: of the model's files, of the shard set, and of what was asked. So a
killed evaluation goes on, other figures can be computed without the model, and nothing is mixed up.
"""

import gzip
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from glipv2.pipeline import storage
from glipv2.pipeline.config import RunConfig
from glipv2.pipeline.errors import ConfigError, DataError
from glipv2.pipeline.eval_config import PromptConfig, SuiteConfig
from glipv2.pipeline.records import Record
from glipv2.pipeline.shard_format import ShardSet

if TYPE_CHECKING:
    from glipv2.eval.detection import ScoredBoxes
    from glipv2.model.batch import Detection
    from glipv2.model.grounder import Grounder

RANDOM = "random"
"""Instead of a checkpoint: the recipe's model with random weights, the floor of every table."""
VERSION = 2
"""Of what the files hold; a change of how predictions are made raises it."""
WINDOW = 8
"""Batches of images that are decoded at a time."""
Precision = Literal["fp32", "bf16", "fp16"]
Kind = Literal["all", "shown", "phrases", "answers", "captions"]
"""What is asked about an image: all categories, those it shows, the phrases of its caption, its
questions, or a caption."""
KINDS: dict[str, Kind] = {
    "lvis": "all", "phrases": "phrases", "referring": "phrases", "segmentation": "phrases",
    "vqa": "answers", "captioning": "captions",
}  # fmt: skip
LVIS_BOXES = 0, 300
"""Kept of an image (all) and of each prompt about it, unless a suite says otherwise: a cap here
would make of fixed AP another figure, and classic AP takes 300 of an image (facts I)."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Everything beside the model and the images that decides a prediction."""

    kind: Kind
    prompts: dict[str, PromptConfig] = field(default_factory=dict)
    chunk_size: int = 0
    max_boxes: int = 100
    max_boxes_per_prompt: int = 100
    masks: bool = False
    beams: int = 0
    precision: Precision = "fp32"
    min_probability: float = 0.05
    """Of a phrase, for a place to be looked at (facts D.1); all that is found there is kept."""

    @property
    def digest(self) -> str:
        return storage.digest([VERSION, asdict(self)])


def asked_of(suite: SuiteConfig, precision: Precision) -> Asked:
    """What the suite asks about images."""
    kind = KINDS.get(suite.task) or suite.ask
    if kind in ("answers", "captions"):
        beams = suite.beams if kind == "captions" else 0
        return Asked(kind=kind, beams=beams, precision=precision)
    if kind == "phrases":
        own = Asked(kind=kind, masks=suite.task == "segmentation", precision=precision)
        # the best box of an expression counts, however little it is like it (facts I)
        return replace(own, min_probability=0.0) if suite.task == "referring" else own
    of_image, of_prompt = LVIS_BOXES if suite.task == "lvis" else (100, 100)
    return Asked(
        kind=kind,
        prompts=suite.prompts,
        chunk_size=suite.chunk_size,
        max_boxes=of_image if suite.max_boxes is None else suite.max_boxes,
        max_boxes_per_prompt=suite.max_boxes_per_prompt or of_prompt,
        masks=suite.masks,
        precision=precision,
    )


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What an actor does in one go: one model, one shard."""

    checkpoint: str
    set_url: str
    shard: int
    images: int
    """The first ones of the shard."""
    asked: Asked
    out: str
    """The file that is made."""

    def __str__(self) -> str:
        return f"shard {self.shard} of {self.set_url}"


def pieces(
    folder: str, model: str, checkpoint: str, data: ShardSet, asked: Asked, limit: int
) -> list[Piece]:
    """All of the work of one model on one set, done or not.

    `folder` is RUN/eval, `model` a digest that tells it from others, `limit` 0 for all images.
    """
    return [
        Piece(
            checkpoint=checkpoint,
            set_url=data.url,
            shard=shard,
            images=images,
            asked=asked,
            out=out,
        )
        for shard, images, out in prediction_files(folder, model, data, asked.digest, limit)
    ]


def prediction_files(
    folder: str, model: str, data: ShardSet, asked: str, limit: int
) -> Iterator[tuple[int, int, str]]:
    """(shard, how many of its images, URL) of the files that hold what `pieces` makes; `asked` is
    the digest of what was asked."""
    left = limit or data.samples
    own = storage.join(folder, "predictions", model, f"{data.digest}-{asked}")
    for number, shard in enumerate(data.shards):
        images = min(left, shard.samples)
        if images:
            name = shard.name if images == shard.samples else f"{shard.name}-first-{images}"
            yield number, images, storage.join(own, f"{name}.json.gz")
        left -= images


def missing(work: Sequence[Piece]) -> list[Piece]:
    """What is not made yet."""
    folders = {piece.out.rpartition("/")[0] for piece in work}
    there = {f"{folder}/{name}" for folder in folders for name in storage.list_names(folder)}
    return [piece for piece in work if piece.out not in there]


def predict(config: RunConfig, work: Sequence[Piece], what: str) -> None:
    """Make the files that are missing, spread over Ray actors."""
    from glipv2.pipeline.progress import progress
    from glipv2.pipeline.ray_map import map_on_ray

    todo = missing(work)
    if not todo:
        return
    done = map_on_ray(
        partial(Predictor, config),
        todo,
        num_actors=min(len(todo), config.eval.num_actors),
        gpus_per_actor=config.eval.gpus_per_actor,
    )
    for _ in progress(done, len(todo), what):
        pass


class Predictor:
    """The worker of one actor; keeps the last model it loaded."""

    def __init__(self, config: RunConfig) -> None:
        import torch

        torch.set_num_threads(1)
        self.config = config
        self.loaded: tuple[tuple[str, str], Any] = (("", ""), None)

    def __call__(self, piece: Piece) -> None:
        from glipv2.pipeline.shard_reader import open_shard_set

        started = time.monotonic()
        data = open_shard_set(piece.set_url)
        grounder = self._grounder(piece.checkpoint, piece.asked.precision)
        batch = self.config.eval.batch_size
        images: dict[str, Any] = {}
        for first in range(0, piece.images, WINDOW * batch):
            last = min(first + WINDOW * batch, piece.images)
            records = read_records(data, piece.shard, first, last)
            found = _ask(grounder, records, data.categories, piece.asked, batch)
            images |= {record.key: entry for record, entry in zip(records, found, strict=True)}
        seconds = round(time.monotonic() - started, 3)
        text = json.dumps({"seconds": seconds, "names": data.categories, "images": images})
        storage.create_once(piece.out, gzip.compress(text.encode(), mtime=0))

    def _grounder(self, checkpoint: str, precision: str) -> "Grounder":
        from glipv2.model.grounder import PRECISIONS, Grounder
        from glipv2.pipeline.checkpoint import load_model
        from glipv2.pipeline.dist import local_device
        from glipv2.pipeline.initial_model import random_model

        if self.loaded[0] != (checkpoint, precision):
            if checkpoint == RANDOM:
                model, tokenizer = random_model(self.config)
            else:
                model, tokenizer = load_model(checkpoint)
            model = model.eval().to(local_device(), PRECISIONS[precision])  # type: ignore[index]
            self.loaded = ((checkpoint, precision), Grounder(model, tokenizer))
        grounder: Grounder = self.loaded[1]
        return grounder


def read_records(data: ShardSet, shard: int, first: int, last: int) -> list[Record]:
    """Records [first, last) of a shard. An evaluation set must be whole: a bad sample raises."""
    from glipv2.pipeline.record_json import parse_record
    from glipv2.pipeline.shard_reader import raw_samples

    return [parse_record(raw) for raw in raw_samples(data, shard, first, last)]


def _ask(
    grounder: "Grounder",
    records: Sequence[Record],
    categories: tuple[str, ...],
    asked: Asked,
    batch_size: int,
) -> list[Any]:
    """What the file holds of each image."""
    from glipv2.eval.grounding import phrases_of
    from glipv2.pipeline.images import decode_image

    images = [decode_image(record.image) for record in records]
    if asked.kind == "captions":
        written = grounder.caption(images, beams=asked.beams, batch_size=batch_size)
        return [text for text, _ in written]
    if asked.kind == "answers":
        texts = [[question.text for question in record.questions] for record in records]
        said = grounder.answer_each(images, texts, batch_size=batch_size)
        return [
            {question.id: best for question, [(best, _)] in zip(r.questions, own, strict=True)}
            for r, own in zip(records, said, strict=True)
        ]
    if asked.kind == "phrases":
        prompts = [(r.caption, [p.spans for p in phrases_of(r)]) for r in records]
        found = grounder.ground(
            images,
            prompts,
            batch_size=batch_size,
            score_threshold=0.0,
            masks="run_lengths" if asked.masks else False,
            min_probability=asked.min_probability,
        )
        return [{**_entry(one), "names": one.names} for one in found]
    return [_entry(one) for one in _categories(grounder, images, records, categories, asked,
                                               batch_size)]  # fmt: skip


def _categories(
    grounder: "Grounder",
    images: list[Any],
    records: Sequence[Record],
    categories: tuple[str, ...],
    asked: Asked,
    batch_size: int,
) -> "list[Detection]":
    """Detections whose labels count the set's categories."""
    import torch

    from glipv2.model.grounder import Masks

    masks: Masks = "run_lengths" if asked.masks else False
    if any(prompt.prefix or prompt.suffix for prompt in asked.prompts.values()):
        text, spans = _sentence(grounder, categories, asked.prompts)
        captions = [(text, spans)] * len(images)
        return grounder.ground(
            images, captions, batch_size=batch_size, score_threshold=0.0, masks=masks
        )
    said = {name: prompt.name or name for name, prompt in asked.prompts.items()}
    names, number = [list(categories)] * len(images), {n: i for i, n in enumerate(categories)}
    if asked.kind == "shown":
        shown = ({categories[g.category] for g in r.regions if g.category is not None}
                 for r in records)  # fmt: skip
        names = [sorted(own) for own in shown]
    found = grounder.detect(
        images,
        [[said.get(name, name) for name in own] for own in names],
        max_categories_per_prompt=asked.chunk_size or None,
        batch_size=batch_size,
        score_threshold=0.0,
        masks=masks,
        max_boxes=asked.max_boxes or None,
        max_boxes_per_prompt=asked.max_boxes_per_prompt,
    )
    labels = ([number[own[k]] for k in one.labels_K] for one, own in zip(found, names, strict=True))
    return [
        replace(one, labels_K=torch.tensor(own, dtype=torch.int64))
        for one, own in zip(found, labels, strict=True)
    ]


def _sentence(
    grounder: "Grounder", categories: tuple[str, ...], prompts: dict[str, PromptConfig]
) -> tuple[str, list[list[tuple[int, int]]]]:
    """One prompt with what stands around the names; ConfigError when it is too long to be one."""
    from glipv2.model.prompts import SEPARATOR, clean_category

    text, spans = "", []
    for category in categories:
        prompt = prompts.get(category, PromptConfig())
        name = prompt.name or clean_category(category)
        before = f"{prompt.prefix.strip()} " if prompt.prefix.strip() else ""
        after = prompt.suffix.strip()
        text += f"{SEPARATOR if text else ''}{before}"
        spans.append([(len(text), len(text) + len(name))])
        text += f"{name}{'' if not after or after[0] == ',' else ' '}{after}"
    if grounder.tokenizer.encode(text).truncated:
        raise ConfigError(
            "prompts with a prefix or suffix must fit one text of "
            f"{grounder.tokenizer.max_tokens} tokens, and these {len(categories)} categories do "
            "not; give names alone"
        )
    return text, spans


def _entry(found: "Detection") -> dict[str, Any]:
    entry: dict[str, Any] = {
        "boxes": found.boxes_K4.tolist(),
        "scores": found.scores_K.tolist(),
        "labels": found.labels_K.tolist(),
    }
    masks = found.run_lengths()
    return entry if masks is None else {**entry, "masks": masks}


def read_predictions(work: Sequence[Piece]) -> Iterator[tuple[float, dict[str, Any]]]:
    """Of each piece its seconds, and its record keys with what was predicted."""
    return map(read_prediction_file, (piece.out for piece in work))


def read_prediction_file(url: str) -> tuple[float, dict[str, Any]]:
    """The seconds it took, and record keys with what was predicted; DataError for a damaged one."""
    try:
        tree = json.loads(gzip.decompress(storage.read_bytes(url)))
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{url} is damaged: {error}; delete it, and evaluate again") from error
    images: dict[str, Any] = tree["images"]
    for entry in images.values():
        if isinstance(entry, dict) and "boxes" in entry:
            entry.setdefault("names", tree["names"])
    return float(tree["seconds"]), images


def as_detection(entry: dict[str, Any]) -> "Detection":
    """The very numbers of the prediction, in a tenth of the memory that JSON's values take."""
    import torch

    from glipv2.model.batch import Detection

    return Detection(
        boxes_K4=torch.tensor(entry["boxes"], dtype=torch.float32).reshape(-1, 4),
        scores_K=torch.tensor(entry["scores"], dtype=torch.float32),
        labels_K=torch.tensor(entry["labels"], dtype=torch.int64),
        names=entry["names"],
        run_lengths_K=entry.get("masks"),
    )


def as_boxes(entry: dict[str, Any]) -> "ScoredBoxes":
    """Plain numbers, with the masks if there are any."""
    from glipv2.eval.detection import ScoredBoxes

    names = [entry["names"][label] for label in entry["labels"]]
    return ScoredBoxes(
        boxes=entry["boxes"], scores=entry["scores"], names=names, masks=entry.get("masks")
    )
