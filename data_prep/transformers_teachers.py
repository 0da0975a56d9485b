"""Zero-shot detectors of `transformers` as teachers: how each architecture is asked.

All are asked in one way, phrases and an image to boxes with a score for each phrase, in passes of
images that look alike to the model: an image's boxes don't depend on what else is in its batch.
"""

import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from glipv2.model.batch import Detection
from glipv2.model.boxes import area, suppress
from glipv2.model.image_input import Images, image_count, read_images
from glipv2.model.postprocess import MIN_PROBABILITY, NMS_THRESHOLD, merge
from glipv2.model.prompts import Caption, grounding_prompt

CANDIDATES = 300
"""Boxes of one phrase that are looked at, best first."""
MAX_ASPECT = 16
"""Grounding DINO fails on thinner images: too few places for its queries, or no row at all."""
CLS, SEP, STOP, QUESTION_MARK = 101, 102, 1012, 1029
"""The token ids between which Grounding DINO's words see each other: they are part of the model."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """Phrases that are looked for in one image, in one pass."""

    number: int
    """Of the image."""
    labels: list[int]
    """Where the phrases stand in the caller's list."""
    phrases: list[str]
    size: tuple[int, int]
    """(height, width) of the image as given."""
    inputs: dict[str, Tensor]
    """What the image processor makes of it, a batch of one."""


