"""Masks, filters and plots of the page of glipv2 view: parsed, not looked at."""

import base64
import io
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

sys.path.insert(0, str(Path(__file__).parent))
from page_parser import (
    BOX_A,
    BOX_B,
    CIRCLE,
    SQUARE,
    assert_self_contained,
    boxes,
    jpeg,
    pair,
    shown,
)

from glipv2.jobs import cli, sampling, view
from glipv2.jobs.mask_overlay import MAX_MASKS
from glipv2.jobs.sampling import Wanted
from glipv2.pipeline.errors import DataError
from glipv2.pipeline.records import Region
from glipv2.pipeline.shards import write_shard_set


@pytest.fixture
def page_of(tmp_path):
    def make(records, wanted=view.EVERYTHING, count=50, **options):
        url = str(tmp_path / "some_set")
        write_shard_set(url, records, (), {}, samples_per_shard=4)
        view.view(url, str(tmp_path / "page.html"), count, 0, wanted=wanted, **options)
        return shown(tmp_path / "page.html")

    make.url = tmp_path / "some_set"
    return make


def run_lengths(mask_HW):
    runs = coco_mask.encode(np.asfortranarray(mask_HW.astype(np.uint8)))
    return {"size": [int(side) for side in runs["size"]], "counts": runs["counts"].decode()}


def ellipse(box, width=160, height=100):
    y, x = np.mgrid[:height, :width] + 0.5
    x0, y0, x1, y1 = box
    return ((2 * x - x0 - x1) / (x1 - x0)) ** 2 + ((2 * y - y0 - y1) / (y1 - y0)) ** 2 < 1


def drawn_mask(element, width, height):
    """(bool (height, width), colour) of an overlay put where the page puts it."""
    head, _, data = element["href"].partition(",")
    assert head == "data:image/png;base64"
    picture = Image.open(io.BytesIO(base64.b64decode(data))).convert("RGBA")
    x, y, w, h = (int(element[name]) for name in ("x", "y", "width", "height"))
    pixels = np.asarray(picture.resize((w, h), Image.Resampling.NEAREST))
    mask_HW = np.zeros((height, width), dtype=bool)
    mask_HW[y : y + h, x : x + w] = pixels[..., 3] > 0
    colors = np.unique(pixels[pixels[..., 3] > 0][:, :3], axis=0)
    assert len(colors) == 1
    return mask_HW, "#" + bytes(colors[0].tolist()).hex()


def test_a_mask_is_drawn_where_it_is_in_the_colour_of_its_phrase(page_of):
    circle, square = ellipse(BOX_B), ellipse((10, 6, 60, 40))
    regions = (
        Region(box=BOX_A, spans=(SQUARE,), mask=run_lengths(square)),
        Region(box=BOX_B, spans=(CIRCLE,), mask=run_lengths(circle)),
        Region(box=(1, 1, 9, 9), spans=(CIRCLE,)),
    )
    page = page_of([pair(regions=regions)])
    colors = {box[:4]: box[4] for box in boxes(page)}
    drawn = [drawn_mask(element, 160, 100) for element in page.all("image")]
    assert len(drawn) == 2 and colors[BOX_A] != colors[BOX_B]
    for (found, color), truth, box in zip(drawn, (square, circle), (BOX_A, BOX_B), strict=True):
        assert np.array_equal(found, truth)
        assert color == colors[box]
    assert_self_contained(page)


def test_the_mask_of_a_large_picture_is_drawn_small_and_keeps_its_shape(page_of):
    truth = ellipse((100, 50, 850, 550), 1000, 600)
    region = Region(box=(100, 50, 850, 550), spans=(SQUARE,), mask=run_lengths(truth))
    page = page_of([pair(image=jpeg(1000, 600), width=1000, height=600, regions=(region,))])
    [element] = page.all("image")
    found, _ = drawn_mask(element, 1000, 600)
    assert (found & truth).sum() / (found | truth).sum() > 0.98
    assert len(element["href"]) < 6000


