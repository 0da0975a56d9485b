"""What the report shows of one set: the best and the worst of it, whatever its task."""

import gzip
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as coco_mask

sys.path.insert(0, str(Path(__file__).parent))
from page_parser import assert_self_contained, shown  # noqa: E402
from scored_runs import (  # noqa: E402
    counting_map,
    save_step,
    scored_config,
    write_detection,
    write_scored_tasks,
)

from glipv2.data_prep.toy import toy_record  # noqa: E402
from glipv2.jobs import report_examples  # noqa: E402
from glipv2.jobs.evaluate import evaluate_suites  # noqa: E402
from glipv2.jobs.report import write_report  # noqa: E402
from glipv2.jobs.report_suites import suite_tables  # noqa: E402
from glipv2.pipeline import ray_map  # noqa: E402
from glipv2.pipeline.shard_reader import iterate_records, open_shard_set  # noqa: E402
from glipv2.pipeline.shards import write_shard_set  # noqa: E402

NOWHERE = [0.0, 0.0, 1.0, 1.0]
LOST = {"boxes": [], "scores": [], "labels": [], "masks": []}


@pytest.fixture(scope="module")
def scored_once(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray_map, "map_on_ray", counting_map([]))
        return write_scored_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture
def run(scored_once, tmp_path):
    """It, to be changed at will."""
    return shutil.copytree(scored_once, tmp_path / "run")


def result_of(run, suite):
    [file] = (run / "eval").glob(f"*/{suite}.json")
    return json.loads(file.read_text())


def predict(run, suite, entry_of):
    """Put other predictions where those of a suite are: `entry_of(record)`; returns its records."""
    [own] = result_of(run, suite)["sets"].values()
    records = {record.key: record for record in iterate_records(own["url"])}
    changed = {}
    for file in (run / "eval" / "predictions").glob(f"*/*-{own['asked']}/*.gz"):
        tree = json.loads(gzip.decompress(file.read_bytes()))
        for key, old in tree["images"].items():
            names = {"names": old["names"]} if "names" in old else {}
            new = entry_of(records[key])
            tree["images"][key] = {**names, **new} if "boxes" in new else new
            changed[key] = records[key]
        file.write_bytes(gzip.compress(json.dumps(tree).encode()))
    assert changed
    return changed


def groups(run, suite):
    """Title -> (keys, texts) of the pictures."""
    table = next(table for table in suite_tables([str(run)]) if table.name == suite)
    [detail] = table.details
    for _, mistakes in detail.examples.groups:
        for own in mistakes:
            assert own.picture.uri.startswith("data:image/jpeg"), own.picture.problem
    return {title: list(own) for title, own in detail.examples.groups}, detail


def keys(mistakes):
    return [own.key for own in mistakes]


def test_every_task_has_pictures_and_the_page_shows_them(run):
    tables = suite_tables([str(run)])
    assert len(tables) == 7 and all(len(table.details) == 1 for table in tables)
    page = shown(Path(write_report(str(run))))
    assert_self_contained(page)
    for table in tables:
        [detail] = table.details
        assert detail.examples, table.name
        assert detail.examples.note in page.text
        uris = {own.picture.uri for _, kind in detail.examples.groups for own in kind}
        assert uris and uris <= {image["src"] for image in page.all("img")}
        has_categories = table.name in ("coco", "lvis-minival")
        assert bool(detail.categories) == bool(detail.plot) == has_categories


def test_lvis_is_judged_by_its_rules(run):
    """cat is a verified negative of every image, blue_dog drawn, cow neither."""

    def entry(record):
        true = list(record.regions[0].box)
        return {"boxes": [true, NOWHERE, NOWHERE, NOWHERE], "scores": [0.9, 0.95, 0.97, 0.99],
                "labels": [1, 1, 0, 2], "masks": [record.regions[0].mask] * 4}  # fmt: skip

    records = predict(run, "lvis-minival", entry)
    shown_groups, detail = groups(run, "lvis-minival")
    assert [name for name, _, _ in detail.categories] == ["blue_dog"]
    assert detail.key == [("all categories", "accent")]
    wrong = shown_groups["Wrong boxes it was surest of"]
    assert sorted(keys(wrong)) == sorted(records)
    assert all(own.text.startswith("“cat” 0.97") for own in wrong)  # nobody looked for cows
    assert not shown_groups["Objects it came least near to"]


