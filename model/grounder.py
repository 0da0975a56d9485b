"""The one way to get predictions: images and texts in, boxes in the images' own pixels out."""

from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from glipv2.model.batch import Detection
from glipv2.model.features import (
    EncodedImages,
    Text,
    Words,
    encode_pictures,
    read_pictures,
)
from glipv2.model.glip import GLIPv2
from glipv2.model.image_input import ImageInput, Images, Picture, image_count
from glipv2.model.mask_head import region_masks
from glipv2.model.postprocess import (
    MAX_DETECTIONS,
    MIN_PROBABILITY,
    detections,
    in_own_pixels,
    merge,
    suppress_across_phrases,
)
from glipv2.model.prompts import (
    Caption,
    Prompt,
    category_prompt,
    grounding_prompt,
    split_categories,
    token_map,
)
from glipv2.model.tokenizer import Tokenizer, Tokens
from glipv2.model.understanding import answer, generate
from glipv2.model.weights import from_pretrained

Precision = Literal["fp32", "bf16", "fp16"]
"""Of the weights; named as in `train.precision`."""
Masks = bool | Literal["run_lengths"]
"""Whether masks are wanted, and whether as COCO run lengths, which many fit memory as."""
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class _Question:
    """A text that one pass of the fusion tower asks about an image."""

    prompt: Prompt
    tokens: Tokens
    labels: list[int]
    """Where each phrase of the prompt stands in the caller's list."""

    @property
    def text(self) -> Text:
        return tuple(self.tokens.ids)


@dataclass(frozen=True, kw_only=True)
class _Settings:
    batch_size: int
    score_threshold: float
    cross_phrase_nms: float | None = None
    masks: Masks = False
    max_boxes: int | None = MAX_DETECTIONS
    max_boxes_per_prompt: int = MAX_DETECTIONS
    min_probability: float = MIN_PROBABILITY


