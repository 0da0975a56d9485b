"""A worker's share of labelling, with a teacher whose answers are known."""

import sys
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from sample_records import record  # noqa: E402

from glipv2.data_prep import labelling  # noqa: E402
from glipv2.data_prep.labelling import (  # noqa: E402
    FAILED,
    KILLED,
    InHand,
    ShardLabeller,
    ShardTask,
    Tally,
    after_kill,
)
from glipv2.data_prep.phrases import load_parser  # noqa: E402
from glipv2.model.batch import Detection  # noqa: E402
from glipv2.model.image_input import Picture  # noqa: E402
from glipv2.pipeline import shards  # noqa: E402
from glipv2.pipeline.config import LabelConfig, PhraseConfig  # noqa: E402
from glipv2.pipeline.errors import DataError, StoreError  # noqa: E402
from glipv2.pipeline.images import decode_image  # noqa: E402
from glipv2.pipeline.records import Record  # noqa: E402
from glipv2.pipeline.shard_format import ShardSet  # noqa: E402

SETTINGS = LabelConfig(window=8, batch_size=3, score_threshold=0.5)
STAMP = {"teacher": "t", "label_settings": "s"}
COUNT = 50


@dataclass
class Teacher:
    """Boxes every phrase of its image, with a score from the image's colour."""

    asked: list[list[str]] = field(default_factory=list)
    die_on: str = ""
    die_of_shade: float = -100
    """An image of about this red ends whoever prepares it."""
    fail_on: tuple[str, ...] = ()
    """Captions of which any error in `error` comes."""
    error: Exception = field(default_factory=lambda: RuntimeError("out of memory\nand more"))

    def prepare(self, image_3HW: Tensor) -> Picture:
        if abs(float(image_3HW[0].float().mean()) - self.die_of_shade) < 0.9:
            raise SystemExit("of an image")
        return Picture(pixels_3HW=image_3HW, own_size=tuple(image_3HW.shape[1:]))  # type: ignore[arg-type]

    def ground(
        self, pictures: list[Picture], captions: list[tuple[str, list[object]]], batch_size: int
    ) -> list[Detection]:
        texts = [text for text, _ in captions]
        self.asked.append(texts)
        if self.die_on in texts:
            raise SystemExit(self.die_on)
        if any(text in self.fail_on for text in texts):
            raise self.error
        found = []
        for picture, (_, spans) in zip(pictures, captions, strict=True):
            K = len(spans)
            found.append(
                Detection(
                    boxes_K4=torch.tensor([[2.0 + k, 3, 20 + k, 20] for k in range(K)]),
                    scores_K=picture.pixels_3HW[0, 0, 0].float().expand(K) / 100,
                    labels_K=torch.arange(K),
                    names=[""] * K,
                )
            )
        return found


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    def pair(number: int) -> shards.RawSample:
        words = " very" * (number * 7 % 5)
        text = f"a{words} red square {number}" if number % 9 else "going there"
        whole = replace(record(2 * number), key=f"key{number:04d}", task="pairs", caption=text)
        members = shards.record_members(replace(whole, regions=()))
        if number == 11:
            members["jpg"] = members["jpg"][:200]
        return shards.RawSample(key=whole.key, members=members)

    folder = str(tmp_path_factory.mktemp("pairs"))
    info = shards.write_raw_shard(folder, "shard-000000", map(pair, range(COUNT)))
    return shards.write_manifest(folder, [info], (), {})


def labeller_of(
    pairs: ShardSet, teacher: Teacher, notes: list[InHand], **changes: object
) -> ShardLabeller:
    settings = replace(SETTINGS, **changes)  # type: ignore[arg-type]
    find = load_parser(PhraseConfig())
    return ShardLabeller(pairs, teacher, find, settings, STAMP, notes.append)  # type: ignore[arg-type]


def labelled(
    pairs: ShardSet,
    teacher: Teacher | None = None,
    task: ShardTask | None = None,
    **changes: object,
) -> tuple[list[Record], Tally, Teacher, list[InHand]]:
    teacher, notes, tally = teacher or Teacher(), list[InHand](), Tally()
    labeller = labeller_of(pairs, teacher, notes, **changes)
    return list(labeller.records(task or ShardTask(number=0), tally)), tally, teacher, notes


