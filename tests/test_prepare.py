import argparse
import json
import os
import re
import shutil
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from glipv2.data_prep import toy
from glipv2.data_prep.reasons import REASONS, Dropped
from glipv2.jobs import prepare
from glipv2.jobs.cli import main
from glipv2.pipeline import storage, worker_notes
from glipv2.pipeline.config import CleanConfig, PrepareConfig
from glipv2.pipeline.errors import ConfigError, DataError
from glipv2.pipeline.shards import iterate_records, open_shard_set, write_manifest

SAMPLES = Path(__file__).parents[1] / "infra" / "samples"
TOY = PrepareConfig(source="toy", set="toy_val", count=20, size=64, seed=3)
BCCD = PrepareConfig(
    source="voc",
    annotations=(str(SAMPLES / "bccd" / "Annotations"),),
    images=(str(SAMPLES / "bccd" / "JPEGImages"),),
    list=str(SAMPLES / "bccd" / "heldout.txt"),
)


def command(*words):
    parser = argparse.ArgumentParser()
    prepare.add_arguments(parser)
    return prepare.run(parser.parse_args(words))


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_toy_set_is_written_and_read_back_equal(tmp_path):
    made = prepare.prepare_set(str(tmp_path / "set"), TOY, samples_per_shard=8)
    assert [shard.samples for shard in made.shards] == [8, 8, 4]
    assert list(iterate_records(made.url)) == list(toy.toy_records("toy_val", 20, 3, 64))
    assert made.categories == toy.toy_categories("toy_val")
    assert made.info["totals"]["samples"] == 20 and made.info["counts"] == {}


def test_the_same_command_reuses_and_another_is_refused(tmp_path, capsys):
    url = str(tmp_path / "set")
    prepare.prepare_set(url, TOY)
    before = contents(tmp_path)
    prepare.prepare_set(url, TOY)
    assert contents(tmp_path) == before
    assert "are there already" in capsys.readouterr().out
    with pytest.raises(DataError, match="seed: 3 there, 4 now.*delete that folder"):
        prepare.prepare_set(url, replace(TOY, seed=4))
    assert contents(tmp_path) == before


def test_a_changed_source_is_noticed(tmp_path):
    source = tmp_path / "pairs"
    (source / "images").mkdir(parents=True)
    for path in (SAMPLES / "web_pairs" / "images").iterdir():
        os.link(path, source / "images" / path.name)
    lines = (SAMPLES / "web_pairs" / "pairs.jsonl").read_text().splitlines(keepends=True)
    (source / "pairs.jsonl").write_text("".join(lines[:5]))
    options = PrepareConfig(source="pairs", root=str(source))
    assert prepare.prepare_set(str(tmp_path / "set"), options).samples == 5
    (source / "pairs.jsonl").write_text("".join(lines[:6]))
    with pytest.raises(DataError, match="made with other settings"):
        prepare.prepare_set(str(tmp_path / "set"), options)


@pytest.mark.parametrize("killed_after", [2, 9, 17, 21])
def test_cut_off_anywhere_the_same_command_ends_with_equal_bytes(
    tmp_path, monkeypatch, killed_after
):
    prepare.prepare_set(str(tmp_path / "whole"), TOY, samples_per_shard=8)
    real, calls = toy.toy_record, Counter()

    def dies(*arguments):
        calls["all"] += 1
        if calls["all"] >= killed_after:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(toy, "toy_record", dies)
        with pytest.raises(KeyboardInterrupt):
            prepare.prepare_set(str(tmp_path / "cut"), TOY, samples_per_shard=8)
    if (tmp_path / "cut" / "commits").exists():
        with pytest.raises(DataError, match="other settings"):
            prepare.prepare_set(str(tmp_path / "cut"), replace(TOY, count=21), samples_per_shard=8)
    prepare.prepare_set(str(tmp_path / "cut"), TOY, samples_per_shard=8)
    whole, cut = contents(tmp_path / "whole"), contents(tmp_path / "cut")
    commits = [name for name in whole if name.parts[0] == "commits"]
    assert {k: v for k, v in cut.items() if k not in commits} == {
        k: v for k, v in whole.items() if k not in commits
    }
    for name in commits:  # the attempt's name is the only thing that may differ
        one, two = json.loads(whole[name]), json.loads(cut[name])
        assert {**one, "attempt": ""} == {**two, "attempt": ""}


