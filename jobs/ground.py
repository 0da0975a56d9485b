"""glipv2 ground: images and a text (or categories) -> boxes as JSON and as pictures."""

import argparse
import io
from collections.abc import Iterator
from typing import TYPE_CHECKING

from glipv2.pipeline import storage
from glipv2.pipeline.errors import BadSample, ConfigError, DataError

if TYPE_CHECKING:
    from torch import Tensor

    from glipv2.model.batch import Detection
    from glipv2.model.grounder import Grounder

COLOURS = ("#e6194b", "#0082c8", "#3cb44b", "#f58231", "#911eb4", "#008080", "#9a6324", "#808000")
THRESHOLD = 0.5
ONE_NAME = 0.6
"""Of boxes of a text's phrases that overlap more than this only the best is shown."""
MASK_OPACITY = 110


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint", required=True, help="run folder, step folder or model folder"
    )
    parser.add_argument("--image", required=True, nargs="+", help="JPEG, PNG or WebP files")
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--text", help='phrases ended by full stops: "a red square. a blue circle."')
    text.add_argument("--categories", help="comma-separated names: dog,red car")
    text.add_argument("--question", help="is answered, without boxes")
    text.add_argument("--caption", action="store_true", help="describe the images, without boxes")
    parser.add_argument(
        "--threshold",
        type=float,
        help="lowest score shown, 0 to 1 (default 0.5); a phrase for something absent scores low",
    )
    parser.add_argument(
        "--masks", action="store_true", default=None, help="also find each object's outline"
    )
    parser.add_argument(
        "--out", help="writes OUT.json and OUT.png, or OUT-1.png, OUT-2.png, ... (default ground)"
    )


def run(arguments: argparse.Namespace) -> int:
    threshold = THRESHOLD if arguments.threshold is None else arguments.threshold
    if not 0 <= threshold <= 1:
        raise ConfigError(f"--threshold must be between 0 and 1, not {threshold}")
    if arguments.question is not None or arguments.caption:
        for option in ("threshold", "masks", "out"):
            if getattr(arguments, option) is not None:
                raise ConfigError(
                    f"--{option} is about boxes: it goes with --text or --categories, not with "
                    + ("--caption" if arguments.caption else "--question")
                )
    images = [read(path) for path in arguments.image]
    try:
        grounder = load(arguments.checkpoint)
        if arguments.question is not None:
            questions = [arguments.question] * len(images)
            said = [answers[0] for answers in grounder.answer(images, questions)]
            return _show_words(arguments.image, said)
        if arguments.caption:
            return _show_words(arguments.image, grounder.caption(images))
        found = ground(
            grounder,
            images,
            text=arguments.text,
            categories=arguments.categories,
            threshold=threshold,
            masks=bool(arguments.masks),
        )
    except ValueError as error:  # no model, or a head that it lacks
        raise ConfigError(f"{arguments.checkpoint}: {error}") from error
    asked = arguments.text or arguments.categories
    return _write(arguments.out or "ground", arguments.image, images, asked, found)


def read(path: str) -> "Tensor":
    """The image's pixels, EXIF orientation applied."""
    from glipv2.model.image_input import unusable
    from glipv2.pipeline.images import decode_image

    if not storage.exists(path):
        raise DataError(f"{path} does not exist")
    try:
        return decode_image(storage.read_bytes(path))
    except BadSample as error:
        raise DataError(f"{path}: {unusable(error.reason, error.detail)}") from error


def load(checkpoint: str) -> "Grounder":
    """The model that a checkpoint argument means, on this machine's device."""
    from glipv2.model.grounder import Grounder
    from glipv2.pipeline.checkpoint import load_model
    from glipv2.pipeline.dist import local_device

    model, tokenizer = load_model(checkpoint)
    return Grounder(model.to(local_device()), tokenizer)


