"""ODinW-13 and -35 as suites: a folder of their sets, asked by names or as GLIP asks."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from scored_runs import counting_map, scored_config, spy, tiny_model, write_tasks  # noqa: E402

from glipv2.eval.odinw import odinw_sets  # noqa: E402
from glipv2.jobs.evaluate import evaluate_suites  # noqa: E402
from glipv2.model.grounder import Grounder  # noqa: E402
from glipv2.pipeline import ray_map  # noqa: E402
from glipv2.pipeline.shard_reader import iterate_records  # noqa: E402
from glipv2.pipeline.shards import write_shard_set  # noqa: E402

PROMPTED = {
    "Aquarium": "penguin, which is black and white. puffin with orange beaks. "
                "stingray which is flat and round",
    "EgoHands_generic": "hand of a person",
    "Packages": "there is a package on the porch",
    "pothole": "there are some holes on the road",
}  # fmt: skip
RENAMED = {
    "CottontailRabbits": ["cat", "rabbit"],
    "NorthAmericaMushrooms": ["cat", "flat mushroom", "yellow mushroom"],
}


@pytest.mark.parametrize("count", [13, 35])
def test_odinw_is_a_folder_of_its_sets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    names = [own.name for own in odinw_sets(count)]
    asked: list[Any] = []
    done: list[Any] = []
    monkeypatch.setattr(ray_map, "map_on_ray", counting_map(done))
    monkeypatch.setattr(Grounder, "detect", spy(Grounder.detect, asked))
    monkeypatch.setattr(Grounder, "ground", spy(Grounder.ground, asked))
    (tmp_path / "model").mkdir()
    for file, content in tiny_model(0).items():
        (tmp_path / "model" / file).write_bytes(content)
    records = list(iterate_records(write_tasks(tmp_path)["few"]))[:1]
    for own in odinw_sets(count):
        categories = ("cat", *(own.prompts or ("dog",)))
        write_shard_set(str(tmp_path / "odinw" / own.name), records, categories, {})
    suite = {"set": str(tmp_path / "odinw"), "odinw": count}
    suites = {"plain": suite, "asked": {**suite, "odinw_prompts": True}}
    config = scored_config(tmp_path / "run", suites)
    plain, prompted = evaluate_suites(config, {"model": str(tmp_path / "model")})["model"]
    assert list(plain["sets"]) == names and len(names) == count
    ap = [plain["sets"][name]["metrics"]["ap"] for name in names]
    assert plain["metrics"]["ap"] == pytest.approx(np.mean(ap))
    assert plain["metrics"]["ap_median"] == pytest.approx(np.median(ap))
    assert [["cat", "package"]] in asked and prompted["protocol"] != plain["protocol"]
    texts = [own[0][0] for own in asked if isinstance(own[0], tuple)]
    assert sorted(texts) == sorted(f"cat. {text}" for text in PROMPTED.values())
    assert all([wanted] in asked for wanted in RENAMED.values())
    assert len(done) < 2 * len(names)  # sets without prompts were asked the same before
