"""The figures of a set against plain numpy over its records; their memory has a bound."""

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from sample_records import CATEGORIES, jpeg, record

from glipv2.jobs import cli
from glipv2.jobs.stats import survey_set
from glipv2.jobs.survey import Frequent, Survey, Tally
from glipv2.pipeline.records import Question, Region
from glipv2.pipeline.shards import iterate_records, open_shard_set, write_shard_set

WORDS = ("a", "red", "square", "beside", "two", "large", "blue", "circles", "and", "one", "ring")
MASK = {"size": [300, 400], "counts": "01"}


def random_records(count, seed=0):
    """Detection and grounding in turn; both kinds of scores, boxes of all sizes, some masks."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        caption = " ".join(rng.choice(WORDS, rng.integers(3, 9)))
        grounded = number % 3 > 0
        regions = []
        for _ in range(rng.integers(0, 6)):
            x0, y0 = rng.uniform(0, 300), rng.uniform(0, 200)
            start = int(rng.integers(0, len(caption) - 2))
            end = int(rng.integers(start + 1, len(caption) + 1))
            regions.append(
                Region(
                    box=(x0, y0, rng.uniform(x0 + 1, 400), rng.uniform(y0 + 1, 300)),
                    spans=((start, end),) if grounded else (),
                    category=None if grounded else int(rng.integers(2)),
                    score=float(rng.uniform()) if rng.random() < 0.6 else 1.0,
                    mask=MASK if rng.random() < 0.2 else None,
                )
            )
        yield record(
            number,
            image=jpeg(number, (400, 300)),
            width=400,
            height=300,
            task="grounding" if grounded else "detection",
            caption=caption if grounded else "",
            regions=tuple(regions),
            provenance={"source": f"s{number % 4}"} if number else {},
        )


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    url = str(tmp_path_factory.mktemp("survey") / "set")
    write_shard_set(url, random_records(90), CATEGORIES, {}, samples_per_shard=20)
    return url


def by_numpy(records):
    """Values of each tally."""
    regions = [(rec, region) for rec in records for region in rec.regions]
    sides = np.array([[x1 - x0, y1 - y0] for _, r in regions for x0, y0, x1, y1 in [r.box]])
    phrases = [
        " ".join(rec.caption[s:e] for s, e in spans)
        for rec in records
        for spans in {r.spans for r in rec.regions}
        if spans
    ]
    return {
        "boxes": [len(rec.regions) for rec in records],
        "box_sizes": np.sqrt(sides.prod(1) / (400 * 300)),
        "scores": [r.score for _, r in regions if r.score < 1],
        "phrase_words": [len(phrase.split()) for phrase in phrases],
        "caption_words": [len(rec.caption.split()) for rec in records if rec.caption],
        "short_sides": [min(rec.width, rec.height) for rec in records],
    }


def test_every_figure_is_that_of_numpy(url):
    records = list(iterate_records(url))
    figures = survey_set(open_shard_set(url), workers=1).figures()
    for name, values in by_numpy(records).items():
        found, values = figures[name], np.asarray(values, dtype=np.float64)
        assert found["number"] == len(values)
        assert found["mean"] == pytest.approx(values.mean(), rel=1e-12)
        assert (found["min"], found["max"]) == (values.min(), values.max())
        near = 0.0005 if name in ("box_sizes", "scores") else 0
        for share, quantile in ((0.1, "p10"), (0.5, "median"), (0.9, "p90")):
            exact = np.quantile(values, share, method="inverted_cdf")
            assert abs(found[quantile] - exact) <= near + 1e-12, (name, quantile)
        cells = Counter(np.round(values, 3 if near else 0).tolist())
        assert dict(found["histogram"]) == cells
    areas = [
        (x1 - x0) * (y1 - y0) for rec in records for x0, y0, x1, y1 in (r.box for r in rec.regions)
    ]
    assert figures["areas"] == {
        "small": sum(a < 1024 for a in areas),
        "medium": sum(1024 <= a <= 9216 for a in areas),
        "large": sum(a > 9216 for a in areas),
    }
    names = Counter(
        CATEGORIES[r.category]
        if r.category is not None
        else rec.caption[slice(*r.spans[0])].lower()
        for rec in records
        for r in rec.regions
    )
    assert figures["names"] == names and figures["names_too_low_by"] == 0
    assert figures["masks"] == sum(r.mask is not None for rec in records for r in rec.regions)
    assert figures["sources"] == {"unknown": 1, "s0": 22, "s1": 23, "s2": 22, "s3": 22}
    assert figures["tasks"] == {"detection": 30, "grounding": 60}
    assert figures["samples"] == 90 and figures["unreadable"] == {}


def test_parts_in_any_order_merge_to_the_whole():
    whole, parts = Survey(), [Survey() for _ in range(4)]
    for number, rec in enumerate(random_records(40)):
        whole.add(rec, CATEGORIES)
        parts[number % 4].add(rec, CATEGORIES)
    merged = Survey()
    for part in reversed(parts):
        merged.merge(part)
    expected, found = whole.figures(), merged.figures()
    for name, figure in expected.items():
        if isinstance(figure, dict) and "mean" in figure:  # sums of floats depend on their order
            assert found[name].pop("mean") == pytest.approx(figure.pop("mean"), rel=1e-12)
    assert found == expected


def test_questions_and_captions_are_counted():
    answers = (("Two", "2", "a dog"), ("yes",), ())

    def asked(n):
        return tuple(
            Question(id=f"{k}", text="how " * (k + n + 1), answers=answers[k % 3])
            for k in range(1 + n)
        )

    records = [
        record(n, task="vqa", caption="", regions=(), questions=asked(n)) for n in range(4)
    ] + [
        record(n, task="captioning", regions=(), caption="cat", captions=("cat", "a cat " * n))
        for n in range(4, 8)
    ]
    parts = [Survey(), Survey()]
    for n, rec in enumerate(records):
        parts[n % 2].add(rec)
    parts[0].merge(parts[1])
    figures = parts[0].figures()
    words = [k + n + 1 for n in range(4) for k in range(1 + n)]
    assert figures["question_words"]["number"] == len(words) == 10
    assert figures["question_words"]["mean"] == np.mean(words)
    agreed = [("2", "yes")[k % 3] for n in range(4) for k in range(1 + n) if k % 3 < 2]
    assert figures["answers"] == Counter(agreed)
    assert figures["caption_words"]["histogram"] == [[1, 4], [8, 1], [10, 1], [12, 1], [14, 1]]


def test_bars_count_every_value_once_and_join_outsiders_to_the_end_bins():
    rng = np.random.default_rng(1)
    values = (rng.integers(0, 1001, 5000) / 1000).tolist()
    tally = Tally(step=0.001)
    for value in values:
        tally.add(value)
    edges = np.linspace(0.2, 0.8, 13)
    # whole thousandths: a value on an edge belongs to the bin above it
    thousandths = np.rint(np.clip(values, 0.2, 0.8) * 1000)
    expected, _ = np.histogram(thousandths, np.rint(edges * 1000))
    assert tally.between(edges.tolist()) == expected.tolist()
    assert sum(expected) == 5000


def test_memory_has_a_bound_whatever_is_counted():
    rng = np.random.default_rng(2)
    tally, names = Tally(step=0.001), Frequent(capacity=50)
    for value in rng.random(30_000):
        tally.add(float(value))
        names.add(f"{value}" * 50)
    assert len(tally.cells) <= 1001
    assert len(names.counts) <= 100
    assert max(map(len, names.counts)) <= 80


@pytest.mark.parametrize("parts", [1, 3])
def test_frequent_names_keep_their_counts_within_the_error_they_state(parts):
    rng = np.random.default_rng(parts)
    stream = [f"n{n}" for n in rng.zipf(1.3, 20_000) % 5000]
    truth, found = Counter(stream), Frequent(capacity=60)
    for part in range(parts):
        own = Frequent(capacity=60)
        for name in stream[part::parts]:
            own.add(name)
        found.merge(own)
    assert 0 < found.error <= len(stream) / 60
    for name, count in truth.items():
        assert count - found.error <= found.counts[name] <= count
    assert [name for name, _ in found.top(3)] == [name for name, _ in truth.most_common(3)]


def test_stats_prints_the_figures_and_writes_them(url, tmp_path, capsys):
    out = tmp_path / "figures.json"
    assert cli.main(["stats", url, "--workers", "1", "--json", str(out)]) == 0
    figures, text = json.loads(out.read_text()), capsys.readouterr().out
    assert (figures["samples"], figures["shards"]) == (90, 5)
    records = list(iterate_records(url))
    boxes = [len(rec.regions) for rec in records]
    assert f"boxes       {sum(boxes):,}: " in text
    row = next(line for line in text.splitlines() if line.startswith("boxes in a picture"))
    middle = np.quantile(boxes, (0.1, 0.5, 0.9), method="inverted_cdf")
    expected = [90, np.mean(boxes), 0, *middle, max(boxes)]
    assert row.split()[4:] == [f"{value:.4g}" for value in expected]
    assert f"  {CATEGORIES[0]} " in text


def test_sets_of_questions_and_captions_say_how_many_there_are(tmp_path, capsys):
    asked = [Question(id=f"{n}", text="What is it?", answers=("a dog", "dog")) for n in range(3)]
    kinds = [
        {"task": "vqa", "caption": "", "questions": tuple(asked)},
        {"task": "captioning", "caption": "a dog", "captions": ("a dog", "a brown dog")},
    ]
    records = [record(n, regions=(), **kind) for n, kind in enumerate(kinds)]
    url, out = str(tmp_path / "set"), tmp_path / "figures.json"
    write_shard_set(url, records, CATEGORIES, {})
    assert cli.main(["stats", url, "--json", str(out)]) == 0
    shown = capsys.readouterr().out.splitlines()
    for line in ("questions   3", "answers     6", "captions    2", "boxes       none"):
        assert line in shown
    assert not any(line.startswith("masks") for line in shown)
    assert json.loads(out.read_text())["texts"] == {"questions": 3, "answers": 6, "captions": 2}


def test_unreadable_samples_are_counted_and_left_out(tmp_path, capsys):
    url = tmp_path / "set"
    write_shard_set(str(url), [record(n) for n in range(5)], CATEGORIES, {})
    tar = url / "shard-000000.tar"
    data = bytearray(tar.read_bytes())
    data[600] ^= 1  # inside the first member
    tar.write_bytes(data)
    assert cli.main(["stats", str(url)]) == 0
    text = capsys.readouterr().out
    assert "unreadable  crc_mismatch 1; `glipv2 check" in text
    assert "tasks       grounding 4" in text