def test_what_lvis_did_not_draw_all_of_is_no_mistake(tmp_path):
    record = replace(toy_record("toy_val", 0, seed=1, size=64), caption="", task="detection")
    first, second, *_ = record.regions
    regions = tuple(
        replace(r, category=n, spans=(), phrase="") for n, r in enumerate((first, second))
    )
    provenance = {"neg_categories": [2], "not_exhaustive_categories": [0, 2]}
    record = replace(record, regions=regions, provenance=provenance)
    plain = {"boxes": [list(first.box), NOWHERE, NOWHERE, NOWHERE], "scores": [0.5] * 4,
             "labels": [0, 0, 1, 2], "names": ["a", "b", "c"]}  # fmt: skip
    entry = report_examples._entry(record, plain, ("a", "b", "c"))
    judged = [(own["name"], own["box"] == NOWHERE) for own in entry["predicted"]]
    assert judged == [("a", False), ("b", True)]


@pytest.mark.parametrize("suite", ["flickr30k", "refcoco"])
def test_of_phrases_the_best_box_counts(run, suite):
    """Of one image all phrases are found, of one none, the others have a better box elsewhere."""
    [own] = result_of(run, suite)["sets"].values()
    limit = 3 if suite == "flickr30k" else 4
    good, lost, *wrong = sorted(r.key for r in iterate_records(own["url"]))[:limit]

    def entry(record):
        if record.key == lost:
            return LOST
        spans = list(dict.fromkeys(region.spans for region in record.regions))
        boxes = [list(region.box) for region in record.regions]
        labels = [spans.index(region.spans) for region in record.regions]
        scores = [0.5] * len(boxes)
        if record.key != good:
            boxes, labels, scores = [*boxes, NOWHERE], [*labels, 0], [*scores, 0.75]
        return {"boxes": boxes, "labels": labels, "scores": scores,
                "names": [str(n) for n in range(len(spans))]}  # fmt: skip

    records = predict(run, suite, entry)
    found, detail = groups(run, suite)
    assert not detail.categories and detail.plot is None
    best = found["Best found"]
    phrases = len({region.spans for region in records[good].regions})
    assert keys(best)[0] == good
    plural = "" if phrases == 1 else "s"
    assert best[0].text.endswith(f": {phrases} of {phrases} phrase{plural} found.")
    false = found["Wrong boxes it was surest of"]
    assert sorted(keys(false)) == wrong and all("0.75: its IoU" in own.text for own in false)
    missed = found["Phrases it came least near to"]
    assert keys(missed) == [lost] and "no box here" in missed[0].text


def test_masks_are_shown_beside_the_true_ones(run):
    [own] = result_of(run, "phrasecut")["sets"].values()
    good, empty, *_ = sorted(r.key for r in iterate_records(own["url"]))

    def entry(record):
        if record.key == empty:
            return {**LOST, "names": ["x"]}
        whole = coco_mask.encode(np.ones((record.height, record.width), np.uint8, order="F"))
        mask = {**whole, "counts": whole["counts"].decode()}
        mask = record.regions[0].mask if record.key == good else mask
        own = {"boxes": [NOWHERE], "labels": [0], "scores": [0.9], "masks": [mask]}
        return {**own, "names": ["x"]}

    predict(run, "phrasecut", entry)
    found, _ = groups(run, "phrasecut")
    best, worst = found["Masks that fit best"], found["Masks that fit worst"]
    assert keys(best)[0] == good and best[0].text.endswith(": IoU 1.00.")
    assert [mark.tag for mark in best[0].picture.marks] == ["×", "✓"]
    assert all(mark.mask for mark in best[0].picture.marks)
    assert keys(worst)[0] == empty and worst[0].text.endswith(": IoU 0.00.")
    assert [mark.tag for mark in worst[0].picture.marks] == ["✓"]  # nothing was found
    assert not set(keys(best)) & set(keys(worst)) and empty not in keys(best)


