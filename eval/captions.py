"""Captions against those of people: BLEU-1 to 4, ROUGE-L and CIDEr-D without Java or downloads.

The formulas and their small constants are those of the COCO caption evaluation; METEOR and SPICE
exist as Java programs only and are an option (`java_scores`). Words are those of `ptb_words`, which
stands in for Stanford's PTBTokenizer 3.4.1 (Java): COCO's lower-cased tokens without punctuation.
Of 1,601 captions of COCO and Flickr8k both give the same words for all but one ("blvd."). They part
on web text: slashes between names, rare abbreviations, bullets and quotation marks within words.
"""

import importlib.util
import logging
import math
import re
import shutil
import subprocess
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from glipv2.pipeline.errors import ConfigError, DataError
from glipv2.pipeline.records import Record

log = logging.getLogger(__name__)
Words = tuple[str, ...]
NGRAMS = (1, 2, 3, 4)
BETA = 1.2
"""Of ROUGE-L: how much more recall counts than precision."""
SIGMA = 6.0
"""Of CIDEr-D: the difference in length that halves a score, about."""
TINY, SMALL = 1e-15, 1e-9
"""Of BLEU: they keep a corpus without a match above 0 and one without words from dividing by 0."""

CLITICS = re.compile(r"(?<=\w)(n't|'(?:s|m|d|ll|re|ve))(?!\w)")
JOINED = re.compile(r"\b(can|gon|got|lem|gim|wan)(not|na|ta|me)\b")
UNJOINED = {"can not", "gon na", "got ta", "lem me", "gim me", "wan na"}
TOKEN = re.compile(
    r"(?:[^\W\d_]\.){2,}"  # u.s.
    r"|\b(?:[^\W\d_]|mr|mrs|ms|dr|st|jr|sr|vs|al|co|mt)\.(?=\s+\S)"  # dr. j. smith
    r"|n't|'(?:s|m|d|ll|re|ve)(?!\w)"
    r"|[\w@]+(?:[-'.,:/&@][\w@]+)*"  # t-shirt, 1,000, 5:30, and/or
    r"|[#$%&*+=<>~^|\\(){}\[\]]"
)
BRACKETS = {
    "(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"
}  # fmt: skip
"""The official code means to leave them out, and doesn't: it looks for them in capitals."""


@dataclass(frozen=True, kw_only=True)
class CaptionScores:
    """Of a set of images; in [0, 1], CIDEr-D in [0, 10]."""

    bleu: tuple[float, float, float, float]
    """Of n-grams up to 1, 2, 3 and 4, over the whole set."""
    rouge_l: float
    """Mean over images."""
    cider_d: float
    """Mean over images. A word is worth less the more images it is said of, so that one image alone
    scores 0."""
    images: int

    def to_dict(self) -> dict[str, float]:
        return {
            **{f"bleu_{n}": score for n, score in zip(NGRAMS, self.bleu, strict=True)},
            "rouge_l": self.rouge_l,
            "cider_d": self.cider_d,
            "images": float(self.images),
        }


def caption_scores(records: Sequence[Record], captions: Mapping[str, str]) -> CaptionScores:
    """Scores of one caption for each record, against all captions that people gave of it.

    DataError for a record without an entry, or without people's captions.
    """
    said, truths = _words(records, captions)
    return CaptionScores(
        bleu=bleu(said, truths),
        rouge_l=fmean(rouge_l(words, own) for words, own in zip(said, truths, strict=True)),
        cider_d=fmean(cider_d(said, truths)),
        images=len(said),
    )


def cider_of_images(records: Sequence[Record], captions: Mapping[str, str]) -> list[float]:
    """CIDEr-D of each caption among those of these records; their mean is that of the set."""
    return cider_d(*_words(records, captions))


def ptb_words(text: str) -> Words:
    """Lower-cased words in the manner of the Penn Treebank, without punctuation.

    Hyphenated words, numbers and abbreviations stay whole; "isn't" becomes "is n't", "man's" "man
    's", "cannot" "can not".
    """
    text = text.lower().replace("\u2019", "'").replace("\u2018", "'")
    text = CLITICS.sub(r" \1", text)
    text = JOINED.sub(lambda m: joined if (joined := f"{m[1]} {m[2]}") in UNJOINED else m[0], text)
    return tuple(BRACKETS.get(word, word) for word in TOKEN.findall(text))


def bleu(
    said: Sequence[Words], truths: Sequence[Sequence[Words]]
) -> tuple[float, float, float, float]:
    """BLEU of the whole set: matches are counted over all captions, each as often as some person
    said it; the length that is asked for is that of the person closest to the caption's."""
    right, made = Counter[int](), Counter[int]()
    length = wanted = 0
    for words, own in zip(said, truths, strict=True):
        length += len(words)
        wanted += min((abs(len(truth) - len(words)), len(truth)) for truth in own)[1]
        for n in NGRAMS:
            counts, most = _ngrams(words, n), Counter[Words]()
            for truth in own:
                most |= _ngrams(truth, n)
            right[n] += (counts & most).total()
            made[n] += counts.total()
    ratio = (length + TINY) / (wanted + SMALL)
    short = math.exp(min(1 - 1 / ratio, 0.0))
    logs = [math.log((right[n] + TINY) / (made[n] + SMALL)) for n in NGRAMS]
    one, two, three, four = (short * math.exp(sum(logs[:n]) / n) for n in NGRAMS)
    return one, two, three, four