def test_what_committed_nothing_blocks_no_other_command(tmp_path, monkeypatch):
    url = str(tmp_path / "set")
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "_shards", lambda *_: pytest.fail("interrupted"))
        with pytest.raises(pytest.fail.Exception):
            prepare.prepare_set(url, BCCD)
    looks = tmp_path / "set" / "looks" / "shard-000000.json"
    storage.write_bytes(str(looks), b"[]")  # of the first command: what it saw says nothing now
    options = PrepareConfig(source="pairs", root=str(SAMPLES / "web_pairs"))
    made = prepare.prepare_set(url, replace(options, clean=CleanConfig(duplicates=True)))
    assert made.samples == 36 and not looks.exists()
    with pytest.raises(DataError, match="source: pairs there, toy now"):
        prepare.prepare_set(url, TOY)


def test_two_commands_at_once_never_make_one_set(tmp_path, monkeypatch):
    """The second takes the folder over before the first commits; the first ends first."""
    url, real = str(tmp_path / "set"), prepare._shards

    def overtaken(*arguments):
        with monkeypatch.context() as patch:
            patch.setattr(prepare, "_shards", lambda *_: [])
            patch.setattr(prepare, "_complete", lambda *_: None)
            prepare.prepare_set(url, replace(TOY, seed=4))
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "_shards", overtaken)
        prepare.prepare_set(url, TOY, samples_per_shard=8)
    (tmp_path / "set" / "dataset.json").unlink()
    with pytest.raises(DataError, match="shard-000000 was made by another command"):
        prepare.prepare_set(url, replace(TOY, seed=4))


def test_what_differs_is_said_in_words_and_paths(tmp_path):
    for name in ("one", "two"):
        shutil.copytree(SAMPLES / "web_pairs" / "images", tmp_path / name / "images")
    lines = (SAMPLES / "web_pairs" / "pairs.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "one" / "pairs.jsonl").write_text("".join(lines[:5]))
    (tmp_path / "two" / "pairs.jsonl").write_text("".join(lines[:6]))
    first, second = (
        PrepareConfig(source="pairs", root=str(tmp_path / name)) for name in ("one", "two")
    )
    url = str(tmp_path / "set")
    prepare.prepare_set(url, replace(first, clean=CleanConfig(min_words=2)))
    cases = {
        second: f"root: {tmp_path}/one there, {tmp_path}/two now",
        replace(first, clean=CleanConfig(min_words=3)): "min_words: 2 there, 3 now",
        first: "min_words: 2 there, 0 now",  # a rule that is gone is another setting too
    }
    for options, said in cases.items():
        with pytest.raises(DataError, match="not the same table|min_words") as caught:
            prepare.prepare_set(url, options)
        assert said in str(caught.value)
        assert not re.search(r"[0-9a-f]{8}", str(caught.value).replace(url, ""))


def test_only_what_differs_is_named(tmp_path):
    options = PrepareConfig(source="pairs", root=str(SAMPLES / "web_pairs"))
    url, other = str(tmp_path / "plain"), str(tmp_path / "ruled")
    ruled = replace(options, clean=CleanConfig(min_side=200))
    prepare.prepare_set(url, options)
    prepare.prepare_set(other, ruled)
    for folder, given, said in (
        (url, ruled, "min_side: 0 there, 200 now"),
        (other, options, "min_side: 200 there, 0 now"),
        (url, replace(options, clean=CleanConfig(languages=("en",))), "languages: none there, en"),
    ):
        with pytest.raises(DataError, match=re.escape(f"with other settings ({said}")) as caught:
            prepare.prepare_set(folder, given)
        assert ";" not in str(caught.value).partition(" (")[2].partition(")")[0]


def test_a_set_made_before_a_rule_was_known_is_as_by_that_rules_default(tmp_path):
    options = PrepareConfig(source="pairs", root=str(SAMPLES / "web_pairs"))
    ruled, url = replace(options, clean=CleanConfig(min_side=50)), tmp_path / "set"
    prepare.prepare_set(str(url), ruled)
    made = open_shard_set(str(url))
    content = made.info["plan"]["content"]
    del content["languages"], content["max_aspect"]
    write_manifest(str(url), list(made.shards), made.categories, made.info)
    before = contents(url)
    prepare.prepare_set(str(url), ruled)
    assert contents(url) == before
    with pytest.raises(DataError, match=r"settings \(min_side: 50 there, 60 now\);"):
        prepare.prepare_set(str(url), replace(options, clean=CleanConfig(min_side=60)))


def test_progress_is_shown_within_a_shard(tmp_path, monkeypatch):
    """Step by step and never back, though there are one or two shards only."""
    bars = {}

    class Bar:
        def __init__(self, total, text, unit):
            self.n, self.steps = 0, []
            bars[f"{text}: {total} {unit}s"] = self

        def update(self, count):
            self.n += count
            self.steps.append(count)

        def close(self):
            pass

    monkeypatch.setattr(prepare, "bar", Bar)
    monkeypatch.setattr(worker_notes, "NOTE_S", 0.0)
    url = str(tmp_path / "set")
    prepare.prepare_set(url, TOY, samples_per_shard=10, workers=0)
    clean = CleanConfig(exclude=(url,))
    other = replace(TOY, seed=2, clean=clean)
    prepare.prepare_set(str(tmp_path / "other"), other, workers=0)
    for text in ("prepare set: 20 rows", "hash excluded images: 20 images"):
        assert bars[text].n == 20 and set(bars[text].steps) <= {0, 1}
    tars = tmp_path / "tars"
    tars.mkdir()
    [tar, _] = sorted(Path(url).glob("*.tar"))
    tar.rename(tars / tar.name)
    size = (tars / tar.name).stat().st_size
    prepare.index_in_place(PrepareConfig(source="webdataset", root=str(tars)), workers=0)
    steps = bars[f"index tars: {size} bytes"].steps
    assert sum(steps) == size and len(steps) >= 10 and 0 <= min(steps) <= max(steps) < size / 2


def test_the_rate_counts_from_the_beginning(monkeypatch):
    bars, make = [], prepare.bar
    monkeypatch.setattr(prepare, "bar", lambda *given: bars.append(make(*given)) or bars[-1])
    rows = prepare._Unit("row", lambda number: (number, 1))
    list(prepare._mapped(lambda: time.sleep, [0.3], 0, "rows", rows, 1))
    [shown] = bars
    assert shown.n == 1 and time.time() - shown.start_t >= 0.3


@pytest.mark.parametrize("command", ["prepare pairs --root x --out y", "check x", "stats x"])
@pytest.mark.parametrize("number", ["-1", "two"])
def test_impossible_numbers_of_workers_are_refused(command, number, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*command.split(), "--workers", number])
    said = capsys.readouterr().err
    assert caught.value.code == 2
    assert "argument --workers: must be a whole number of" in said and f"not '{number}'" in said


