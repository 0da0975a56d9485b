"""The quality of a labelled set: phrases found by its own rules, boxes by lot, doubtful ones."""

import csv
import dataclasses
import io
import json
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from page_parser import assert_self_contained, boxes, pair, shown

from glipv2.data_prep.phrases import parser_version
from glipv2.jobs import cli, sampling, view
from glipv2.jobs.audit import read_audit
from glipv2.jobs.labelled import making_of
from glipv2.jobs.sampling import Lot, scattered
from glipv2.jobs.stats import survey_set
from glipv2.jobs.survey import Phrases
from glipv2.pipeline.config import PhraseConfig
from glipv2.pipeline.errors import ConfigError, DataError
from glipv2.pipeline.records import Region
from glipv2.pipeline.shards import open_shard_set, write_shard_set

RULES = PhraseConfig(stop=("photo",))
SETTINGS = {
    "teacher": "8ba396f781ed0396",
    "parser": parser_version(RULES),
    "keep_empty": False,
    **{f"phrases.{key}": value for key, value in dataclasses.asdict(RULES).items()},
}


def record(key, caption, **scores):
    """`scores` of boxes by the word that ends their phrase, in the order of the words."""
    regions = []
    for word, own in scores.items():
        end = caption.index(word) + len(word)
        span = (caption.rindex(" ", 0, end - len(word) - 1) + 1, end)
        regions += [
            Region(box=(5.0 + 9 * len(regions) + i, 5, 50, 60), spans=(span,), score=score,
                   phrase=caption[slice(*span)])
            for i, score in enumerate(own)
        ]  # fmt: skip
    return pair(key, caption=caption, regions=tuple(regions), provenance={"source": "web"})


RECORDS = [
    record("p-0", "see a red square by a blue circle", square=[0.9, 0.6], circle=[0.5]),
    record("p-1", "see a Red Square by a blue circle", Square=[0.75]),
    record("p-2", "see a red square by a green ring in a nice photo", ring=[0.8]),
]
"""red square: in 2 of 3 places, 3 boxes of mean 0.75; blue circle in 1 of 2; green ring in 1 of 1;
the photo was not asked for."""


@pytest.fixture
def labelled(tmp_path):
    def write(records=RECORDS, settings=SETTINGS, info=None):
        url = tmp_path / "web"
        write_shard_set(str(url), records, (), info or {}, samples_per_shard=2)
        if settings is not None:
            (url / "label.json").write_text(json.dumps(settings))
        return str(url)

    return write


def test_each_phrase_has_its_places_boxes_and_mean_score(labelled):
    phrases = survey_set(open_shard_set(labelled()), workers=1).phrases
    found = {name: dataclasses.astuple(outcome)[:3] for name, outcome in phrases.top(9)}
    assert found == {"red square": (3, 2, 3), "blue circle": (2, 1, 1), "green ring": (1, 1, 1)}
    means = {name: outcome.score for name, outcome in phrases.top(9)}
    assert means == pytest.approx({"red square": 0.75, "blue circle": 0.5, "green ring": 0.8})
    assert dataclasses.astuple(phrases.total)[:3] == (6, 4, 5)
    assert [name for name, _ in phrases.least_kept(9, times=2)] == ["blue circle", "red square"]


def test_without_the_rules_only_phrases_with_a_box_are_counted(labelled):
    phrases = survey_set(open_shard_set(labelled(settings=None)), workers=1).phrases
    assert {n: (o.times, o.kept) for n, o in phrases.top(9)} == {
        "red square": (2, 2), "blue circle": (1, 1), "green ring": (1, 1),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"parser": "glipv2 rules 0, textblob 0"}, "found by glipv2 rules 0, textblob 0, here is"),
        ({"phrases.parser": "spacy:/from/elsewhere"}, "parser spacy:/from/elsewhere is no"),
        ({"phrases.parser": "spacy:no_such_model_here"}, "spacy:no_such_model_here"),
        ({"phrases.new_rule": 1}, "new_rule"),
        ({"phrases.max_words": -1}, "label.phrases.max_words"),
    ],
)
def test_rules_that_are_not_here_are_named_and_no_share_is_shown(labelled, tmp_path, changes, why):
    url = labelled(settings={**SETTINGS, **changes})
    making = making_of(open_shard_set(url))
    assert making.find is None and why in making.why_not
    view.view(url, str(tmp_path / "page.html"), 5, 0)
    page = shown(tmp_path / "page.html")
    assert "How often a phrase got no box isn't known: " in page.text
    assert "With a box" not in page.text and "least often" not in page.text


@pytest.mark.parametrize("text", ["{", "[]", "3"])
def test_a_damaged_label_json_is_refused(labelled, text):
    url = labelled(settings=None)
    (Path(url) / "label.json").write_text(text)
    with pytest.raises(DataError, match="label.json"):
        making_of(open_shard_set(url))


