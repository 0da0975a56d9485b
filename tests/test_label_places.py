"""Where a labelling runs, and the names under which it writes."""

import io
import json
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from untrained_teacher import save_teacher

sys.path.insert(0, str(Path(__file__).parent))
from in_process import without_ray  # noqa: E402

from glipv2.jobs.cli import main  # noqa: E402
from glipv2.jobs.label import label, label_on_ray  # noqa: E402
from glipv2.jobs.prepare import prepare_set  # noqa: E402
from glipv2.pipeline import ray_map  # noqa: E402
from glipv2.pipeline.config import PrepareConfig  # noqa: E402
from glipv2.pipeline.config_loader import load_config  # noqa: E402
from glipv2.pipeline.shard_reader import iterate_records, open_shard_set  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs, and a teacher with random weights that is sure of itself."""
    folder = tmp_path_factory.mktemp("places")
    options = PrepareConfig(source="toy", set="toy_pairs", count=6, size=64, seed=1)
    prepare_set(str(folder / "pairs"), options, samples_per_shard=3)
    save_teacher(folder / "teacher")
    return folder


@pytest.fixture
def recipe(folder: Path, tmp_path: Path) -> Callable[[str], str]:
    """Of a labelling of a set into OUT of the test's own folder."""

    def write(pairs: str) -> str:
        settings = {
            "teacher": str(folder / "teacher"),
            "inputs": {pairs: str(tmp_path / "out")},
            "score_threshold": 0.3,
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({"run_dir": str(tmp_path / "run"), "label": settings}))
        return str(path)

    return write


def test_the_pool_has_the_size_and_its_actors_the_share_that_the_recipe_asks_for(
    folder: Path, recipe: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(ray_map, "map_on_ray", lambda *_, **named: asked.append(named) or ())
    pairs = str(folder / "pairs")
    wanted = ["num_actors=[3,5]", "gpus_per_actor=0.25", "cpus_per_actor=1.5"]
    config = load_config(recipe(pairs), [f"label.{setting}" for setting in wanted])
    assert list(label_on_ray(config.label, open_shard_set(pairs), [])) == []
    [pool] = asked
    expected = {"min_actors": 3, "num_actors": 5, "gpus_per_actor": 0.25, "cpus_per_actor": 1.5}
    assert {name: pool[name] for name in expected} == expected


def test_a_cluster_that_is_not_there_is_refused_by_its_address(
    folder: Path, recipe: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("RAY_ADDRESS", "")  # what the command sets is taken back
    command = ["label", recipe(str(folder / "pairs")), "--address", "127.0.0.1:9"]
    assert main(command) == 2
    assert "no Ray cluster can be joined at 127.0.0.1:9" in capsys.readouterr().err
    assert not (tmp_path / "out" / "dataset.json").exists()


def test_a_labelled_shard_has_the_name_of_its_pairs_whatever_that_is(
    folder: Path, recipe: Callable[[str], str], tmp_path: Path
) -> None:
    web, names = tmp_path / "web", ["cats_and_dogs", "part-7", "zebra2021"]
    web.mkdir()
    records = list(iterate_records(str(folder / "pairs")))
    for number, name in enumerate(names):
        with tarfile.open(web / f"{name}.tar", "w") as tar:
            for record in records[2 * number : 2 * number + 2]:
                members = {record.image_format: record.image, "txt": record.caption.encode()}
                for ending, data in members.items():
                    member = tarfile.TarInfo(f"{record.key}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    assert main(["prepare", "webdataset", "--root", str(web), "--index-only"]) == 0
    config = load_config(recipe(str(web)), [])
    with without_ray():
        label(config)
        assert "nothing was left to do" in label(config)
    out = open_shard_set(str(tmp_path / "out"))
    assert [shard.name for shard in out.shards] == names
    assert [shard.name for shard in open_shard_set(str(web)).shards] == names
    for name in names:
        assert (tmp_path / "out" / f"{name}.tar").exists()
        assert json.loads((tmp_path / "out" / "commits" / f"{name}.json").read_text())
    captions = [record.caption for record in records]
    assert [r.caption for r in iterate_records(out.url)] == captions
