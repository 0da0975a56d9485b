"""Caption scores against their formulas, written out in plain loops."""

import math
import shutil
import sys

import pytest

from glipv2.eval.captions import bleu, caption_scores, cider_d, java_scores, ptb_words, rouge_l
from glipv2.pipeline.errors import ConfigError, DataError
from glipv2.pipeline.records import Record


def record(key, *captions):
    return Record(
        key=key,
        image=b"",
        image_format="jpg",
        width=9,
        height=9,
        task="captioning",
        caption=captions[0] if captions else "",
        captions=captions,
    )


SAID = {
    "a": "a dog runs on the grass",
    "b": "two men stand near a red car",
    "c": "a a a a a cat",
    "d": "the sky",
}
GIVEN = {
    "a": ("a dog runs over the green grass", "the dog is running", "a brown dog on the grass"),
    "b": ("two men are standing next to a red car", "men near a car"),
    "c": ("a cat sits on a mat", "the cat on the mat sleeps"),
    "d": ("a very blue sky above the sea", "clouds"),
}
RECORDS = [record(key, *captions) for key, captions in GIVEN.items()]


def grams(words, n):
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def plain_bleu(most):
    """Clipped matches over the corpus, geometric mean, brevity penalty."""
    length = closest = 0
    for key, said in SAID.items():
        words = said.split()
        length += len(words)
        lengths = sorted(len(text.split()) for text in GIVEN[key])
        closest += min(lengths, key=lambda size: abs(size - len(words)))
    product = 1.0
    for n in range(1, most + 1):
        right = made = 0
        for key, said in SAID.items():
            mine = grams(said.split(), n)
            made += len(mine)
            for gram in set(mine):
                limit = max(grams(text.split(), n).count(gram) for text in GIVEN[key])
                right += min(mine.count(gram), limit)
        product *= right / made
    return product ** (1 / most) * min(1.0, math.exp(1 - closest / length))


def subsequence(one, other):
    """Longest common one, by recursion."""
    if not one or not other:
        return 0
    if one[0] == other[0]:
        return 1 + subsequence(one[1:], other[1:])
    return max(subsequence(one[1:], other), subsequence(one, other[1:]))


def plain_cider():
    scores = []
    for key, said in SAID.items():
        total = 0.0
        for n in range(1, 5):
            everything = {
                g for texts in [*GIVEN.values()] for t in texts for g in grams(t.split(), n)
            } | {g for s in SAID.values() for g in grams(s.split(), n)}
            order = sorted(everything)
            weights = {}
            for gram in order:
                images = sum(any(gram in grams(t.split(), n) for t in ts) for ts in GIVEN.values())
                weights[gram] = math.log(len(GIVEN) / max(images, 1))
            mine = [grams(said.split(), n).count(g) * weights[g] for g in order]
            for text in GIVEN[key]:
                theirs = [grams(text.split(), n).count(g) * weights[g] for g in order]
                product = sum(min(a, b) * b for a, b in zip(mine, theirs, strict=True))
                norm = math.hypot(*mine) * math.hypot(*theirs)
                apart = len(said.split()) - len(text.split())
                if norm:
                    similar = product / norm * math.exp(-(apart**2) / (2 * 6.0**2))
                    total += similar / len(GIVEN[key])
        scores.append(10 * total / 4)
    return scores


def test_scores_of_a_small_corpus_are_those_of_the_formulas():
    result = caption_scores(RECORDS, SAID)
    for n in (1, 2, 3):
        assert result.bleu[n - 1] == pytest.approx(plain_bleu(n), rel=1e-6)
    assert plain_bleu(4) == 0 < result.bleu[3] < 1e-3  # no match of four words: the official floor
    rouge = []
    for key, said in SAID.items():
        words = said.split()
        common = [(subsequence(words, t.split()), len(t.split())) for t in GIVEN[key]]
        p, r = max(c / len(words) for c, _ in common), max(c / size for c, size in common)
        rouge.append((1 + 1.44) * p * r / (r + 1.44 * p) if p and r else 0)
    assert result.rouge_l == pytest.approx(sum(rouge) / 4)
    cider = plain_cider()
    assert len({round(score, 6) for score in cider}) == 4
    assert result.cider_d == pytest.approx(sum(cider) / 4)
    assert set(result.to_dict()) == {
        "bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider_d", "images"
    }  # fmt: skip


OFFICIAL_SAID = {
    "a": "a brown dog runs over the green grass in the park",
    "b": "two men are standing next to an old red car",
    "c": "a a a a a cat on the mat",
    "d": "the sky",
    "e": "a man in a blue shirt rides a horse on the beach",
}
OFFICIAL_GIVEN = {
    "a": ("a brown dog runs over the green lawn", "the dog is running in the park",
          "a dog on the grass"),
    "b": ("two men are standing next to a red car", "men near a car", "a red car and two old men"),
    "c": ("a cat sits on the mat", "the cat on the mat sleeps"),
    "d": ("a very blue sky above the sea", "clouds in the sky"),
    "e": ("a man rides a horse on the beach at sunset",
          "a person in a blue shirt rides a brown horse", "man and horse by the sea"),
}  # fmt: skip
OFFICIAL_RECORDS = [record(key, *captions) for key, captions in OFFICIAL_GIVEN.items()]
OFFICIAL = {
    "bleu_1": 0.8863636363434918, "bleu_2": 0.8118441408663549, "bleu_3": 0.7291756095092093,
    "bleu_4": 0.6521924924639582, "rouge_l": 0.7336962114130706, "cider_d": 2.8635070979052117,
}  # fmt: skip
"""Of pycocoevalcap 1.2: `Bleu(4)`, `Rouge()` and `Cider()` with `compute_score(given, said)`, where
`given` is {key: list of captions} and `said` {key: [caption]}; no tokeniser is needed, for these
captions are words between single spaces."""
OFFICIAL_METEOR = 0.43228466842755425
"""Of `Meteor()` of the same package and corpus, with Java 17."""