def test_phrases_have_bounded_memory_and_exact_shares_of_the_places_they_state():
    rng = np.random.default_rng(4)
    stream = [f"n{n}" for n in rng.zipf(1.3, 6000) % 3000]
    truth, whole = Counter(stream), Phrases()
    whole.often.capacity = 50
    for part in range(3):
        own = Phrases()
        own.often.capacity = 50
        for number, name in enumerate(stream[part::3]):
            own.add(name * 30, [0.5] * (number % 2))  # long names are cut
            assert len(own.by_name) <= 101
        whole.merge(own)
        assert whole.by_name.keys() == whole.often.counts.keys()
    assert whole.often.error > 0 and whole.total.times == 6000 and whole.total.kept == 3000
    by_cut = Counter()
    for name, count in truth.items():
        by_cut[(name * 30)[:80]] += count
    for name, outcome in whole.top(20):
        assert by_cut[name] - whole.often.error <= outcome.times <= by_cut[name]
        assert outcome.kept == outcome.boxes <= outcome.times
    assert whole.top(1)[0][0] == by_cut.most_common(1)[0][0]
    assert whole.top(1)[0][1].share == pytest.approx(0.5, abs=0.05)


def rows_of(page):
    """Of each table of phrases: rows as texts."""
    cells = [e for e in page.elements if e["tag"] in ("th", "td")]
    texts = [" ".join(e["text"].split()) for e in cells]
    width = 4
    return [texts[i : i + width] for i in range(0, len(texts), width)]


def test_the_page_says_how_often_each_phrase_got_a_box(labelled, tmp_path, monkeypatch):
    monkeypatch.setattr("glipv2.jobs.view_figures.LEAST_TIMES", 2)
    url = labelled(info={"counts": {"pairs": 8, "images": 3}})
    view.view(url, str(tmp_path / "page.html"), 5, 0)
    page = shown(tmp_path / "page.html")
    assert_self_contained(page)
    head = ["Phrase", "Times", "With a box", "Mean score"]
    square, circle = ["red square", "3", "67%", "0.75"], ["blue circle", "2", "50%", "0.50"]
    ring = ["green ring", "1", "100%", "0.80"]
    assert rows_of(page) == [head, square, circle, ring, head, circle, square]
    text = " ".join(page.text.split())
    assert "Pairs without any box (5 of 8) are not in the set, and not counted." in text
    assert "67%of 6 in captions" in [e["text"] for e in page.all("dd")]


def test_the_page_of_a_set_that_keeps_empty_pairs_says_so(labelled, tmp_path):
    empty = record("p-3", "see a red square")
    url = labelled([*RECORDS, empty], {**SETTINGS, "keep_empty": True})
    view.view(url, str(tmp_path / "page.html"), 5, 0)
    page = shown(tmp_path / "page.html")
    assert "Pairs without any box are in the set, and counted." in page.text
    assert ["red square", "4", "50%", "0.75"] in rows_of(page)


def test_the_least_sure_boxes_are_shown_lowest_first(labelled, tmp_path, monkeypatch):
    monkeypatch.setattr(sampling, "UNSURE", 2)
    view.view(labelled(), str(tmp_path / "page.html"), 1, 0)
    page = shown(tmp_path / "page.html")
    section = page.text.partition("Least sure")[2].partition("A random sample")[0]
    assert re.findall(r"p-\d", section) == ["p-0", "p-1"]  # 0.5 and 0.75, one box a picture
    faint = ["dim" in e["class"].split() for e in page.all("g") if "box" in e["class"].split()]
    assert faint[:4] == [True, True, False, False]
    view.view(labelled(), str(tmp_path / "page.html"), 3, 0)  # all samples are shown
    assert "Least sure" not in shown(tmp_path / "page.html").text


