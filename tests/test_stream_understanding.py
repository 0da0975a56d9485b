"""Questions and captions from shards to batches and through `glipv2 pretrain`."""

import io
import itertools
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
from commands import TIMEOUT, smoke_recipe, start  # noqa: E402
from sample_records import record  # noqa: E402

from glipv2.jobs.cli import main
from glipv2.jobs.pretrain import check_mixture
from glipv2.model.tokenizer import Tokenizer, tiny_vocab
from glipv2.pipeline.answers import agreed_answer, answer_numbers, normal_answer, soft_targets
from glipv2.pipeline.config import DataConfig
from glipv2.pipeline.config_loader import dump_config, load_config
from glipv2.pipeline.errors import ConfigError
from glipv2.pipeline.loader import build_loader
from glipv2.pipeline.masking import IGNORE
from glipv2.pipeline.records import Question
from glipv2.pipeline.runlog import read_losses
from glipv2.pipeline.shards import write_shard_set
from glipv2.pipeline.stream import merge_positions

COLOURS = ("red", "blue", "green")
ANSWERS = ("yes", "no", *COLOURS, "2")
TOKENIZER = Tokenizer.from_vocab(tiny_vocab(), 64)
DATA = DataConfig(
    mixture={"set": 1.0},
    short_sides=(32,),
    long_side=48,
    caption_packing=1.0,
    pack_gold_captions=True,
    mlm_probability=1.0,
    lanes=4,
    unit_samples=4,
)


def vqa(number):
    """Three questions: about a colour, a number, and one that nobody answers in known words."""
    colour, other = COLOURS[number % 3], COLOURS[(number + 1) % 3]
    sure = number % 11
    questions = (
        ("which color is the circle?", (colour,) * sure + (other,) * (10 - sure)),
        ("how many circles are there?", ("Two",) * 6 + ("two.", "no", "none", "a few")),
        ("why is it here?", ("because",) * 10),
    )
    return record(
        number,
        task="vqa",
        caption="",
        regions=(),
        questions=tuple(
            Question(id=f"{number}-{n}", text=text, answers=answers)
            for n, (text, answers) in enumerate(questions)
        ),
    )


def captioning(number):
    colour = COLOURS[number % 3]
    captions = (f"a {colour} circle", f"the circle is {colour}.")
    return record(number, task="captioning", caption=captions[0], captions=captions, regions=())


MAKERS = {"vqa": vqa, "captioning": captioning}


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    return {
        task: write_shard_set(f"{folder}/{task}", map(make, range(40)), [], {}, 16)
        for task, make in MAKERS.items()
    }


def loader(shard_set, rank=0, world_size=1, data=DATA, **changes):
    model = {"answers": ANSWERS, "captions": True} | changes
    return build_loader(data, 8, {"set": shard_set}, TOKENIZER, rank, world_size, **model)


def take(own, count, position=None):
    return list(itertools.islice(own.batches(position or own.start()), count))


def texts(batch):
    """What each row reads, as word pieces without the special ones."""
    rows = zip(batch.tokens_BT.tolist(), batch.token_mask_BT.sum(1).tolist(), strict=True)
    return [" ".join(TOKENIZER.vocabulary[i] for i in ids[1 : n - 1]) for ids, n in rows]


def pieces(text):
    return " ".join(TOKENIZER.vocabulary[i] for i in TOKENIZER.encode(text).ids[1:-1])


def fields_of(batch):
    rows = zip(batch.keys, texts(batch), batch.images_B3HW, strict=True)
    answers = batch.answers_BV if batch.answers_BV is not None else [None] * len(batch.keys)
    return [
        (key, text, image.numpy().tobytes(), None if found is None else found.tolist())
        for (key, text, image), found in zip(rows, answers, strict=True)
    ]


def test_a_question_comes_whole_with_its_soft_targets(sets):
    seen = Counter()
    for batch, _ in take(loader(sets["vqa"]), 10):
        assert batch.task == "vqa" and not batch.box_mask_BN.any()
        assert batch.answers_BV.shape == (8, len(ANSWERS))
        assert (batch.mlm_labels_BT == IGNORE).all() and batch.most_masked == 0
        for row, text in enumerate(texts(batch)):
            asked = {pieces(q.text): q for q in vqa(int(batch.keys[row][-4:])).questions}
            seen[text] += 1
            # Written apart from the code: 0.3 a person, and both "Two" and "two." are "2".
            given = [{"Two": "2", "two.": "2"}.get(a, a) for a in asked[text].answers]
            expected = [min(1.0, given.count(answer) * 3 / 10) for answer in ANSWERS]
            assert np.allclose(batch.answers_BV[row].numpy(), expected, atol=1e-6)
    assert set(seen) == {pieces(q.text) for q in vqa(0).questions[:2]}  # "why" has no known answer
    assert min(seen.values()) > 20


