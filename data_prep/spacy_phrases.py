"""The parser for those who have spaCy: noun chunks of a dependency parse, as our chunks.

It reads any English pipeline with a tagger and a parser, some hundred captions a second.
"""

import functools
import importlib.metadata
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from glipv2.data_prep.phrase_filters import Chunk, Word
from glipv2.pipeline import storage
from glipv2.pipeline.errors import ConfigError

UNUSED_PARTS = ("ner", "lemmatizer", "textcat", "entity_linker")
_SURROGATE = re.compile("[\ud800-\udfff]")
LEXICON_CURE = "or set label.phrases.parser=lexicon, which needs neither"


class SpacyChunker:
    """Caption -> noun chunks. Threads may share it; they take turns."""

    def __init__(self, model: str) -> None:
        self._pipeline, self._lock = load_pipeline(model), threading.Lock()

    def __call__(self, caption: str) -> Iterator[Chunk]:
        with self._lock:
            return iter(list(doc_chunks(self._pipeline(_SURROGATE.sub("�", caption)))))


def doc_chunks(doc: Any) -> Iterator[Chunk]:
    """The noun chunks of a parsed spacy.tokens.Doc, pronouns left out."""
    for chunk in doc.noun_chunks:
        if chunk.root.pos_ not in ("NOUN", "PROPN"):
            continue
        words = [
            Word(token.lower_, token.idx, token.idx + len(token), token.tag_) for token in chunk
        ]
        yield Chunk(words, chunk.end < len(doc) and doc[chunk.end].lower_ == "of")


def spacy_version(model: str) -> str:
    """Of spaCy, and of the model: one of the same name and version may have other weights."""
    meta = load_pipeline(model).meta
    files = model_digest(_model_folder(model))
    return f"spacy {importlib.metadata.version('spacy')}, {meta['name']} {meta['version']} {files}"


def model_digest(folder: Path) -> str:
    """16 hex digits of the content of a model's files, wherever the folder lies."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")
    return storage.digest(
        {path.relative_to(folder).as_posix(): storage.file_crc32c(str(path)) for path in files}
    )


def _model_folder(model: str) -> Path:
    """Where `spacy.load` finds it."""
    import spacy

    is_installed = spacy.util.is_package(model)
    return Path(spacy.util.get_package_path(model) if is_installed else model)


@functools.cache
def load_pipeline(model: str) -> Any:
    """An installed pipeline, or one in a folder; ConfigError with the cure when it can't serve."""
    try:
        import spacy
    except ImportError as error:
        raise ConfigError(
            f"label.phrases.parser=spacy:{model} needs spaCy ({error}); "
            f"pip install 'spacy>=3.8,<4', {LEXICON_CURE}"
        ) from error
    try:
        pipeline = spacy.load(model, exclude=UNUSED_PARTS)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"label.phrases.parser=spacy:{model}: spaCy can't load it ({str(error)[:200]}); "
            f"python -m spacy download {model}, {LEXICON_CURE}"
        ) from error
    parsed = pipeline("a red dog")
    if pipeline.lang != "en" or not all(map(parsed.has_annotation, ("TAG", "POS", "DEP"))):
        raise ConfigError(
            f"label.phrases.parser=spacy:{model}: not an English model with a tagger and a parser "
            f"(language {pipeline.lang}, parts {', '.join(pipeline.pipe_names) or 'none'}); "
            f"take one such as en_core_web_sm, {LEXICON_CURE}"
        )
    return pipeline