def test_pairs_keep_their_order_and_get_their_own_boxes(pairs: ShardSet) -> None:
    records, tally, teacher, _ = labelled(pairs)
    numbers = [int(r.key.removeprefix("key")) for r in records]
    # the colour is the score: pictures from 25 on have 2 * 25 / 100
    expected = [n for n in range(25, COUNT) if n % 9]
    assert numbers == expected
    for number, found in zip(numbers, records, strict=True):
        (region,) = found.regions
        assert found.task == "grounding" and found.provenance["teacher"] == "t"
        assert found.caption[slice(*region.spans[0])] == region.phrase
        assert region.phrase.endswith("red square")
        assert region.box == (2, 3, 20, 20)
        assert region.score == pytest.approx(number / 50, abs=0.04)  # JPEG colours
    for window in teacher.asked:
        assert [len(text) for text in window] == sorted(len(text) for text in window)
    assert sum(len(window) for window in teacher.asked) == COUNT - 6 - 1
    counts = tally.counts
    assert counts["pairs"] == COUNT and counts["images"] == len(expected) == counts["boxes"]
    assert counts["no_phrase"] == 6 and counts["image_undecodable"] == 1
    assert counts["no_box"] == COUNT - 6 - 1 - len(expected)
    assert [(key, reason) for key, reason, _ in tally.bad] == [("key0011", "image_undecodable")]


def test_the_result_does_not_depend_on_windows_or_threads(pairs: ShardSet) -> None:
    usual = labelled(pairs)[0]
    for changes in ({"window": 1}, {"window": 33}, {"window": 500}, {"decode_threads": 1}):
        assert labelled(pairs, **changes)[0] == usual


