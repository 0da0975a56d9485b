"""`eval.suites`: what is asked, kept and scored, and that nothing is predicted twice."""

import gzip
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from commands import finish, kill_when  # noqa: E402
from scored_runs import (  # noqa: E402
    IMAGES,
    SHARDS,
    counting_map,
    save_step,
    scored_config,
    spy,
    tiny_model,
    write_detection,
    write_tasks,
)

from glipv2.eval.detection import average_precision  # noqa: E402
from glipv2.jobs.evaluate import evaluate_suites, suite_table  # noqa: E402
from glipv2.jobs.evaluate_predict import as_detection, read_predictions  # noqa: E402
from glipv2.jobs.evaluate_score import Scores, averages  # noqa: E402
from glipv2.jobs.evaluate_suites import evaluate_suite, make_job, open_suite  # noqa: E402
from glipv2.model.glip import GLIPv2  # noqa: E402
from glipv2.model.grounder import Grounder  # noqa: E402
from glipv2.model.weights import from_pretrained, model_files  # noqa: E402
from glipv2.pipeline import ray_map  # noqa: E402
from glipv2.pipeline.checkpoint import write_folder  # noqa: E402
from glipv2.pipeline.errors import ConfigError, DataError  # noqa: E402
from glipv2.pipeline.pins import pins  # noqa: E402
from glipv2.pipeline.shard_reader import iterate_records, open_shard_set  # noqa: E402


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_detection(folder / "val")
    write_tasks(folder)
    (folder / "model").mkdir()
    (folder / "bare").mkdir()
    for model, heads in (("model", True), ("bare", False)):
        for name, content in tiny_model(0, heads).items():
            (folder / model / name).write_bytes(content)
    return folder


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was predicted, in this process."""
    pieces: list[Any] = []
    monkeypatch.setattr(ray_map, "map_on_ray", counting_map(pieces))
    return pieces


def whole(result: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in result.items() if name != "seconds"}


def test_a_result_has_the_figures_of_the_models_own_predictions(
    data: Path, tmp_path: Path, done: list[Any]
) -> None:
    step = save_step(str(tmp_path / "run"), 20)
    config = scored_config(tmp_path / "run", {"toy": {"set": str(data / "val"), "chunk_size": 5}})
    [result] = evaluate_suites(config, {"model": str(tmp_path / "run")})["model"]
    assert (
        json.loads((tmp_path / "run" / "eval" / "step-000020" / "toy.json").read_text()) == result
    )
    records, opened = list(iterate_records(str(data / "val"))), open_shard_set(str(data / "val"))
    found = Grounder.load(step).detect(
        [r.image for r in records], list(opened.categories), max_categories_per_prompt=5
    )
    keys = [record.key for record in records]
    expected = average_precision(records, dict(zip(keys, found, strict=True)), opened.categories)
    assert result["metrics"]["ap"] == pytest.approx(expected.ap, abs=1e-6)
    assert result["metrics"]["ap50"] == pytest.approx(expected.ap50, abs=1e-6)
    assert result["sets"]["toy"]["images"] == SHARDS * IMAGES == len(records)
    assert result["sets"]["toy"]["digest"] == opened.digest
    assert result["checkpoint"]["step"] == 20 and result["settings"]["chunk_size"] == 5
    assert set(result["sets"]["toy"]["per_category"]) == set(expected.per_category)
    assert f"  images: {len(records)} of 1 set" in suite_table({"model": [result]})
    job = make_job(config, open_suite(config, "toy"), step)
    kept = {k: e for _, own in read_predictions(job.work()["toy"]) for k, e in own.items()}
    for key, one in zip(keys, found, strict=True):
        again = as_detection(kept[key])
        torch.testing.assert_close(again.boxes_K4, one.boxes_K4, rtol=0, atol=1e-3)
        assert again.phrases == one.phrases
    assert not pins(str(tmp_path / "run"))


def test_what_was_scored_or_predicted_is_not_made_again(
    data: Path, tmp_path: Path, done: list[Any]
) -> None:
    run = tmp_path / "run"
    save_step(str(run), 20)
    suites = {"toy": {"set": str(data / "val")}}
    config = scored_config(run, suites)
    [first] = evaluate_suites(config, {"model": str(run)})["model"]
    assert len(done) == SHARDS
    [again] = evaluate_suites(config, {"model": str(run)})["model"]
    assert again == first and len(done) == SHARDS
    [rescored] = evaluate_suites(config, {"model": str(run)}, score_only=True)["model"]
    assert whole(rescored) == whole(first) and len(done) == SHARDS
    other = scored_config(run, {"toy": {**suites["toy"], "chunk_size": 3}})
    with pytest.raises(DataError, match=f"{SHARDS} of {SHARDS} prediction files of toy are miss"):
        evaluate_suites(other, {"model": str(run)}, score_only=True)
    [changed] = evaluate_suites(other, {"model": str(run)})["model"]
    assert len(done) == 2 * SHARDS and changed["protocol"] != first["protocol"]
    evaluate_suites(config, {"model": str(run)})  # these predictions are still there
    assert len(done) == 2 * SHARDS
    save_step(str(run), 20, seed=5)  # another model under the same number
    evaluate_suites(config, {"model": str(run)})
    assert len(done) == 3 * SHARDS


def test_a_killed_evaluation_goes_on_with_the_shards_that_are_missing(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    save_step(str(run), 20)
    config = scored_config(run, {"toy": {"set": str(data / "val")}})
    done: list[Any] = []
    in_process = counting_map(done)

    def killed(*arguments: Any, **named: Any) -> Any:
        for number, item in enumerate(in_process(*arguments, **named), start=1):
            yield item
            if number == 2:
                raise KeyboardInterrupt

    monkeypatch.setattr(ray_map, "map_on_ray", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate_suites(config, {"model": str(run)})
    assert not (run / "eval" / "step-000020").exists()
    monkeypatch.setattr(ray_map, "map_on_ray", in_process)
    [resumed] = evaluate_suites(config, {"model": str(run)})["model"]
    assert sorted(piece.shard for piece in done) == list(range(SHARDS))
    out = str(tmp_path / "fresh")
    [fresh] = evaluate_suites(config, {"model": str(run)}, out=out)["model"]
    assert fresh["metrics"] == resumed["metrics"] and len(done) == 2 * SHARDS
    kept, made = (sorted(path.rglob("*.gz")) for path in (run / "eval", tmp_path / "fresh"))
    for one, other in zip(kept, made, strict=True):
        same = [json.loads(gzip.decompress(path.read_bytes()))["images"] for path in (one, other)]
        assert same[0] == same[1]


def test_scoring_alone_needs_no_checkpoint(data: Path, tmp_path: Path, done: list[Any]) -> None:
    step = save_step(str(tmp_path / "run"), 20)
    config = scored_config(tmp_path / "run", {"toy": {"set": str(data / "val"), "limit": 5}})
    [first] = evaluate_suites(config, {"model": step})["model"]
    assert first["sets"]["toy"]["images"] == 5
    for path in Path(step).iterdir():
        path.unlink()
    Path(step).rmdir()
    [again] = evaluate_suites(config, {"model": step}, score_only=True)["model"]
    assert whole(again) == whole(first)


def test_a_damaged_prediction_file_is_named(data: Path, tmp_path: Path, done: list[Any]) -> None:
    step = save_step(str(tmp_path / "run"), 20)
    config = scored_config(tmp_path / "run", {"toy": {"set": str(data / "val")}})
    job = make_job(config, open_suite(config, "toy"), step)
    evaluate_suite(job)
    [damaged, *_] = job.work()["toy"]
    Path(damaged.out).write_bytes(Path(damaged.out).read_bytes()[:-20])
    with pytest.raises(DataError, match=r"shard-000000\.json\.gz is damaged.*delete it"):
        evaluate_suite(job, score_only=True)


def test_every_task_is_scored_with_the_heads_it_needs(
    data: Path, tmp_path: Path, done: list[Any]
) -> None:
    suites = {
        "boxes": {"set": str(data / "val"), "masks": True, "max_boxes": 7},
        "phrases": {"set": str(data / "val"), "task": "phrases"},
        "expressions": {"set": str(data / "referring"), "task": "referring"},
        "cut": {"set": str(data / "referring"), "task": "segmentation", "mask_score": 0.1},
        "vqa": {"set": str(data / "vqa"), "task": "vqa"},
        "lvis": {"set": str(data / "lvis"), "task": "lvis", "chunk_size": 2},
        "captions": {"set": str(data / "captioning"), "task": "captioning", "beams": 1},
    }
    config = scored_config(tmp_path / "run", suites)
    found = evaluate_suites(config, {"model": str(data / "model")})["model"]
    results = {result["suite"]: result for result in found}
    for result in results.values():
        value = result["metrics"][result["first"]]
        assert 0 <= value <= 1, result["suite"]
    assert {"mask_ap", "ap", "ar_100"} <= set(results["boxes"]["metrics"])
    assert {"classic_ap", "ap_common"} <= set(results["lvis"]["metrics"])
    assert results["lvis"]["settings"]["max_boxes"] == 0  # what was kept, not what was left unsaid
    assert results["lvis"]["settings"]["max_boxes_per_prompt"] == 300
    assert set(results["lvis"]["sets"]["lvis"]["per_category"]) == {"blue_dog"}
    assert {"recall_at_1", "merged_recall_at_1"} <= set(results["phrases"]["metrics"])
    assert results["expressions"]["metrics"]["expressions"] == 4
    assert {"mean_iou", "cumulative_iou"} <= set(results["cut"]["metrics"])
    assert results["vqa"]["metrics"]["questions"] == 6
    [folder] = (tmp_path / "run" / "eval").glob("model-*")
    exported = json.loads((folder / "vqa.evalai.json").read_text())
    assert sorted(entry["question_id"] for entry in exported) == [1, 2, 11, 12, 21, 22]
    assert {entry["answer"] for entry in exported} <= {"red", "blue", "two"}
    boxes = [
        len(entry["scores"])
        for _, own in read_predictions(
            make_job(config, open_suite(config, "boxes"), str(data / "model")).work()["boxes"]
        )
        for entry in own.values()
    ]
    assert max(boxes) == 7 and len(boxes) == SHARDS * IMAGES


@pytest.mark.parametrize(
    ("task", "given", "lacking"),
    [
        ("detection", "referring", "categories"),
        ("lvis", "captioning", "frequencies of categories"),
        ("lvis", "few", "frequencies of categories"),
        ("phrases", "lvis", "captions with boxes"),
        ("phrases", "spanless", "captions with boxes of their phrases"),
        ("referring", "captioning", "expressions"),
        ("referring", "several", "expressions of one box each"),
        ("segmentation", "vqa", "expressions with masks"),
        ("vqa", "captioning", "questions"),
        ("captioning", "vqa", "captions"),
    ],
)
def test_a_set_that_a_task_cannot_score_is_refused_before_predicting(
    data: Path, tmp_path: Path, task: str, given: str, lacking: str
) -> None:
    config = scored_config(tmp_path / "run", {"odd": {"set": str(data / given), "task": task}})
    with pytest.raises(ConfigError, match=rf"eval\.suites\.odd .*needs {lacking}.*has none: give"):
        open_suite(config, "odd")


def test_what_only_scoring_needs_is_looked_for_before_predicting(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = [{"question_id": n, "answer_type": "other", "question_type": "x"} for n in (1, 2)]
    files = {"other": {"annotations": known}, "coco": {"annotations": [{"id": 1}]}}
    for name, tree in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(tree))
    told = {"absent": "absent.json", "coco": "this is not a VQAv2 annotation",
            "other": r"does not tell the kind of question 01 of .*vqa: give the file"}  # fmt: skip
    for name, problem in told.items():
        suite = {"set": str(data / "vqa"), "task": "vqa", "annotations": f"{tmp_path}/{name}.json"}
        with pytest.raises(ConfigError, match=rf"eval\.suites\.odd\.annotations: .*{problem}"):
            open_suite(scored_config(tmp_path / "run", {"odd": suite}), "odd")
    monkeypatch.setattr(shutil, "which", lambda _: None)
    suite = {"set": str(data / "captioning"), "task": "captioning", "java": True}
    with pytest.raises(ConfigError, match="METEOR and SPICE need Java"):
        open_suite(scored_config(tmp_path / "run", {"odd": suite}), "odd")


def test_secret_answers_are_exported_and_not_scored(
    data: Path, tmp_path: Path, done: list[Any]
) -> None:
    """As of VQAv2's test-dev and test-std, alone or both together."""
    dev, std = str(data / "secret"), str(data / "secret2")
    suites = {"dev": {"set": dev, "task": "vqa"},
              "both": {"sets": {"dev": dev, "std": std}, "task": "vqa"}}  # fmt: skip
    config = scored_config(tmp_path / "run", suites)
    alone, both = evaluate_suites(config, {"model": str(data / "model")})["model"]
    assert alone["metrics"] == {"questions": 6} and both["metrics"] == {"questions": 10}
    [folder] = (tmp_path / "run" / "eval").glob("model-*")
    exported = json.loads((folder / "dev.evalai.json").read_text())
    assert [entry["question_id"] for entry in exported] == [1, 2, 11, 12, 21, 22]
    assert (folder / "both.dev.evalai.json").read_text() == (folder / "dev.evalai.json").read_text()
    assert len(json.loads((folder / "both.std.evalai.json").read_text())) == 4
    assert "questions" in suite_table({"model": [alone, both]})
    mixed = {"mixed": {"sets": {"val": str(data / "vqa"), "std": std}, "task": "vqa"}}
    with pytest.raises(DataError, match="accuracy is undefined for std"):
        evaluate_suites(scored_config(tmp_path / "run", mixed), {"model": str(data / "model")})


