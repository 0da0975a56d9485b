"""What a labelling refuses, estimates and says; its workers run in this process."""

import json
import logging
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from untrained_teacher import save_teacher

sys.path.insert(0, str(Path(__file__).parent))
from in_process import without_ray
from page_parser import shown
from tiny_detectors import build_detector

from glipv2.data_prep import noun_phrases as parser
from glipv2.data_prep.labelling import InHand, ShardTask
from glipv2.data_prep.noun_phrases import noun_phrases
from glipv2.data_prep.phrases import parser_version
from glipv2.data_prep.teachers import load_teacher, teacher_digest
from glipv2.jobs import label_estimate, view
from glipv2.jobs.cli import main
from glipv2.jobs.label import Killers, label, open_labeller
from glipv2.jobs.label_estimate import Sample, print_estimate
from glipv2.jobs.label_plan import make_plan
from glipv2.jobs.label_report import Shown
from glipv2.jobs.prepare import prepare_set
from glipv2.model.grounder import Grounder
from glipv2.pipeline import ray_map
from glipv2.pipeline.config import PhraseConfig, PrepareConfig
from glipv2.pipeline.config_loader import load_config
from glipv2.pipeline.errors import ConfigError, DataError, MachinesLostError, PoisonItemError
from glipv2.pipeline.images import decode_image
from glipv2.pipeline.shard_format import ShardInfo
from glipv2.pipeline.shard_reader import iterate_records, open_shard_set

PAIRS, SHARDS = 12, 3


@pytest.fixture(autouse=True)
def in_this_process():
    """Asks for no `monkeypatch`, so that a test's own changes are taken back before this one's."""
    with without_ray():
        yield