def test_answers_are_shown_with_those_of_people(run):
    right, half, wrong = sorted(
        r.key for r in iterate_records(result_of(run, "vqav2")["sets"]["vqav2"]["url"])
    )
    said = {right: "red", half: "blue", wrong: "green"}
    predict(run, "vqav2", lambda r: {q.id: said[r.key] for q in r.questions})
    found, _ = groups(run, "vqav2")
    good, bad = found["Right answers"], found["Wrong answers"]
    assert keys(good) == [right, half] and keys(bad) == [wrong]
    assert good[0].text == "what colour is it “red” (1.00). People: red (7 of 10), blue (3)"
    assert good[1].text.startswith("what colour is it “blue” (0.90)")
    assert bad[0].text.startswith("what colour is it “green” (0.00)")


def test_captions_are_ranked_by_cider(run):
    url = result_of(run, "coco-captions")["sets"]["coco-captions"]["url"]
    first, second, third = sorted(record.key for record in iterate_records(url))
    # words that all images share are worth nothing
    said = {first: "a green dog", second: "nothing", third: "a red square"}
    truths = {first: ("a green dog runs",), second: ("two cats",), third: ("red circle",)}
    records = [replace(r, caption=truths[r.key][0], captions=truths[r.key])
               for r in iterate_records(url)]  # fmt: skip
    found = report_examples._of_captions([(r, said[r.key]) for r in records], (), {}, 2)
    (_, best), (_, worst) = found.groups
    assert keys(best) == [first, third] and keys(worst) == [second]
    assert (
        best[0].text.startswith("“a green dog” (") and "People: “a green dog runs”" in best[0].text
    )
    predict(run, "coco-captions", lambda record: "no such thing")
    found, _ = groups(run, "coco-captions")  # and what scores 0 is nowhere called good
    assert sorted(keys(found["Farthest from what people said"])) == [first, second, third]
    assert not found["Closest to what people said"]


def test_each_set_of_a_suite_is_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(ray_map, "map_on_ray", counting_map([]))
    write_detection(tmp_path / "whole")
    records = list(iterate_records(str(tmp_path / "whole")))
    categories = open_shard_set(str(tmp_path / "whole")).categories
    for name, own in (("left", records[:6]), ("right", records[6:])):
        write_shard_set(str(tmp_path / name), own, categories, {}, samples_per_shard=4)
    save_step(str(tmp_path / "run"), 20)
    sets = {name: str(tmp_path / name) for name in ("left", "right")}
    config = scored_config(tmp_path / "run", {"pair": {"sets": sets, "limit": 5}})
    evaluate_suites(config, {"model": str(tmp_path / "run")})
    [table] = suite_tables([str(tmp_path / "run")])
    assert [detail.set for detail in table.details] == ["left", "right"]
    for detail, own in zip(table.details, (records[:5], records[6:11]), strict=True):
        assert detail.categories and detail.plot and "first 5 images" in detail.examples.note
        shown_keys = {one.key for _, kind in detail.examples.groups for one in kind}
        assert shown_keys and shown_keys <= {record.key for record in own}
        assert max(len(kind) for _, kind in detail.examples.groups) <= 3  # they share the six
    page = shown(Path(write_report(str(tmp_path / "run"))))
    told = [element["text"] for element in page.all("summary")]
    for name in sets:
        assert f"step 20 on {name}: categories and pictures" in told


@pytest.mark.parametrize("what", ["shard", "predictions"])
def test_what_was_damaged_since_leaves_its_pictures_out(run, what, monkeypatch):
    [own] = result_of(run, "refcoco")["sets"].values()
    if what == "shard":
        copy = run / "copy"
        shutil.copytree(own["url"], copy)
        damaged = next(copy.glob("*.tar"))
        content = bytearray(damaged.read_bytes())
        content[700] ^= 1
        place = {own["url"]: str(copy)}
        opened = report_examples.open_shard_set
        monkeypatch.setattr(
            report_examples, "open_shard_set", lambda url: opened(place.get(url, url))
        )
    else:
        damaged = next((run / "eval" / "predictions").glob(f"*/*-{own['asked']}/*.gz"))
        content = damaged.read_bytes()[:50]
    damaged.write_bytes(content)
    tables = {table.name: table for table in suite_tables([str(run)])}
    assert tables["refcoco"].details == [] and tables["coco"].details
    assert tables["refcoco"].ours  # its figures stay


def test_only_the_first_images_are_looked_at(run, monkeypatch):
    monkeypatch.setattr(report_examples, "IMAGES", 3)
    table = next(table for table in suite_tables([str(run)]) if table.name == "refcoco")
    assert "the first 3 images" in table.details[0].examples.note
