"""The pages say what the data says: parsed, not looked at."""

import argparse
import base64
import io
import re
import sys
from pathlib import Path

import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
from page_parser import (  # noqa: E402
    BOX_A,
    BOX_B,
    CAPTION,
    EVIL,
    Page,
    assert_self_contained,
    boxes,
    jpeg,
    pair,
    shown,
)

from glipv2.jobs import sampling, view  # noqa: E402
from glipv2.jobs.card_text import plain_text  # noqa: E402
from glipv2.jobs.page import record_card, render  # noqa: E402
from glipv2.pipeline.errors import DataError  # noqa: E402
from glipv2.pipeline.records import Question, Region  # noqa: E402
from glipv2.pipeline.shards import write_shard_set  # noqa: E402


@pytest.fixture
def labelled_set(tmp_path):
    def write(records, categories=()):
        url = tmp_path / "some_set"
        write_shard_set(str(url), records, categories, {})
        return str(url), tmp_path / "page.html"

    return write


def test_every_box_is_drawn_where_the_record_has_it(labelled_set):
    url, out = labelled_set([pair("p-0"), pair("p-1")])
    view.view(url, str(out), 10, 0)
    page = shown(out)
    assert [box[:4] for box in boxes(page)] == [BOX_B, BOX_A] * 2
    assert len(page.all("svg", viewbox="0 0 160 100")) == 2  # the frame of these coordinates


def test_a_phrase_has_the_colour_and_the_number_of_its_box(labelled_set):
    url, out = labelled_set([pair()])
    view.view(url, str(out), 1, 0)
    page = shown(out)
    color_of = {box[:4]: box[4] for box in boxes(page)}
    marks = {m["text"]: m["style"] for m in page.all("mark")}
    assert marks == {
        "red square1": f"--c:{color_of[BOX_A]}",
        "blue circle2": f"--c:{color_of[BOX_B]}",
    }
    assert color_of[BOX_A] != color_of[BOX_B]
    tags = [t["text"] for t in page.all("text", text_anchor=None) if "fill" in t]
    assert tags == ["2", "1"]  # in the order of the regions: circle, square
    dots = [(d["text"], d["style"]) for d in page.all("span", class_="dot")]
    assert dots == [("1", marks["red square1"]), ("2", marks["blue circle2"])]
    assert [n["text"] for n in page.all("span", class_="num")] == ["0.75", "0.50"]


def test_markup_in_the_data_is_shown_and_never_obeyed(labelled_set):
    region = Region(box=BOX_A, category=0, phrase=EVIL)
    evil = pair("q", task="detection", caption="", regions=(region,))
    url, out = labelled_set([pair(), evil], categories=[EVIL])
    view.view(url, str(out), 2, 0)
    page = shown(out)
    assert_self_contained(page)
    caption = page.all("p", class_="caption")[0]["text"]
    assert caption.replace("square1", "square").replace("circle2", "circle") == CAPTION
    assert page.text.count(EVIL) == 6  # caption, provenance (2), legend, categories, plot
    assert EVIL not in page.html


def test_a_caption_is_cut_into_pieces_without_losing_a_character():
    text = "a dog on the mat by a dog"
    inner, outer, apart = ((2, 5),), ((0, 16),), ((20, 25), (6, 8))
    regions = tuple(Region(box=BOX_A, spans=s, score=0.5) for s in (inner, outer, apart))
    card = record_card(pair(caption=text, regions=regions))
    assert "".join(piece.text for piece in card.caption) == text
    colors = {piece.text: piece.color for piece in card.caption}
    assert colors["dog"] != colors["a "] != ""  # the shorter of nested phrases colours its words
    assert colors["a dog"] == colors["on"]  # both parts of one phrase
    assert colors[" by "] == ""
    ends = [piece.text for piece in card.caption if piece.number]
    assert sorted(ends) == [" the mat", "a dog", "dog", "on"]


def test_text_that_no_page_can_hold_is_replaced_one_for_one():
    text = "a\x00b\ud800c\u202ed\x1b e\n"
    assert len(plain_text(text)) == len(text)
    assert plain_text(text).encode().decode() == "a\ufffdb\ufffdc\ufffdd\ufffd e\n"
    assert plain_text("naïve 日本 👍🏽 עברית") == "naïve 日本 👍🏽 עברית"


