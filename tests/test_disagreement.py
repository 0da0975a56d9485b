"""What two labelled sets say of each other, against verdicts found by hand."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from page_parser import CIRCLE, SQUARE, assert_self_contained, boxes, pair, shown

from glipv2.jobs import cli, sampling, view
from glipv2.jobs.disagreement import ALONE, ELSEWHERE, SAME, disagreement, verdicts_of
from glipv2.pipeline.errors import DataError
from glipv2.pipeline.records import Region
from glipv2.pipeline.shards import open_shard_set, write_manifest, write_shard


def square(*box, score=0.8):
    return Region(box=box, spans=(SQUARE,), phrase="red square", score=score)


def circle(*box, score=0.8):
    return Region(box=box, spans=(CIRCLE,), phrase="blue circle", score=score)


@pytest.mark.parametrize(
    ("mine", "other", "expected"),
    [
        ([square(0, 0, 10, 10)], [square(0, 0, 10, 10)], ([SAME], [SAME])),
        ([square(0, 0, 10, 10)], [square(0, 0, 10, 5)], ([SAME], [SAME])),  # IoU 0.5
        ([square(0, 0, 10, 10)], [square(0, 0, 10, 4.9)], ([ELSEWHERE], [ELSEWHERE])),
        ([square(0, 0, 10, 10)], [square(50, 0, 60, 10)], ([ELSEWHERE], [ELSEWHERE])),
        ([square(0, 0, 10, 10)], [circle(0, 0, 10, 10)], ([ALONE], [ALONE])),
        ([square(0, 0, 10, 10)], [], ([ALONE], [])),
        ([], [], ([], [])),
        # two boxes of a phrase here, one there: the better fit is the same, the other alone
        ([square(0, 0, 10, 9, score=0.9), square(0, 0, 10, 5, score=0.6)],
         [square(0, 0, 10, 10)], ([SAME, ALONE], [SAME])),
        ([square(0, 0, 10, 10), square(30, 0, 40, 10), circle(0, 0, 9, 9)],
         [square(60, 0, 70, 10), square(0, 1, 10, 10)],
         ([SAME, ELSEWHERE, ALONE], [ELSEWHERE, SAME])),
    ],
)  # fmt: skip
def test_verdicts(mine, other, expected):
    assert verdicts_of(mine, other) == expected
    assert verdicts_of(other, mine) == expected[::-1]


def labelled_set(url, *shards):
    """Each shard is {key: regions}; records as `glipv2 label` leaves them."""
    infos = []
    for number, own in enumerate(shards):
        records = [pair(key, regions=tuple(regions)) for key, regions in own.items()]
        infos.append(write_shard(str(url), f"shard-{number:06d}", records, {}))
    return write_manifest(str(url), infos, (), {})


HERE = (
    {"a": [square(0, 0, 10, 10), circle(20, 0, 40, 20)], "b": [square(0, 0, 10, 10)]},
    {"d": [square(0, 0, 10, 10)], "e": [square(5, 5, 15, 15), circle(60, 60, 90, 90)]},
    {},
)
THERE = (
    {"a": [square(0, 0, 10, 10), circle(20, 0, 40, 8)], "c": [circle(0, 0, 10, 10)]},
    {"e": [square(5, 5, 15, 15)], "f": [square(0, 0, 5, 5), square(50, 0, 60, 9)]},
    {"g": [circle(0, 0, 10, 10)]},
)
"""Of 6 and 7 boxes: 2 are in both (a, e), one is elsewhere (a), 3 and 4 are in one set alone."""


@pytest.fixture
def rounds(tmp_path):
    return labelled_set(tmp_path / "one", *HERE), labelled_set(tmp_path / "two", *THERE)


@pytest.mark.parametrize("stretch", [1, 2, 256])
def test_pairs_are_joined_by_key_whatever_either_set_lacks(rounds, monkeypatch, stretch):
    monkeypatch.setattr(sampling, "STRETCH", stretch)
    found = disagreement(*rounds, seed=0)
    assert dict(found.verdicts[0]) == {SAME: 2, ELSEWHERE: 1, ALONE: 3}
    assert dict(found.verdicts[1]) == {SAME: 2, ELSEWHERE: 1, ALONE: 4}
    assert (found.pairs, found.boxes, found.complete) == (7, 13, True)
    assert found.agreement == 4 / 13
    # pairs that differ, most first: a (2 of 4 boxes), f (2 of 2); then one box each
    assert sorted((n, share) for n, share, *_ in found.most)[-2:] == [(2, 0.5), (2, 1.0)]
    assert len(found.most) == 7


def test_of_large_sets_a_part_is_read(rounds, monkeypatch):
    monkeypatch.setattr(sampling, "STRETCH", 1)
    monkeypatch.setattr(sampling, "MAX_STRETCHES", 3)
    found = [disagreement(*rounds, seed=seed) for seed in range(8)]
    assert {(f.pairs, f.complete) for f in found} == {(3, False)}
    assert len({f.boxes for f in found}) > 1


def test_only_the_pairs_that_differ_most_are_kept(tmp_path):
    here = {f"k{n:02d}": [square(i * 10, 0, i * 10 + 9, 9) for i in range(n)] for n in range(1, 16)}
    one, two = labelled_set(tmp_path / "a", here), labelled_set(tmp_path / "b", {})
    found = disagreement(one, two, seed=0)
    assert sorted(n for n, *_ in found.most) == list(range(4, 16))


@pytest.mark.parametrize(
    ("there", "why"),
    [
        (({"a": []},), "shards have other names"),
        (({"b": [], "a": []}, {}, {}), "b stands in another order there"),
    ],
)
def test_sets_of_other_pairs_are_refused(rounds, tmp_path, there, why):
    with pytest.raises(DataError, match=why):
        disagreement(rounds[0], labelled_set(tmp_path / "other", *there), seed=0)


def test_a_pair_with_another_caption_is_refused(rounds, tmp_path):
    url, caption = str(tmp_path / "other"), pair().caption.upper()
    infos = [write_shard(url, "shard-000000", [pair("a", caption=caption)], {})]
    infos += [write_shard(url, f"shard-{n:06d}", [], {}) for n in (1, 2)]
    with pytest.raises(DataError, match="a has another caption there"):
        disagreement(rounds[0], write_manifest(url, infos, (), {}), seed=0)


def test_an_altered_sample_is_counted_and_left_out(rounds, tmp_path):
    tar = tmp_path / "two" / "shard-000000.tar"
    data = bytearray(tar.read_bytes())
    data[600] ^= 1  # inside the first member of a
    tar.write_bytes(data)
    found = disagreement(rounds[0], open_shard_set(str(tmp_path / "two")), seed=0)
    assert (found.pairs, found.unreadable, found.boxes) == (6, 1, 9)


def test_the_page_shows_both_sets_side_by_side(rounds, tmp_path):
    out = tmp_path / "page.html"
    words = ["view", rounds[0].url, "--out", str(out), "--compare", rounds[1].url, "--keys", "b"]
    assert cli.main(words) == 0
    page = shown(out)
    assert_self_contained(page)
    text = " ".join(page.text.split())
    assert "Against two Of 7 pairs, which have a box in either set." in text
    facts = {dt["text"]: dd["text"] for dt, dd in zip(page.all("dt"), page.all("dd"), strict=True)}
    assert facts["Boxes in both"] == "31%of 13, IoU 0.5 or more"
    assert facts["Elsewhere in the other"] == "115% of the boxes"  # 1, and 2 of 13
    assert facts["Only in one"] == "323% of the boxes"
    assert facts["Only in two"] == "431% of the boxes"
    keys = [e["text"].split()[0] for e in page.all("p", class_="meta")]
    assert keys[:2] == ["f", "a"]
    assert sorted(keys) == ["a", "b", "b", "c", "d", "e", "f", "g"]  # b was asked for, too
    drawn = boxes(page)
    assert [box[:4] for box in drawn[:2]] == [(0, 0, 5, 5), (50, 0, 60, 9)]
    assert [box[:4] for box in drawn[2:6]] == [
        (0, 0, 10, 10), (20, 0, 40, 20), (0, 0, 10, 10), (20, 0, 40, 8),
    ]  # fmt: skip
    assert {box[4] for box in drawn[2:4]}.isdisjoint(box[4] for box in drawn[4:6])
    styles = [e["class"].split() for e in page.all("g") if "box" in e["class"].split()][:6]
    assert ["dashed" in s for s in styles] == [True, True, False, False, True, True]
    assert ["dim" in s for s in styles] == [False, False, True, False, True, False]
    assert [n["text"] for n in page.all("span", class_="num")][:3] == [
        "no box | 0.80, 0.80", "0.80 | 0.80", "0.80 | 0.80",
    ]  # fmt: skip


def test_a_missing_set_is_named(rounds, tmp_path):
    with pytest.raises(DataError, match="nowhere"):
        view.view(rounds[0].url, str(tmp_path / "p.html"), 1, 0, compare=str(tmp_path / "nowhere"))