def test_mistakes_are_named_as_the_user_made_them(tmp_path, capsys):
    web = ["prepare", "pairs", "--root", str(SAMPLES / "web_pairs"), "--out", str(tmp_path / "x")]
    for words, said in [
        ("--max-aspect 0.5", "--max-aspect must be 0 or at least 1, not 0.5"),
        ("--min-side -1", "--min-side must be 0 or more"),
        ("--min-words -1", "--min-words must be 0 or more"),
        ("--look-distance 9", "--look-distance must be between 0 and 7"),
        ("--languages en english", "--languages must be ISO 639 codes, not 'english'; did you "
                                   "mean en? known codes: ace, af,"),
        ("--languages EN", "did you mean en?"),
        ("--languages xy", "known codes: "),
    ]:  # fmt: skip
        assert main([*web, *words.split()]) == 2
        assert said in capsys.readouterr().err
        assert not (tmp_path / "x").exists()
    toy_words = ["prepare", "toy", "--set", "toy_val", "--out", str(tmp_path / "x")]
    with pytest.raises(SystemExit):
        main([*toy_words, "--count", "0"])
    assert "--count: must be a whole number of 1 or more, not '0'" in capsys.readouterr().err
    assert main([*toy_words, "--count", "1", "--seed", "-1"]) == 2
    assert "glipv2 prepare: --seed must be 0 or more, not -1" in capsys.readouterr().err
    recipe = tmp_path / "recipe.yaml"
    web_set = {"source": "pairs", "root": web[3], "clean": {"max_aspect": 0.5}}
    recipe.write_text(json.dumps({"run_dir": str(tmp_path), "prepare": {"web": web_set}}))
    assert main(["prepare", "recipe", str(recipe)]) == 2
    assert "clean.max_aspect must be" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "near"), [("prepare cocoo", "coco"), ("prepare COCO", "coco"), ("prepair", "prepare")]
)
def test_the_nearest_name_is_given(words, near, capsys):
    with pytest.raises(SystemExit):
        main(words.split())
    assert f"did you mean {near}?" in capsys.readouterr().err


def test_the_help_says_what_each_option_is_for_its_source(capsys):
    for source, texts in {
        "coco": ["the instances JSON file"],
        "voc": ["the folder of XML files", "captions of fewer words"],
        "pairs": ["first with text of alt, caption, text, description, title"],
        "webdataset": ["the .txt, else the first with text of caption, alt, text,"],
    }.items():
        with pytest.raises(SystemExit):
            main(["prepare", source, "--help"])
        shown = " ".join(capsys.readouterr().out.split())
        assert all(text in shown for text in texts)


