"""The one way to get predictions: images and texts in, boxes in the images' own pixels out."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glipv2.model.batch import Detection
from glipv2.model.glip import GLIPv2
from glipv2.model.images import pad_images, resize, resized_size
from glipv2.model.postprocess import MAX_DETECTIONS, MIN_PROBABILITY, detections
from glipv2.model.prompts import (
    Prompt,
    Spans,
    caption_prompt,
    category_prompt,
    split_categories,
    token_map,
)
from glipv2.model.tokenizer import Tokenizer, Tokens


@dataclass(kw_only=True)
class _Job:
    """One image and one text for one pass of the fusion tower."""

    image: int
    prompt: Prompt
    tokens: Tokens
    labels: list[int]
    """Where each phrase of the prompt stands in the caller's list."""


class Grounder:
    """Finds phrases or categories in images, with any model that `build_model` built.

    An image's boxes do not depend on what else is in its batch: only images of one padded size
    share a batch, and texts are masked where they are padded. Puts the model into evaluation mode.
    """

    def __init__(self, model: GLIPv2, tokenizer: Tokenizer) -> None:
        if tokenizer.vocab_size > model.config.text_encoder.vocab_size:
            raise ValueError("the tokenizer knows more words than the model has embeddings for")
        self.model = model.eval()
        self.tokenizer = tokenizer

    def ground(
        self,
        images: Sequence[Tensor],
        prompts: Sequence[tuple[str, Sequence[Spans]]],
        batch_size: int = 8,
        score_threshold: float = MIN_PROBABILITY,
    ) -> list[Detection]:
        """Find the phrases of one caption in each uint8 RGB (3, H, W) image.

        A prompt is a caption and, per phrase, its [start, end) character spans. Labels count the
        phrases of the image's own prompt. A phrase cut off with the end of a too long caption
        finds nothing.
        """
        jobs = []
        for image, (caption, spans) in enumerate(prompts):
            prompt = caption_prompt(caption, spans)
            tokens = self.tokenizer.encode(caption)
            labels = list(range(len(prompt.spans)))
            jobs.append(_Job(image=image, prompt=prompt, tokens=tokens, labels=labels))
        names = [job.prompt.phrases for job in jobs]
        return self._run(images, jobs, names, batch_size, score_threshold)

    def detect(
        self,
        images: Sequence[Tensor],
        categories: Sequence[str] | Sequence[Sequence[str]],
        max_categories_per_prompt: int | None = None,
        batch_size: int = 8,
        score_threshold: float = MIN_PROBABILITY,
    ) -> list[Detection]:
        """Find categories, the same for all uint8 RGB (3, H, W) images or a list for each.

        More categories than fit one prompt (or than `max_categories_per_prompt`) are asked for in
        several, about the same image features. Labels count the caller's categories; at most 100
        boxes of an image are kept over all prompts.
        """
        if categories and not isinstance(categories[0], str):
            names = [[str(name) for name in per_image] for per_image in categories]
        else:
            names = [[str(name) for name in categories]] * len(images)
        if len(names) != len(images):
            raise ValueError(f"{len(names)} category lists for {len(images)} images")
        jobs = []
        for image, wanted in enumerate(names):
            for labels in split_categories(wanted, self.tokenizer, max_categories_per_prompt):
                prompt = category_prompt([wanted[label] for label in labels])
                tokens = self.tokenizer.encode(prompt.text)
                jobs.append(_Job(image=image, prompt=prompt, tokens=tokens, labels=labels))
        return self._run(images, jobs, names, batch_size, score_threshold)

    @torch.inference_mode()
    def _run(
        self,
        images: Sequence[Tensor],
        jobs: list[_Job],
        names: list[list[str]],
        batch_size: int,
        score_threshold: float,
    ) -> list[Detection]:
        jobs_of: dict[int, list[_Job]] = defaultdict(list)
        for job in jobs:
            jobs_of[job.image].append(job)
        parts: dict[int, list[Detection]] = defaultdict(list)
        for pyramid, sizes_B2, numbers in self._encoded(images, batch_size):
            own = [(row, job) for row, image in enumerate(numbers) for job in jobs_of[image]]
            for first in range(0, len(own), batch_size):
                group = [job for _, job in own[first : first + batch_size]]
                rows = torch.tensor([row for row, _ in own[first : first + batch_size]])
                found = self._answer(
                    [x[rows.to(x.device)] for x in pyramid], sizes_B2[rows], group, score_threshold
                )
                for job, detection, size in zip(group, found, sizes_B2[rows], strict=True):
                    parts[job.image].append(
                        _in_own_terms(detection, job.labels, images[job.image], size)
                    )
        return [_merge(parts[image], names[image]) for image in range(len(images))]

    def _encoded(
        self, images: Sequence[Tensor], batch_size: int
    ) -> Iterator[tuple[list[Tensor], Tensor, list[int]]]:
        """Pyramid, resized sizes and image numbers of batches of equally padded images."""
        settings = self.model.config.input
        device = self.model.alignment_head.bias0.device
        by_shape: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for number, image in enumerate(images):
            height, width = image.shape[1:]
            size = resized_size(height, width, settings.short_side, settings.long_side)
            by_shape[settings.pad_to or tuple(-(-side // 32) for side in size)].append(number)
        for members in by_shape.values():
            for first in range(0, len(members), batch_size):
                numbers = members[first : first + batch_size]
                resized = [
                    resize(images[n], settings.short_side, settings.long_side) for n in numbers
                ]
                images_B3HW, sizes_B2 = pad_images(resized, settings.pad_to)
                pyramid = self.model.encode_images(images_B3HW.to(device), sizes_B2.to(device))
                yield pyramid, sizes_B2, numbers

    def _answer(
        self, pyramid: list[Tensor], sizes_B2: Tensor, jobs: list[_Job], score_threshold: float
    ) -> list[Detection]:
        """Detections of a group of jobs, in pixels of the resized images, labels as in the job."""
        texts = list({tuple(job.tokens.ids): None for job in jobs})
        length = max(len(text) for text in texts)
        padded = [[*text, *[self.tokenizer.pad_id] * (length - len(text))] for text in texts]
        lengths = torch.tensor([len(text) for text in texts])
        device = pyramid[0].device
        mask_UT = (torch.arange(length) < lengths[:, None]).to(device)
        words_UTD = self.model.text_encoder(torch.tensor(padded).to(device), mask_UT)
        rows = torch.tensor([texts.index(tuple(job.tokens.ids)) for job in jobs]).to(device)
        outputs = self.model.fuse(pyramid, words_UTD[rows], mask_UT[rows])
        maps = [torch.from_numpy(token_map(job.tokens, job.prompt.spans)) for job in jobs]
        return detections(
            outputs, maps, [job.prompt.phrases for job in jobs], sizes_B2, score_threshold
        )


def _in_own_terms(
    detection: Detection, labels: list[int], image_3HW: Tensor, resized_2: Tensor
) -> Detection:
    """Boxes in pixels of the image as given, labels in the caller's numbering."""
    own_2 = torch.tensor(image_3HW.shape[1:], dtype=torch.float32)
    ratio_xy = (own_2 / resized_2).flip(0)
    return Detection(
        boxes_K4=detection.boxes_K4 * ratio_xy.repeat(2),
        scores_K=detection.scores_K,
        labels_K=torch.tensor(labels, dtype=torch.int64)[detection.labels_K],
        names=detection.names,
    )


def _merge(parts: list[Detection], names: list[str]) -> Detection:
    """The best boxes of all prompts about one image, best first; none if nothing was asked."""
    if not parts:
        nothing = torch.zeros(0)
        return Detection(
            boxes_K4=torch.zeros(0, 4), scores_K=nothing, labels_K=nothing.long(), names=names
        )
    scores = torch.cat([part.scores_K for part in parts])
    order = scores.argsort(descending=True, stable=True)[:MAX_DETECTIONS]
    return Detection(
        boxes_K4=torch.cat([part.boxes_K4 for part in parts])[order],
        scores_K=scores[order],
        labels_K=torch.cat([part.labels_K for part in parts])[order],
        names=names,
    )