def test_of_many_masks_the_largest_are_drawn_and_an_unreadable_one_is_named(page_of):
    def square(side, mask=None):
        box = (0.0, 0.0, float(side), float(side))
        inside = np.zeros((100, 160), dtype=bool)
        inside[:side, :side] = True
        return Region(box=box, spans=(SQUARE,), mask=mask or run_lengths(inside))

    many = tuple(square(side) for side in range(10, 15 + MAX_MASKS))
    broken = {"size": [100, 160], "counts": "01"}
    page = page_of([pair(regions=many), pair("p-1", regions=(square(9, broken), square(8)))])
    sides = sorted(int(element["width"]) for element in page.all("image"))
    assert sides == [8, *range(15, 15 + MAX_MASKS)]
    assert len(boxes(page)) == MAX_MASKS + 5 + 2  # every box is there
    assert f"the {MAX_MASKS} largest of {MAX_MASKS + 5} are drawn" in page.text
    assert "unreadable masks 1" in page.text


def labelled(key, source, *scores):
    regions = tuple(
        Region(box=(5.0 + 9 * n, 5, 12 + 9 * n, 50), spans=(SQUARE,), score=score)
        for n, score in enumerate(scores)
    )
    return pair(key, regions=regions, provenance={"source": source})


MIXED = [
    labelled("p-0", "web", 0.35, 0.9),
    labelled("p-1", "web", 0.75),
    labelled("p-2", "books & <co>", 0.41, 0.2),
    labelled("p-3", "books & <co>", 1.0),
    labelled("p-4", "toy"),
]


def keys_shown(page):
    return re.findall(r"p-\d+", page.text)


@pytest.mark.parametrize(
    ("wanted", "keys"),
    [
        (Wanted(sources=("web",)), ["p-0", "p-1"]),
        (Wanted(sources=("web", "toy")), ["p-0", "p-1", "p-4"]),
        (Wanted(min_score=0.4), ["p-0", "p-1", "p-2", "p-3"]),
        (Wanted(max_score=0.4), ["p-0", "p-2"]),
        (Wanted(min_score=0.3, max_score=0.4), ["p-0"]),
        (Wanted(sources=("books & <co>",), min_score=0.5), ["p-3"]),
    ],
)
def test_only_the_samples_asked_for_are_shown_and_counted(page_of, wanted, keys):
    page = page_of(MIXED, wanted)
    assert keys_shown(page) == keys
    assert f"Figures are of the {len(keys)} samples with {wanted.text}" in page.text
    assert "among 5 that were read" in page.text


def test_boxes_of_other_scores_are_drawn_faintly(page_of):
    page = page_of(MIXED, Wanted(min_score=0.4, max_score=0.8))
    faint = ["dim" in e["class"].split() for e in page.all("g") if "box" in e["class"].split()]
    assert keys_shown(page) == ["p-1", "p-2"]
    assert faint == [False, False, True]


def test_a_rare_source_is_looked_for_until_there_are_enough(page_of, monkeypatch):
    monkeypatch.setattr(sampling, "STRETCH", 2)
    monkeypatch.setattr(sampling, "MAX_STRETCHES", 2)
    records = [labelled(f"p-{n}", "rare" if n in (3, 12) else "web", 0.5) for n in range(20)]
    assert keys_shown(page_of(records, Wanted(sources=("rare",)))) == ["p-3", "p-12"]
    assert "among 4 that were read, of 20 in the set" in page_of(
        records, Wanted(sources=("web",)), count=2
    ).text  # fmt: skip


def test_what_no_sample_has_is_refused_with_what_there_is(page_of):
    with pytest.raises(DataError, match="no sample with source webb; its sources: .*web"):
        page_of(MIXED, Wanted(sources=("webb",)))
    with pytest.raises(DataError, match="--min-score"):
        page_of(MIXED, Wanted(min_score=0.5, max_score=0.4))
    with pytest.raises(DataError, match="--keys"):
        page_of(MIXED, Wanted(sources=("web",)), keys=["p-1"])


