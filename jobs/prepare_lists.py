"""glipv2 prepare vocabulary, answers: what several shard sets have in common, as files to edit."""

import argparse
from collections import Counter
from collections.abc import Callable, Iterable

from glipv2.jobs.every_shard import at_least, every_shard
from glipv2.jobs.stats import counted
from glipv2.jobs.survey import records_of
from glipv2.pipeline.answers import agreed_answer, write_answers
from glipv2.pipeline.errors import BadSample, DataError
from glipv2.pipeline.shards import ShardSet, check_shard_sizes, open_shard_set
from glipv2.pipeline.vocabulary import vocabulary_of, write_vocabulary

LEAST = 9


def add_parsers(add_parser: Callable[..., argparse.ArgumentParser]) -> None:
    """The two commands; `listed` of their arguments is what they do."""
    vocabulary = add_parser(
        "vocabulary", help="which categories of several sets are the same, for data.vocabulary"
    )
    vocabulary.add_argument("shards", nargs="+", metavar="SHARDS", help="the sets of the mixture")
    same = "names of one category (tv,tvmonitor); may be repeated"
    vocabulary.add_argument("--same", action="append", default=[], metavar="NAME,NAME", help=same)
    vocabulary.add_argument("--out", required=True, metavar="URL", help="the file to write")
    vocabulary.set_defaults(listed=list_categories)
    answers = add_parser(
        "answers", help="the answers that several questions share, for model.answers"
    )
    answers.add_argument("shards", nargs="+", metavar="SHARDS", help="sets of questions")
    least = f"questions that must agree on an answer (default {LEAST})"
    answers.add_argument("--least", type=at_least(1), default=LEAST, metavar="N", help=least)
    answers.add_argument("--out", required=True, metavar="URL", help="the file to write")
    answers.set_defaults(listed=list_answers)


def list_categories(arguments: argparse.Namespace) -> None:
    """Write the names of all sets' categories, with one number for those that are the same."""
    same = [group.split(",") for group in arguments.same]
    ids = vocabulary_of(map(open_shard_set, arguments.shards), same)
    write_vocabulary(arguments.out, ids)
    categories = counted(len(set(ids.values())), "category", "categories")
    print(f"{arguments.out}: {counted(len(ids), 'name')} of {categories}")  # noqa: T201


def list_answers(arguments: argparse.Namespace) -> None:
    """Write the answers that people agree on for at least `least` questions, frequent ones first.

    With 9 and the training and validation sets of VQAv2 it is the usual list (facts E.5).
    """
    counts = _agreed(arguments.shards)
    answers = sorted(counts, key=lambda answer: (-counts[answer], answer))
    chosen = [answer for answer in answers if counts[answer] >= arguments.least]
    if not chosen:
        most = counted(counts[answers[0]], "question")
        raise DataError(
            f"at most {most} agree on an answer, and --least is {arguments.least}; choose other "
            "sets or a lower --least"
        )
    write_answers(arguments.out, chosen)
    share = sum(counts[answer] for answer in chosen) / counts.total()
    print(  # noqa: T201 - the answer of the command
        f"{arguments.out}: {counted(len(chosen), 'answer')}, which {share:.1%} of "
        f"{counted(counts.total(), 'question')} agree on"
    )


def _agreed(urls: Iterable[str]) -> Counter[str]:
    """Answer -> questions that people answer so; DataError for a set that has none."""
    counts: Counter[str] = Counter()
    for shard_set in map(open_shard_set, urls):
        check_shard_sizes(shard_set)
        questions, own = 0, Counter[str]()
        for _, (number, found) in every_shard(shard_set, agreed_answers, "read"):
            questions += number
            own.update(found)
        if not questions:
            raise DataError(
                f"{shard_set.url} holds no questions; give sets of `glipv2 prepare vqav2`"
            )
        if not own:
            raise DataError(
                f"{shard_set.url}: none of {counted(questions, 'question')} has an answer (those "
                "of a test split are secret); leave the set out"
            )
        counts.update(own)
    return counts


def agreed_answers(shard_set: ShardSet, number: int) -> tuple[int, Counter[str]]:
    """The questions of a shard, and how many people answer so, by the answer most of them give."""
    records = records_of(shard_set, number, 0, shard_set.shards[number].samples)
    readable = (record for record in records if not isinstance(record, BadSample))
    questions = [question for record in readable for question in record.questions]
    agreed = (agreed_answer(question.answers) for question in questions)
    return len(questions), Counter(answer for answer in agreed if answer is not None)