class Grounder:
    """Finds phrases or categories in images, with any model that `build_model` built.

    Images may be anything of `ImageInput`. An image's boxes do not depend on what else is in its
    batch: only images of one padded size share a batch, and texts are masked where they are padded.
    Puts the model into evaluation mode.
    """

    def __init__(self, model: GLIPv2, tokenizer: Tokenizer) -> None:
        if tokenizer.vocab_size > model.config.text_encoder.vocab_size:
            raise ValueError("the tokenizer knows more words than the model has embeddings for")
        self.model = model.eval()
        self.tokenizer = tokenizer

    @classmethod
    def load(
        cls,
        folder_or_url: str | Path,
        device: torch.device | str = "cpu",
        precision: Precision = "fp32",
    ) -> "Grounder":
        """The model of a run's newest step, of one step, or of any folder with model.safetensors,
        config.json and vocab.txt.

        ValueError if there is none or a file is damaged; bf16 and fp16 are for GPUs.
        """
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")
        model, tokenizer = from_pretrained(folder_or_url)
        return cls(model.to(device, PRECISIONS[precision]), tokenizer)

    def prepare(self, image: ImageInput) -> Picture:
        """The image as the model takes it, for `ground` to be called with later: what threads can
        do ahead."""
        return read_pictures([image], self.model.config.input)[0]

    def ground(
        self,
        images: Images,
        captions: Sequence[Caption],
        batch_size: int = 8,
        score_threshold: float = MIN_PROBABILITY,
        cross_phrase_nms: float | None = None,
        masks: Masks = False,
        min_probability: float = MIN_PROBABILITY,
    ) -> list[Detection]:
        """Find the phrases of one caption in each image.

        Labels count the phrases of the image's own caption; a phrase cut off with the end of a too
        long caption finds nothing, nor does a caption without any. Boxes are the best 100 with
        scores from `score_threshold` on; the default keeps mostly wrong ones. With
        `cross_phrase_nms`, of boxes that overlap more than this only the best stays, whatever their
        phrases. Places where a phrase is no more probable than `min_probability` are not looked at.
        ValueError names an image that can't be read or a caption that makes no sense, such as one
        that lacks the words of its phrases.
        """
        _check_one_each(images, captions, "captions")
        questions = []
        for number, caption in enumerate(captions):
            prompt = _prompt(number, caption)
            tokens = self.tokenizer.encode(prompt.text)
            labels = list(range(len(prompt.spans)))
            questions.append([_Question(prompt=prompt, tokens=tokens, labels=labels)])
        settings = _Settings(
            batch_size=batch_size,
            score_threshold=score_threshold,
            cross_phrase_nms=cross_phrase_nms,
            masks=masks,
            min_probability=min_probability,
        )
        names = [question.prompt.phrases for (question,) in questions]
        return self._run(images, questions, names, settings)

    def detect(
        self,
        images: Images,
        categories: Sequence[str] | Sequence[Sequence[str]],
        max_categories_per_prompt: int | None = None,
        batch_size: int = 8,
        score_threshold: float = MIN_PROBABILITY,
        masks: Masks = False,
        max_boxes: int | None = MAX_DETECTIONS,
        max_boxes_per_prompt: int = MAX_DETECTIONS,
    ) -> list[Detection]:
        """Find categories, the same for all images or a list for each.

        More categories than fit one prompt (or than `max_categories_per_prompt`) are asked for in
        several, about the same image features. Labels count the caller's categories; without any,
        nothing is found. Boxes are the best `max_boxes_per_prompt` of each prompt, and of those the
        best `max_boxes` of an image (None keeps all), with scores from `score_threshold` on; the
        default keeps mostly wrong ones. ValueError names an image that can't be read or a category
        that is blank or no text.
        """
        names = _categories(categories, image_count(images))
        _check_one_each(images, names, "category lists")
        chunks = {own: self._chunks(own, max_categories_per_prompt) for own in set(names)}
        settings = _Settings(
            batch_size=batch_size,
            score_threshold=score_threshold,
            masks=masks,
            max_boxes=max_boxes,
            max_boxes_per_prompt=max_boxes_per_prompt,
        )
        return self._run(
            images, [chunks[own] for own in names], [list(own) for own in names], settings
        )

    @torch.inference_mode()
    def answer(
        self, images: Images, questions: Sequence[str], top: int = 1, batch_size: int = 8
    ) -> list[list[tuple[str, float]]]:
        """The `top` answers to one question about each image, with probabilities, best first.

        ValueError if the model has no question answering head.
        """
        _check_one_each(images, questions, "questions")
        _check_texts(questions, "question")
        found = self.answer_each(images, [[question] for question in questions], top, batch_size)
        return [answers for (answers,) in found]

    @torch.inference_mode()
    def answer_each(
        self,
        images: Images,
        questions: Sequence[Sequence[str]],
        top: int = 1,
        batch_size: int = 8,
    ) -> list[list[list[tuple[str, float]]]]:
        """As `answer`, with any number of questions about each image, encoded once for all."""
        if top < 1:
            raise ValueError(f"top must be at least 1, not {top}")
        _check_one_each(images, questions, "lists of questions")
        texts = [[tuple(self.tokenizer.encode(q).ids) for q in own] for own in questions]
        words = Words(self.model, (text for own in texts for text in own))
        answers: list[list[list[tuple[str, float]]]] = [[] for _ in texts]
        for batch in self._encoded(images, batch_size):
            todo = [(row, text) for row, n in enumerate(batch.numbers) for text in texts[n]]
            for first in range(0, len(todo), batch_size):
                rows, group = zip(*todo[first : first + batch_size], strict=True)
                fused = self.model.fuse_words(_rows(batch, rows).pyramid, *words(group))
                for row, best in zip(rows, answer(self.model, fused, top), strict=True):
                    answers[batch.numbers[row]].append(best)
        return answers

    @torch.inference_mode()
    def caption(
        self,
        images: Images,
        beams: int = 5,
        max_words: int = 20,
        length_penalty: float = 1.0,
        batch_size: int = 8,
    ) -> list[tuple[str, float]]:
        """A caption of each image and its mean log probability; see `understanding.generate`.

        ValueError if the model has no captioning head.
        """
        count = image_count(images)
        captions: dict[int, tuple[str, float]] = {}
        for batch in self._encoded(images, batch_size):
            written = generate(
                self.model, self.tokenizer, batch.pyramid, beams, max_words, length_penalty
            )
            captions.update(zip(batch.numbers, written, strict=True))
        return [captions[number] for number in range(count)]

    def _encoded(self, images: Images, batch_size: int) -> Iterator[EncodedImages]:
        pictures = read_pictures(images, self.model.config.input)
        return encode_pictures(self.model, dict(enumerate(pictures)), batch_size)

    def _chunks(self, names: Sequence[str], max_categories: int | None) -> list[_Question]:
        """The prompts that ask for all categories."""
        blank = [number for number, name in enumerate(names) if not name.strip()]
        if blank:
            raise ValueError(f"category {blank[0]} of {len(names)} is blank")
        if max_categories is not None and max_categories < 1:
            raise ValueError(f"max_categories_per_prompt must be positive, not {max_categories}")
        questions = []
        for labels in split_categories(names, self.tokenizer, max_categories):
            prompt = category_prompt([names[label] for label in labels])
            tokens = self.tokenizer.encode(prompt.text)
            questions.append(_Question(prompt=prompt, tokens=tokens, labels=labels))
        return questions

    @torch.inference_mode()
    def _run(
        self,
        images: Images,
        questions: list[list[_Question]],
        names: list[list[str]],
        settings: _Settings,
    ) -> list[Detection]:
        """Ask all questions about each image and keep the best boxes, in the caller's labels."""
        if settings.masks and self.model.mask_head is None:
            raise ValueError("this model has no mask head: it was built with model.masks false")
        pictures = dict(enumerate(read_pictures(images, self.model.config.input)))
        asked = {number: picture for number, picture in pictures.items() if names[number]}
        words = Words(self.model, (q.text for number in asked for q in questions[number]))
        results = {
            number: _nothing(names[number], picture.own_size, settings.masks)
            for number, picture in pictures.items()
        }
        for batch in encode_pictures(self.model, asked, settings.batch_size):
            todo = [(row, q) for row, n in enumerate(batch.numbers) for q in questions[n]]
            parts: list[list[Detection]] = [[] for _ in batch.numbers]
            for first in range(0, len(todo), settings.batch_size):
                rows, group = zip(*todo[first : first + settings.batch_size], strict=True)
                found = self._ask(_rows(batch, rows), group, words, settings)
                for row, detection in zip(rows, found, strict=True):
                    parts[row].append(detection)
            for number, own in zip(batch.numbers, parts, strict=True):
                picture = pictures[number]
                best = merge(own, names[number], settings.max_boxes)
                results[number] = in_own_pixels(
                    best, picture.size, picture.own_size, settings.masks == "run_lengths"
                )
        return list(results.values())

    def _ask(
        self,
        images: EncodedImages,
        questions: Sequence[_Question],
        words: Words,
        settings: _Settings,
    ) -> list[Detection]:
        """One question about each image: boxes in pixels of the resized images, masks as
        probabilities (K, S, S) inside their boxes."""
        words_BTD, mask_BT = words([q.text for q in questions])
        outputs = self.model.fuse(images.pyramid, words_BTD, mask_BT, maps=images.maps)
        maps = [torch.from_numpy(token_map(q.tokens, q.prompt.spans)) for q in questions]
        phrases = [q.prompt.phrases for q in questions]
        found = detections(
            outputs,
            maps,
            phrases,
            images.sizes_B2,
            settings.score_threshold,
            settings.max_boxes_per_prompt,
            settings.min_probability,
        )
        if settings.cross_phrase_nms is not None:
            found = [suppress_across_phrases(d, settings.cross_phrase_nms) for d in found]
        if settings.masks:
            boxes, labels = [d.boxes_K4 for d in found], [d.labels_K for d in found]
            masks = region_masks(self.model, outputs, maps, boxes, labels)
            found = [replace(d, masks_KHW=m) for d, m in zip(found, masks, strict=True)]
        return [
            replace(d, labels_K=torch.tensor(q.labels, dtype=torch.int64)[d.labels_K])
            for d, q in zip(found, questions, strict=True)
        ]


