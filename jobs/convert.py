"""glipv2 convert: weights of GLIP, timm and transformers -> a model folder of ours, and back."""

import argparse
import io
import json
import logging
import pickle
import posixpath
import zipfile
from typing import Any

from glipv2.model.folders import COMMIT
from glipv2.pipeline import storage
from glipv2.pipeline.checkpoint import read_model, resolve_checkpoint, write_model
from glipv2.pipeline.errors import ConfigError, DataError

KINDS = ("glip", "timm-swin", "bert")
log = logging.getLogger(__name__)
INERT = "glip_inert.safetensors"
"""Tensors of a GLIP file that the model does not compute with, kept for the way back."""
BERT_FILES = ("model.safetensors", "pytorch_model.bin")
GOES_WITH = {
    "vocab": KINDS,
    "preset": ("timm-swin", "bert"),
    "seed": ("timm-swin", "bert"),
    "ema": ("glip",),
}
"""Option -> the kinds of --from that it is about."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument(
        "--from", dest="sources", nargs=2, action="append", metavar=("KIND", "FILE"),
        help="glip FILE.pth; or timm-swin FILE (timm's or Microsoft's) and bert FOLDER, one or "
        "both, to start a training",
    )  # fmt: skip
    way.add_argument(
        "--to", nargs=2, metavar=("KIND", "FOLDER"),
        help="glip FOLDER: write a run's newest model, a step or a model folder as GLIP's file",
    )  # fmt: skip
    parser.add_argument("--out", required=True, help="folder to write; with --to the .pth file")
    parser.add_argument("--vocab", help="vocab.txt of the text encoder; a bert folder has its own")
    parser.add_argument("--preset", help="size of a new model (default T)")
    parser.add_argument("--seed", type=int, help="of what a new model draws at random (default 0)")
    parser.add_argument(
        "--ema", action="store_true", default=None, help="glip: the averaged weights, model_ema"
    )


def run(arguments: argparse.Namespace) -> int:
    if arguments.to:
        kind, folder = arguments.to
        _known(kind, ("glip",))
        _refuse_idle(arguments, [])
        count = to_glip_file(folder, arguments.out)
        print(f"{count} tensors -> {arguments.out}")  # noqa: T201
        return 0
    sources = dict(arguments.sources)
    for kind in sources:
        _known(kind, KINDS)
    if len(sources) < len(arguments.sources):
        raise ConfigError("--from names one kind twice; give each once")
    if "glip" in sources and len(arguments.sources) > 1:
        raise ConfigError("--from glip is a whole model: give it alone")
    _refuse_idle(arguments, list(sources))
    if "glip" in sources:
        ema = bool(arguments.ema)
        count = from_glip_file(sources["glip"], arguments.out, arguments.vocab, ema)
    else:
        count = new_model(sources, arguments)
    print(f"{count} parameters -> {arguments.out}")  # noqa: T201
    return 0


def _known(kind: str, kinds: tuple[str, ...]) -> None:
    if kind not in kinds:
        raise ConfigError(f"unknown kind {kind!r}; known: {', '.join(kinds)}")


def _refuse_idle(arguments: argparse.Namespace, kinds: list[str]) -> None:
    """ConfigError for an option that is about none of the kinds that --from names."""
    for option, own in GOES_WITH.items():
        if getattr(arguments, option) is not None and not set(own) & set(kinds):
            instead = f"--from {' and '.join(kinds)}" if kinds else "--to glip"
            raise ConfigError(
                f"--{option} goes with --from {' or '.join(own)}; it means nothing for {instead}"
            )


def from_glip_file(file: str, out: str, vocab: str | None, ema: bool) -> int:
    """Write a checkpoint of the original code as a model folder; returns the parameters' number.

    DataError counts and names tensors that are missing, unexpected or of another shape.
    """
    from safetensors.torch import save

    from glipv2.model.convert import from_glip, glip_config, glip_dtypes, glip_inert
    from glipv2.model.glip import build_model
    from glipv2.model.weights import model_files

    tensors, prefix = _glip_tensors(file, "model_ema" if ema else "model")
    try:
        config = glip_config(tensors)
        model = build_model(config, seed=0)
        model.load_state_dict(from_glip(tensors, model.state_dict(), config))
        dtypes = glip_dtypes(tensors, model.state_dict(), config)
    except (ValueError, IndexError) as error:  # IndexError: a tensor of too few dimensions
        raise DataError(f"{file}: {error}") from error
    files = model_files(model, _tokenizer(vocab, config.text_encoder))
    inert = {name: tensor.contiguous() for name, tensor in glip_inert(tensors).items()}
    files[INERT] = save(inert, metadata={"prefix": prefix, "dtypes": json.dumps(dtypes)})
    write_model(out, files, step=0)
    return sum(parameter.numel() for parameter in model.parameters())


def to_glip_file(folder: str, out: str) -> int:
    """Write a model folder as a file that the original code loads; returns the tensors' number.

    The classifier that GLIP's code expects but never uses is zero if the model never had one.
    """
    import torch

    from glipv2.model.convert import glip_inert_zeros, to_glip
    from glipv2.model.weights import model_from_files

    if storage.exists(beside := storage.join(posixpath.dirname(out) or ".", COMMIT)):
        raise ConfigError(f"--out {out} would stand among the files of {beside}; write elsewhere")
    url = resolve_checkpoint(folder)
    files = read_model(url, INERT)
    try:
        model, _ = model_from_files(files)
        inert, prefix, dtypes = _stored_inert(files.get(INERT))
        tensors = to_glip(model.state_dict(), model.config, dtypes)
    except ValueError as error:
        raise DataError(f"{url}: {error}") from error
    if not model.config.glip_compatible:
        log.warning(
            "%s was not trained with model.glip_compatible: GLIP's own code computes something "
            "else with these weights", folder,
        )  # fmt: skip
    if INERT not in files:
        inert = glip_inert_zeros(model.config)
    named = {
        prefix + name: tensor.detach().clone(memory_format=torch.contiguous_format)
        for name, tensor in (tensors | inert).items()
    }
    buffer = io.BytesIO()
    torch.save({"model": named}, buffer)
    storage.write_bytes(out, buffer.getvalue())
    return len(named)


def _stored_inert(data: bytes | None) -> tuple[dict[str, Any], str, dict[str, str]]:
    """Of the GLIP file that a folder was made from: inert tensors, its names' prefix, and types."""
    from safetensors.torch import load

    if data is None:
        return {}, "", {}
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    return load(data), header["prefix"], json.loads(header.get("dtypes", "{}"))