def rouge_l(words: Words, truths: Sequence[Words]) -> float:
    """F of the longest common subsequence: its best precision and best recall over the truths."""
    common = [_common_subsequence(words, truth) for truth in truths]
    precision = max(common) / max(len(words), 1)
    recall = max(c / max(len(truth), 1) for c, truth in zip(common, truths, strict=True))
    if not precision or not recall:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def cider_d(said: Sequence[Words], truths: Sequence[Sequence[Words]]) -> list[float]:
    """Of each image: how alike the n-grams are, the rarer the more they count.

    Ten times the mean over n and over people of the cosine of their tf-idf vectors, clipped so that
    saying a word again doesn't help, and lowered for a different length.
    """
    shown_in = Counter[Words]()
    for own in truths:
        shown_in.update({gram for truth in own for n in NGRAMS for gram in _ngrams(truth, n)})
    log_images = math.log(len(said))

    def vector(words: Words, n: int) -> dict[Words, float]:
        counts = _ngrams(words, n)
        return {g: c * (log_images - math.log(max(shown_in[g], 1))) for g, c in counts.items()}

    scores = []
    for words, own in zip(said, truths, strict=True):
        total = 0.0
        for n in NGRAMS:
            mine = vector(words, n)
            for truth in own:
                theirs = vector(truth, n)
                # lengths in pairs of words, as the official code counts them
                apart = max(len(words) - 1, 0) - max(len(truth) - 1, 0)
                total += _clipped_cosine(mine, theirs) * math.exp(-(apart**2) / (2 * SIGMA**2))
        scores.append(10 * total / len(NGRAMS) / len(own))
    return scores


def java_scores(
    records: Sequence[Record],
    captions: Mapping[str, str],
    metrics: Sequence[str] = ("meteor", "spice"),
) -> dict[str, float]:
    """METEOR and SPICE of pycocoevalcap, in [0, 1]; errors as in `caption_scores`.

    ConfigError if the package or Java is missing. SPICE takes 8 GB of memory, and downloads 400 MB
    of models when it is first used; where it can't be run it is left out, with a warning, and
    METEOR is still there.
    """
    if unknown := set(metrics) - {"meteor", "spice"}:
        raise ValueError(f"{min(unknown)!r} is neither meteor nor spice")
    check_java()
    found, given = _texts(records, captions)
    said = {number: [" ".join(ptb_words(text))] for number, text in enumerate(found)}
    truths = {n: [" ".join(ptb_words(t)) for t in texts] for n, texts in enumerate(given)}
    scores = {}
    if "meteor" in metrics:
        from pycocoevalcap.meteor.meteor import Meteor

        scores["meteor"] = float(Meteor().compute_score(truths, said)[0])
    if "spice" in metrics and (spice := _spice(truths, said)) is not None:
        scores["spice"] = spice
    return scores


def _spice(truths: Mapping[int, Sequence[str]], said: Mapping[int, Sequence[str]]) -> float | None:
    from pycocoevalcap.spice import spice

    try:
        return float(spice.Spice().compute_score(truths, said)[0])
    except (OSError, subprocess.SubprocessError, zipfile.BadZipFile) as error:
        log.warning(
            "no SPICE: its Java program or the download of its models failed (%s). Without a way "
            "to nlp.stanford.edu put stanford-corenlp-3.6.0.jar and its -models.jar into %s, and "
            "evaluate again with --score-only",
            error,
            Path(spice.__file__).parent / "lib",
        )
        return None


def check_java() -> None:
    """ConfigError unless there are the programs and the package that `java_scores` runs."""
    package = importlib.util.find_spec("pycocoevalcap")
    if package is None or shutil.which("java") is None:
        raise ConfigError(
            "METEOR and SPICE need Java (8 or newer: apt-get install default-jre-headless) and "
            "pycocoevalcap (pip install 'glipv2[captions]'); the other caption scores need neither"
        )


def _words(
    records: Sequence[Record], captions: Mapping[str, str]
) -> tuple[list[Words], list[list[Words]]]:
    found, given = _texts(records, captions)
    return [ptb_words(own) for own in found], [[ptb_words(t) for t in texts] for texts in given]


def _texts(
    records: Sequence[Record], captions: Mapping[str, str]
) -> tuple[list[str], list[list[str]]]:
    """What was said of each image, and what people said."""
    if not records:
        raise DataError("no images: the scores of their captions are undefined")
    for record in records:
        if record.key not in captions:
            raise DataError(f"no caption of image {record.key}: was it evaluated?")
        if not record.captions and not record.caption:
            raise DataError(f"{record.key}: nobody's caption to compare with")
    given = [list(record.captions) or [record.caption] for record in records]
    return [captions[record.key] for record in records], given


def _ngrams(words: Words, n: int) -> Counter[Words]:
    return Counter(words[place : place + n] for place in range(len(words) - n + 1))


def _common_subsequence(one: Words, other: Words) -> int:
    """Length of the longest."""
    row = [0] * (len(other) + 1)
    for word in one:
        before = 0
        for place, candidate in enumerate(other, start=1):
            above = row[place]
            row[place] = before + 1 if word == candidate else max(above, row[place - 1])
            before = above
    return row[-1]


def _clipped_cosine(mine: Mapping[Words, float], theirs: Mapping[Words, float]) -> float:
    norms = [math.sqrt(sum(v * v for v in vector.values())) for vector in (mine, theirs)]
    product = sum(min(v, theirs.get(g, 0.0)) * theirs.get(g, 0.0) for g, v in mine.items())
    return product / (norms[0] * norms[1]) if norms[0] and norms[1] else product