def test_stats_print_the_shares(labelled, capsys):
    assert cli.main(["stats", labelled(), "--workers", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "phrases     6 in the captions, 66.7% with a box" in lines
    assert ["red", "square", "3", "67%", "0.750"] in [line.split() for line in lines]


def csv_rows(path):
    return list(csv.DictReader(io.StringIO(path.read_text("utf-8-sig"), newline="")))


def test_boxes_by_lot_have_the_numbers_of_the_csv(labelled, tmp_path, capsys):
    url, out, table = labelled(), tmp_path / "page.html", tmp_path / "check.csv"
    words = ["view", url, "--out", str(out), "--csv", str(table), "--count", "4", "--seed"]
    assert cli.main([*words, "2"]) == 0
    page, rows = shown(out), csv_rows(table)
    assert_self_contained(page)
    assert [row["number"] for row in rows] == ["1", "2", "3", "4"]
    tags = [t["text"] for t in page.all("text", text_anchor=None) if "fill" in t]
    assert tags == ["1", "2", "3", "4"]
    assert [box[:4] for box in boxes(page)] == [
        tuple(float(row[side]) for side in ("x0", "y0", "x1", "y1")) for row in rows
    ]
    everything = {
        (r.key, g.phrase, g.box[0], g.score, r.caption) for r in RECORDS for g in r.regions
    }
    drawn = {
        (row["key"], row["phrase"], float(row["x0"]), float(row["score"]), row["caption"])
        for row in rows
    }
    assert len(drawn) == 4 and drawn < everything
    names = [n["text"] for n in page.all("span", class_="name")]
    assert names == [row["phrase"] for row in rows]

    assert cli.main([*words, "2"]) == 2  # somebody may have filled it in
    assert "may hold what somebody filled in" in capsys.readouterr().err
    first = table.read_bytes()
    table.unlink()
    assert cli.main([*words, "2"]) == 0 and table.read_bytes() == first
    table.unlink()
    assert cli.main([*words, "3"]) == 0 and table.read_bytes() != first

    text = table.read_text("utf-8-sig").replace("\r\n", "\n")
    table.write_text(re.sub(r"(?m)^(\d.*),$", r"\1,1", text))
    assert read_audit(str(table)).total.right == 4


def test_boxes_of_one_place_are_checked_on_cards_of_their_own(labelled, tmp_path):
    same = record("p-0", "see a red square by a blue circle", square=[0.9, 0.8], circle=[0.7])
    regions = (dataclasses.replace(region, box=(5, 5, 50, 60)) for region in same.regions)
    table = tmp_path / "check.csv"
    url = labelled([dataclasses.replace(same, regions=tuple(regions))])
    view.view(url, str(tmp_path / "p.html"), 9, 0, csv=str(table))
    page, rows = shown(tmp_path / "p.html"), csv_rows(table)
    cards = [" ".join(card["text"].split()) for card in page.all("article")]
    assert len(cards) == len(boxes(page)) == len(rows) == 3
    for card, row in zip(cards, rows, strict=True):
        assert f" {row['number']}{row['phrase']}{float(row['score']):.2f} p-0" in card
    assert [m["text"] for m in page.all("mark")] == [row["phrase"] for row in rows]


def test_only_boxes_with_the_scores_asked_for_are_checked(labelled, tmp_path):
    table = tmp_path / "check.csv"
    wanted = sampling.Wanted(min_score=0.6, max_score=0.8)
    view.view(labelled(), str(tmp_path / "p.html"), 9, 0, wanted=wanted, csv=str(table))
    assert sorted(row["score"] for row in csv_rows(table)) == ["0.6", "0.75", "0.8"]


def test_a_set_without_boxes_and_keys_are_refused(labelled, tmp_path):
    url, out, table = labelled([record("p-0", "a cat")]), str(tmp_path / "p.html"), "x.csv"
    with pytest.raises(DataError, match="no boxes to check"):
        view.view(url, out, 5, 0, csv=str(tmp_path / table))
    with pytest.raises(DataError, match="--csv"):
        view.view(url, out, 5, 0, keys=["p-0"], csv=str(tmp_path / table))
    (tmp_path / table).touch()
    with pytest.raises(ConfigError, match="exists"):
        view.view(url, out, 5, 0, csv=str(tmp_path / table))


def test_every_item_has_the_same_chance():
    counts = Counter()
    for seed in range(3000):
        lot = Lot(3, np.random.default_rng(seed))
        for item in range(10):
            lot.offer(item)
        assert len(set(lot.items)) == 3
        counts.update(lot.items)
    # 900 each, standard deviation 25
    assert len(counts) == 10 and all(abs(count - 900) < 110 for count in counts.values())


def test_a_large_set_is_sampled_all_over(labelled, monkeypatch):
    shard_set = open_shard_set(labelled([record(f"p-{n}", "a cat") for n in range(21)]))
    sizes = [shard.samples for shard in shard_set.shards]
    everything = [(s, n, n + 1) for s, size in enumerate(sizes) for n in range(size)]
    assert scattered(shard_set, np.random.default_rng(0)) == everything
    monkeypatch.setattr(sampling, "STRETCH", 5)
    monkeypatch.setattr(sampling, "MAX_STRETCHES", 1)
    counts = Counter()
    for seed in range(2100):
        found = scattered(shard_set, np.random.default_rng(seed))
        assert len(set(found)) == 5 and set(found) <= set(everything)
        counts.update(found)
    # 500 each, standard deviation 20
    assert len(counts) == 21 and all(abs(count - 500) < 95 for count in counts.values())
