"""glipv2 demo: the page answers as the model does, says what is wrong, and works in a browser."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
from chromium import Browser, needs_chromium, running  # noqa: E402
from scored_runs import tiny_model  # noqa: E402

from glipv2.data_prep.toy import toy_record  # noqa: E402
from glipv2.jobs import demo  # noqa: E402
from glipv2.jobs.cli import main  # noqa: E402
from glipv2.jobs.demo import (  # noqa: E402
    CATEGORIES,
    TEXT,
    areas,
    colours_of,
    demo_page,
    highlighted,
    rows,
)
from glipv2.jobs.ground import ground, load, read  # noqa: E402
from glipv2.model.batch import Detection  # noqa: E402
from glipv2.model.grounder import Grounder  # noqa: E402
from glipv2.pipeline.errors import ConfigError  # noqa: E402

ASKED = "a red square and a blue circle"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    (folder / "model").mkdir()
    for name, content in tiny_model(3, heads=True).items():
        (folder / "model" / name).write_bytes(content)
    (folder / "toy.jpg").write_bytes(toy_record("toy_val", 0, seed=1, size=64).image)
    return folder / "model"


@pytest.fixture(scope="module")
def address(checkpoint: Path) -> Iterator[str]:
    page = demo_page(load(str(checkpoint)), "tiny")
    _, address, _ = page.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
    yield address
    page.close()


def ask(address: str, checkpoint: Path, asked: str, kind: str, threshold: float) -> Any:
    from gradio_client import Client, handle_file

    picture = handle_file(str(checkpoint.parent / "toy.jpg"))
    client = Client(address, verbose=False)
    return client.predict(picture, asked, kind, threshold, False, api_name="/find")


def test_the_page_shows_what_the_model_finds(address: str, checkpoint: Path) -> None:
    image = (checkpoint.parent / "toy.jpg").read_bytes()
    [expected] = Grounder.load(str(checkpoint)).detect(
        [image], ["red square", "blue circle"], score_threshold=0.02
    )
    assert len(expected.phrases) > 0
    picture, words, table = ask(address, checkpoint, "red square, blue circle", CATEGORIES, 0.02)
    assert [row[0] for row in table["data"]] == expected.phrases
    assert [row[1] for row in table["data"]] == [round(s, 3) for s in expected.scores_K.tolist()]
    value = picture.get("value", picture)
    assert [a["label"] for a in value["annotations"]] == expected.phrases
    assert {token["token"] for token in words.get("value", words)} == set(expected.phrases)
    for area, box in zip(value["annotations"], expected.boxes_K4.tolist(), strict=True):
        x0, y0, x1, y1 = map(round, box)
        drawn = Image.open(area["image"]["path"] if isinstance(area["image"], dict) else
                           area["image"]).convert("RGBA")  # fmt: skip
        *colour, opacity = drawn.getpixel(((x0 + x1) // 2, (y0 + y1) // 2))
        assert "#" + bytes(colour).hex() == colours_of(expected)[area["label"]].lower()
        assert opacity > 0


def test_a_mistake_is_told_on_the_page(address: str, checkpoint: Path) -> None:
    from gradio_client.exceptions import AppError

    with pytest.raises(AppError, match="has no noun phrase"):
        ask(address, checkpoint, "of the", TEXT, 0.5)
    with pytest.raises(AppError, match="names no category"):
        ask(address, checkpoint, " , ", CATEGORIES, 0.5)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with running(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


LOWEST = 0.485
"""Score of the boxes shown: of some twenty, both phrases have one."""
CELLS = "[data-testid^=cell-]"
TEXTS = "[...document.querySelectorAll('{}')].map(e => e.innerText.trim())"
BEHIND = "[...document.querySelectorAll('.token.highlighted')]" \
         ".map(e => getComputedStyle(e).backgroundColor)"  # fmt: skip
PAINTED = """Promise.all([...document.querySelectorAll('img.mask')].map(async image => {
    await image.decode();
    const canvas = new OffscreenCanvas(image.naturalWidth, image.naturalHeight);
    const context = canvas.getContext("2d");
    context.drawImage(image, 0, 0);
    const rgba = context.getImageData(0, 0, canvas.width, canvas.height).data;
    return rgba.filter((value, n) => n % 4 == 3 && value > 0).length;
}))"""
"""Pixels that each annotation covers."""


@needs_chromium
@pytest.mark.parametrize(("width", "masks"), [(1280, False), (390, True)])
def test_a_picture_and_a_text_give_boxes_masks_and_coloured_phrases(
    browser: Browser, address: str, checkpoint: Path, width: int, masks: bool
) -> None:
    picture = checkpoint.parent / "toy.jpg"
    [expected] = ground(load(str(checkpoint)), [read(str(picture))], text=ASKED, categories=None,
                        threshold=LOWEST, masks=masks)  # fmt: skip
    assert set(expected.phrases) == {"red square", "blue circle"}
    page = browser.open(address, width)
    page.wait("document.querySelectorAll('input[type=file], textarea').length > 1")
    page.give_file("input[type=file]", picture)
    page.wait("[...document.images].some(i => i.src.endsWith('toy.jpg') && i.naturalWidth)")
    page.type_over("textarea", ASKED)
    page.type_over("input[type=number]", str(LOWEST))
    page.value("document.activeElement.blur()")
    if masks:
        page.click("input[type=checkbox]")
    page.click("button.primary")
    page.wait(f"document.querySelectorAll('{CELLS}').length > 3")
    phrases = page.value(TEXTS.format(".token.highlighted"))
    assert phrases == ["red square", "blue circle"]
    for phrase, shown in zip(phrases, page.value(BEHIND), strict=True):
        red, green, blue = bytes.fromhex(colours_of(expected)[phrase][1:])
        assert shown.startswith(f"rgba({red}, {green}, {blue}, ")
    cells = [str(cell) for row in rows(expected) for cell in row]
    assert page.value(TEXTS.format(CELLS))[:6] == cells[:6]
    shapes = [shape for shape, _ in areas(expected)]
    sizes = [s.sum() if masks else (s[2] - s[0]) * (s[3] - s[1]) for s in shapes]
    assert page.value(PAINTED) == [int(size) for size in sizes]
    assert page.value("document.documentElement.scrollWidth") <= width
    assert page.errors == [] and len(page.requests) > 10
    assert [url for url in page.requests if not url.startswith(address)] == []
    page.close()


def found(phrases: list[str], masks: bool = False) -> Detection:
    count = len(phrases)
    return Detection(
        boxes_K4=torch.tensor([[1.2, 2.6, 30.0, 40.0]] * count).reshape(-1, 4),
        scores_K=torch.linspace(0.9, 0.5, count),
        labels_K=torch.arange(count),
        names=phrases,
        masks_KHW=torch.ones(count, 4, 5, dtype=torch.bool) if masks else None,
    )


def test_words_boxes_and_masks_share_a_label() -> None:
    one = found(["red square"])
    assert highlighted(ASKED, one) == [
        ("a ", None), ("red square", "red square"), (" and a ", None), ("blue circle", None)
    ]  # fmt: skip
    assert areas(one) == [((1, 3, 30, 40), "red square")]
    [(mask, label)] = areas(found(["red square"], masks=True))
    assert mask.shape == (4, 5) and label == "red square"
    assert list(colours_of(found(["b", "a"]))) == ["b", "a"]


def test_an_impossible_port_is_refused_before_the_model_is_read(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["demo", "--checkpoint", "nowhere", "--port", "70000"]) == 2
    assert "--port must be between 1 and 65535, not 70000" in capsys.readouterr().err


def test_without_gradio_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ConfigError, match=r"pip install 'glipv2\[demo\]'"):
        demo.demo_page(None, "x")  # type: ignore[arg-type]


def test_a_checkpoint_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--checkpoint", "nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err