def test_an_image_is_encoded_once_for_all_questions_about_it(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grounder = Grounder.load(data / "model")
    images = [record.image for record in iterate_records(str(data / "vqa"))]
    questions = [["what colour", "how many", "is it red"], [], ["a circle"]]
    expected = [
        [grounder.answer([image], [question], top=2)[0] for question in own]
        for image, own in zip(images, questions, strict=True)
    ]
    encoded: list[int] = []
    encode = GLIPv2.encode_images

    def counting(self: GLIPv2, images_B3HW: torch.Tensor, *others: Any) -> Any:
        encoded.append(len(images_B3HW))
        return encode(self, images_B3HW, *others)

    monkeypatch.setattr(GLIPv2, "encode_images", counting)
    found = grounder.answer_each(images, questions, top=2, batch_size=2)
    assert sum(encoded) == len(images)
    for own, others in zip(found, expected, strict=True):
        assert [[name for name, _ in best] for best in own] == [
            [name for name, _ in best] for best in others
        ]
        for best, other in zip(own, others, strict=True):
            assert [p for _, p in best] == pytest.approx([p for _, p in other], abs=1e-5)


def test_lvis_keeps_as_many_boxes_as_asked_of_every_prompt(
    data: Path, tmp_path: Path, done: list[Any]
) -> None:
    plain = {"set": str(data / "val"), "chunk_size": 9}
    every = {**plain, "max_boxes": 0, "max_boxes_per_prompt": 120}
    counts = {}
    for name, suite in {"plain": plain, "every": every}.items():
        config = scored_config(tmp_path / "run", {name: suite})
        job = make_job(config, open_suite(config, name), str(data / "model"))
        evaluate_suite(job)
        found = [e for _, own in read_predictions(job.work()[name]) for e in own.values()]
        counts[name] = [np.array(entry["scores"]) for entry in found]
        for entry in found:
            assert all(0 <= label < 48 for label in entry["labels"])
    for few, many in zip(counts["plain"], counts["every"], strict=True):
        assert len(few) == 100 and len(many) > 300
        assert np.array_equal(np.sort(few), np.sort(many)[-100:])


def test_low_scores_are_kept_and_the_best_box_of_an_expression_whatever_it_is(
    data: Path, tmp_path: Path, done: list[Any]
) -> None:
    """Facts D.1: only what a phrase is less probable than 0.05 at is left out; facts I: of an
    expression not even that."""
    suites = {
        "boxes": {"set": str(data / "few")},
        "phrases": {"set": str(data / "referring"), "task": "phrases"},
        "expressions": {"set": str(data / "referring"), "task": "referring"},
    }
    config = scored_config(tmp_path / "run", suites)
    for name, bias, centerness in (("shy", 0.0, -7.0), ("unsure", -7.0, 0.0)):
        model, tokenizer = from_pretrained(data / "model")
        torch.nn.init.constant_(model.alignment_head.bias0, bias)
        torch.nn.init.constant_(model.box_head.centerness.bias, centerness)
        (tmp_path / name).mkdir()
        for file, content in model_files(model, tokenizer).items():
            (tmp_path / name / file).write_bytes(content)
        scores = {}
        for suite in suites:
            job = make_job(config, open_suite(config, suite), str(tmp_path / name))
            evaluate_suite(job)
            scores[suite] = [
                entry["scores"]
                for _, own in read_predictions(job.work()[suite])
                for entry in own.values()
            ]
        for suite, own in scores.items():
            wanted = name == "shy" or suite == "expressions"
            assert all(bool(each) == wanted for each in own), (name, suite)
        assert max(map(max, scores["expressions"])) < 0.05


def test_several_sets_give_their_mean_and_median(
    data: Path, tmp_path: Path, done: list[Any]
) -> None:
    sets = {f"part{limit}": str(data / "val") for limit in (1, 2)}
    config = scored_config(tmp_path / "run", {"many": {"sets": sets, "limit": 4}})
    [result] = evaluate_suites(config, {"model": str(data / "model")})["model"]
    ap = [own["metrics"]["ap"] for own in result["sets"].values()]
    assert result["metrics"]["ap"] == pytest.approx(np.mean(ap))
    assert result["metrics"]["ap_median"] == pytest.approx(np.median(ap))
    assert len(done) == 2  # both are the same set, so its 4 images were looked at once
    by_task = {
        "referring": ({"accuracy": 0.5, "expressions": 3.0, "dropped": 1.0},
                      {"accuracy": 1.0, "expressions": 5.0, "dropped": 0.0}),
        "phrases": ({"recall_at_1": 0.5, "phrases": 3.0, "merged_phrases": 3.0},
                    {"recall_at_1": 1.0, "phrases": 5.0, "merged_phrases": 5.0}),
    }  # fmt: skip
    counted = {
        task: averages(task, {str(n): Scores(metrics=own) for n, own in enumerate(sets)})
        for task, sets in by_task.items()
    }
    assert counted["referring"] == {
        "accuracy": 0.75, "expressions": 8, "dropped": 1, "accuracy_median": 0.75
    }  # fmt: skip
    assert counted["phrases"]["phrases"] == counted["phrases"]["merged_phrases"] == 8


def test_prompts_replace_names_and_stand_around_them(
    data: Path, tmp_path: Path, done: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(Grounder, "detect", spy(Grounder.detect, asked))
    monkeypatch.setattr(Grounder, "ground", spy(Grounder.ground, asked))
    short = {"set": str(data / "few"), "limit": 1}
    renamed = {**short, "prompts": {"blue_dog": {"name": "blue thing"}}}
    prompts = {
        "blue_dog": {"prefix": "there is a", "suffix": ", which is flat"},
        "cow": {"name": "big cow", "suffix": "on the left"},
    }
    around = {**short, "prompts": prompts}
    config = scored_config(tmp_path / "run", {"renamed": renamed, "around": around})
    evaluate_suites(config, {"model": str(data / "model")})
    [names] = asked[0]
    assert names == ["cat", "blue thing", "cow"]
    [(text, spans)] = asked[1]
    assert text == "cat. there is a blue dog, which is flat. big cow on the left"
    assert [text[a:b] for [(a, b)] in spans] == ["cat", "blue dog", "big cow"]
    bad = scored_config(tmp_path / "run", {"bad": {**short, "prompts": {"owl": {"name": "x"}}}})
    with pytest.raises(ConfigError, match=r"eval.suites.bad: the prompts are for .*: owl"):
        evaluate_suites(bad, {"model": str(data / "model")})
    for kind, head in (
        ({"masks": True}, "masks"),
        ({"task": "segmentation", "set": str(data / "referring")}, "masks"),
        ({"task": "vqa", "set": str(data / "vqa")}, "answers"),
        ({"task": "captioning", "set": str(data / "captioning")}, "captions"),
    ):
        first, headless = {"first": short}, {"headless": {**short, **kind}}
        config = scored_config(tmp_path / "bare", first | headless)
        with pytest.raises(ConfigError, match=rf"suites.headless needs a model with model.{head}"):
            evaluate_suites(config, {"model": str(data / "bare")})
    assert not (tmp_path / "bare").exists()  # the first suite is not scored in vain
    long = {"set": str(data / "val"), "prompts": {"blue square": {"suffix": "on the left"}}}
    config = scored_config(tmp_path / "run", {"long": long})
    with pytest.raises(ConfigError, match="must fit one text of 96 tokens"):
        evaluate_suites(config, {"model": str(data / "model")})


@pytest.mark.parametrize(
    ("suite", "told"),
    [
        ({}, "needs `set` or `sets`"),
        ({"set": "a", "sets": {"b": "c"}}, "needs `set` or `sets`"),
        ({"set": "a", "task": "detecton"}, "eval.suites.bad.task must be one of"),
        ({"set": "a", "limit": -1}, "limit must be 0 or more"),
        ({"sets": {"b": "c"}, "odinw": 13}, "a suite with `odinw`"),
        ({"set": "a", "chunks": 3}, "did you mean eval.suites.bad.chunk_size"),
    ],
)
def test_a_suite_that_makes_no_sense_is_refused(suite: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        scored_config("run", {"bad": suite})


def test_a_suite_is_scored_by_real_actors_and_shown(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_folder(str(run / "checkpoints" / "step-000040"), tiny_model(1), 40)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({
        "run_dir": str(run), "eval": {"suites": {"toy": {"set": str(data / "val")}}},
    }))  # fmt: skip
    said = finish("evaluate", recipe)
    result = json.loads((run / "eval" / "step-000040" / "toy.json").read_text())
    assert f"  ap{'':26s}{result['metrics']['ap']:12.4f}" in said
    printed = finish("evaluate", recipe, "--json", "-", "--suite", "toy")  # nothing is left to do
    assert json.loads(printed[printed.index("{") :])["suites"]["model"] == [result]
    assert "eval.suites has no 'coco'; it has: toy" in finish(
        "evaluate", recipe, "--suite", "coco", code=2
    )


@pytest.mark.slow
def test_a_command_that_is_killed_predicts_no_shard_twice(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_folder(str(run / "checkpoints" / "step-000040"), tiny_model(1), 40)
    recipe = tmp_path / "recipe.yaml"
    suites = {"toy": {"set": str(data / "val")}}
    recipe.write_text(
        json.dumps({"run_dir": str(run), "eval": {"suites": suites, "num_actors": 1}})
    )

    def made() -> dict[str, int]:
        found = run.glob("eval/predictions/*/*/*.gz")
        return {path.name: path.stat().st_mtime_ns for path in found}

    assert kill_when(lambda: len(made()) >= 2, "evaluate", recipe) == -9
    before = made()
    assert 2 <= len(before) < SHARDS
    finish("evaluate", recipe)
    assert before.items() <= made().items() and len(made()) == SHARDS
    result = json.loads((run / "eval" / "step-000040" / "toy.json").read_text())
    out = tmp_path / "undisturbed"
    finish("evaluate", recipe, "--out", out)
    [again] = out.glob("eval/*/toy.json")
    assert json.loads(again.read_text())["metrics"] == result["metrics"]