def test_voc_keeps_the_categories_of_the_whole_folder_and_the_licence(capsys):
    made = prepare.prepare_set("memory://bccd-heldout", BCCD)
    assert (made.samples, made.categories) == (20, ("Platelets", "RBC", "WBC"))
    assert made.info["licence"] == "MIT License"
    assert made.info["totals"] == {"samples": 20, "boxes": 304, "phrases": 0}
    assert "20 samples, 304 boxes" in capsys.readouterr().out


def test_every_command_line_makes_its_set(tmp_path):
    toy_url, pairs_url = str(tmp_path / "toy"), str(tmp_path / "web")
    assert command(*f"toy --set toy_pairs --count 3 --size 64 --hard --out {toy_url}".split()) == 0
    assert open_shard_set(toy_url).samples == 3
    assert command("pairs", "--root", str(SAMPLES / "web_pairs"), "--out", pairs_url) == 0
    assert open_shard_set(pairs_url).info["licence"].startswith("Creative Commons Attribution 4.0")
    image = next((SAMPLES / "bccd" / "JPEGImages").iterdir()).name
    instances = {
        "images": [{"id": 5, "file_name": image}, {"id": 6, "file_name": "gone.jpg"}],
        "annotations": [{"image_id": 5, "category_id": 1, "bbox": [1, 2, 30, 40]}],
        "categories": [{"id": 1, "name": "cell"}],
    }
    (tmp_path / "coco.json").write_text(json.dumps(instances))
    words = ["coco", "--annotations", str(tmp_path / "coco.json"), "--images", *BCCD.images]
    assert command(*words, "--out", str(tmp_path / "coco")) == 0
    made = open_shard_set(str(tmp_path / "coco"))
    assert made.info["counts"] == {"image_missing": 1}
    assert made.info["first"] == {"image_missing": "gone.jpg"}
    assert "sample left out  image_missing" in prepare.closing_table(made)
    assert "gone.jpg" in prepare.closing_table(made)


def test_the_sets_of_a_recipe_are_made_where_its_run_looks_for_them(tmp_path):
    toy_set = {"source": "toy", "set": "toy_val", "count": 2, "size": 64}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"run_dir": str(tmp_path / "run"), "prepare": {"gold": toy_set}}))
    assert command("recipe", str(recipe), "prepare.gold.count=3") == 0
    assert open_shard_set(str(tmp_path / "run" / "data" / "gold")).samples == 3
    recipe.write_text(json.dumps({"run_dir": str(tmp_path / "run")}))
    with pytest.raises(ConfigError, match=r"recipe.yaml names no set to make"):
        command("recipe", str(recipe))


def test_a_source_without_one_usable_sample_says_why(tmp_path):
    (tmp_path / "pairs.jsonl").write_text('{"image": "gone.jpg", "alt": "a dog"}\n' * 3)
    options = PrepareConfig(source="pairs", root=str(tmp_path))
    with pytest.raises(DataError, match="no usable sample.*3 image_missing"):
        prepare.prepare_set("memory://nothing", options)
    assert not storage.exists("memory://nothing/dataset.json")
    options = PrepareConfig(source="pairs", root=str(SAMPLES / "web_pairs"))
    assert prepare.prepare_set("memory://nothing", options).samples == 36  # the corrected command


def test_mistakes_in_the_options_are_refused_before_any_work(tmp_path):
    url = str(tmp_path / "set")
    for options, message in [
        (PrepareConfig(source="voc", annotations=("x",)), "voc source needs images"),
        (PrepareConfig(source="toy", set="toy_val"), "toy source needs count"),
        (replace(TOY, count=-1), "count must be at least 1"),
        (replace(TOY, set="toy_nothing"), "unknown toy set"),
    ]:
        with pytest.raises(ConfigError, match=message):
            prepare.prepare_set(url, options)
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(DataError, match=r"empty.txt names nothing"):
        prepare.prepare_set(url, replace(BCCD, list=str(tmp_path / "empty.txt")))
    with pytest.raises(DataError, match="category 'cell' occurs twice"):
        instances = {"images": [], "annotations": []}
        instances["categories"] = [{"id": 1, "name": "cell"}, {"id": 2, "name": "cell"}]
        (tmp_path / "coco.json").write_text(json.dumps(instances))
        path = str(tmp_path / "coco.json")
        options = PrepareConfig(source="coco", annotations=(path,), images=(url[:-4],))
        prepare.prepare_set(url, options)
    assert not (tmp_path / "set").exists()


def test_an_unknown_reason_is_a_mistake_of_ours():
    with pytest.raises(KeyError):
        Dropped().note("no_such_reason", "here")
    assert {reason.unit for reason in REASONS.values()} == {"sample", "box", "kept"}
