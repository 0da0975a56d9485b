"""Our numbers against those of the original code, through the same command a user would run."""

import json
import shutil
from pathlib import Path

import parity
import pytest
import torch
from safetensors.torch import load_file, save_file

FOLDER = Path(__file__).parent / "data" / "glip_reference"


def test_every_tensor_of_the_original_is_reproduced(capsys: pytest.CaptureFixture[str]) -> None:
    assert parity.main([str(FOLDER)]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = {line.split()[0] for line in lines}
    expected = {name for name in json.loads((FOLDER / "meta.json").read_text())["io"]}
    assert {name for name in expected if not name.startswith("in.")} <= names
    assert any(line.startswith("gradient norms of 259 parameters") for line in lines)


@pytest.fixture
def altered(tmp_path: Path) -> Path:
    """A reference in which one pyramid map, one detection and one shape are not the original's."""
    shutil.copytree(FOLDER, tmp_path / "reference", dirs_exist_ok=True)
    tensors = load_file(FOLDER / "io.safetensors")
    tensors["eval.fpn.P4"] = tensors["eval.fpn.P4"] * 1.001
    tensors["eval.det.1.boxes"] = tensors["eval.det.1.boxes"].clone()
    tensors["eval.det.1.boxes"][3, 2] += 0.2
    tensors["eval.anchors.P5"] = tensors["eval.anchors.P5"][1:]
    tensors["eval.unheard_of"] = torch.ones(2)
    save_file(tensors, tmp_path / "reference" / "io.safetensors")
    return tmp_path / "reference"


def test_what_differs_is_named_and_fails(altered: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert parity.main([str(altered)]) == 1
    wrong = {line.split()[0] for line in capsys.readouterr().out.splitlines() if "WRONG" in line}
    assert {"eval.fpn.P4", "eval.det.1.boxes", "eval.anchors.P5", "eval.unheard_of"} <= wrong
    assert not wrong & {"eval.fpn.P3", "eval.det.0.boxes", "eval.anchors.P4"}
