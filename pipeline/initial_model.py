"""The model that a run starts or goes on with."""

import logging

from glipv2.model.adaptation import adopt
from glipv2.model.folders import MODEL_FILES
from glipv2.model.glip import GLIPv2, build_model
from glipv2.model.tokenizer import Tokenizer, tiny_vocab
from glipv2.model.weights import model_from_files
from glipv2.pipeline.checkpoint import Checkpoint, load_model
from glipv2.pipeline.config import RunConfig
from glipv2.pipeline.errors import ConfigError

log = logging.getLogger(__name__)


def random_model(config: RunConfig) -> tuple[GLIPv2, Tokenizer]:
    """The recipe's model with random weights from its seed, and the tokenizer of the package."""
    tokenizer = Tokenizer.from_vocab(tiny_vocab(), config.model.text_encoder.max_tokens)
    return build_model(config.model, config.seed), tokenizer


def initial_model(config: RunConfig, saved: Checkpoint | None) -> tuple[GLIPv2, Tokenizer]:
    """The model to train and its tokenizer: from the run's own checkpoint, else from `train.init`,
    else with random weights from the seed."""
    if saved is None and not config.train.init:
        return random_model(config)
    if saved is not None:
        model, tokenizer = model_from_files({name: saved.read(name) for name in MODEL_FILES})
    else:
        source = config.run_url(str(config.train.init))
        model, tokenizer = load_model(source)
        if model.config != config.model:
            model = _continued(config, model, source)
    return model.train(), tokenizer


def _continued(config: RunConfig, start: GLIPv2, source: str) -> GLIPv2:
    """The recipe's model with what it shares with another; heads that one lacks are new."""
    model = build_model(config.model, config.seed)
    try:
        new = adopt(model, start)
    except ValueError as error:
        raise ConfigError(f"train.init: {source} can't start this recipe: {error}") from error
    if new:
        log.warning("%s starts from %s; new: %s", config.run_dir, source, ", ".join(new))
    return model
