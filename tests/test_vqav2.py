import io
import json

import pytest
from PIL import Image

from glipv2.data_prep.reasons import Dropped
from glipv2.data_prep.sources import open_source
from glipv2.jobs.cli import main
from glipv2.pipeline.config import PrepareConfig
from glipv2.pipeline.errors import ConfigError, DataError

IMAGES = ("COCO_val2014_000000000042.jpg", "000000000043.jpg", "image7.jpg")


def jpeg(size=(40, 30)):
    buffer = io.BytesIO()
    Image.new("RGB", size, (90, 120, 30)).save(buffer, "JPEG")
    return buffer.getvalue()


def test_the_closing_table_counts_questions_and_answers(folder, capsys):
    answered = annotations({1: ["a dog", "dog"], 2: ["a cat", "cat"]})
    opened(folder, questions(asked(42, 1), asked(42, 2)), answered)
    files = [str(folder / "0.json"), str(folder / "1.json")]
    words = ["prepare", "vqav2", "--images", str(folder / "img"), "--out", str(folder / "set")]
    assert main([*words, "--annotations", *files]) == 0
    assert "set: 1 sample, 2 questions, 4 answers, 1 shard, " in capsys.readouterr().out
    assert main([*words, "--annotations", *files]) == 0
    assert "1 sample is there already" in capsys.readouterr().out
    out = str(folder / "answers.txt")
    assert main(["prepare", "answers", str(folder / "set"), "--least", "1", "--out", out]) == 0
    assert "2 answers, which 100.0% of 2 questions agree on" in capsys.readouterr().out
    opened(folder, questions(asked(42, 1)))
    words[-1] = str(folder / "test")
    assert main([*words, "--annotations", files[0]]) == 0
    assert main(["prepare", "answers", str(folder / "test"), "--out", out]) == 2
    assert "none of 1 question has an answer" in capsys.readouterr().err


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "img").mkdir()
    for name in IMAGES:
        (tmp_path / "img" / name).write_bytes(jpeg())
    return tmp_path


def opened(folder, *files):
    """Files are documents, or (name, text)."""
    urls = []
    for number, file in enumerate(files):
        name, text = file if isinstance(file, tuple) else (f"{number}.json", json.dumps(file))
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        urls.append(str(folder / name))
    images = (str(folder / "img"),)
    return open_source(PrepareConfig(source="vqav2", annotations=tuple(urls), images=images))


def read(folder, *files):
    source = opened(folder, *files)
    dropped = Dropped()
    return list(source.records(dropped)), dropped


def asked(image_id, question_id, question="What is it?"):
    return {"image_id": image_id, "question_id": question_id, "question": question}


def questions(*entries):
    return {"info": {}, "task_type": "Open-Ended", "data_subtype": "val2014", "questions": entries}


def annotations(answers):
    entries = [
        {
            "question_type": "what",
            "multiple_choice_answer": "x",
            "answers": [
                {"answer": text, "answer_confidence": "yes", "answer_id": n + 1}
                for n, text in enumerate(texts)
            ],
            "image_id": 1,
            "question_id": question_id,
        }
        for question_id, texts in answers.items()
    ]
    return {"info": {}, "license": {}, "annotations": entries}


TEN = [f"answer {n}" for n in range(8)] + ["2", "yes"]


def test_an_image_has_all_its_questions_with_ten_answers_in_any_order_of_files(folder):
    of_questions = questions(asked(42, 42001), asked(43, 43000, "Is it?"), asked(42, 42000, "Who?"))
    of_answers = annotations({43000: TEN, 42000: TEN[::-1], 42001: TEN})
    records, dropped = read(folder, of_questions, of_answers)
    first, second = records
    assert (first.key, first.task, first.provenance["file"]) == ("42", "vqa", IMAGES[0])
    assert [(q.id, q.text) for q in first.questions] == [
        ("42001", "What is it?"),
        ("42000", "Who?"),
    ]
    assert first.questions[0].answers == tuple(TEN) == first.questions[1].answers[::-1]
    assert second.provenance["file"] == IMAGES[1] and not dropped
    assert read(folder, of_answers, of_questions)[0] == records


def test_secret_answers_are_no_mistake_and_missing_ones_are(folder):
    of_questions = questions(asked(42, 1), asked(42, 2))
    (record,), dropped = read(folder, of_questions)
    assert [q.answers for q in record.questions] == [(), ()] and not dropped
    (record,), dropped = read(folder, of_questions, annotations({2: TEN}))
    assert [len(q.answers) for q in record.questions] == [0, 10]
    assert dropped == {"answer_unreadable": 1}