def test_pictures_are_shrunk_keep_their_shape_and_show_a_problem_when_broken():
    uri = record_card(pair(image=jpeg(2000, 1000), width=2000, height=1000)).picture.uri
    picture = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    assert picture.size == (480, 240)
    broken = record_card(pair(image=jpeg()[:60])).picture
    assert (broken.uri, broken.problem) == ("", "image_undecodable")
    html = render("view.html", **empty_view(cards=[record_card(pair(image=b"GIF89a"))])).decode()
    assert "no picture: image_format" in Page(html).text


def empty_view(**changes):
    values = {
        "name": "n", "url": "u", "total": "1", "facts": [], "plots": [], "rankings": [],
        "scanned_note": "", "categories": (), "skipped": [], "heading": "h", "sample_note": "",
        "filters": [], "cards": [], "ratio": 1, "phrases": None, "comparison": None,
        "unsure": [], "to_check": False,
    }  # fmt: skip
    return {**values, **changes}


def test_gold_and_empty_records_say_so(labelled_set):
    gold = pair("gold", regions=(Region(box=BOX_A, category=0), Region(box=BOX_B, category=0)),
                task="detection", caption="")  # fmt: skip
    url, out = labelled_set([gold, pair("empty", regions=())], categories=["cell"])
    view.view(url, str(out), 9, 0)
    page = shown(out)
    legend = page.all("ul", class_="legend")
    assert [re.sub(r"\s+", " ", line["text"]).strip() for line in legend] == ["1cell× 2"]
    assert len({color for *_, color in boxes(page)}) == 1
    assert page.text.count("no boxes") == 1


def asked(key="q-0", count=2, **changes):
    people = ("Red", "red", "a red", "maroon", "pink", "dark red")
    many = [Question(id=str(n), text=f"question {n}?") for n in range(count - 2)]
    questions = (
        Question(id="a", text="what colour is <b>it</b>?", answers=people),
        Question(id="b", text="how many?", answers=("two",)),
        *many,
    )
    return pair(key, task="vqa", caption="", regions=(), questions=questions, **changes)


def texts(page, tag, **attributes):
    return [" ".join(e["text"].split()) for e in page.all(tag, **attributes)]


def test_a_card_shows_questions_with_what_people_answered(labelled_set):
    url, out = labelled_set([asked(), asked("q-1", count=9)])
    view.view(url, str(out), 5, 0)
    page = shown(out)
    assert_self_contained(page)
    first = [
        "what colour is <b>it</b>? red (3 of 6), maroon (1), pink (1), ...",
        "how many? two",
    ]
    unanswered = [f"question {n}? no answer given" for n in range(4)]
    assert texts(page, "li") == [*first, *first, *unanswered, "and 3 more"]
    assert "no boxes" not in page.text
    assert texts(page, "dd")[2:4] == ["115.5 a picture", "147.0 a picture"]  # questions, answers
    assert texts(page, "figcaption") == ["Length of questions", "Questions by answer"]
    assert "red2" in "".join(page.text.split()) and "Boxes" not in page.text


def test_a_card_shows_every_caption(labelled_set):
    captions = ("a cat", "a black cat sits", "cat & mouse")
    record = pair(task="captioning", caption=captions[0], captions=captions, regions=())
    url, out = labelled_set([record])
    view.view(url, str(out), 5, 0)
    page = shown(out)
    assert texts(page, "p", class_="caption") == ["a cat"]
    assert texts(page, "li") == ["a black cat sits", "cat & mouse"]
    assert texts(page, "dd")[2] == "33.0 a picture"
    assert "Length of captions" in texts(page, "figcaption")


def test_digests_are_cut_and_whole_under_the_pointer(labelled_set):
    making = {"source": "web", "teacher": "8ba396f781ed0396", "label_settings": "ada0c838aa59c300"}
    url, out = labelled_set([pair(provenance={**making, "image_id": "000000123456"})])
    view.view(url, str(out), 5, 0)
    page = shown(out)
    assert {e["text"]: e["title"] for e in page.all("abbr")} == {
        "8ba396…": making["teacher"],
        "ada0c8…": making["label_settings"],
    }
    assert making["teacher"] not in page.text and "000000123456" in page.text


