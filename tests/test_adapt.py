"""glipv2 adapt: every way x shots x seed is tuned, chosen, scored, and summed up."""

import json
import sys
from pathlib import Path
from statistics import stdev
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))
from commands import finish, kill_when, smoke_recipe  # noqa: E402
from page_parser import assert_self_contained, shown  # noqa: E402
from scored_runs import counting_map, scored_config, tiny_model, write_detection  # noqa: E402

from glipv2.jobs import adapt, adapt_cell  # noqa: E402
from glipv2.jobs.adapt import cell_text, plan, summarise, table  # noqa: E402
from glipv2.jobs.cli import main  # noqa: E402
from glipv2.jobs.prepare import prepare_set  # noqa: E402
from glipv2.jobs.report import write_report  # noqa: E402
from glipv2.pipeline import ray_map  # noqa: E402
from glipv2.pipeline.config import PrepareConfig  # noqa: E402
from glipv2.pipeline.config_loader import config_from_tree, load_config  # noqa: E402
from glipv2.pipeline.errors import ConfigError, PreemptedError, RankFailedError  # noqa: E402
from glipv2.pipeline.shard_reader import iterate_records, open_shard_set  # noqa: E402
from glipv2.pipeline.shards import write_shard_set  # noqa: E402

STEPS = 3


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tune the heads of a model with random weights to a toy set, with one shot."""
    folder = tmp_path_factory.mktemp("adapt")
    (folder / "model").mkdir()
    for name, content in tiny_model(0).items():
        (folder / "model" / name).write_bytes(content)
    write_detection(folder / "val")
    options = PrepareConfig(source="toy", set="toy_detection", count=24, size=64)
    prepare_set(str(folder / "train"), options)
    head = {"train": {"tune": "linear_probe"}}
    return smoke_recipe(
        folder,
        run_dir=str(folder / "run"),
        prepare={},
        label={"teacher": ""},
        data={"mixture": {}, "fixed_prompts": True},
        train={"init": str(folder / "model"), "steps": STEPS, "checkpoint_every": 1,
               "processes": 1, "zero_stage": 0, "weight_decay": 0.0},
        eval={"detection": "", "real_detection": "", "label_truth": {},
              "suites": {"toy": {"set": str(folder / "val")}}},
        adapt={"sets": {"shapes": {"train": str(folder / "train"), "suite": "toy"}},
               "ways": ["probe"], "shots": [1], "seeds": [3, 30]},
        phases={"full": {}, "probe": head},
    )  # fmt: skip


@pytest.mark.parametrize("killed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_figures_of_a_comparison_are_those_of_its_models(recipe: Path, killed: bool) -> None:
    run = recipe.parent / f"run-{killed}"
    command = ("adapt", recipe, f"run_dir={run}")
    first = run / "shapes" / "probe" / "1-shot" / "seed-3" / "eval" / "step-000003" / "toy.json"
    if killed:
        kill_when(first.exists, *command)
        written = first.stat().st_mtime_ns
    said = finish(*command)
    assert not killed or first.stat().st_mtime_ns == written
    found = json.loads((run / "adapt.json").read_text())
    cells = {(c["way"], c["shots"], c["seed"]): c for c in found["cells"]}
    assert set(cells) == {("zero-shot", 0, 0), ("probe", 1, 3), ("probe", 1, 30)}
    frozen = load_file(recipe.parent / "model" / "model.safetensors")
    for (way, _, seed), cell in cells.items():
        if way == "zero-shot":
            continue
        assert cell["step"] == STEPS and cell["devices"] == 1 and cell["train_seconds"] > 0
        assert 0 < cell["images"] < 24
        own = json.loads((Path(cell["run"]) / "eval" / "step-000003" / "toy.json").read_text())
        assert own["metrics"] == cell["metrics"]
        config = yaml.safe_load((Path(cell["run"]) / "config.yaml").read_text())
        assert config["seed"] == seed and config["train"]["init"] == str(recipe.parent / "model")
        tuned = load_file(Path(cell["run"]) / "checkpoints" / "step-000003" / "model.safetensors")
        changed = {name for name in tuned if not torch.equal(tuned[name], frozen[name])}
        heads = ("box_head.deltas.", "box_head.centerness.", "alignment_head.")
        assert changed and all(name.startswith(heads) for name in changed)
    subsets = {
        seed: open_shard_set(str(run / "subsets" / f"shapes-1-shot-seed-{seed}"))
        for seed in (3, 30)
    }
    assert subsets[3].shards[0].crc32c != subsets[30].shards[0].crc32c
    aps = [cells["probe", 1, seed]["metrics"]["ap"] for seed in (3, 30)]
    [row] = [r for r in found["summary"] if (r["way"], r["shots"]) == ("probe", 1)]
    assert row["mean"] == pytest.approx(sum(aps) / 2) and row["std"] == pytest.approx(stdev(aps))
    assert table(found["cells"]) in said
    page = shown(Path(write_report(str(run))))
    assert_self_contained(page)
    assert "2 models tuned" in page.html and cell_text(row) in page.html


def cell(name: str, way: str, shots: int, seed: int, ap: float) -> dict[str, Any]:
    return {"set": name, "way": way, "shots": shots, "seed": seed, "first": "ap",
            "metrics": {"ap": ap}}  # fmt: skip


def test_seeds_are_averaged_over_sets_before_their_deviation() -> None:
    results = [
        cell("a", "full", 1, 3, 0.1), cell("a", "full", 1, 30, 0.3),
        cell("b", "full", 1, 3, 0.5), cell("b", "full", 1, 30, 0.4),
        cell("a", "full", 0, 3, 0.7), {**cell("b", "full", 0, 3, 0.0), "error": "lost"},
    ]  # fmt: skip
    rows = {(row["set"], row["shots"]): row for row in summarise(results)}
    assert rows["average", 1]["mean"] == pytest.approx(0.325)
    assert rows["average", 1]["std"] == pytest.approx(stdev([0.3, 0.35]))
    assert rows["a", 1]["std"] == pytest.approx(stdev([0.1, 0.3]))
    assert rows["a", 0]["std"] is None
    assert ("b", 0) not in rows and ("average", 0) not in rows  # a set is missing
    lines = table(results).splitlines()
    assert lines[0].split() == ["a", "(ap)", "1-shot", "all"]
    assert lines[1].split() == ["full", ".200±.141", ".700"]
    assert lines[3].split() == ["full", ".450±.071", "-"]


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    items: list[Any] = []
    monkeypatch.setattr(ray_map, "map_on_ray", counting_map(items))
    return items


def test_the_step_that_is_best_on_the_validation_suite_is_scored(
    recipe: Path, tmp_path: Path, done: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(str(recipe), [
        f"run_dir={tmp_path / 'run'}", "adapt.sets.shapes.val=toy", "adapt.shots=[1]",
        "adapt.seeds=[3]",
    ])  # fmt: skip
    worth = {1: 0.2, 2: 0.6, 3: 0.6}
    real = adapt_cell.evaluate_suite
    monkeypatch.setattr(
        adapt_cell, "evaluate_suite",
        lambda job: {**real(job), "metrics": {"ap": worth.get(int(job.checkpoint[-1]), 0.0)}}
        if "step-" in job.checkpoint else real(job),
    )  # fmt: skip
    cells = plan(config, {"full": config})
    zero, best = adapt.adapt(config, cells)
    assert zero["way"] == "zero-shot" and (best["step"], best["metrics"]) == (3, {"ap": 0.6})
    worth[3] = 0.5
    assert adapt.adapt(config, cells)[1]["step"] == 2


def test_what_fails_does_not_stop_the_others(
    recipe: Path, tmp_path: Path, done: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(str(recipe), [
        f"run_dir={tmp_path / 'run'}", "adapt.shots=[1]", "adapt.seeds=[3,30]",
        "train.init=null", "adapt.num_tasks=5", "adapt.gpus_per_task=0.5", "adapt.cpus_per_task=3",
    ])  # fmt: skip

    failures: list[Exception] = [
        RankFailedError("rank 0 was killed"), RuntimeError("CUDA out of memory"),
    ]  # fmt: skip

    def fail(tuned: Any) -> str:
        raise failures.pop(0)

    monkeypatch.setattr(adapt_cell, "pretrain", fail)
    cells = plan(config, {"full": config})
    pools: list[dict[str, Any]] = []
    monkeypatch.setattr(ray_map, "map_on_ray", counting_map(done, pools))
    results = adapt.adapt(config, cells)
    assert len(done) == 2
    assert pools == [{"num_actors": 5, "gpus_per_actor": 0.5, "cpus_per_actor": 3.0}]
    assert [r["error"] for r in results] == ["rank 0 was killed", "CUDA out of memory"]
    assert "1-shot/seed-3" in results[0]["run"]
    page = write_report(str(tmp_path / "run"))
    assert "rank 0 was killed" in Path(page).read_text()
    failures.append(PreemptedError("stopped as told to; step 2 is saved"))
    with pytest.raises(PreemptedError):  # no failure: the same command goes on with it
        adapt.adapt(config, cells)
    assert not failures


def test_what_can_not_be_compared_is_refused(recipe: Path, tmp_path: Path) -> None:
    config = load_config(str(recipe), [f"run_dir={tmp_path}"])
    with pytest.raises(ConfigError, match="has no 'dice'; it has: shapes"):
        plan(config, {"full": config}, ["dice"])
    several = {"both": {"sets": {"a": str(recipe.parent / "val"), "b": str(recipe.parent / "val")}}}
    odd = scored_config(tmp_path, several)
    tree = {"run_dir": str(tmp_path), "eval": {"suites": several}}
    odd = config_from_tree(
        {**tree, "adapt": {"sets": {"x": {"train": str(recipe.parent / "train"),
                                          "suite": "both"}}}}, []
    )  # fmt: skip
    with pytest.raises(ConfigError, match="both scores several sets"):
        plan(odd, {"full": odd})
    with pytest.raises(ConfigError, match="set adapt.sets"):
        plan(config_from_tree({"run_dir": "x"}, []), {})
    wrong = {"sets": {"x": {"train": "a", "suite": "b", "splits": "c_{shots}"}}}
    with pytest.raises(ConfigError, match="must have {shots} and {seed}"):
        config_from_tree({"run_dir": "x", "adapt": wrong}, [])


def test_a_model_that_can_not_start_the_recipe_is_refused_before_any_is_tuned(
    recipe: Path, tmp_path: Path, done: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["adapt", str(recipe), f"run_dir={tmp_path}", "model.glip_compatible=true"]) == 2
    assert "model.glip_compatible is true here and false there" in capsys.readouterr().err
    assert not done


def test_published_splits_are_taken_where_they_are_named(recipe: Path, tmp_path: Path) -> None:
    few = list(iterate_records(str(recipe.parent / "train")))[:2]
    categories = open_shard_set(str(recipe.parent / "train")).categories
    published = write_shard_set(str(tmp_path / "cut_1_3"), few, categories, {})
    config = load_config(str(recipe), [
        f"run_dir={tmp_path / 'run'}", "adapt.shots=[1,0]", "adapt.seeds=[3]",
        f"adapt.sets.shapes.splits={tmp_path}/cut_{{shots}}_{{seed}}", "adapt.epochs=4",
    ])  # fmt: skip
    _, one, every = plan(config, {"full": config})
    [url] = one.config.data.mixture
    repeated = [record.image for record in iterate_records(url)]  # enough for any stream
    assert open_shard_set(url).info["few_shot"]["of"] == published.digest
    assert repeated == [record.image for record in few] * 32 and one.images == 2
    assert every.images == 24 and every.config.train.steps == 24