def test_any_caption_of_an_image_comes_whole_and_alone(sets):
    seen = Counter()
    for batch, _ in take(loader(sets["captioning"]), 10):
        assert batch.task == "captioning" and batch.answers_BV is None
        assert not batch.box_mask_BN.any()
        assert (batch.mlm_labels_BT == IGNORE).all()
        for key, text in zip(batch.keys, texts(batch), strict=True):
            seen[[pieces(c) for c in captioning(int(key[-4:])).captions].index(text)] += 1
    assert min(seen[0], seen[1]) > 20


@pytest.mark.parametrize("task", MAKERS)
def test_batches_do_not_depend_on_ranks_and_resumes(sets, task):
    whole = take(loader(sets[task]), 6)
    again = take(loader(sets[task]), 3, whole[2][1])
    assert [fields_of(b) for b, _ in again] == [fields_of(b) for b, _ in whole[3:]]
    shares = [take(loader(sets[task], rank, 2), 3, whole[2][1]) for rank in range(2)]
    for step, (batch, after) in enumerate(whole[3:]):
        zero, one = (fields_of(share[step][0]) for share in shares)
        assert zero[:2] + one[:2] + zero[2:] + one[2:] == fields_of(batch)  # lanes 0, 1, 2, 3
        assert merge_positions([share[step][1] for share in shares]) == after


def test_a_picture_is_not_mirrored_when_its_answers_or_its_caption_tell_left_from_right(tmp_path):
    def mirrored(made):
        """How often the dark half is at the right, in 16 samples."""
        records = [replace(made, key=f"k{n}", image=dark_left_half()) for n in range(8)]
        folder = str(tmp_path / str(len(list(tmp_path.iterdir()))))
        own = loader(write_shard_set(folder, records, [], {}), answers=("left", "red"))
        found = [batch for batch, _ in take(own, 2)]
        return sum(bool(i[:, :, :8].float().mean() > 99) for b in found for i in b.images_B3HW)

    def asked(answer):
        question = Question(id="1", text="where is it?", answers=(answer,))
        return replace(vqa(0), questions=(question,))

    assert 2 <= mirrored(asked("red")) <= 14
    assert mirrored(asked("left")) == 0
    said = captioning(0)
    assert 2 <= mirrored(said) <= 14
    assert mirrored(replace(said, captions=("a dog on the left",))) == 0


def dark_left_half():
    image = Image.new("RGB", (32, 24), "white")
    image.paste((0, 0, 0), (0, 0, 16, 24))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("given", "normal"),
    [
        ("Yes!", "yes"),
        ("The  dog", "dog"),
        ("two", "2"),
        ("None", "0"),
        ("dont know", "don't know"),
        ("well", "well"),
        ("10,000 people", "10000 people"),
        ("red, white", "red white"),
        ("t-shirt", "t shirt"),
        ("fish - chips", "fish chips"),
        ("2.5", "2.5"),
        ("U.S.", "us"),
        ("A", "a"),
        ("?", "?"),
    ],
)
def test_answers_are_compared_as_vqa_does(given, normal):
    assert normal_answer(given) == normal == normal_answer(normal)


def test_the_answer_of_a_single_person_is_right():
    numbers = answer_numbers(ANSWERS)
    assert soft_targets(("Red",), numbers).tolist() == [0, 0, 1, 0, 0, 0]
    assert soft_targets(("purple",), numbers).sum() == 0
    assert agreed_answer(("a", "Two", "2")) == "2" and agreed_answer(()) is None
    with pytest.raises(ConfigError, match="'yes' and 'Yes!' are one answer"):
        answer_numbers(("yes", "no", "Yes!"))


def test_images_without_a_question_to_learn_from_count_as_bad(tmp_path):
    secret = [
        vqa(n) if n % 4 else replace(vqa(n), questions=vqa(n).questions[2:]) for n in range(40)
    ]
    shard_set = write_shard_set(str(tmp_path), secret, [], {})
    bad = []
    own = loader(
        shard_set, data=replace(DATA, max_bad_share=0.5), on_bad=lambda *args: bad.append(args)
    )
    keys = {key for batch, _ in take(own, 5) for key in batch.keys}
    assert len(keys) == 30 and not any(int(key[-4:]) % 4 == 0 for key in keys)
    assert {why.reason for *_, why in bad} == {"answer_unknown"}


