"""VQA accuracy against leaving people out one by one, as its rule says."""

import json
import re
from itertools import product

import pytest

from glipv2.eval.vqa import (
    QuestionKind,
    answer_worth,
    evalai_answers,
    question_kinds,
    vqa_accuracy,
)
from glipv2.pipeline.answers import CONTRACTIONS as MENDED
from glipv2.pipeline.answers import normal_answer
from glipv2.pipeline.errors import DataError
from glipv2.pipeline.records import Question, Record


def record(*questions):
    return Record(
        key="a",
        image=b"",
        image_format="jpg",
        width=9,
        height=9,
        task="vqa",
        questions=tuple(Question(id=i, text="what?", answers=tuple(a)) for i, a in questions),
    )


def by_leaving_out(answer, given):
    """The rule in words: each person is left out in turn; three of the others make it right."""
    total = 0.0
    for person in range(len(given)):
        others = given[:person] + given[person + 1 :]
        total += min(sum(other == answer for other in others) / 3, 1)
    return total / len(given)


@pytest.mark.parametrize("agree", range(11))
def test_worth_is_the_average_over_ten_sets_of_nine(agree):
    given = ["red"] * agree + ["blue"] * (10 - agree)
    expected = [0, 0.3, 0.6, 0.9][agree] if agree < 4 else 1.0
    assert answer_worth("red", given) == pytest.approx(by_leaving_out("red", given))
    assert answer_worth("red", given) == pytest.approx(expected)


def test_worth_of_any_few_answers_is_that_of_the_rule():
    for given in product("xyz", repeat=4):
        for answer in "xw":
            expected = by_leaving_out(answer, list(given))
            assert answer_worth(answer, given) == pytest.approx(expected)
    assert (answer_worth("x", ["x"]), answer_worth("y", ["x"])) == (1, 0)  # nobody to leave out


def test_answers_are_compared_in_normal_form_on_both_sides():
    given = ["The dog's", "dogs", "2 dogs!", "two dogs", "2 dogs"] + ["cat"] * 5
    assert answer_worth("Two  dogs.", given) == pytest.approx(0.9)
    assert answer_worth("two dog", given) == 0


# ----- the official normalisation, written down as its code applies it --------------------------

CONTRACTIONS = {
    "aint": "ain't", "arent": "aren't", "cant": "can't", "couldnt've": "couldn't've",
    "couldn'tve": "couldn't've", "dont": "don't", "hed": "he'd", "hes": "he's", "hows": "how's",
    "itd": "it'd", "maam": "ma'am", "oclock": "o'clock", "ow's'at": "'ow's'at",
    "somebody'd": "somebodyd", "somebodys": "somebody's", "thats": "that's", "twas": "'twas",
    "weve": "we've", "whats": "what's", "wont": "won't", "yall'd've": "y'all'd've",
    "y'all'dve": "y'all'd've", "youre": "you're",
}  # fmt: skip
NOT_MENDED = ["im", "ive", "lets", "shes", "ill", "its", "id", "well", "were", "shell"]


WELL_FORMED = re.compile(
    r"(?:[a-z]+|y'all)(?:n't|'(?:d|ve|ll|re|s))+|y'all|ma'am|o'clock|'twas|'ow's'at"
)


@pytest.mark.parametrize("written", MENDED)
def test_every_contraction_is_mended_by_putting_an_apostrophe_back(written):
    mended = MENDED[written]
    assert normal_answer(written) == mended and normal_answer(written.upper()) == mended
    if written == "somebody'd":  # a slip of the official table
        assert mended == "somebodyd"
        return
    assert len(mended) == len(written) + 1
    assert written.replace("'", "") == mended.replace("'", "")
    assert any(mended[:n] + mended[n + 1 :] == written for n, c in enumerate(mended) if c == "'")
    assert normal_answer(mended) == mended and WELL_FORMED.fullmatch(mended)


