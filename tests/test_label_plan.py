"""What a labelling refuses and goes by; its workers run in this process."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import label_recipe
from label_recipe import PAIRS, SHARDS
from tiny_detectors import build_detector

from glipv2.data_prep import noun_phrases as parser
from glipv2.data_prep.labelling import InHand, ShardTask
from glipv2.data_prep.noun_phrases import noun_phrases
from glipv2.data_prep.phrases import parser_version
from glipv2.data_prep.teachers import load_teacher, teacher_digest
from glipv2.jobs.cli import main
from glipv2.jobs.label import Killers, label, open_labeller
from glipv2.jobs.label_estimate import print_estimate
from glipv2.jobs.label_plan import make_plan
from glipv2.jobs.prepare import prepare_set
from glipv2.pipeline import ray_map
from glipv2.pipeline.config import PhraseConfig, PrepareConfig
from glipv2.pipeline.errors import ConfigError, DataError, MachinesLostError, PoisonItemError
from glipv2.pipeline.images import decode_image
from glipv2.pipeline.shard_reader import iterate_records, open_shard_set

in_this_process, folder, config = (
    label_recipe.in_this_process,
    label_recipe.folder,
    label_recipe.config,
)


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
    claim.write_text('{"input": "ab"}')
    with pytest.raises(DataError, match=r"label\.json is no record of a labelling; restore it"):
        label(config())
    # as if two commands with other settings had claimed the set at once, and this one last
    there = make_plan(config("label.max_boxes=4")).deciding
    claim.write_text(json.dumps({**json.loads(mine), **there}))
    with pytest.raises(ConfigError, match="shard-000000 was labelled with other settings, at the"):
        label(config("label.max_boxes=4"))


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
