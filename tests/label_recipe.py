"""What tests of `glipv2 label` share: pairs, a teacher, and a recipe that labels them."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from untrained_teacher import save_teacher

sys.path.insert(0, str(Path(__file__).parent))
from in_process import without_ray

from glipv2.jobs.prepare import prepare_set
from glipv2.pipeline.config import PrepareConfig, RunConfig
from glipv2.pipeline.config_loader import load_config

PAIRS, SHARDS = 12, 3


def write_pairs_and_teacher(folder: Path) -> None:
    """Into FOLDER/pairs, and FOLDER/teacher with random weights that is sure of itself."""
    write_pairs(folder, seed=1)
    save_teacher(folder / "teacher")


def write_pairs(folder: Path, seed: int) -> None:
    options = PrepareConfig(source="toy", set="toy_pairs", count=PAIRS, size=64, seed=seed)
    prepare_set(str(folder / "pairs"), options, samples_per_shard=PAIRS // SHARDS)


def write_recipe(folder: Path, own: Path) -> Path:
    """OWN/recipe.yaml, which labels the pairs into OWN/out."""
    settings = {
        "teacher": str(folder / "teacher"),
        "inputs": {str(folder / "pairs"): str(own / "out")},
        "score_threshold": 0.3,
    }
    path = own / "recipe.yaml"
    path.write_text(yaml.safe_dump({"run_dir": str(own / "run"), "label": settings}))
    return path


@pytest.fixture(autouse=True)
def in_this_process() -> Iterator[None]:
    """Asks for no `monkeypatch`, so that a test's own changes are taken back before this one's."""
    with without_ray(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs and a teacher."""
    folder = tmp_path_factory.mktemp("plan")
    write_pairs_and_teacher(folder)
    return folder


@pytest.fixture
def config(folder: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """Of a labelling of the pairs into OUT of the test's own folder, with overrides."""

    def make(*overrides: str) -> RunConfig:
        return load_config(str(write_recipe(folder, tmp_path)), list(overrides))

    return make
