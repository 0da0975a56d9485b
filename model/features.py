"""Image and text features for prediction: each computed once, in batches that don't change them."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from glipv2.model.config import InputConfig
from glipv2.model.glip import GLIPv2
from glipv2.model.image_input import Images, Picture, read_images
from glipv2.model.images import pad_images, resize, resized_size

Text = tuple[int, ...]
"""Token ids."""


@dataclass(frozen=True, kw_only=True)
class EncodedImages:
    """The unfused features of images of one padded size."""

    numbers: list[int]
    """Where each image stands in the caller's list."""
    pyramid: list[Tensor]
    """One (B, D, H, W) map a level, finest first."""
    maps: list[Tensor] | None
    """As many and as large, after the tower; None where they depend on the text."""
    sizes_B2: Tensor
    """int64 (height, width) of each resized image, on the CPU."""


def read_pictures(images: Images, settings: InputConfig) -> list[Picture]:
    """The images resized for the model; ValueError names one that can't be read.

    Pictures, which this has made before, stay as they are.
    """
    if isinstance(images, Sequence) and all(isinstance(image, Picture) for image in images):
        return list(cast("Sequence[Picture]", images))
    pictures = []
    for pixels_3HW in read_images(images):
        own_size = pixels_3HW.shape[1], pixels_3HW.shape[2]
        size = resized_size(*own_size, settings.short_side, settings.long_side)
        resized_3HW = resize(pixels_3HW, size)
        pictures.append(Picture(pixels_3HW=resized_3HW, own_size=own_size))
    return pictures


def encode_pictures(
    model: GLIPv2, pictures: Mapping[int, Picture], batch_size: int
) -> Iterator[EncodedImages]:
    """The features of all pictures, by number, in batches of at most `batch_size`.

    Only pictures of one padded size share a batch, so that none depends on its neighbours.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    pad_to = model.config.input.pad_to
    device = model.alignment_head.bias0.device
    by_shape: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for number, picture in pictures.items():
        by_shape[pad_to or tuple(-(-side // 32) for side in picture.size)].append(number)
    for members in by_shape.values():
        for first in range(0, len(members), batch_size):
            numbers = members[first : first + batch_size]
            images_B3HW, sizes_B2 = pad_images([pictures[n].pixels_3HW for n in numbers], pad_to)
            pyramid = model.encode_images(images_B3HW.to(device), sizes_B2.to(device))
            maps = None if model.config.fusion else model.tower_without_text(pyramid)
            yield EncodedImages(numbers=numbers, pyramid=pyramid, maps=maps, sizes_B2=sizes_B2)


class Words:
    """Unfused text features: each distinct text is encoded once and kept until its last use."""

    def __init__(self, model: GLIPv2, uses: Iterable[Text]) -> None:
        self.model = model
        self.uses = Counter(uses)
        self.known: dict[Text, Tensor] = {}

    def __call__(self, texts: Sequence[Text]) -> tuple[Tensor, Tensor]:
        """Features (B, T, D) and bool mask (B, T) of some of the announced texts."""
        new = [text for text in dict.fromkeys(texts) if text not in self.known]
        if new:
            ids_BT, mask_BT = self._padded([torch.tensor(text) for text in new])
            words_BTD = self.model.encode_words(ids_BT, mask_BT)
            for text, words_TD in zip(new, words_BTD, strict=True):
                self.known[text] = words_TD[: len(text)].clone()
        found = self._padded([self.known[text] for text in texts])
        self.uses.subtract(texts)
        self.known = {text: words for text, words in self.known.items() if self.uses[text] > 0}
        return found

    def _padded(self, rows: list[Tensor]) -> tuple[Tensor, Tensor]:
        lengths_B = torch.tensor([len(row) for row in rows])
        mask_BT = torch.arange(int(lengths_B.max())) < lengths_B[:, None]
        device = self.model.alignment_head.bias0.device
        return pad_sequence(rows, batch_first=True).to(device), mask_BT.to(device)