def _nothing(names: list[str], size: tuple[int, int], masks: Masks) -> Detection:
    """What is found where nothing is asked of an image of (height, width) pixels."""
    return Detection(
        boxes_K4=torch.zeros(0, 4),
        scores_K=torch.zeros(0),
        labels_K=torch.zeros(0, dtype=torch.int64),
        names=names,
        masks_KHW=torch.zeros(0, *size, dtype=torch.bool) if masks is True else None,
        run_lengths_K=[] if masks == "run_lengths" else None,
    )


def _rows(batch: EncodedImages, rows: Sequence[int]) -> EncodedImages:
    """Some images of a batch, perhaps the same one several times."""
    index = torch.tensor(rows)
    on_device = index.to(batch.pyramid[0].device)
    return EncodedImages(
        numbers=[batch.numbers[row] for row in rows],
        pyramid=[x[on_device] for x in batch.pyramid],
        maps=None if batch.maps is None else [x[on_device] for x in batch.maps],
        sizes_B2=batch.sizes_B2[index],
    )


def _prompt(number: int, caption: Caption) -> Prompt:
    """A caption's prompt; ValueError says which caption it is and what is wrong with it."""
    try:
        prompt = grounding_prompt(caption)
        _check_texts([prompt.text], "text")
    except ValueError as error:
        raise ValueError(f"caption {number}: {error}") from error
    except TypeError as error:
        raise ValueError(
            f"caption {number}, of type {type(caption).__name__}, must be a text or a pair of text "
            f"and phrases, each phrase its words or a list of (start, end): {error}"
        ) from error
    return prompt


def _categories(
    categories: Sequence[str] | Sequence[Sequence[str]], images: int
) -> list[tuple[str, ...]]:
    """The categories of each image; ValueError names one that is no text."""
    if isinstance(categories, str):
        raise ValueError(f"categories must be a list, not the text {categories!r}")
    if not isinstance(categories, Iterable):
        raise ValueError(f"categories must be a list, not of type {type(categories).__name__}")
    given: list[Any] = list(categories)
    if not any(isinstance(own, Iterable) and not isinstance(own, str) for own in given):
        _check_texts(given, "category")
        return [tuple(given)] * images
    for number, own in enumerate(given):
        if isinstance(own, str) or not isinstance(own, Iterable):
            raise ValueError(f"category list {number} is of type {type(own).__name__}, not a list")
    lists = [tuple(own) for own in given]
    for number, own in enumerate(lists):
        _check_texts(own, f"image {number}: category")
    return lists


def _check_texts(texts: Sequence[object], what: str) -> None:
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            found = type(text).__name__
            raise ValueError(f"{what} {number} of {len(texts)} is of type {found}, not a text")


def _check_one_each(images: Images, others: Sequence[object], what: str) -> None:
    count = image_count(images)
    listed = isinstance(others, Sized) and not isinstance(others, str)
    if not listed or len(others) != count:
        found = "a text" if isinstance(others, str) else f"of type {type(others).__name__}"
        found = str(len(others)) if listed else found
        raise ValueError(f"{count} images need a list of as many {what}, not {found}")