def test_json_lines_with_labels_are_read_alone(folder):
    lines = [
        {
            "question_id": 1,
            "image": "COCO_val2014_000000000043.jpg",
            "text": "A dog?",
            "label": "no",
        },
        {"question_id": 2, "image": IMAGES[0], "text": "A cat?", "label": "yes"},
        {"image_id": "42", "question": "Who?", "answers": ["he", {"answer": "she"}]},
        {"image_id": 42, "question": "Where?", "answer": "here"},
    ]
    text = "\n".join(map(json.dumps, lines)) + "\n{broken\n"
    records, dropped = read(folder, ("pope.json", text))
    told = {
        record.provenance["file"]: [(q.id, q.text, q.answers) for q in record.questions]
        for record in records
    }
    assert told[IMAGES[1]] == [("1", "A dog?", ("no",))]  # of another release than its name says
    assert [record.provenance["file"] for record in records] == [IMAGES[1], IMAGES[0], IMAGES[0]]
    assert len({record.key for record in records}) == 3
    assert told[IMAGES[0]] == [("2", "Who?", ("he", "she")), ("3", "Where?", ("here",))]
    assert dropped == {"row_unreadable": 1}
    with pytest.raises(ConfigError, match="pope.json has questions and answers in one"):
        read(folder, ("pope.json", text), questions(asked(42, 1)))


@pytest.mark.parametrize(("name", "mark"), [("train.csv", ","), ("train.tsv", "\t")])
def test_columns_of_questions_and_answers_are_read(folder, name, mark):
    lines = ["question,answer,image_id", "what is it,a lamp,image7", "how many,2,image7", "x,y"]
    records, dropped = read(folder, (name, "\n".join(lines).replace(",", mark)))
    (record,) = records
    assert [(q.id, q.text, q.answers) for q in record.questions] == [
        ("0", "what is it", ("a lamp",)),
        ("1", "how many", ("2",)),
    ]
    assert record.key == "image7" and dropped == {"row_unreadable": 1}


def test_everything_broken_is_counted_by_reason(folder):
    (folder / "img" / "000000000050.jpg").write_bytes(jpeg()[:300])
    entries = [
        asked(42, 1),
        asked(42, 1, "Again?"),
        asked(42, 2, " \u0000 "),
        asked(42, 3, None),
        asked(42, 4, "?!"),
        asked(42, 5, "w " * 900),
        asked(None, 6),
        asked(42, [7]),
        asked(1.5, 8),
        "What?",
        asked(43, 9, ""),
        asked(99, 10),
        asked("../secret", 11),
        asked(50, 12),
        *(asked("image7", number) for number in range(100, 1_101)),
    ]
    odd = [None, "", "\u0007", 7, ["a"], "a " * 900, "fine"]
    records, dropped = read(folder, questions(*entries), annotations({1: odd, 12: TEN}))
    assert [record.key for record in records] == ["42"]
    assert [(q.id, q.answers) for q in records[0].questions] == [("1", ("fine",))]
    assert dropped == {
        "question_repeated": 1,
        "question_unreadable": 9,
        "answer_unreadable": 6,
        "question_missing": 1,
        "image_missing": 2,
        "image_undecodable": 1,
        "texts_too_many": 1,
    }


def test_annotations_in_other_forms_give_no_answers_and_no_traceback(folder):
    document = {"annotations": [{"question_id": 1, "answers": "yes"}, 7, {"question_id": 2}]}
    (record,), dropped = read(folder, document, questions(asked(42, 1), asked(42, 2)))
    assert [q.answers for q in record.questions] == [(), ()]
    assert dropped == {"answer_unreadable": 2}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([annotations({1: TEN})], "has answers only; give the questions too"),
        ([questions(asked(1, 1)), questions(asked(2, 2))], "are both questions"),
        ([("a.json", "")], "not valid JSON"),
        ([("a.json", "[1]")], "a.json is none of the files"),
        ([("a.json", '{"images": []}')], "a.json is none of the files"),
        ([("a.p", b"\x80\x04]")], "a.p is a Python pickle"),
        ([("a.csv", "picture,words\n")], "a.csv: the first row .* image_id/image; found picture"),
        ([("a.csv", "")], "a.csv: the first row .* found nothing"),
    ],
)
def test_files_of_another_kind_are_refused_by_name(folder, files, message):
    with pytest.raises(DataError, match=message):
        read(folder, *files)


def test_what_the_user_named_must_be_there(folder):
    (folder / "q.json").write_text(json.dumps(questions(asked(42, 1))))
    for annotations_, images, message in [
        ("gone.json", "img", "annotation file .*gone.json does not exist"),
        ("q.json", "gone", "image folder .*gone does not exist"),
    ]:
        options = {"annotations": (str(folder / annotations_),), "images": (str(folder / images),)}
        with pytest.raises(DataError, match=message):
            open_source(PrepareConfig(source="vqav2", **options))
