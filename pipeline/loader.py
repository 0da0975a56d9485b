"""The data path: shards -> stream -> picture and text -> tokens -> batch."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from glipv2.model.batch import NO_CATEGORY, NO_WORD, Batch, BatchTask
from glipv2.model.prompts import clean_category, token_map
from glipv2.model.tokenizer import Tokenizer
from glipv2.pipeline.answers import answer_numbers
from glipv2.pipeline.augment import Augmentation, cropped, draw_view, picture
from glipv2.pipeline.cache import RangeCache
from glipv2.pipeline.collate import Sample, collate
from glipv2.pipeline.config import DataConfig
from glipv2.pipeline.errors import ConfigError
from glipv2.pipeline.masking import IGNORE, Masking, mask_tokens, tokens_within
from glipv2.pipeline.negatives import (
    Categories,
    Negatives,
    TrainingText,
    caption_text,
    detection_text,
)
from glipv2.pipeline.shard_format import ShardSet
from glipv2.pipeline.stream import (
    OnBad,
    Position,
    Slot,
    Stream,
    StreamConfig,
    check_lanes,
    largest_divisor,
)
from glipv2.pipeline.tasks import batch_task, draw_caption, draw_question, mixture_task
from glipv2.pipeline.vocabulary import equal_names, read_vocabulary
from glipv2.pipeline.workers import batches_from_workers

MOST_LANES = 64


class Loader:
    """Endless batches of one rank, from any position."""

    def __init__(
        self, stream: Stream, prepare: "Preparation", data: DataConfig, accumulation: int = 1
    ) -> None:
        self.stream = stream
        self.prepare = prepare
        self.data = data
        self.accumulation = accumulation

    def start(self) -> Position:
        return self.stream.start()

    def batches(self, position: Position) -> Iterator[tuple[Batch, Position]]:
        """This rank's share of each global batch after `position`, and the position after it.

        Of a loader without accumulation, where a step's share is one batch.
        """
        for (batch,), after in self.steps(position):
            yield batch, after

    def steps(self, position: Position) -> Iterator[tuple[list[Batch], Position]]:
        """This rank's micro-batches of each step after `position`, and the position after it.

        Together they are its share of the global batch, in order; each is padded by itself.
        """
        if self.data.workers:
            largest = 3 * max(self.data.short_sides) * self.data.long_side
            prepared = batches_from_workers(
                self.stream, position, self.prepare, self.data.workers, largest
            )
        else:
            prepared = self.stream.batches(position, self.prepare)
        pad_id, max_tokens = self.prepare.tokenizer.pad_id, self.prepare.tokenizer.max_tokens
        for samples, after in prepared:
            count = len(samples) // self.accumulation
            parts = [samples[i : i + count] for i in range(0, len(samples), count)]
            yield [collate(part, pad_id, max_tokens, self.data.pad_to) for part in parts], after


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """From a stream's slot to a sample; a pure function of the slot."""

    tokenizer: Tokenizer
    augmentation: Augmentation
    negatives: Negatives
    masking: Masking
    categories: Mapping[str, Categories]
    """Source -> its categories."""
    masks: bool = False
    """Whether samples carry the masks of their regions."""
    task: BatchTask = "grounding"
    answers: Mapping[str, int] = field(default_factory=dict)
    """vqa: the normal form of each answer that the model knows, and its number."""

    def __call__(self, slot: Slot) -> Sample:
        task = batch_task(slot.source, slot.record)
        if task != self.task:
            raise ConfigError(
                f"data.mixture: {slot.source} is for {self.task} as its first record says, but "
                f"{slot.record.key} is for {task}: make a shard set of each"
            )
        return self._grounded(slot) if task == "grounding" else self._understood(slot)

    def _grounded(self, slot: Slot) -> Sample:
        """Words with their places, among words that are not in the picture."""
        record, rng = slot.record, slot.rng
        view = draw_view((record.width, record.height), self._said(slot), self.augmentation, rng)
        slot = replace(slot, record=cropped(record, view))
        seen = picture(slot.record, view, self.masks)
        text = self._text(slot)
        tokens = self.tokenizer.encode(text.prompt.text)  # the one time it is tokenised
        positive_PT = token_map(tokens, text.prompt.spans)
        kept, phrases = _named_regions(text, positive_PT)
        ids_T = np.array(tokens.ids)
        open_T = tokens_within(tokens.offsets, text.maskable)
        corrupted_T, labels_T = mask_tokens(ids_T, open_T, self.masking, rng)
        category_P = self.categories[slot.source].shared_ids(text.categories)
        token_category_T = np.full(len(ids_T), NO_WORD)
        for positive_T, category in zip(positive_PT, category_P, strict=True):
            if category != NO_CATEGORY:
                token_category_T[positive_T] = category
        return Sample(
            key=f"{slot.source}/{record.key}",
            image_3HW=seen.image_3HW,
            boxes_N4=seen.boxes_N4.numpy()[kept],
            positive_NT=positive_PT[phrases],
            box_category_N=category_P[phrases],
            token_ids_T=corrupted_T,
            mlm_labels_T=labels_T,
            token_category_T=token_category_T,
            masks_NSS=None if seen.masks_NSS is None else seen.masks_NSS[kept],
        )

    def _understood(self, slot: Slot) -> Sample:
        """A question with its answers, or a caption: whole, and without boxes."""
        record, rng = replace(slot.record, regions=()), slot.rng
        if self.task == "vqa":
            drawn = draw_question(record, self.answers, rng)
        else:
            drawn = draw_caption(record, rng)
        view = draw_view((record.width, record.height), drawn.said, self.augmentation, rng)
        seen = picture(record, view)
        ids_T = np.array(self.tokenizer.encode(drawn.text).ids)
        return Sample(
            key=f"{slot.source}/{record.key}",
            image_3HW=seen.image_3HW,
            boxes_N4=seen.boxes_N4.numpy(),
            positive_NT=np.zeros((0, len(ids_T)), dtype=bool),
            box_category_N=np.zeros(0, dtype=np.int64),
            token_ids_T=ids_T,
            mlm_labels_T=np.full(len(ids_T), IGNORE),
            token_category_T=np.full(len(ids_T), NO_WORD),
            task=self.task,
            answers_V=drawn.targets_V,
        )

    def _text(self, slot: Slot) -> TrainingText:
        budget = self.tokenizer.max_tokens - 2
        if slot.record.task == "detection":
            own = self.categories[slot.source]
            return detection_text(slot.record, own, budget, self.negatives, slot.rng)
        return caption_text(
            slot.record, slot.neighbours, self._count, budget, self.negatives, slot.rng
        )

    def _said(self, slot: Slot) -> str:
        """The words that are claimed of this image: they decide whether it may be mirrored."""
        names = self.categories[slot.source].names
        present = [names[r.category] for r in slot.record.regions if r.category is not None]
        return " ".join([slot.record.caption, *present])

    def _count(self, text: str) -> int:
        return len(self.tokenizer.encode(text).ids) - 2