@pytest.fixture(autouse=True)
def without_gpu(in_this_process, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pairs, and a teacher with random weights that is sure of itself."""
    folder = tmp_path_factory.mktemp("plan")
    options = PrepareConfig(source="toy", set="toy_pairs", count=PAIRS, size=64, seed=1)
    prepare_set(str(folder / "pairs"), options, samples_per_shard=PAIRS // SHARDS)
    save_teacher(folder / "teacher")
    return folder


@pytest.fixture
def config(folder, tmp_path):
    """Of a labelling of the pairs into OUT of the test's own folder, with overrides."""

    def make(*overrides):
        settings = {
            "teacher": str(folder / "teacher"),
            "inputs": {str(folder / "pairs"): str(tmp_path / "out")},
            "score_threshold": 0.3,
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({"run_dir": str(tmp_path / "run"), "label": settings}))
        return load_config(str(path), list(overrides))

    return make


@pytest.mark.parametrize(
    "setting",
    ["score_threshold=1.5", "score_threshold=-0.1", "score_threshold=.nan", "cross_phrase_nms=1.01",
     "cross_phrase_nms=-1", "gpus_per_actor=-1", "cpus_per_actor=0"],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused_by_name(config, setting):
    with pytest.raises(ConfigError, match=f"label.{setting.partition('=')[0]} must be "):
        config(f"label.{setting}")


def test_an_output_set_that_is_used_twice_is_refused(config, folder, tmp_path):
    for twice in ("pairs", "other"):
        inputs = {str(folder / "pairs"): str(folder / twice), "data/more": str(folder / "other")}
        with pytest.raises(ConfigError, match=rf"label.inputs names .*{twice} twice"):
            label(config(f"label.inputs={json.dumps(inputs)}"))
    assert not (folder / "pairs" / "label.json").exists()


def test_what_is_wrong_with_a_later_set_is_told_before_the_first_is_labelled(
    config, gold, folder, tmp_path, monkeypatch
):
    def with_second(pairs, out):
        inputs = {str(folder / "pairs"): str(tmp_path / "out"), str(pairs): str(out)}
        return f"label.inputs={json.dumps(inputs)}"

    shutil.copytree(folder / "pairs", tmp_path / "more")
    second = with_second(tmp_path / "more", tmp_path / "gold")  # begun for other pairs
    monkeypatch.setattr(ray_map, "map_on_ray", lambda *_, **__: pytest.fail("Ray was started"))
    with pytest.raises(DataError, match=r"^label.inputs: .*no-such-set"):
        label(config(with_second("data/no-such-set", "data/2"), gold))
    with pytest.raises(ConfigError, match=f"{tmp_path / 'gold'} was labelled with other settings"):
        label(config(second))
    assert not (tmp_path / "out").exists()


def test_a_price_is_refused_where_nothing_is_estimated(config, tmp_path, capsys):
    config()
    assert main(["label", str(tmp_path / "recipe.yaml"), "--price", "2"]) == 2
    assert "--price is for --dry-run" in capsys.readouterr().err
    assert main(["label", str(tmp_path / "recipe.yaml"), "--gc", "--dry-run"]) == 2
    assert "--dry-run must touch none" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_teacher_that_is_not_trained_is_told_how_to_get_it(config, tmp_path):
    for phases, cure in (({}, "or train first$"), ({"teacher": {}}, "--phase teacher$")):
        asked = config("label.teacher=teacher")
        with pytest.raises(DataError, match=r"^label.teacher: no checkpoint in .*" + cure):
            make_plan(replace(asked, phases=phases))


def test_a_claim_gives_way_until_a_shard_is_committed(config, tmp_path):
    claim = tmp_path / "out" / "label.json"
    claim.parent.mkdir()
    claim.write_text('{"score_threshold": 1.5}')
    label(config("label.max_boxes=3"))
    assert json.loads(claim.read_text())["max_boxes"] == 3
    before = claim.read_bytes()
    with pytest.raises(ConfigError, match="max_boxes: 3 there, 4 now"):
        label(config("label.max_boxes=4"))
    assert claim.read_bytes() == before


def test_shards_of_unknown_making_are_not_taken_for_labelled_ones(config, tmp_path):
    label(config())
    claim = tmp_path / "out" / "label.json"
    mine = claim.read_bytes()
    claim.unlink()
    with pytest.raises(ConfigError, match="out holds shards but no label.json"):
        label(config())
    assert not claim.exists()
    # as if two commands with other settings had claimed the set at once, and this one last
    there = make_plan(config("label.max_boxes=4")).deciding
    claim.write_text(json.dumps({**json.loads(mine), **there}))
    with pytest.raises(ConfigError, match="shard-000000 was labelled with other settings, at the"):
        label(config("label.max_boxes=4"))


def best_score(folder):
    """The highest score of any phrase of the pairs, asked one by one."""
    grounder = Grounder.load(folder / "teacher")
    best = 0.0
    for record in iterate_records(str(folder / "pairs")):
        spans = [[(p.start, p.end)] for p in noun_phrases(record.caption)]
        if spans:
            [found] = grounder.ground([decode_image(record.image)], [(record.caption, spans)])
            best = max(best, *found.scores_K.tolist())
    return best


@pytest.mark.parametrize("keep_empty", [False, True])
def test_a_set_without_boxes_is_told_with_the_best_score_and_still_opens(
    config, folder, tmp_path, caplog, keep_empty
):
    best = best_score(folder)
    assert 0.3 < best < 0.999
    with caplog.at_level(logging.WARNING):
        said = label(config("label.score_threshold=0.999", f"label.keep_empty={keep_empty}"))
    out = str(tmp_path / "out")
    [warning] = [r.getMessage() for r in caplog.records if r.name == "glipv2.jobs.label"]
    assert f"{out}: no box for any of {PAIRS} pairs: the best score was " in warning
    told = re.search(r"best score was ([\d.]+), label.score_threshold is 0.999", warning)
    assert float(told[1]) == pytest.approx(best, abs=1e-4)
    assert "choose another output set or delete" in warning
    kept = PAIRS if keep_empty else 0
    assert f"{out}: {kept} of {PAIRS} pairs kept" in said and " 0 boxes" in said
    assert open_shard_set(out).samples == kept == len(list(iterate_records(out)))
    view.view(out, str(tmp_path / "page.html"), 5, 0)
    page = shown(tmp_path / "page.html")
    assert ("The set has no samples." in page.text) != keep_empty


def test_captions_without_phrases_are_told_apart(config, folder, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        label(config("label.phrases.min_length=60"))
    assert "no caption has a phrase to look for" in caplog.text
    assert f"glipv2 view {folder / 'pairs'}" in caplog.text


def test_the_last_line_has_the_totals_of_the_whole_set_after_a_restart(config, tmp_path, capsys):
    out = tmp_path / "out"
    first = label(config())
    records = list(iterate_records(str(out)))
    boxes = sum(len(record.regions) for record in records)
    assert 0 < len(records) <= PAIRS < boxes
    kept = f"{out}: {len(records)} of {PAIRS} pairs kept ({len(records) / PAIRS:.1%}), "
    totals = f"{kept}{boxes} boxes, {boxes / len(records):.1f} per image; "
    assert first.startswith(f"{totals}this run: {PAIRS} pairs in ")
    assert first.endswith(f"\nlook at them: glipv2 view {out} --out out.html")
    assert label(config()).startswith(f"{totals}nothing was left to do")
    for name in ("dataset.json", "commits/shard-000001.json"):
        (out / name).unlink()
    capsys.readouterr()
    again = label(config())
    assert again.startswith(f"{totals}this run: {PAIRS // SHARDS} pairs in ")
    assert re.search(r", [\d.]+ a second", again)
    bar = capsys.readouterr().err
    done = PAIRS - PAIRS // SHARDS
    assert f"{done}/{PAIRS}" in bar and "starting a worker" in bar
    assert re.search(rf"{PAIRS}/{PAIRS} \[[\d:]+<[\d:]+, +[\d.]+( pairs/s|s/ pairs), ", bar)
    assert f"{boxes / len(records):.1f} boxes per image" in bar.rpartition("\r")[2]


def test_the_bar_says_what_it_waits_for_and_then_what_is_kept_of_everything(capsys):
    def shard(pairs, images, boxes):
        counts = {"pairs": pairs, "images": images, "boxes": boxes}
        return ShardInfo(
            name="s", samples=images, bytes=0, crc32c="", commit_crc32c="", stats={"counts": counts}
        )

    live = Shown("web", 40, [shard(10, 10, 100)], workers=3)
    assert "starting up to 3 workers" in capsys.readouterr().err
    live.watch([InHand(shard=7, pairs=10, images=10, boxes=0)])
    assert live.bar.n == 20 and live.bar.postfix == "5.0 boxes per image, 100.0% kept"
    live.watch([InHand(shard=7, pairs=4), InHand(shard=8, pairs=1)])  # begun again after a death
    assert live.bar.n == 20
    live.update(7, shard(30, 0, 0))
    live.watch([InHand(shard=7, pairs=10)])  # an old note
    live.close()
    last = capsys.readouterr().err.rpartition("\r")[2]
    assert "40/40" in last and "10.0 boxes per image, 25.0% kept" in last
    assert "out: 10 of 40 pairs kept (25.0%), 100 boxes, 10.0 per image" in live.closing_lines(
        "out"
    )


@pytest.fixture
def gold(config, folder, tmp_path):
    """What the teacher itself finds above 0.5, as if it were the truth."""
    name = str(tmp_path / "gold")
    inputs = json.dumps({str(folder / "pairs"): name})
    label(config(f"label.inputs={inputs}", "label.score_threshold=0.5", "label.max_boxes=100"))
    (tmp_path / "run").rename(tmp_path / "run_of_gold")
    return f"label.calibration={name}"


def scores(url):
    return sorted(r.score for record in iterate_records(url) for r in record.regions)


def test_the_threshold_that_is_chosen_on_gold_is_told_and_used(config, gold, tmp_path, caplog):
    out, asked = str(tmp_path / "out"), (gold, "label.target_precision=0.8", "label.max_boxes=100")
    said = label(config(*asked))
    chosen = json.loads((tmp_path / "run" / "labels" / "threshold.json").read_text())
    threshold = chosen["threshold"]
    assert chosen["reached"] and 0.3 < threshold < 0.5
    curve = [(p["threshold"], p["precision"], p["recall"], p["kept"]) for p in chosen["curve"]]
    assert (threshold, chosen["precision"], chosen["recall"]) in [point[:3] for point in curve]
    assert [point[0] for point in curve] == sorted({point[0] for point in curve})
    assert all(precision < 0.8 for at, precision, *_ in curve if at < threshold)
    kept = [point[3] for point in curve]
    assert len(curve) > 20 and kept == sorted(kept, reverse=True) and kept[-1] < kept[0]
    told = f"threshold {threshold:.2f}: precision {chosen['precision']:.2f}, recall "
    assert said.startswith(told) and "on gold\n" in said and caplog.text == ""
    assert json.loads((tmp_path / "out" / "label.json").read_text())["score_threshold"] == threshold
    kept = scores(out)
    (tmp_path / "out").rename(tmp_path / "first")
    assert label(config(*asked)).startswith(told)  # known from threshold.json
    assert scores(out) == kept
    (tmp_path / "out").rename(tmp_path / "second")
    label(config("label.max_boxes=100"))
    at_less = scores(out)
    assert kept == [score for score in at_less if score >= threshold] != at_less


@pytest.fixture(scope="module")
def truth(folder):
    """Gold pairs of which a teacher with random weights knows nothing."""
    options = PrepareConfig(source="toy", set="toy_calibration", count=4, size=64, seed=2)
    prepare_set(str(folder / "truth"), options)
    return f"label.calibration={folder / 'truth'}"


def test_a_precision_that_no_threshold_reaches_is_warned_of(
    config, truth, tmp_path, caplog, capsys
):
    label(config(truth))
    chosen = json.loads((tmp_path / "run" / "labels" / "threshold.json").read_text())
    assert chosen["precision"] < 0.8 and not chosen["reached"]
    told = "no threshold reaches label.target_precision 0.9 on label.calibration; the most precise"
    [warning] = [r.getMessage() for r in caplog.records if r.name == "glipv2.jobs.label"]
    assert warning.startswith(f"{told} is taken, with {chosen['precision']:.2f}")
    print_estimate(config(truth), price=0.0)
    said = capsys.readouterr().out
    assert told in said and f"threshold {chosen['threshold']:.2f}: precision " in said


def test_a_dry_run_refuses_other_settings_and_does_not_end_what_was_cut_off(
    config, tmp_path, capsys
):
    out = tmp_path / "out"
    label(config())
    winner = json.loads((out / "commits" / "shard-000001.json").read_text())["attempt"]
    (out / "attempts").mkdir(exist_ok=True)
    (out / "shard-000001.tar").rename(out / "attempts" / f"{winner}.tar")
    (out / "attempts" / "shard-000002-ab.tar").write_bytes(b"half")
    for name in ("dataset.json", "shard-000002.tar"):
        (out / name).unlink()
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    print_estimate(config(), price=0.0)
    assert f"{PAIRS} pairs in {SHARDS} shards, of which 2 are done" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="max_boxes: 20 there, 7 now"):
        print_estimate(config("label.max_boxes=7"), price=0.0)
    after = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert after == before


@pytest.fixture(scope="module")
def detectors(folder):
    """Of two families of transformers, with random weights."""
    return [f"hf:{build_detector(k, folder / k)}" for k in ("grounding-dino", "owlv2")]


def best_of(records):
    return [max(region.score for region in record.regions) for record in records]


def asked_directly(detectors, records):
    """The best score of each record's image when the teachers are asked by hand."""
    teacher = load_teacher(detectors)
    prompts = [
        (record.caption, [[(p.start, p.end)] for p in noun_phrases(record.caption)])
        for record in records
    ]
    found = teacher.ground([decode_image(record.image) for record in records], prompts)
    return [float(detection.scores_K.max()) for detection in found]


def test_an_ensemble_of_foreign_teachers_labels_with_a_threshold_of_its_own(
    config, truth, detectors, tmp_path
):
    first, second = detectors
    both = (truth, f"label.teacher={first}", f"label.ensemble=[{second}]", "label.max_boxes=100")
    plan = make_plan(config(*both))
    assert plan.stamp["teacher"] == teacher_digest(detectors)
    assert plan.stamp["parser"] == parser_version(PhraseConfig())
    said = label(config(*both))
    assert said.startswith(str(plan.gold))
    labelled = open_shard_set(str(tmp_path / "out"))
    assert plan.stamp.items() <= labelled.info.items()
    assert all(plan.stamp.items() <= shard.stats.items() for shard in labelled.shards)
    records = list(iterate_records(labelled.url))
    assert len(records) > PAIRS / 2
    for record in records:
        assert plan.stamp.items() <= record.provenance.items()
        for region in record.regions:
            assert region.score >= plan.gold.threshold
            assert region.phrase == " ".join(record.caption[a:b] for a, b in region.spans)
    assert best_of(records) == pytest.approx(asked_directly(detectors, records), abs=1e-3)
    with pytest.raises(ConfigError, match="  teacher: '.*' there, '.*' now"):
        label(config(truth, f"label.teacher={first}", "label.max_boxes=100"))


def test_a_dry_run_tells_the_sample_it_took(config, tmp_path, capsys):
    assert print_estimate(config(), price=0.0) == 0
    said = capsys.readouterr().out
    found = re.search(r"sample: (\d+) pairs at ([\d.]+) a second on one worker, ", said)
    assert int(found[1]) == PAIRS // SHARDS  # of the first shard, which has no more
    assert re.search(r"start: \d+ s until a worker is ready", said)
    assert f"left: {PAIRS} pairs" in said and "0.00" not in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("pair_s", "start_s", "actors", "expected"),
    [
        # 12 pairs in 3 shards: all by one worker; start + a share each; 3 starts cost as well
        (2.0, 10.0, 2, ("24 s of work", "about 22 s with 2 like", "cost: 0.12 at 10")),
        (2.0, 10.0, 9, ("24 s of work", "about 18 s with 3 like", "cost: 0.15 at 10")),
        (100.0, 60.0, 1, ("20 min 00 s of work", "about 21 min 00 s with 1", "cost: 3.50 at 10")),
        (3600.0, 0.0, 1, ("12 h 00 min of work", "about 12 h 00 min with 1", "cost: 120.00 at")),
    ],
)
def test_the_estimate_adds_starts_and_shares_of_the_work(
    config, monkeypatch, capsys, pair_s, start_s, actors, expected
):
    sample = Sample(pairs=4, images=3, boxes=6, start_s=start_s, pair_s=pair_s)
    monkeypatch.setattr(label_estimate, "timed", lambda *_: sample)
    print_estimate(config(f"label.num_actors=[1,{actors}]"), price=10)
    said = capsys.readouterr().out
    assert "75% kept, 2.0 boxes each" in said
    assert all(part in said for part in expected), said


def test_the_bar_moves_with_the_windows_of_a_shard(config, monkeypatch):
    shown, show = [], Shown._show
    monkeypatch.setattr(Shown, "_show", lambda self: (show(self), shown.append(self.bar.n)))
    label(config("label.window=1"))
    assert shown == sorted(shown) and shown[-1] == PAIRS
    assert set(shown) == set(range(1, PAIRS + 1))


def test_a_machine_with_another_teacher_or_parser_labels_nothing(
    config, folder, tmp_path, monkeypatch
):
    shutil.copytree(folder / "teacher", tmp_path / "teacher")
    plan = make_plan(config(f"label.teacher={tmp_path / 'teacher'}"))
    pairs = open_shard_set(str(folder / "pairs"))
    open_labeller(pairs, plan.settings, plan.stamp)
    with monkeypatch.context() as patch:
        patch.setattr(parser, "RULES", parser.RULES + 1)
        with pytest.raises(ConfigError, match=rf"has a parser \(.*rules {parser.RULES}"):
            open_labeller(pairs, plan.settings, plan.stamp)
    vocab = tmp_path / "teacher" / "vocab.txt"
    vocab.write_text(vocab.read_text().replace("circle", "square_"))
    with pytest.raises(ConfigError, match=rf"has a teacher \({tmp_path}/teacher: \w+ instead of"):
        open_labeller(pairs, plan.settings, plan.stamp)


def test_pairs_that_killed_are_remembered_of_the_same_set_only(tmp_path):
    url, task = str(tmp_path / "killers.json"), ShardTask(number=3)
    note = InHand(shard=3, first=5, last=6, alone=True)
    again = Killers(url, "one").after_kill(task, 2, note)
    assert again.skip == (5,) == Killers(url, "one").of(3)
    assert Killers(url, "other").of(3) == Killers(url, "one").of(4) == ()


@pytest.mark.parametrize(("error", "code"), [(MachinesLostError, 3), (PoisonItemError, 2)])
def test_a_shard_that_is_given_up_does_not_keep_other_sets_waiting(
    config, folder, tmp_path, monkeypatch, capsys, error, code
):
    shutil.copytree(folder / "pairs", tmp_path / "more")
    config()
    inputs = {
        str(folder / "pairs"): str(tmp_path / "out"),
        str(tmp_path / "more"): str(tmp_path / "2"),
    }
    usual = ray_map.map_on_ray

    def first_fails(*arguments, **options):
        yield from usual(*arguments, **options)
        if not (tmp_path / "failed").exists():
            (tmp_path / "failed").touch()
            raise error("shard 1 is given up")

    monkeypatch.setattr(ray_map, "map_on_ray", first_fails)
    command = ["label", str(tmp_path / "recipe.yaml"), f"label.inputs={json.dumps(inputs)}"]
    assert main(command) == code
    said = capsys.readouterr().err
    assert f"glipv2 label: {folder / 'pairs'}: shard 1 is given up" in said
    assert f"{tmp_path / '2'}: " in said
    assert (tmp_path / "2" / "dataset.json").exists()
    assert not (tmp_path / "out" / "dataset.json").exists()
    assert main(command) == 0