def test_a_mixture_is_for_one_task_and_fits_the_model(sets, tmp_path):
    both = {"questions": sets["vqa"], "captions": sets["captioning"]}
    data = replace(DATA, mixture=dict.fromkeys(both, 1.0))
    with pytest.raises(ConfigError, match="questions is for vqa, captions is for captioning, and"):
        build_loader(data, 8, both, TOKENIZER, answers=ANSWERS, captions=True)
    with pytest.raises(ConfigError, match="set model.answers to the file of `glipv2 prepare ans"):
        loader(sets["vqa"], answers=())
    with pytest.raises(ConfigError, match="set model.captions to true"):
        loader(sets["captioning"], captions=False)
    mixed = [vqa(n) if n < 20 else captioning(n) for n in range(40)]
    own = loader(write_shard_set(str(tmp_path / "mixed"), mixed, [], {}))
    with pytest.raises(ConfigError, match="set is for vqa as its first record says, but key00.*"):
        take(own, 10)
    recipe = smoke_recipe(tmp_path, data={"mixture": {sets["vqa"].url: 1.0}})
    with pytest.raises(ConfigError, match="the model knows no answers"):
        check_mixture(load_config(str(recipe), []))


def test_the_list_of_answers_is_counted_written_and_read_back(sets, tmp_path, capsys):
    out = str(tmp_path / "answers.txt")
    assert main(["prepare", "answers", sets["vqa"].url, "--least", "14", "--out", out]) == 0
    agreed = Counter(
        Counter(normal_answer(a) for a in q.answers).most_common(1)[0][0]
        for n in range(40)
        for q in vqa(n).questions
    )
    chosen = sorted((a for a in agreed if agreed[a] >= 14), key=lambda a: (-agreed[a], a))
    assert Path(out).read_text().splitlines() == chosen and chosen[:2] == ["2", "because"]
    share = sum(agreed[a] for a in chosen) / 120
    said = f"{len(chosen)} answers, which {share:.1%} of 120 questions agree on"
    assert said in capsys.readouterr().out
    config = load_config(str(smoke_recipe(tmp_path)), [f"model.answers={out}"])
    assert config.model.answers == tuple(chosen)
    resolved = tmp_path / "resolved.yaml"  # needs the file no more
    resolved.write_text(dump_config(config))
    Path(out).unlink()
    assert load_config(str(resolved), []).model.answers == tuple(chosen)
    with pytest.raises(ConfigError, match="answers.txt doesn't exist; make it with `glipv2 prep"):
        load_config(str(resolved), [f"model.answers={out}"])
    for url in (sets["captioning"].url, sets["vqa"].url):
        assert main(["prepare", "answers", url, "--least", "41", "--out", out]) == 2
        assert not Path(out).exists()
    said = capsys.readouterr().err
    assert f"{sets['captioning'].url} holds no questions" in said
    assert "at most 40 questions agree" in said


@pytest.mark.slow
def test_pretraining_on_questions_and_on_captions_lowers_the_loss(sets, tmp_path):
    """Two runs at once, one of them on two ranks."""
    (tmp_path / "answers.txt").write_text("".join(f"{answer}\n" for answer in ANSWERS))
    models = {
        "vqa": {"answers": str(tmp_path / "answers.txt")},
        "captioning": {"captions": True},
    }
    processes = {}
    for ranks, (task, model) in enumerate(models.items(), start=1):
        (tmp_path / task).mkdir()
        recipe = smoke_recipe(
            tmp_path / task,
            run_dir=str(tmp_path / task / "run"),
            model={**model, "masked_words": False},
            data={"mixture": {sets[task].url: 1.0}, "lanes": 4},
            train={"steps": 20, "processes": ranks, "checkpoint_every": 20},
        )
        processes[task] = start("pretrain", recipe)
    for task, term, least in (("vqa", "answer", 0.65), ("captioning", "caption", 0.4)):
        out, err = processes[task].communicate(timeout=TIMEOUT)
        assert processes[task].returncode == 0, out + err
        losses = [entry[term] for entry in read_losses(str(tmp_path / task / "run"))]
        assert len(losses) == 20 and np.mean(losses[-5:]) < least * np.mean(losses[:3]), losses
