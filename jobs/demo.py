"""glipv2 demo: a page where a picture and a text give boxes, masks, coloured phrases (gradio)."""

import argparse
import os
from typing import TYPE_CHECKING, Any

from glipv2.data_prep.noun_phrases import noun_phrases
from glipv2.jobs.ground import COLOURS, THRESHOLD, ground, load, read
from glipv2.pipeline.errors import ConfigError, UserError

if TYPE_CHECKING:
    from torch import Tensor

    from glipv2.model.batch import Detection
    from glipv2.model.grounder import Grounder

TEXT, CATEGORIES = "Phrases of a text", "Categories, comma-separated"
EXAMPLE = "a red square and a blue circle"
HINT = "no box scores that high: lower the threshold, or name what is in the picture"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint", required=True, help="run folder, step folder or model folder"
    )
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets others in, unprotected")
    parser.add_argument("--port", type=int, default=7860)


def run(arguments: argparse.Namespace) -> int:
    if not 1 <= arguments.port <= 65535:
        raise ConfigError(f"--port must be between 1 and 65535, not {arguments.port}")
    try:
        grounder = load(arguments.checkpoint)
    except ValueError as error:
        raise ConfigError(f"{arguments.checkpoint}: {error}") from error
    page = demo_page(grounder, arguments.checkpoint)
    try:
        page.launch(server_name=arguments.host, server_port=arguments.port)  # until ctrl-C
    except OSError as error:
        where = f"--host {arguments.host} --port {arguments.port}"
        raise ConfigError(f"{where}: nothing can listen there; choose another ({error})") from error
    return 0


def demo_page(grounder: "Grounder", name: str) -> Any:
    """The page, not yet served; ConfigError where gradio is not installed."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio as gr
    except ImportError as error:
        raise ConfigError("the demo needs gradio: pip install 'glipv2[demo]'") from error
    has_masks = grounder.model.mask_head is not None

    def find(path: str | None, asked: str, kind: str, threshold: float, masks: bool) -> Any:
        if path is None:
            raise gr.Error("choose a picture first")
        try:
            image = read(path)
            found = ground(
                grounder, [image],
                text=asked if kind == TEXT else None,
                categories=asked if kind == CATEGORIES else None,
                threshold=threshold, masks=masks,
            )[0]  # fmt: skip
        except UserError as error:
            raise gr.Error(str(error)) from error
        colours = colours_of(found)
        if not colours:
            gr.Info(HINT)
        picture = (image.permute(1, 2, 0).numpy(), areas(found))
        words = highlighted(asked, found) if kind == TEXT else [(n, n) for n in colours]
        return (
            gr.AnnotatedImage(picture, color_map=colours),
            gr.HighlightedText(words, color_map=colours),
            rows(found),
        )

    with gr.Blocks(title="GLIPv2 demo", analytics_enabled=False) as page:
        gr.Markdown(f"# Grounding with GLIPv2\n`{name}`")
        with gr.Row():
            with gr.Column():
                picture = gr.Image(type="filepath", label="Picture", height=360)
                kind = gr.Radio([TEXT, CATEGORIES], value=TEXT, label="What to look for")
                asked = gr.Textbox(value=EXAMPLE, label="Text")
                threshold = gr.Slider(0, 1, value=THRESHOLD, step=0.01, label="Lowest score")
                masks = gr.Checkbox(False, label="Masks", visible=has_masks)
                button = gr.Button("Find", variant="primary")
            with gr.Column():
                shown = gr.AnnotatedImage(label="Found", height=360, show_legend=False)
                words = gr.HighlightedText(label="Phrases", show_inline_category=False)
                table = gr.Dataframe(headers=["phrase", "score", "box"], label="Boxes")
        given, made = [picture, asked, kind, threshold, masks], [shown, words, table]
        button.click(find, given, made, api_name="find")
        asked.submit(find, given, made, api_name=False)
    return page


def colours_of(found: "Detection") -> dict[str, str]:
    """A colour for each phrase that has boxes, in the order of their best ones."""
    phrases = dict.fromkeys(found.phrases)
    return {phrase: COLOURS[n % len(COLOURS)] for n, phrase in enumerate(phrases)}


def areas(found: "Detection") -> list[tuple[Any, str]]:
    """Boxes as whole pixels, or masks where there are any, with their phrases."""
    if found.masks_KHW is not None:
        shapes: list[Any] = [mask_HW.numpy().astype(float) for mask_HW in found.masks_KHW]
    else:
        shapes = [tuple(round(v) for v in box) for box in found.boxes_K4.tolist()]
    return list(zip(shapes, found.phrases, strict=True))


def highlighted(text: str, found: "Detection") -> list[tuple[str, str | None]]:
    """The text in pieces; phrases with boxes bear their own words as a label."""
    pieces: list[tuple[str, str | None]] = []
    end, seen = 0, set(found.phrases)
    for phrase in noun_phrases(text):
        words = text[phrase.start : phrase.end]
        pieces += [(text[end : phrase.start], None), (words, words if words in seen else None)]
        end = phrase.end
    return [(words, label) for words, label in (*pieces, (text[end:], None)) if words]


def rows(found: "Detection") -> list[list[Any]]:
    boxes: Tensor = found.boxes_K4.round().int()
    return [
        [phrase, round(score, 3), " ".join(map(str, box))]
        for phrase, score, box in zip(
            found.phrases, found.scores_K.tolist(), boxes.tolist(), strict=True
        )
    ]