def ground(
    grounder: "Grounder",
    images: list["Tensor"],
    *,
    text: str | None,
    categories: str | None,
    threshold: float,
    masks: bool = False,
) -> list["Detection"]:
    """The boxes of each image, best first, in its own pixels."""
    from glipv2.data_prep.noun_phrases import noun_phrases

    if categories is not None:
        names = list(dict.fromkeys(n.strip() for n in categories.split(",") if n.strip()))
        if not names:
            raise ConfigError("--categories names no category; give for example dog,red car")
        return grounder.detect(images, names, score_threshold=threshold, masks=masks)
    text = text or ""
    phrases = noun_phrases(text)
    if not phrases:
        raise ConfigError(f"--text {text!r} has no noun phrase; name things, or --categories")
    spans = [((phrase.start, phrase.end),) for phrase in phrases]
    return grounder.ground(
        images,
        [(text, spans)] * len(images),
        score_threshold=threshold,
        cross_phrase_nms=ONE_NAME,
        masks=masks,
    )


def _show_words(paths: list[str], said: list[tuple[str, float]]) -> int:
    for path, (words, score) in zip(paths, said, strict=True):
        print(f"{score:.2f}  {words}  ({path})")  # noqa: T201
    return 0


def _write(
    out: str, paths: list[str], images: list["Tensor"], asked: str, found: list["Detection"]
) -> int:
    """OUT.json, one object (of several images a list), and a picture for each image."""
    stem = out.removesuffix(".json").removesuffix(".png")
    pictures = [f"{stem}{number}.png" for number in _suffixes(len(paths))]
    results = [
        {"image": path, "text": asked, "regions": detection.to_dict()["regions"]}
        for path, detection in zip(paths, found, strict=True)
    ]
    content = results[0] if len(results) == 1 else results
    storage.write_json(f"{stem}.json", content)
    for result, image, detection, picture in zip(results, images, found, pictures, strict=True):
        storage.write_bytes(picture, drawn(image, detection))
        for region in result["regions"]:
            box = ", ".join(f"{value:.0f}" for value in region["box"])
            print(f"{region['score']:.2f}  {region['phrase']:24s} [{box}]")  # noqa: T201
        print(f"{len(result['regions'])} boxes -> {stem}.json, {picture}")  # noqa: T201
    return 0


def _suffixes(count: int) -> Iterator[str]:
    return iter([""] if count == 1 else [f"-{number}" for number in range(1, count + 1)])


def drawn(image_3HW: "Tensor", detection: "Detection") -> bytes:
    """A PNG: the image, enlarged if small, with a coloured box, label and mask for each region."""
    from PIL import Image, ImageDraw

    picture = Image.fromarray(image_3HW.permute(1, 2, 0).numpy())
    colours: dict[str, str] = {}
    for phrase in detection.phrases:
        colours.setdefault(phrase, COLOURS[len(colours) % len(COLOURS)])
    if detection.masks_KHW is not None:
        for phrase, mask_HW in zip(detection.phrases, detection.masks_KHW, strict=True):
            mask = Image.fromarray(mask_HW.byte().numpy() * MASK_OPACITY)
            picture.paste(Image.new("RGB", picture.size, colours[phrase]), mask=mask)
    factor = max(1, round(640 / max(picture.size)))
    picture = picture.resize((picture.width * factor, picture.height * factor))
    canvas = ImageDraw.Draw(picture)
    boxes = [[value * factor for value in box] for box in detection.boxes_K4.tolist()]
    rows = list(zip(boxes, detection.phrases, detection.scores_K.tolist(), strict=True))
    for box, phrase, _ in reversed(rows):  # the best is drawn last, on top; labels after all boxes
        canvas.rectangle(tuple(box), outline=colours[phrase], width=3)
    for (x0, y0, _, _), phrase, score in reversed(rows):
        label = f"{phrase} {score:.2f}"
        area = canvas.textbbox((x0 + 4, max(0, y0 - 14)), label)
        canvas.rectangle((area[0] - 3, area[1] - 2, area[2] + 3, area[3] + 2), fill=colours[phrase])
        canvas.text((x0 + 4, max(0, y0 - 14)), label, fill="white")
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()