@pytest.mark.parametrize(
    "box", [BOX_A, (120.0, 0.0, 160.0, 40.0), (120.0, 60.0, 160.0, 100.0), (0.0, 0.0, 160.0, 100.0)]
)
def test_boxes_of_one_place_show_all_their_numbers(box):
    spans = [((n, n + 1),) for n in range(5)]
    regions = tuple(Region(box=box, spans=s, score=0.5) for s in (*spans, spans[0]))
    picture = record_card(pair(regions=regions)).picture
    tags = {tag.mark.tag: tag for tag in picture.tags}
    assert sorted(tags) == ["1", "2", "3", "4", "5"] and len(picture.tags) == 6
    corners = [(t.x, t.y, t.x + t.width, t.y + t.height) for t in tags.values()]
    for number, (x0, y0, x1, y1) in enumerate(corners):
        assert x0 >= 0 and x1 <= 160.01 and y0 >= 0 and y1 <= 100
        assert max(x0 - box[0], box[0] - x1, y0 - box[1], box[1] - y1) < 5 * picture.tag
        for a0, b0, a1, b1 in corners[:number]:  # 0.02 px of rounding
            assert x1 <= a0 + 0.02 or a1 <= x0 + 0.02 or y1 <= b0 + 0.02 or b1 <= y0 + 0.02


def test_a_category_has_one_colour_on_all_cards(labelled_set):
    def cells(key, *numbers):
        regions = tuple(Region(box=(n * 20.0, 5, n * 20.0 + 9, 50), category=n) for n in numbers)
        return pair(key, regions=regions, task="detection", caption="")

    url, out = labelled_set([cells("a", 1, 0), cells("b", 2, 1)], categories=["x", "y", "z"])
    view.view(url, str(out), 2, 0)
    colors = [color for *_, color in boxes(shown(out))]
    assert colors[0] == colors[3]  # y
    assert len(set(colors)) == 3


def test_the_same_seed_gives_the_same_page_and_another_seed_another_sample(labelled_set):
    url, out = labelled_set([pair(f"p-{i}") for i in range(12)])

    def sample(seed):
        view.view(url, str(out), 3, seed)
        return re.findall(r"p-\d+", shown(out).text.partition("A random sample")[2])

    first = sample(1)
    assert len(first) == 3 and sample(1) == first
    assert any(sample(seed) != first for seed in range(2, 6))


def test_keys_choose_the_samples_and_an_unknown_key_is_refused(labelled_set):
    url, out = labelled_set([pair(f"p-{i}") for i in range(5)])
    view.view(url, str(out), 1, 0, keys=["p-3", "p-1"])
    assert re.findall(r"p-\d+", shown(out).text) == ["p-1", "p-3"]
    with pytest.raises(DataError, match="no sample with key nobody"):
        view.view(url, str(out), 1, 0, keys=["p-3", "nobody"])


def test_a_large_set_is_read_in_part_and_the_page_says_so(labelled_set, monkeypatch):
    monkeypatch.setattr(sampling, "STRETCH", 2)
    monkeypatch.setattr(sampling, "MAX_STRETCHES", 3)
    url, out = labelled_set([pair(f"p-{i}") for i in range(20)])
    view.view(url, str(out), 4, 0)
    page = shown(out)
    assert "of 6 samples that were read, of 20" in page.text
    assert page.text.partition("A random sample")[2].count("task grounding") == 4


def test_an_altered_sample_is_counted_and_the_others_are_shown(labelled_set, tmp_path):
    url, out = labelled_set([pair("p-0", image=jpeg(color="navy")), pair("p-1")])
    tar = tmp_path / "some_set" / "shard-000000.tar"
    data = bytearray(tar.read_bytes())
    data[600] ^= 1  # inside the first member
    tar.write_bytes(data)
    view.view(url, str(out), 5, 0)
    page = shown(out)
    assert "crc_mismatch" in page.text
    assert re.findall(r"p-\d", page.text) == ["p-1"]


def test_view_is_a_command(labelled_set, capsys):
    url, out = labelled_set([pair()])
    parser = argparse.ArgumentParser()
    view.add_arguments(parser)
    assert view.run(parser.parse_args([url, "--out", str(out), "--count", "1"])) == 0
    assert capsys.readouterr().out == f"page: {out}\n"
    with pytest.raises(DataError, match="--count"):
        view.run(parser.parse_args([url, "--out", str(out), "--count", "0"]))