def official(text):
    text = text.replace("\n", " ").replace("\t", " ").strip()
    marks = ';/[]"{}()=+\\_-><@`,?!'
    out = text
    for mark in marks:
        if f"{mark} " in text or f" {mark}" in text or re.search(r"(\d)(,)(\d)", text):
            out = out.replace(mark, "")
        else:
            out = out.replace(mark, " ")
    out = re.sub(r"(?!<=\d)(\.)(?!\d)", "", out)
    digits = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4"}
    digits |= {"five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}
    words = [digits.get(word, word) for word in out.lower().split()]
    words = [word for word in words if word not in ("a", "an", "the")]
    return " ".join(CONTRACTIONS.get(word, word) for word in words)


@pytest.mark.parametrize(
    "text",
    [
        *CONTRACTIONS, *NOT_MENDED, "A dog, the cat", "yes,no", "yes , no", "10,000", "1,000-2,000",
        "t-shirt", "t-shirt, blue", "and/or", "U.S.A.", "2.5 feet.", ".5", "None", "TEN!", "it's",
        "\"quoted\"", "Mr. Smith's", "what?now", "#7", "5:30 pm", "a.m.", "50%", "rock'n'roll",
        "  x\ty ",
        "[a] (b) {c}", "e=mc+2", "back\\slash", "under_score", "<tag>", "me@home.com", "`tick`",
    ],
)  # fmt: skip
def test_the_normal_form_is_the_official_one(text):
    assert normal_answer(text) == official(text)


def test_accuracy_is_the_mean_over_questions_and_of_each_kind():
    questions = [
        ("11", ["yes"] * 10),
        ("12", ["2"] * 2 + ["3"] * 8),
        ("13", ["red"] + ["blue"] * 9),
        ("14", []),
    ]
    answers = {"11": "Yes", "12": "two", "13": "green", "14": "so what"}
    kinds = {
        "11": QuestionKind("yes/no", "is the"),
        "12": QuestionKind("number", "how many"),
        "13": QuestionKind("other", "what color"),
    }
    result = vqa_accuracy([record(*questions[:2]), record(*questions[2:])], answers, kinds)
    assert result.to_dict() == pytest.approx(
        {
            "accuracy": 1.6 / 3,
            "questions": 3,
            "unanswered_by_people": 1,
            "accuracy_yes/no": 1,
            "accuracy_number": 0.6,
            "accuracy_other": 0,
        }
    )
    assert result.by_question_type == pytest.approx({"is the": 1, "how many": 0.6, "what color": 0})
    assert "accuracy_other" not in vqa_accuracy([record(*questions)], answers).to_dict()


def test_kinds_come_from_vqav2s_annotations_and_evalai_takes_a_list():
    annotation = {"question_id": 458752000, "answer_type": "other", "question_type": "what is"}
    document = {"annotations": [{**annotation, "answers": []}]}
    assert question_kinds(document) == {"458752000": QuestionKind("other", "what is")}
    with pytest.raises(DataError, match="not a VQAv2"):
        question_kinds({"annotations": [{"question_id": 1}]})
    exported = json.dumps(evalai_answers({"20": "b", "3": "a cat"}))
    assert json.loads(exported) == [
        {"question_id": 3, "answer": "a cat"},
        {"question_id": 20, "answer": "b"},
    ]
    with pytest.raises(DataError, match="'q7'"):
        evalai_answers({"q7": "a"})


def test_what_cannot_be_scored_is_refused():
    asked = record(("1", ["x"]))
    with pytest.raises(DataError, match="no answer to question 1"):
        vqa_accuracy([asked], {})
    with pytest.raises(DataError, match="question 1 is there twice"):
        vqa_accuracy([asked, asked], {"1": "x"})
    with pytest.raises(DataError, match="undefined"):
        vqa_accuracy([record(("1", []))], {"1": "x"})
    with pytest.raises(DataError, match="question 1 is not in the annotations"):
        vqa_accuracy([asked], {"1": "x"}, {})
