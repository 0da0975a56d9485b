"""A model as a folder of files, and back."""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from glipv2.model.config import ModelConfig, config_from_dict, config_to_dict
from glipv2.model.folders import CONFIG, MODEL_FILES, VOCABULARY, WEIGHTS, model_folder
from glipv2.model.glip import GLIPv2, build_model
from glipv2.model.tokenizer import Tokenizer
from glipv2.model.urls import scheme_of


def model_files(model: GLIPv2, tokenizer: Tokenizer) -> dict[str, bytes]:
    """File name to content: weights, shape, vocabulary; all that `model_from_files` needs."""
    return {WEIGHTS: weights_file(model.state_dict()), **shape_files(model.config, tokenizer)}


def weights_file(tensors: Mapping[str, Tensor]) -> bytes:
    """The content of `model.safetensors` with a model's tensors by name."""
    on_cpu = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    return save(on_cpu, metadata={"format": "pt"})


def shape_files(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, bytes]:
    """The files of a model beside its weights."""
    shape = json.dumps(config_to_dict(config), indent=2, sort_keys=True)
    return {
        CONFIG: (shape + "\n").encode(),
        VOCABULARY: ("\n".join(tokenizer.vocabulary) + "\n").encode(),
    }


def model_from_files(files: dict[str, bytes]) -> tuple[GLIPv2, Tokenizer]:
    """Rebuild a model on the CPU; ValueError names a missing file or the parameters that differ."""
    missing = [name for name in MODEL_FILES if name not in files]
    if missing:
        raise ValueError(f"not a saved model: {', '.join(missing)} missing")
    try:
        config = config_from_dict(json.loads(files[CONFIG]))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{CONFIG} is not that of a model: {error}") from error
    model = build_model(config, seed=0)
    load_weights(model, files[WEIGHTS])
    tokenizer = Tokenizer.from_vocab(
        files[VOCABULARY].decode().splitlines(), config.text_encoder.max_tokens
    )
    return model, tokenizer


def from_pretrained(url: str | Path) -> tuple[GLIPv2, Tokenizer]:
    """Model and tokenizer of a model's folder, a step of a run, or a run's newest step.

    Given as a path or a URL that fsspec knows. ValueError says what would do instead, what a folder
    lacks, what is damaged or which parameters differ.
    """
    url = str(url)
    scheme_of(url)
    filesystem, _ = fsspec.url_to_fs(url, use_listings_cache=False)  # a run may have a newer step
    folder = model_folder(url, filesystem.exists, lambda folder: _names(filesystem, folder))
    try:
        files = {name: filesystem.cat_file(f"{folder.rstrip('/')}/{name}") for name in MODEL_FILES}
        return model_from_files(files)
    except FileNotFoundError as error:
        raise ValueError(f"{folder} is a step that lacks a model's file: {error}") from error
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def _names(filesystem: Any, folder: str) -> list[str]:
    """Sorted names of what is in a folder, [] when it is absent."""
    with suppress(FileNotFoundError, NotADirectoryError):
        paths = filesystem.ls(folder, detail=False)
        return sorted(path.rstrip("/").rpartition("/")[2] for path in paths)
    return []


def load_weights(model: GLIPv2, data: bytes) -> None:
    """Fill a model from the bytes of a safetensors file; names and shapes must match exactly."""
    try:
        tensors = load(data)
    except SafetensorError as error:
        raise ValueError(f"{WEIGHTS} is damaged: {error}; copy the folder again") from error
    expected = model.state_dict()
    wrong = sorted(
        name
        for name in expected.keys() | tensors.keys()
        if name not in expected
        or name not in tensors
        or expected[name].shape != tensors[name].shape
    )
    if wrong:
        shown = ", ".join(wrong[:5]) + (" ..." if len(wrong) > 5 else "")
        raise ValueError(f"weights do not fit the model in {len(wrong)} tensors: {shown}")
    model.load_state_dict(tensors)