def new_model(sources: dict[str, str], arguments: argparse.Namespace) -> int:
    """A model to start a training with: encoders from elsewhere, the rest from the seed."""
    from glipv2.model.config import preset
    from glipv2.model.convert import bert_from_transformers, swin_from_timm
    from glipv2.model.glip import build_model
    from glipv2.model.weights import model_files

    try:
        config = preset(arguments.preset or "T")
    except ValueError as error:
        raise ConfigError(str(error)) from error
    model = build_model(config, arguments.seed or 0)
    weights = model.state_dict()
    vocab = arguments.vocab
    try:
        if "timm-swin" in sources:
            source = sources["timm-swin"]
            weights |= swin_from_timm(read_tensors(source), weights)
        if "bert" in sources:
            source = sources["bert"]
            weights |= bert_from_transformers(_bert_tensors(source), weights)
            vocab = vocab or _bert_vocab(source)
    except ValueError as error:
        raise DataError(f"{source}: {error}") from error
    model.load_state_dict(weights)
    write_model(arguments.out, model_files(model, _tokenizer(vocab, config.text_encoder)), step=0)
    return sum(parameter.numel() for parameter in model.parameters())


def _bert_vocab(folder: str) -> str:
    url = storage.join(folder, "vocab.txt")
    if not storage.exists(url):
        raise DataError(
            f"{url} doesn't exist: give the list of word pieces, one a line, with --vocab "
            "(recent transformers write it into tokenizer.json only)"
        )
    return url