def test_scores_are_not_asked_of_a_set_that_has_none(page_of):
    given = [labelled(f"p-{n}", "web", 1.0, 1.0) for n in range(3)]
    for records in (given, [labelled("p-0", "web")]):  # boxes of people, no boxes
        for wanted in (Wanted(min_score=0.5), Wanted(max_score=0.9)):
            with pytest.raises(DataError, match=f"has no scores .* the {len(records)} samples"):
                page_of(records, wanted)
            shutil.rmtree(page_of.url)
    some = [*given, labelled("p-9", "web", 0.35)]
    assert keys_shown(page_of(some, Wanted(min_score=0.95))) == ["p-0", "p-1", "p-2"]


def left_by(page, option):
    """Keys of the cards that the page's own rules leave when one radio button is on."""
    style = "".join(e["text"] for e in page.all("style"))
    rule = r"\.filtered:has\(#%s:checked\) \.card:not\(\.([\w-]+)\) \{ display: none; \}"
    [group] = re.findall(rule % re.escape(option["id"]), style)
    cards = [e for e in page.all("article") if group in e["class"].split()]
    return [key for card in cards for key in re.findall(r"p-\d+", card["text"])]


def test_the_page_filters_by_source_and_score_without_a_script(page_of):
    page = page_of(MIXED)
    assert_self_contained(page)
    radios = page.all("input", type="radio")
    assert [r.get("id") for r in radios if "checked" in r] == [None, None]  # "all", twice
    labels = [re.sub(r"\s+", " ", e["text"]).strip() for e in page.all("label")]
    found = {
        label: left_by(page, radio)
        for label, radio in zip(labels, radios, strict=True)
        if "id" in radio
    }
    assert found == {
        "books & <co> 2": ["p-2", "p-3"],
        "web 2": ["p-0", "p-1"],
        "toy 1": ["p-4"],
        "1 (given) 1": ["p-3"],
        "0.9 to 1.0 1": ["p-0"],
        "0.7 to 0.8 1": ["p-1"],
        "0.4 to 0.5 1": ["p-2"],
        "0.3 to 0.4 1": ["p-0"],
        "0.2 to 0.3 1": ["p-2"],
    }


def test_boxes_have_the_group_of_their_own_score(page_of):
    page = page_of(MIXED[:1])
    for kind in ("box", "tag"):
        groups = [e["data-group"] for e in page.all("g", class_=kind)]
        assert groups == ["score-3", "score-9"]
    style = "".join(e["text"] for e in page.all("style"))
    for group in groups:
        rule = f'.filtered:has(#{group}:checked) .pic g:not([data-group="{group}"])'
        assert f"{rule} {{ opacity: 0.15; }}" in style
    assert [r["id"] for r in page.all("input", type="radio") if "id" in r] == ["score-9", "score-3"]


def test_the_plots_show_the_figures_of_the_set(page_of):
    page = page_of(MIXED)
    titles = [e["text"] for e in page.all("figcaption")]
    assert titles == [
        "Boxes in a picture", "Length of phrases", "Size of boxes", "Scores of boxes",
        "Boxes by name", "Pictures by source",
    ]  # fmt: skip
    heights = [e["text"] for e in page.all("title") if re.match(r"\S+–\S+: ", e["text"])]
    assert heights[:3] == ["-0.5–0.5: 1", "0.5–1.5: 2", "1.5–2.5: 2"]  # boxes in a picture
    assert "0.4–0.45: 1" in heights and "0.35–0.4: 1" in heights
    assert "red square6" in page.text.replace("\n", "")


def test_the_command_takes_the_filters(tmp_path, capsys):
    url, out = str(tmp_path / "set"), tmp_path / "page.html"
    write_shard_set(url, MIXED, (), {})
    words = ["view", url, "--out", str(out), "--source", "web", "--max-score", "0.5"]
    assert cli.main(words) == 0
    assert keys_shown(shown(out)) == ["p-0"]
    assert cli.main([*words[:4], "--source", "nobody"]) == 2
    assert "books & <co>" in capsys.readouterr().err