def test_windows_end_early_where_pictures_are_large(
    pairs: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = labelled(pairs)[0]
    monkeypatch.setattr(labelling, "READ_AT_ONCE", 2)
    monkeypatch.setattr(labelling, "MAX_WINDOW_BYTES", 3 * 3 * 24 * 32)
    records, _, teacher, _ = labelled(pairs, window=40)
    assert records == usual
    assert max(len(window) for window in teacher.asked) <= 4


def test_images_without_a_box_are_kept_where_that_is_wanted(pairs: ShardSet) -> None:
    records, tally, _, _ = labelled(pairs, keep_empty=True)
    assert len(records) == COUNT - 1 == tally.counts["images"]
    assert {len(r.regions) for r in records} == {0, 1}
    assert tally.counts["no_phrase"] == 6


@pytest.mark.parametrize("where", ["teacher", "decoding thread"])
def test_a_killing_pair_is_found_by_its_notes_and_left_out(pairs: ShardSet, where: str) -> None:
    """The dialogue of worker and driver, with an exception in place of the death."""
    poison, kills, task = 30, 0, ShardTask(number=0)
    usual = labelled(pairs)[0]
    deadly = next(r for r in usual if r.key == f"key{poison:04d}")
    if where == "teacher":
        teacher = Teacher(die_on=deadly.caption)
    else:
        teacher = Teacher(die_of_shade=float(decode_image(deadly.image)[0].float().mean()))
    while True:
        notes, tally = list[InHand](), Tally()
        labeller = labeller_of(pairs, teacher, notes)
        try:
            records = list(labeller.records(task, tally))
            break
        except SystemExit:
            kills += 1
            first, last = notes[-1].first, notes[-1].last
            assert first <= poison < last
            assert notes[-1].alone == (last - first == 1) == (kills == 2)
            again = after_kill(task, kills, notes[-1])
            assert again is not None
            task = again
    assert kills == 2 and task.skip == (poison,)
    assert records == [r for r in usual if r.key != f"key{poison:04d}"]
    assert tally.counts[KILLED] == 1
    assert tally.bad[-1] == (f"key{poison:04d}", KILLED, "two workers died on it")


def test_deaths_that_no_pair_explains_end_the_shard() -> None:
    task: ShardTask | None = ShardTask(number=4)
    for kills in range(1, 4):
        assert task is not None
        task = after_kill(task, kills, InHand(shard=4, last=8 * kills))
        assert task == ShardTask(number=4, suspects=(0, 8 * kills))
    assert task is not None and after_kill(task, 4, InHand(shard=4, last=32)) is None
    assert after_kill(task, 4, None) is None
    # each pair that is found to be the cause accounts for one
    alone = InHand(shard=4, first=7, last=8, alone=True)
    assert after_kill(replace(task, skip=(3, 5)), 5, alone) == ShardTask(
        number=4, skip=(3, 5, 7), suspects=(8, 24)
    )
    # a note that says nothing of this shard
    assert after_kill(task, 3, replace(alone, shard=3)) == task


def test_the_notes_of_a_second_shard_begin_at_its_start(pairs: ShardSet) -> None:
    """Whoever dies of the first pairs of a longer shard must have noted them."""
    notes: list[InHand] = []
    labeller = labeller_of(pairs, Teacher(), notes)
    for _ in range(2):
        notes.clear()
        list(labeller.records(ShardTask(number=0), Tally()))
        assert notes[0] == InHand(shard=0, last=8)
        assert all(note.first < note.last for note in notes)


def test_notes_say_what_the_finished_windows_came_to(pairs: ShardSet) -> None:
    _, tally, _, notes = labelled(pairs)
    made = [(note.pairs, note.images, note.boxes) for note in notes]
    assert made == sorted(made) and {pairs for pairs, _, _ in made} == set(range(0, COUNT, 8))
    whole = tuple(tally.counts[name] for name in ("pairs", "images", "boxes"))
    assert (0, 0, 0) == made[0] < made[-1] < whole


def captions(pairs: ShardSet, *numbers: int) -> tuple[str, ...]:
    raws = shards.read_raw(pairs, 0, 0, COUNT)
    return tuple(shards.parse_record(raws[number]).caption for number in numbers)


def test_a_pair_that_the_teacher_fails_on_is_left_out_alone(pairs: ShardSet) -> None:
    usual = labelled(pairs)[0]
    records, tally, _, _ = labelled(pairs, Teacher(fail_on=captions(pairs, 30, 33)))
    assert records == [r for r in usual if r.key not in ("key0030", "key0033")]
    failed = [(key, detail) for key, reason, detail in tally.bad if reason == FAILED]
    assert failed == [("key0030", "RuntimeError: out of memory"), ("key0033", failed[0][1])]
    assert tally.counts[FAILED] == 2 and tally.counts["pairs"] == COUNT
    # where it is tried because somebody died, too
    task = ShardTask(number=0, suspects=(24, 40))
    assert labelled(pairs, Teacher(fail_on=captions(pairs, 30, 33)), task)[0] == records


def test_an_image_that_the_teacher_cannot_prepare_is_left_out_alone(pairs: ShardSet) -> None:
    class Picky(Teacher):
        def prepare(self, image_3HW: Tensor) -> Picture:
            if 60 < image_3HW[0, 0, 0] < 64:
                raise ValueError("no such size")
            return super().prepare(image_3HW)

    usual = labelled(pairs)[0]
    records, tally, _, _ = labelled(pairs, Picky())
    failed = {key for key, reason, _ in tally.bad if reason == FAILED}
    assert 0 < len(failed) < 4 and ("ValueError: no such size") in tally.bad[-1]
    assert records == [r for r in usual if r.key not in failed]


@pytest.mark.parametrize("error", [DataError("no teacher here"), StoreError("the store is away")])
def test_errors_that_are_no_fault_of_a_pair_end_the_shard(
    pairs: ShardSet, error: Exception
) -> None:
    teacher = Teacher(fail_on=captions(pairs, 30), error=error)
    with pytest.raises(type(error), match=str(error)):
        labelled(pairs, teacher)
    assert len(teacher.asked) == 4  # once, as part of the fourth window


def test_a_broken_device_ends_the_worker(pairs: ShardSet) -> None:
    error = torch.AcceleratorError("CUDA error: device-side assert triggered")
    with pytest.raises(SystemExit, match="device-side assert"):
        labelled(pairs, Teacher(fail_on=captions(pairs, 30), error=error))


@pytest.mark.parametrize(
    ("failing", "told"), [(range(COUNT), "7 of 7 pairs"), (range(14, 40), "9 of ")]
)
def test_a_teacher_that_fails_too_often_ends_the_shard(
    pairs: ShardSet, failing: range, told: str
) -> None:
    with pytest.raises(DataError, match=rf"shard 0: the teacher failed on {told}.*out of memory"):
        labelled(pairs, Teacher(fail_on=captions(pairs, *(n for n in failing if n != 11))))


def test_windows_are_read_while_the_teacher_works(pairs: ShardSet) -> None:
    """The second window is decoded before the first has left the teacher."""
    seen = threading.Event()

    class Slow(Teacher):
        def prepare(self, image_3HW: Tensor) -> Picture:
            if self.asked:
                seen.set()
            return super().prepare(image_3HW)

        def ground(self, *arguments: object, **named: object) -> list[Detection]:
            found = super().ground(*arguments, **named)  # type: ignore[arg-type]
            assert seen.wait(20) or len(self.asked) > 1
            return found

    labeller = ShardLabeller(pairs, Slow(), load_parser(PhraseConfig()), SETTINGS, STAMP)  # type: ignore[arg-type]
    assert len(list(labeller.records(ShardTask(number=0), Tally()))) > 10


def test_boxes_that_are_no_numbers_are_counted(pairs: ShardSet) -> None:
    class Broken(Teacher):
        def ground(self, *arguments: object, **named: object) -> list[Detection]:
            found = super().ground(*arguments, **named)  # type: ignore[arg-type]
            found[0].boxes_K4[0, 1] = torch.nan
            return found

    records, tally, teacher, _ = labelled(pairs, Broken())
    assert tally.counts["box_not_finite"] == len(teacher.asked) > 0
    assert len(records) < len(labelled(pairs)[0])
