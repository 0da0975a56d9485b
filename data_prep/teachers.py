"""Teachers of caption self-training behind one door: ours, those of transformers, or several."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from glipv2.pipeline import storage

if TYPE_CHECKING:  # the command line asks for digests only where it needs them, and torch is slow
    import torch

    from glipv2.model.batch import Detection
    from glipv2.model.grounder import Grounder, Precision
    from glipv2.model.image_input import ImageInput, Images, Picture
    from glipv2.model.prompts import Caption

TRANSFORMERS = "hf:"
"""What the name of a detector of `transformers` begins with; a folder or a hub name follows."""


SHORT_SIDE, LONG_SIDE = 800, 1333
"""Pixels that suffice for the teachers of `transformers`: larger images are shrunk for them."""


class Finder(Protocol):
    """What finds the phrases of captions in images."""

    def ground(
        self, images: "Images", captions: Sequence["Caption"], batch_size: int = 8
    ) -> "list[Detection]":
        """One caption for each image, and its phrases.

        Boxes are xyxy in pixels of the images as given, best score first, scores in [0, 1]; labels
        count the phrases of the image's own caption. Overlaps of one phrase have been suppressed,
        overlaps of different phrases have not. ValueError names what can't be read or found.
        """
        ...


class Teacher(Finder, Protocol):
    """A finder whose images can be prepared ahead of it; `model.grounder.Grounder` is one."""

    def prepare(self, image: "ImageInput") -> "Picture":
        """The image, shrunk to what the teacher can use, for `ground`; threads may share this."""
        ...


class Shrinking:
    """Makes a teacher of a finder that takes images of any size."""

    def __init__(
        self, finder: Finder, device: "torch.device | str", precision: "Precision"
    ) -> None:
        self.finder, self.device, self.precision = finder, device, precision

    def prepare(self, image: "ImageInput") -> "Picture":
        from glipv2.model.image_input import Picture, read_image
        from glipv2.model.images import resize, resized_size

        pixels_3HW = read_image(image)
        own = pixels_3HW.shape[1], pixels_3HW.shape[2]
        size = resized_size(*own, SHORT_SIDE, LONG_SIDE)
        smaller_3HW = resize(pixels_3HW, size) if size[0] < own[0] else pixels_3HW
        return Picture(pixels_3HW=smaller_3HW, own_size=own)

    def ground(
        self, images: "Images", captions: Sequence["Caption"], batch_size: int = 8
    ) -> "list[Detection]":
        """See `Finder.ground`; boxes are in pixels of the images before they were shrunk."""
        import torch

        from glipv2.model.grounder import PRECISIONS
        from glipv2.model.image_input import Picture
        from glipv2.model.postprocess import in_own_pixels

        kind = torch.device(self.device).type
        pictures = [x if isinstance(x, Picture) else self.prepare(x) for x in images]
        mixed = torch.autocast(kind, PRECISIONS[self.precision], enabled=self.precision != "fp32")
        with mixed:
            found = self.finder.ground([p.pixels_3HW for p in pictures], captions, batch_size)
        return [in_own_pixels(d, p.size, p.own_size) for d, p in zip(found, pictures, strict=True)]


def load_teacher(
    names: Sequence[str], device: "torch.device | str" = "cpu", precision: "Precision" = "fp32"
) -> Teacher:
    """The teacher of that name, or the ensemble of several.

    A name is a folder or URL with a model of ours, converted ones included, or `hf:` and a folder
    or hub name. Raises DataError or ConfigError if one can't be loaded.
    """
    from glipv2.data_prep.box_fusion import Ensemble

    if len(names) == 1 and not names[0].startswith(TRANSFORMERS):
        return _load_ours(names[0], device, precision)
    finders = [_load(name, device, precision) for name in names]
    return Shrinking(finders[0] if len(finders) == 1 else Ensemble(finders), device, precision)


def teacher_digest(names: Sequence[str]) -> str:
    """16 hex digits of the content of all files that decide what the teachers say."""
    digests = [storage.digest(_checksums(name)) for name in names]
    return digests[0] if len(digests) == 1 else storage.digest(digests)


def _load(name: str, device: "torch.device | str", precision: "Precision") -> Finder:
    if name.startswith(TRANSFORMERS):
        from glipv2.data_prep.transformers_folders import load_detector

        return load_detector(name.removeprefix(TRANSFORMERS), device)
    return _load_ours(name, device, precision)


def _load_ours(name: str, device: "torch.device | str", precision: "Precision") -> "Grounder":
    from glipv2.model.grounder import PRECISIONS, Grounder
    from glipv2.pipeline.checkpoint import load_model

    model, tokenizer = load_model(name)
    return Grounder(model.to(device, PRECISIONS[precision]), tokenizer)


def _checksums(name: str) -> dict[str, str]:
    """File name -> crc32c."""
    if name.startswith(TRANSFORMERS):
        from glipv2.data_prep.transformers_folders import detector_files

        files = detector_files(name.removeprefix(TRANSFORMERS))
        return {file.name: storage.file_crc32c(str(file)) for file in files}
    from glipv2.pipeline.checkpoint import read_model, resolve_checkpoint

    model = read_model(resolve_checkpoint(name))
    return {file: storage.crc32c(data) for file, data in model.items()}
