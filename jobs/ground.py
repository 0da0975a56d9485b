"""glipv2 ground: one image and a text (or categories) -> boxes as JSON and as a picture."""

import argparse
import json
from pathlib import Path
from typing import Any

from glipv2.pipeline.errors import BadSample, ConfigError, DataError

COLOURS = ("#e6194b", "#0082c8", "#3cb44b", "#f58231", "#911eb4", "#008080", "#9a6324", "#808000")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, help="run folder or step folder")
    parser.add_argument("--image", required=True, help="JPEG, PNG or WebP file")
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--text", help='phrases ended by full stops: "a red square. a blue circle."')
    text.add_argument("--categories", help="comma-separated names: dog,red car")
    parser.add_argument(
        "--threshold",
        type=float,
        default=0.5,
        help="lowest score shown, 0 to 1 (default 0.5); a phrase for something absent scores low",
    )
    parser.add_argument("--out", default="ground", help="writes OUT.json and OUT.png")


def run(arguments: argparse.Namespace) -> int:
    result = ground(
        arguments.checkpoint,
        arguments.image,
        text=arguments.text,
        categories=arguments.categories,
        threshold=arguments.threshold,
    )
    out = arguments.out.removesuffix(".json").removesuffix(".png")
    json_path, picture_path = Path(f"{out}.json"), Path(f"{out}.png")
    try:
        json_path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {arguments.out}: {error}") from error
    json_path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    draw(arguments.image, result["regions"], picture_path)
    for region in result["regions"]:
        box = ", ".join(f"{value:.0f}" for value in region["box"])
        print(f"{region['score']:.2f}  {region['phrase']:24s} [{box}]")  # noqa: T201
    print(f"{len(result['regions'])} boxes -> {json_path}, {picture_path}")  # noqa: T201
    return 0


def ground(
    checkpoint: str, image: str, *, text: str | None, categories: str | None, threshold: float
) -> dict[str, Any]:
    """The boxes of one image, best first: {"image", "text", "regions": [box, phrase, score]}.

    Boxes are xyxy in pixels of the image, EXIF orientation applied.
    """
    from glipv2.data_prep.noun_phrases import noun_phrases
    from glipv2.eval.detection import scored_boxes
    from glipv2.model.grounder import Grounder
    from glipv2.pipeline.checkpoint import load_model
    from glipv2.pipeline.images import decode_image

    path = Path(image)
    if not path.is_file():
        raise DataError(f"{image} is a folder, not an image" if path.is_dir()
                        else f"{image} does not exist")  # fmt: skip
    try:
        pixels = decode_image(path.read_bytes())
    except BadSample as error:
        raise DataError(f"{image}: {error}") from error
    grounder = Grounder(*load_model(checkpoint))
    if categories is not None:
        names = list(dict.fromkeys(n.strip() for n in categories.split(",") if n.strip()))
        if not names:
            raise ConfigError("--categories names no category; give for example dog,red car")
        detection = grounder.detect([pixels], names)[0]
    else:
        text = text or ""
        phrases = noun_phrases(text)
        if not phrases:
            raise ConfigError(f"--text {text!r} has no noun phrase; name things, or --categories")
        spans = [((phrase.start, phrase.end),) for phrase in phrases]
        detection = grounder.ground([pixels], [(text, spans)])[0]
    plain = scored_boxes(detection)
    regions = [
        {"box": [round(v, 1) for v in box], "phrase": name, "score": round(score, 4)}
        for box, name, score in zip(plain.boxes, plain.names, plain.scores, strict=True)
        if score >= threshold
    ]
    return {"image": image, "text": text or categories, "regions": regions}


def draw(image: str, regions: list[dict[str, Any]], out: Path) -> None:
    """The image with a coloured box and label for each region; small images are enlarged."""
    from PIL import Image, ImageDraw, ImageOps

    picture = ImageOps.exif_transpose(Image.open(image)).convert("RGB")
    factor = max(1, round(640 / max(picture.size)))
    picture = picture.resize((picture.width * factor, picture.height * factor))
    canvas = ImageDraw.Draw(picture)
    colours: dict[str, str] = {}
    for region in regions:
        colours.setdefault(region["phrase"], COLOURS[len(colours) % len(COLOURS)])
    for region in reversed(regions):  # the best is drawn last, on top; labels after all boxes
        box = tuple(value * factor for value in region["box"])
        canvas.rectangle(box, outline=colours[region["phrase"]], width=3)
    for region in reversed(regions):
        colour = colours[region["phrase"]]
        x0, y0 = region["box"][0] * factor, region["box"][1] * factor
        label = f"{region['phrase']} {region['score']:.2f}"
        area = canvas.textbbox((x0 + 4, max(0, y0 - 14)), label)
        canvas.rectangle((area[0] - 3, area[1] - 2, area[2] + 3, area[3] + 2), fill=colour)
        canvas.text((x0 + 4, max(0, y0 - 14)), label, fill="white")
    picture.save(out)