class TransformersTeacher(ABC):
    """A `glipv2.data_prep.teachers.Finder`; subclasses know how their architecture is asked."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model = model.eval()
        self.processor = processor

    @torch.inference_mode()
    def ground(
        self, images: Images, captions: Sequence[Caption], batch_size: int = 8
    ) -> list[Detection]:
        """See `Finder.ground`; a phrase without a word the model reads finds nothing."""
        if image_count(images) != len(captions):
            raise ValueError(f"{image_count(images)} images and {len(captions)} captions")
        names = [grounding_prompt(caption).phrases for caption in captions]
        found = [[_detection(torch.zeros(0, 4), torch.zeros(0, len(n)), n)] for n in names]
        waiting: dict[Hashable, list[Question]] = defaultdict(list)
        for number, image_3HW in enumerate(read_images(images)):
            for question in self._questions(number, image_3HW, names[number]):
                alike = waiting[self.kind(question)]
                alike.append(question)
                if len(alike) >= batch_size:
                    self._answer(alike, names, found)
                    alike.clear()
        for alike in waiting.values():
            if alike:
                self._answer(alike, names, found)
        return [merge(parts, own) for parts, own in zip(found, names, strict=True)]

    def _questions(self, number: int, image_3HW: Tensor, phrases: list[str]) -> list[Question]:
        prompts = self.prompts(phrases)
        if not prompts:
            return []
        inputs = self.preprocess(image_3HW)
        size = image_3HW.shape[1], image_3HW.shape[2]
        return [
            Question(
                number=number,
                labels=labels,
                phrases=[phrases[label] for label in labels],
                size=size,
                inputs=inputs,
            )
            for labels in prompts
        ]

    def _answer(
        self, questions: list[Question], names: list[list[str]], found: list[list[Detection]]
    ) -> None:
        inputs = {
            name: torch.cat([question.inputs[name] for question in questions]).to(self.model.device)
            for name in questions[0].inputs
        }
        scores, boxes_BQ4 = self.ask(inputs, [question.phrases for question in questions])
        for question, scores_QP, boxes_Q4 in zip(questions, scores, boxes_BQ4, strict=True):
            corners_Q4 = _pixels(boxes_Q4.float().cpu(), self.frame(*question.size), question.size)
            own = names[question.number]
            scores_QN = torch.zeros(len(corners_Q4), len(own))
            scores_QN[:, question.labels] = scores_QP.cpu()
            found[question.number].append(_detection(corners_Q4, scores_QN, own))

    @abstractmethod
    def ask(
        self, inputs: dict[str, Tensor], phrases: Sequence[list[str]]
    ) -> tuple[list[Tensor], Tensor]:
        """One pass: for each image its phrases' scores (Q, P), and the boxes (B, Q, 4) of all.

        Boxes are centre x, centre y, width and height in parts of the `frame`.
        """

    def prompts(self, phrases: list[str]) -> list[list[int]]:
        """Which phrases are asked for together, by their places in the list."""
        asked = [label for label, phrase in enumerate(phrases) if phrase.strip()]
        return [asked] if asked else []

    def kind(self, question: Question) -> Hashable:
        """Questions of one kind can share a pass without touching each other."""
        return question.inputs["pixel_values"].shape

    def preprocess(self, image_3HW: Tensor) -> dict[str, Tensor]:
        """What the folder's own image processor makes of a uint8 image."""
        return dict(
            self.processor.image_processor(
                [image_3HW], input_data_format="channels_first", return_tensors="pt"
            )
        )

    def frame(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of the image when it has been padded at the right and bottom."""
        return height, width


class GroundingDino(TransformersTeacher):
    """Grounding DINO (Liu et al. 2023) and MM Grounding DINO (Zhao et al. 2024).

    The text is the phrases with a full stop after each, not the caption: the text encoder lets
    words see each other only between full stops (the paper's sub-sentence mask), which is how it
    was trained on category lists, and a last phrase without its stop would be masked differently.
    A phrase's score is that of its best token, as in the library's own post-processing.
    """

    def words(self, phrase: str) -> list[int]:
        """Token ids of a phrase; a full stop in it would cut it into two."""
        ids = self.processor.tokenizer(phrase, add_special_tokens=False)["input_ids"]
        most = self.model.config.max_text_len - 3
        return [token for token in ids if token not in (CLS, SEP, STOP, QUESTION_MARK)][:most]

    def prompts(self, phrases: list[str]) -> list[list[int]]:
        """As many phrases a prompt as fit the model's text length."""
        prompts: list[list[int]] = []
        used = 0
        for label, phrase in enumerate(phrases):
            cost = len(self.words(phrase)) + 1
            if cost == 1:
                continue
            if not prompts or used + cost > self.model.config.max_text_len - 2:
                prompts.append([])
                used = 0
            prompts[-1].append(label)
            used += cost
        return prompts

    def text(self, phrases: list[str]) -> tuple[list[int], list[slice]]:
        """Token ids of a prompt, and which of them are each phrase's."""
        ids, places = [CLS], []
        for words in map(self.words, phrases):
            places.append(slice(len(ids), len(ids) + len(words)))
            ids += [*words, STOP]
        return [*ids, SEP], places

    def preprocess(self, image_3HW: Tensor) -> dict[str, Tensor]:
        height, width = image_3HW.shape[1:]
        rows, columns = self.frame(height, width)
        return super().preprocess(F.pad(image_3HW, (0, columns - width, 0, rows - height)))

    def frame(self, height: int, width: int) -> tuple[int, int]:
        least = math.ceil(max(height, width) / MAX_ASPECT)
        return max(height, least), max(width, least)

    def ask(
        self, inputs: dict[str, Tensor], phrases: Sequence[list[str]]
    ) -> tuple[list[Tensor], Tensor]:
        texts = [self.text(own) for own in phrases]
        ids_BT = _padded([ids for ids, _ in texts])
        mask_BT = _padded([[1] * len(ids) for ids, _ in texts])
        device = self.model.device
        outputs = self.model(
            **inputs,
            input_ids=ids_BT.to(device),
            attention_mask=mask_BT.to(device),
            token_type_ids=torch.zeros_like(ids_BT).to(device),
        )
        tokens_BQT = outputs.logits.float().sigmoid()
        scores = [
            torch.stack([tokens_QT[:, place].amax(dim=1) for place in places], dim=1)
            for tokens_QT, (_, places) in zip(tokens_BQT, texts, strict=True)
        ]
        return scores, outputs.pred_boxes


class OwlViT(TransformersTeacher):
    """OWL-ViT (Minderer et al. 2022): every phrase is a query of its own, and none sees another."""

    def ask(
        self, inputs: dict[str, Tensor], phrases: Sequence[list[str]]
    ) -> tuple[list[Tensor], Tensor]:
        # The processor fills shorter lists with blank queries, which are dropped again below.
        texts = self.processor(
            text=list(phrases),
            padding="max_length",
            max_length=self.model.config.text_config.max_position_embeddings,
            truncation=True,
            return_tensors="pt",
        )
        outputs = self.model(**inputs, **texts.to(self.model.device))
        scores_BQP = outputs.logits.float().sigmoid()
        scores = [own_QP[:, : len(own)] for own_QP, own in zip(scores_BQP, phrases, strict=True)]
        return scores, outputs.pred_boxes


class Owlv2(OwlViT):
    """OWLv2 (Minderer et al. 2023): OWL-ViT on images that are padded to a square."""

    def frame(self, height: int, width: int) -> tuple[int, int]:
        return max(height, width), max(height, width)


class OmDetTurbo(TransformersTeacher):
    """OmDet-Turbo (Zhao et al. 2024): phrases are classes, and a task sentence names them all."""

    def kind(self, question: Question) -> Hashable:
        """The model fills shorter class lists with zeros that compete for its queries."""
        return super().kind(question), len(question.phrases)

    def ask(
        self, inputs: dict[str, Tensor], phrases: Sequence[list[str]]
    ) -> tuple[list[Tensor], Tensor]:
        self._forget()
        tasks = self._tokens([f"Detect {', '.join(own)}." for own in phrases])
        classes = self._tokens([phrase for own in phrases for phrase in own])
        outputs = self.model(
            pixel_values=inputs["pixel_values"],
            tasks_input_ids=tasks["input_ids"],
            tasks_attention_mask=tasks["attention_mask"],
            classes_input_ids=classes["input_ids"],
            classes_attention_mask=classes["attention_mask"],
            classes_structure=torch.tensor([len(own) for own in phrases]),
        )
        scores_BQP = outputs.decoder_class_logits.float().sigmoid()
        return list(scores_BQP), outputs.decoder_coord_logits

    def _tokens(self, texts: list[str]) -> Any:
        tokens = self.processor.tokenizer(
            texts,
            padding="max_length",
            max_length=self.model.config.text_config.max_position_embeddings,
            truncation=True,
            return_tensors="pt",
        )
        return tokens.to(self.model.device)

    def _forget(self) -> None:
        """Text features kept from other batches differ in their last bits from new ones."""
        for known in (self.model.language_cache_class, self.model.language_cache_prompt):
            known.cache.clear()
            known.current_load = 0


ARCHITECTURES: dict[str, type[TransformersTeacher]] = {
    "grounding-dino": GroundingDino,
    "mm-grounding-dino": GroundingDino,
    "omdet-turbo": OmDetTurbo,
    "owlv2": Owlv2,
    "owlvit": OwlViT,
}
"""By the `model_type` of a folder's config.json."""


def _detection(corners_Q4: Tensor, scores_QP: Tensor, names: list[str]) -> Detection:
    """The boxes of each phrase above the lowest score, without overlaps."""
    finite_Q = corners_Q4.isfinite().all(dim=1) & (area(corners_Q4) > 0)
    scores_QP = scores_QP.nan_to_num(0).masked_fill(~finite_Q[:, None], 0)
    best_KP, places_KP = scores_QP.topk(min(CANDIDATES, len(scores_QP)), dim=0)
    labels_KP = torch.arange(len(names)).expand_as(places_KP)
    chosen_KP = best_KP > MIN_PROBABILITY
    boxes_K4 = corners_Q4[places_KP[chosen_KP]]
    scores_K, labels_K = best_KP[chosen_KP], labels_KP[chosen_KP]
    kept = suppress(boxes_K4, scores_K, labels_K, NMS_THRESHOLD)
    return Detection(
        boxes_K4=boxes_K4[kept], scores_K=scores_K[kept], labels_K=labels_K[kept], names=names
    )


def _pixels(boxes_Q4: Tensor, frame: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Corners in pixels, cut off at the image, of centres and sizes in parts of the frame."""
    centres_Q2, sides_Q2 = boxes_Q4[:, :2], boxes_Q4[:, 2:]
    corners_Q4 = torch.cat([centres_Q2 - sides_Q2 / 2, centres_Q2 + sides_Q2 / 2], dim=1)
    corners_Q4 = corners_Q4 * torch.tensor([frame[1], frame[0]] * 2)
    return corners_Q4.clamp(min=0).minimum(torch.tensor([size[1], size[0]] * 2))


def _padded(rows: list[list[int]]) -> Tensor:
    length = max(map(len, rows))
    return torch.tensor([row + [0] * (length - len(row)) for row in rows])
