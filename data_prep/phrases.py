"""Find the phrases of a caption that a box could stand for: the parser and rules of a recipe.

    find = load_parser(config.label.phrases)
    find("two dogs on a sofa").phrases    # Phrase("dogs", 4, 8), Phrase("sofa", 14, 18)

Every phrase is exactly caption[start:end]. `label.phrases.parser` chooses who cuts the caption,
ours or spaCy; `phrase_filters` then decides what is kept, the same way for both.
"""

import importlib.metadata
from collections.abc import Callable
from functools import partial

from glipv2.data_prep import noun_phrases
from glipv2.data_prep.phrase_filters import Chunker, PhrasesFound, find_phrases
from glipv2.data_prep.spacy_phrases import SpacyChunker, spacy_version
from glipv2.pipeline.config import PhraseConfig


def load_parser(rules: PhraseConfig) -> Callable[[str], PhrasesFound]:
    """Captions -> phrases; any text is accepted, and threads may share it.

    Raises ConfigError, with the cure, when spaCy or its model is not there.
    """
    model = _spacy_model(rules)
    chunker: Chunker = SpacyChunker(model) if model else noun_phrases.lexicon_chunks
    return partial(find_phrases, chunker, rules)


def parser_version(rules: PhraseConfig) -> str:
    """What decides, beside the settings, which phrases are found: our rules, packages, models."""
    model = _spacy_model(rules)
    parts = spacy_version(model) if model else f"textblob {importlib.metadata.version('textblob')}"
    return f"glipv2 rules {noun_phrases.RULES}, {parts}"


def _spacy_model(rules: PhraseConfig) -> str:
    """Empty for our own parser."""
    return rules.parser.partition(":")[2]