def build_loader(  # noqa: PLR0913 (a job names each of these)
    data: DataConfig,
    global_batch: int,
    sets: Mapping[str, ShardSet],
    tokenizer: Tokenizer,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    on_bad: OnBad | None = None,
    masks: bool = False,
    answers: Sequence[str] = (),
    captions: bool = False,
    accumulation: int = 1,
) -> Loader:
    """The loader of one rank; `sets` are the opened shard sets that `data.mixture` names.

    `accumulation` micro-batches make up a rank's share of a step, which they must divide.

    With `masks`, batches hold those of the regions' masks that the records know. `answers` and
    `captions` are the model's: sets of questions need the former, sets of captions the latter.
    """
    _check(data, sets)
    task = mixture_task(sets, answers, captions)
    config = StreamConfig(
        seed=seed,
        global_batch=global_batch,
        lanes=lane_count(data, global_batch, world_size),
        unit_samples=data.unit_samples,
        window_units=data.window_units,
        max_bad_share=data.max_bad_share,
        group_by_aspect=data.group_by_aspect,
        cache=RangeCache(data.cache, int(data.cache_gb * 1e9)) if data.cache else None,
    )
    prepare = Preparation(
        tokenizer=tokenizer,
        augmentation=Augmentation(
            short_sides=data.short_sides,
            long_side=data.long_side,
            flip=data.flip,
            crop=data.crop,
            crop_least=data.crop_least,
        ),
        negatives=Negatives(
            max_categories=data.max_negatives,
            full_share=data.full_negatives_share,
            packing=data.caption_packing,
            max_captions=data.max_packed_captions,
            pack_gold=data.pack_gold_captions,
            fixed=data.fixed_prompts,
        ),
        masking=Masking(
            probability=data.mlm_probability,
            mask_id=tokenizer.mask_id,
            vocab_size=tokenizer.vocab_size,
            special_ids=tokenizer.special_ids,
        ),
        categories=shared_categories(sets, tokenizer, data.vocabulary),
        masks=masks,
        task=task,
        answers=answer_numbers(answers) if task == "vqa" else {},
    )
    stream = Stream(sets, data.mixture, config, rank, world_size, on_bad)
    return Loader(stream, prepare, data, accumulation)


def lane_count(data: DataConfig, global_batch: int, world_size: int) -> int:
    """The run's number of lanes; ConfigError when batch, lanes and ranks don't divide."""
    lanes = data.lanes or largest_divisor(global_batch, MOST_LANES)
    check_lanes(lanes, global_batch, world_size)
    return lanes


def shared_categories(
    sets: Mapping[str, ShardSet], tokenizer: Tokenizer, vocabulary: str = ""
) -> dict[str, Categories]:
    """Each set's categories, with ids that are equal where the vocabulary says they are the same
    (a file of `glipv2 prepare vocabulary`; without one, where the names are equal).
    """
    cleaned = {
        source: tuple(clean_category(name) for name in shard_set.categories)
        for source, shard_set in sets.items()
    }
    every_name = {name for names in cleaned.values() for name in names}
    shared = read_vocabulary(vocabulary, every_name) if vocabulary else equal_names(every_name)
    cost = {name: len(tokenizer.encode(name).ids) - 2 for name in every_name}
    return {
        source: Categories(
            names=names,
            costs=tuple(cost[name] for name in names),
            ids=tuple(shared[name] for name in names),
        )
        for source, names in cleaned.items()
    }


def _check(data: DataConfig, sets: Mapping[str, ShardSet]) -> None:
    if data.pad_to is not None and min(data.pad_to) < data.long_side:
        raise ConfigError(
            f"data.pad_to {data.pad_to} must be at least data.long_side ({data.long_side}) both "
            "ways, as pictures may be wide or tall"
        )
    in_memory = [name for name, shard_set in sets.items() if shard_set.url.startswith("memory:")]
    if data.workers and in_memory:
        raise ConfigError(
            f"{in_memory[0]} is kept in this process's memory, where loader processes can't reach "
            "it: set data.workers to 0"
        )


def _named_regions(text: TrainingText, positive_PT: np.ndarray) -> tuple[list[int], list[int]]:
    """The regions whose phrase is in the text as the model sees it, and their phrases.

    A region whose words were cut off is dropped: nothing in the text could name it.
    """
    pairs = [
        (region, phrase)
        for region, phrase in enumerate(text.phrase_of_region)
        if phrase is not None and positive_PT[phrase].any()
    ]
    return [region for region, _ in pairs], [phrase for _, phrase in pairs]
