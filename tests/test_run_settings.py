"""With which other settings a run may be resumed: those of speed, length and place."""

from pathlib import Path
from typing import Any

import pytest

from glipv2.model.folders import step_url
from glipv2.pipeline.checkpoint import write_folder
from glipv2.pipeline.config import RunConfig
from glipv2.pipeline.config_loader import config_from_tree
from glipv2.pipeline.errors import ConfigError
from glipv2.pipeline.run_settings import MAY_CHANGE, note_settings

OTHER: dict[str, Any] = {
    "data.cache": "/another/disk",
    "data.cache_gb": 7,
    "data.max_bad_share": 0.5,
    "data.root": "s3://elsewhere/data",
    "data.workers": 3,
    "train.accumulation": 2,
    "train.checkpoint_activations": "[fusion]",
    "train.checkpoint_every": 7,
    "train.compile": "true",
    "train.keep_checkpoints": 9,
    "train.offload": "optimizer",
    "train.processes": 2,
    "train.steps": 2000,
    "train.threads": 4,
    "train.zero_stage": 3,
}


def resumed(run: Path, *settings: str) -> RunConfig:
    tree = {"run_dir": str(run), "data": {"mixture": {"gold": 1}}}
    return config_from_tree(tree, list(settings))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """With a step of it committed."""
    note_settings(resumed(tmp_path))
    write_folder(step_url(str(tmp_path), 3), {}, 3)
    return tmp_path


def test_speed_length_and_place_may_change_one_by_one_and_all_together(run: Path) -> None:
    assert OTHER.keys() == MAY_CHANGE
    settings = [f"{key}={value}" for key, value in OTHER.items()]
    for setting in settings:
        assert resumed(run, setting) != resumed(run), setting
        note_settings(resumed(run, setting))
    note_settings(resumed(run, *settings))
    assert "/another/disk" in (run / "config.yaml").read_text()


@pytest.mark.parametrize("setting", ["data.lanes=4", "train.precision=fp32", "losses.box=3"])
def test_what_decides_the_weights_may_not(run: Path, setting: str) -> None:
    with pytest.raises(ConfigError, match=setting.partition("=")[0]):
        note_settings(resumed(run, setting))