def test_scores_are_those_of_the_official_code():
    ours = caption_scores(OFFICIAL_RECORDS, OFFICIAL_SAID).to_dict()
    assert {name: ours[name] for name in OFFICIAL} == pytest.approx(OFFICIAL, abs=1e-6)


def test_a_perfect_caption_scores_the_most_and_silence_the_least():
    texts = {"a": "a dog on the green grass", "b": "two men near a red car in town"}
    records = [record(key, text) for key, text in texts.items()]
    best = caption_scores(records, texts)
    assert best.bleu == pytest.approx((1, 1, 1, 1))
    assert (best.rouge_l, best.cider_d) == pytest.approx((1, 10))
    silent = caption_scores(records, {"a": "", "b": "!"})
    assert silent.to_dict() == pytest.approx({**dict.fromkeys(best.to_dict(), 0.0), "images": 2})


def test_saying_a_word_again_does_not_help():
    truth = [[("dog", "runs")], [("cat",)]]
    once, twice = (cider_d([words, ("cat",)], truth)[0] for words in (("dog",), ("dog", "dog")))
    assert once >= twice
    assert bleu([("dog", "dog")], [[("dog", "runs")]])[0] == pytest.approx(0.5)
    assert rouge_l(("dog", "dog"), [("dog", "runs")]) == pytest.approx(0.5)


def test_of_two_lengths_equally_close_the_shorter_is_asked_for():
    said, truths = [("a", "b", "c")], [[("a", "b"), ("a", "b", "c", "d")]]
    assert bleu(said, truths)[0] == pytest.approx(1)  # length 2 is asked for: no penalty
    assert bleu([("a", "b")], [[("a", "b", "c")]])[0] == pytest.approx(math.exp(1 - 3 / 2))


@pytest.mark.parametrize(
    ("text", "words"),
    [  # as Stanford's PTBTokenizer 3.4.1 gives them, less the punctuation that COCO leaves out
        ("A man's dog isn't here.", "a man 's dog is n't here"),
        ("They can't; we'll see!", "they ca n't we 'll see"),
        ("He cannot wanna", "he can not wan na"),
        ("A T-shirt, 1,000 people at 5:30 - wow...", "a t-shirt 1,000 people at 5:30 wow"),
        ("U.S. flag by Dr. Smith of J. Inc.", "u.s. flag by dr. smith of j. inc"),
        ("One. Two? \"Three\" 'four'", "one two three four"),
        ("50% off & $5 #1 (really)", "50 % off & $ 5 # 1 -lrb- really -rrb-"),
        ("the boys' car", "the boys car"),
        ("\u2019t was the dog\u2019s", "t was the dog 's"),
        ("", ""),
    ],
)
def test_words_are_those_of_the_treebank_without_punctuation(text, words):
    assert ptb_words(text) == tuple(words.split())


def test_captions_of_a_record_are_all_of_them_or_its_one():
    both = caption_scores([record("a", "x y", "dog"), record("b", "z")], {"a": "dog", "b": "z"})
    assert both.bleu[0] == pytest.approx(1)
    alone = Record(
        key="a", image=b"", image_format="jpg", width=9, height=9, task="pairs", caption="dog"
    )
    assert caption_scores([alone], {"a": "dog"}).bleu[0] == pytest.approx(1)


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(DataError, match="undefined"):
        caption_scores([], {})
    with pytest.raises(DataError, match="no caption of image a"):
        caption_scores(RECORDS, {})
    with pytest.raises(DataError, match="nobody's caption"):
        caption_scores([record("a")], {"a": "dog"})


def test_without_java_its_scores_say_what_to_install(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match=r"METEOR and SPICE need Java .*glipv2\[captions\]"):
        java_scores(RECORDS, SAID)
    with pytest.raises(ValueError, match="'bleu' is neither"):
        java_scores(RECORDS, SAID, ["bleu"])


def test_meteor_of_pycocoevalcap():
    pytest.importorskip("pycocoevalcap")
    if shutil.which("java") is None:
        pytest.skip("no Java")
    perfect = java_scores(RECORDS, {key: texts[0] for key, texts in GIVEN.items()}, ["meteor"])
    assert 0 < java_scores(RECORDS, SAID, ["meteor"])["meteor"] < perfect["meteor"]
    assert perfect["meteor"] == pytest.approx(1, abs=0.01)
    official = java_scores(OFFICIAL_RECORDS, OFFICIAL_SAID, ["meteor"])
    assert official["meteor"] == pytest.approx(OFFICIAL_METEOR, abs=1e-6)


def test_spice_without_its_models_is_told_and_left_out(monkeypatch, tmp_path, caplog):
    """As on a machine that can't download them; the package is a stand-in that fails alike."""
    spice = (
        "from urllib.error import URLError\n"
        "class Spice:\n"
        "    def __init__(self): raise URLError('name or service not known')\n"
    )
    meteor = "class Meteor:\n    def compute_score(self, truths, said): return 0.25, []\n"
    for name, text in (("spice", spice), ("meteor", meteor)):
        (tmp_path / "pycocoevalcap" / name).mkdir(parents=True)
        (tmp_path / "pycocoevalcap" / name / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    for name in [name for name in sys.modules if name.startswith("pycocoevalcap")]:
        monkeypatch.delitem(sys.modules, name)
    assert java_scores(RECORDS, SAID) == {"meteor": 0.25}
    assert "no SPICE: " in caplog.text and "evaluate again with --score-only" in caplog.text
    for name in [name for name in sys.modules if name.startswith("pycocoevalcap")]:
        del sys.modules[name]
