"""A model as a set of files, and back. Bytes only: where they are kept is the caller's business."""

import json

from safetensors.torch import load, save

from glipv2.model.config import config_from_dict, config_to_dict
from glipv2.model.glip import GLIPv2, build_model
from glipv2.model.tokenizer import Tokenizer

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
VOCABULARY = "vocab.txt"


def model_files(model: GLIPv2, tokenizer: Tokenizer) -> dict[str, bytes]:
    """File name to content: weights, shape, vocabulary; all that `model_from_files` needs."""
    tensors = {name: tensor.contiguous().cpu() for name, tensor in model.state_dict().items()}
    config = json.dumps(config_to_dict(model.config), indent=2, sort_keys=True)
    return {
        WEIGHTS: save(tensors, metadata={"format": "pt"}),
        CONFIG: (config + "\n").encode(),
        VOCABULARY: ("\n".join(tokenizer.vocabulary) + "\n").encode(),
    }


def model_from_files(files: dict[str, bytes]) -> tuple[GLIPv2, Tokenizer]:
    """Rebuild a model on the CPU; ValueError names a missing file or the parameters that differ."""
    missing = [name for name in (WEIGHTS, CONFIG, VOCABULARY) if name not in files]
    if missing:
        raise ValueError(f"not a saved model: {', '.join(missing)} missing")
    config = config_from_dict(json.loads(files[CONFIG]))
    model = build_model(config, seed=0)
    load_weights(model, files[WEIGHTS])
    tokenizer = Tokenizer.from_vocab(
        files[VOCABULARY].decode().splitlines(), config.text_encoder.max_tokens
    )
    return model, tokenizer


def load_weights(model: GLIPv2, data: bytes) -> None:
    """Fill a model from the bytes of a safetensors file; names and shapes must match exactly."""
    tensors = load(data)
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