def _bert_tensors(folder: str) -> dict[str, Any]:
    for name in BERT_FILES:
        if storage.exists(storage.join(folder, name)):
            return read_tensors(storage.join(folder, name))
    raise DataError(
        f"{folder} holds neither {' nor '.join(BERT_FILES)}: save the model there first"
    )


def _glip_tensors(file: str, part: str) -> tuple[dict[str, Any], str]:
    """One part of a GLIP file without the prefix of its names, and that prefix.

    A file that is nothing but tensors by name is the part `model`.
    """
    import torch

    stored = _unpickled(file)
    bare = all(isinstance(value, torch.Tensor) for value in stored.values())
    if bare and part == "model":
        stored = {part: stored}
    if part not in stored:
        listed = ", ".join(map(str, list(stored)[:5])) + (" ..." if len(stored) > 5 else "")
        raise DataError(
            f"{file} has no {part!r}, only {listed}: "
            + ("do without --ema" if part != "model" else "is it a file of GLIP's code?")
        )
    tensors = _named_tensors(file, stored[part])
    prefix = "module." if all(name.startswith("module.") for name in tensors) else ""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}, prefix


def read_tensors(file: str) -> dict[str, Any]:
    """Name -> tensor of a .safetensors file or of a pickled state dict, which may run no code."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    if not file.endswith(".safetensors"):
        stored = _unpickled(file)
        return _named_tensors(file, stored.get("model", stored.get("state_dict", stored)))
    try:
        return load(storage.read_bytes(file))
    except SafetensorError as error:
        raise DataError(f"{file} is damaged: {error}") from error


BROKEN = (
    ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, OSError, RuntimeError,
    TypeError, ValueError, zipfile.BadZipFile,
)  # fmt: skip
"""What torch.load is known to raise on files that are something else."""


def _named_tensors(file: str, found: Any) -> dict[str, Any]:
    import torch

    items = found.items() if isinstance(found, dict) else [(None, found)]
    for name, value in items:
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise DataError(f"{file} holds {type(value).__name__} {name!r} where a tensor is meant")
    return dict(items)


def _unpickled(file: str) -> dict[str, Any]:
    """What a file of torch.save holds, as long as that is tensors, numbers and texts."""
    import torch

    data = storage.read_bytes(file)
    try:
        if zipfile.is_zipfile(io.BytesIO(data)):
            damaged = zipfile.ZipFile(io.BytesIO(data)).testzip()
            if damaged:
                raise DataError(f"{file} is damaged (at {damaged}); fetch it again")
        stored = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{file} is no file of torch.save, or holds more than tensors, numbers and texts; what "
            "could run code is not opened. If you trust it, save its tensors alone with torch.save"
        ) from error
    except BROKEN as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{file} is no file of torch.save, or damaged: {said}") from error
    if not isinstance(stored, dict):
        raise DataError(f"{file} holds a {type(stored).__name__}, not a dictionary of tensors")
    return stored


def _tokenizer(vocab: str | None, text_encoder: Any) -> Any:
    from glipv2.model.tokenizer import Tokenizer

    if not vocab:
        raise ConfigError(
            "--vocab is missing: the vocab.txt that the text encoder was trained with"
        )
    try:
        lines = storage.read_bytes(vocab).decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{vocab} is not UTF-8 text: {error}") from error
    if len(lines) != text_encoder.vocab_size:
        raise DataError(
            f"{vocab} has {len(lines)} entries, the text encoder {text_encoder.vocab_size}"
        )
    try:
        return Tokenizer.from_vocab(lines, text_encoder.max_tokens)
    except ValueError as error:
        raise DataError(f"{vocab}: {error}") from error
