"""VQAv2's soft accuracy, and the file that EvalAI takes.

An answer is worth min(n / 3, 1) where n of nine people gave it, averaged over the ten ways to leave
one of the ten people out: 0, 0.3, 0.6, 0.9 or 1 (facts I). Both sides are compared in the normal
form of `normal_answer`, always; releases of the official code differ in what they leave as it is
where all ten people agree to the letter, and that is in this form already but for rare marks.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple

from glipv2.pipeline.answers import normal_answer
from glipv2.pipeline.errors import DataError
from glipv2.pipeline.records import Record

ENOUGH = 3
"""People who agree make an answer right."""


class QuestionKind(NamedTuple):
    answer_type: str
    """"yes/no", "number" or "other"."""
    question_type: str
    """How it begins: "what color is the", "how many", ..."""


@dataclass(frozen=True, kw_only=True)
class VqaAccuracy:
    """Means over questions, in [0, 1]."""

    accuracy: float
    questions: int
    unanswered_by_people: int
    """Questions without people's answers, which can't be scored."""
    by_answer_type: dict[str, float]
    by_question_type: dict[str, float]

    def to_dict(self) -> dict[str, float]:
        return {
            "accuracy": self.accuracy,
            "questions": float(self.questions),
            "unanswered_by_people": float(self.unanswered_by_people),
            **{f"accuracy_{kind}": share for kind, share in self.by_answer_type.items()},
        }


def vqa_accuracy(
    records: Sequence[Record],
    answers: Mapping[str, str],
    kinds: Mapping[str, QuestionKind] | None = None,
) -> VqaAccuracy:
    """Accuracy of one answer for each question id.

    DataError for a question without an entry, one that is asked twice, one that `kinds` (if given)
    doesn't know, and if no question has people's answers.
    """
    worth: dict[str, float] = {}
    unanswered = 0
    for question in (question for record in records for question in record.questions):
        if question.id not in answers:
            raise DataError(f"no answer to question {question.id}: was it evaluated?")
        if question.id in worth:
            raise DataError(f"question {question.id} is there twice")
        if question.answers:
            worth[question.id] = answer_worth(answers[question.id], question.answers)
        else:
            unanswered += 1
    if not worth:
        raise DataError("no question has people's answers: accuracy is undefined")
    by_answer_type: dict[str, list[float]] = defaultdict(list)
    by_question_type: dict[str, list[float]] = defaultdict(list)
    if kinds is not None:
        for number, value in worth.items():
            if number not in kinds:
                raise DataError(f"question {number} is not in the annotations that tell its kind")
            by_answer_type[kinds[number].answer_type].append(value)
            by_question_type[kinds[number].question_type].append(value)
    return VqaAccuracy(
        accuracy=fmean(worth.values()),
        questions=len(worth),
        unanswered_by_people=unanswered,
        by_answer_type={kind: fmean(v) for kind, v in sorted(by_answer_type.items())},
        by_question_type={kind: fmean(v) for kind, v in sorted(by_question_type.items())},
    )


def answer_worth(answer: str, given: Sequence[str]) -> float:
    """How right an answer is to a question that people answered so, in [0, 1].

    Where only one answer is known nobody can be left out: it alone is right.
    """
    agree = Counter(map(normal_answer, given))[normal_answer(answer)]
    people = len(given)
    if people == 1:
        return float(agree)
    with_them = min((agree - 1) / ENOUGH, 1.0) if agree else 0.0
    without_them = min(agree / ENOUGH, 1.0)
    return (agree * with_them + (people - agree) * without_them) / people


def question_kinds(document: Mapping[str, Any]) -> dict[str, QuestionKind]:
    """Question id -> its kind, from VQAv2's parsed annotation file; DataError if it is not one."""
    try:
        return {
            str(a["question_id"]): QuestionKind(str(a["answer_type"]), str(a["question_type"]))
            for a in document["annotations"]
        }
    except (KeyError, TypeError) as error:
        raise DataError(f"this is not a VQAv2 annotation file: {error!r}") from error


def evalai_answers(answers: Mapping[str, str]) -> list[dict[str, Any]]:
    """What EvalAI takes for test-dev and test-std, by ascending id; DataError for other ids."""
    if strange := next((number for number in answers if not number.isdecimal()), None):
        raise DataError(f"question {strange!r}: EvalAI knows VQAv2's ids only, which are numbers")
    ids = sorted(answers, key=int)
    return [{"question_id": int(number), "answer": answers[number]} for number in ids]
