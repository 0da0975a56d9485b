"""What tests of `glipv2 label` share: pairs, a teacher, and a recipe that labels them."""

from collections.abc import Callable
from pathlib import Path

import yaml
from untrained_teacher import save_teacher

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


def configured(folder: Path, own: Path) -> Callable[..., RunConfig]:
    """What gives that recipe with overrides."""

    def make(*overrides: str) -> RunConfig:
        return load_config(str(write_recipe(folder, own)), list(overrides))

    return make
