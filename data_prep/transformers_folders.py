"""Folders with a detector of `transformers`, or names on its hub: fetched, checked, loaded."""

import json
from pathlib import Path

import torch

from glipv2.data_prep.transformers_teachers import ARCHITECTURES, TransformersTeacher
from glipv2.pipeline.errors import ConfigError

FILES = ("*.safetensors", "*.json", "*.txt")
"""Weights, configurations, tokenizers: what is fetched, loaded and part of a teacher's identity."""
UNLOADABLE = (OSError, ValueError, LookupError, RuntimeError, TypeError)
"""What transformers is known to raise on damaged or foreign files."""


def load_detector(name: str, device: torch.device | str = "cpu") -> TransformersTeacher:
    """The detector of a folder, or of a repository on the hub or in its cache.

    ConfigError says what is wrong with it and what would do.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

    folder = detector_folder(name)
    architecture = ARCHITECTURES[_model_type(folder)]
    try:
        model, loaded = AutoModelForZeroShotObjectDetection.from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
        processor = AutoProcessor.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    except (*UNLOADABLE, SafetensorError) as error:
        raise ConfigError(f"the teacher {folder} can't be loaded: {error}") from error
    if missing := sorted(loaded["missing_keys"]):
        raise ConfigError(
            f"the weights of the teacher {folder} lack {len(missing)} tensors, {missing[0]} first; "
            "fetch the folder again, or take one of a whole detector"
        )
    return architecture(model.to(device), processor)


def detector_files(name: str) -> list[Path]:
    """What a detector consists of, sorted by name."""
    folder = detector_folder(name)
    return sorted(path for pattern in FILES for path in folder.glob(pattern))


def detector_folder(name: str) -> Path:
    """Where a detector's files are; those of a hub name are fetched unless they are in its cache.

    ConfigError if there is no such folder or repository, or none that is supported.
    """
    folder = Path(name)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(name, allow_patterns=list(FILES)))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"the teacher hf:{name} is no folder and can't be had from the hub: {error}; run "
                f"`hf download {name}` where there is a network, or give a folder with its files"
            ) from error
    _model_type(folder)
    return folder


def _model_type(folder: Path) -> str:
    try:
        kind = json.loads((folder / "config.json").read_text())["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{folder} holds no detector of transformers: no model_type in config.json: {error!r}"
        ) from error
    if kind not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise ConfigError(f"{folder} is of the kind {kind!r}; supported teachers are {known}")
    return str(kind)
