"""What a model did well and badly on one set of a suite, in pictures of the report.

One function a task chooses them, among the first images of the set. They are there as long as the
predictions and the set's shards are.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from glipv2.eval.captions import cider_of_images
from glipv2.eval.detection import box_iou
from glipv2.eval.grounding import MIN_IOU, phrases_of
from glipv2.eval.segmentation import merged_mask, referring_segmentation
from glipv2.eval.vqa import answer_worth
from glipv2.jobs.card_text import answers_text, plain_text
from glipv2.jobs.evaluate_predict import (
    as_boxes,
    prediction_files,
    read_prediction_file,
    read_records,
)
from glipv2.jobs.mask_overlay import mask_overlay
from glipv2.jobs.mistakes import Found, Missed, Outcome, outcomes, worst_false, worst_missed
from glipv2.jobs.page import LONG_SIDE, Mark, palette_color
from glipv2.jobs.report_pictures import (
    TRUE,
    WRONG,
    Mistake,
    false_box,
    missed_object,
    picture_of,
    symbol_mark,
    well_found,
)
from glipv2.pipeline import storage
from glipv2.pipeline.errors import BadSample, DataError
from glipv2.pipeline.records import Record
from glipv2.pipeline.shard_format import ShardSet
from glipv2.pipeline.shard_reader import open_shard_set

IMAGES = 500
"""The first ones of a set, among which pictures are chosen."""
PICTURES = 6
"""Of each kind; the sets of a suite share them."""
Seen = list[tuple[Record, Any]]
"""Records and what was predicted of each."""


@dataclass(frozen=True, kw_only=True)
class SuitePictures:
    """Pictures of what was done well and badly."""

    note: str
    """Among what they were chosen, and what they show."""
    groups: tuple[tuple[str, tuple[Mistake, ...]], ...]
    """Title and pictures of each kind."""


def suite_pictures(result: Mapping[str, Any], name: str, run_dir: str) -> SuitePictures | None:
    """Of one set of a result; None where predictions or shards are gone or damaged."""
    own, settings = result["sets"][name], result.get("settings", {})
    if "asked" not in own:
        return None
    with suppress(BadSample, DataError, storage.MissingFileError):
        data = open_shard_set(own["url"])
        files = prediction_files(
            storage.join(run_dir, "eval"), result["checkpoint"]["digest"], data, own["asked"],
            settings["limit"],
        )  # fmt: skip
        seen = list(_seen(data, files))
        count = max(1, PICTURES // len(result["sets"]))
        found = _CHOOSE[result["task"]](seen, data.categories, settings, count)
        note = f"Chosen among the first {len(seen):,} images{found.note}."
        return replace(found, note=note)
    return None


def _seen(data: ShardSet, files: Iterator[tuple[int, int, str]]) -> Iterator[tuple[Record, Any]]:
    left = IMAGES
    for shard, images, url in files:
        if left <= 0:
            break
        _, predicted = read_prediction_file(url)
        for record in read_records(data, shard, 0, min(left, images)):
            yield record, predicted[record.key]
        left -= images


def _of_boxes(
    seen: Seen, categories: Sequence[str], settings: Mapping[str, Any], count: int
) -> SuitePictures:
    """detection, lvis: objects with a category."""
    entries = [_entry(record, found, categories) for record, found in seen]
    threshold, by_key = outcomes(entries)
    groups = _groups(seen, by_key, "object", lambda o: o.f1, lambda o: len(o.truth), count)
    return SuitePictures(note=f", boxes scored {threshold:.2f} or more", groups=groups)


def _entry(record: Record, found: dict[str, Any], categories: Sequence[str]) -> dict[str, Any]:
    """Truth and predictions of an image as `mistakes` wants them."""
    truth = [
        {"box": list(region.box), "name": categories[region.category]}
        for region in record.regions
        if region.category is not None and not region.crowd
    ]
    plain = as_boxes(found)
    rows = zip(plain.boxes, plain.names, plain.scores, strict=True)
    predicted = [{"box": box, "name": name, "score": score} for box, name, score in rows]
    if "neg_categories" in record.provenance:
        predicted = _judged(record, predicted, truth, categories)
    return {"key": record.key, "truth": truth, "predicted": predicted}


def _judged(
    record: Record, predicted: list[dict[str, Any]], truth: list[dict[str, Any]],
    categories: Sequence[str],
) -> list[dict[str, Any]]:  # fmt: skip
    """LVIS: the detections that its rules judge in this image (`eval.lvis`)."""
    drawn: dict[str, list[Any]] = {}
    for true in truth:
        drawn.setdefault(true["name"], []).append(true["box"])
    absent, open_end = (
        {categories[place] for place in record.provenance[field]}
        for field in ("neg_categories", "not_exhaustive_categories")
    )

    def is_judged(name: str, box: Sequence[float]) -> bool:
        if name in open_end:
            return name in drawn and _overlap(box, drawn[name]) >= MIN_IOU
        return name in drawn or name in absent

    return [own for own in predicted if is_judged(own["name"], own["box"])]


def _of_phrases(
    seen: Seen, categories: Sequence[str], settings: Mapping[str, Any], count: int
) -> SuitePictures:
    """phrases, referring: the best box of each phrase."""
    by_key = {record.key: _grounded(record, found) for record, found in seen}
    groups = _groups(seen, by_key, "phrase", lambda o: o.right / _asked(o), _asked, count)
    return SuitePictures(note=", the best box of each phrase", groups=groups)


def _grounded(record: Record, found: dict[str, Any]) -> Outcome:
    boxes, lost = [], []
    phrases = phrases_of(record)
    for number, phrase in enumerate(phrases):
        own = [row for row, label in enumerate(found["labels"]) if label == number]
        if not own:
            lost.append(Missed(box=phrase.boxes[0], name=phrase.text, best_score=0.0))
            continue
        best = max(own, key=lambda row: found["scores"][row])
        overlap = _overlap(found["boxes"][best], phrase.boxes)
        boxes.append(
            Found(
                box=tuple(found["boxes"][best]),
                name=phrase.text,
                score=found["scores"][best],
                right=overlap >= MIN_IOU,
                why=f"its IoU with the truth is {overlap:.2f}",
            )
        )
    truth = tuple((box, phrase.text) for phrase in phrases for box in phrase.boxes)
    return Outcome(key=record.key, truth=truth, found=tuple(boxes), missed=tuple(lost))


def _asked(outcome: Outcome) -> int:
    return len(outcome.found) + len(outcome.missed)


def _groups(
    seen: Seen, by_key: dict[str, Outcome], what: str,
    share: Callable[[Outcome], float], total: Callable[[Outcome], int], count: int,
) -> tuple[tuple[str, tuple[Mistake, ...]], ...]:  # fmt: skip
    """Images with the greatest share right, surest mistakes, and what was missed most clearly."""
    records = {record.key: record for record, _ in seen}
    right = sorted(
        (outcome for outcome in by_key.values() if outcome.right),
        key=lambda o: (-share(o), -total(o), o.key),
    )
    return (
        (
            "Best found",
            tuple(well_found(picture_of(records[o.key]), o, total(o), what) for o in right[:count]),
        ),
        (
            "Wrong boxes it was surest of",
            tuple(
                false_box(picture_of(records[outcome.key]), outcome, found)
                for outcome, found in worst_false(by_key, count)
            ),
        ),
        (
            f"{what.capitalize()}s it came least near to",
            tuple(
                missed_object(picture_of(records[outcome.key]), outcome, missed)
                for outcome, missed in worst_missed(by_key, count)
            ),
        ),
    )


def _of_masks(
    seen: Seen, categories: Sequence[str], settings: Mapping[str, Any], count: int
) -> SuitePictures:
    """segmentation: the mask of a phrase beside the true ones."""
    masks = {r.key: merged_mask(as_boxes(e), r, settings["mask_score"]) for r, e in seen}
    ious = [referring_segmentation([r], {r.key: masks[r.key]}).mean_iou for r, _ in seen]

    def picture(row: int) -> Mistake:
        record = seen[row][0]
        marks = [_mask_mark(record, masks[record.key], "found", WRONG, "×")]
        marks += [_mask_mark(record, region.mask, "true", TRUE, "✓") for region in record.regions]
        shown = replace(picture_of(record), marks=tuple(mark for mark in marks if mark))
        text = f"“{plain_text(record.caption)}”: IoU {ious[row]:.2f}."
        return Mistake(key=record.key, picture=shown, text=text)

    groups = _ends(ious, ("Masks that fit best", "Masks that fit worst"), picture, count)
    return SuitePictures(note=": ✓ the true masks, × what was found", groups=groups)


def _mask_mark(record: Record, mask: Any, name: str, number: int, tag: str) -> Mark | None:
    """None for a mask without a pixel."""
    overlay = mask_overlay(record, dict(mask), palette_color(number), LONG_SIDE)
    if overlay is None:
        return None
    right, bottom = overlay.x + overlay.width, overlay.y + overlay.height
    return replace(
        symbol_mark((overlay.x, overlay.y, right, bottom), name, number, tag), mask=overlay
    )


def _of_answers(
    seen: Seen, categories: Sequence[str], settings: Mapping[str, Any], count: int
) -> SuitePictures:
    """vqa: of each image its first question that people answered."""
    asked = [
        (record, question, answers[question.id])
        for record, answers in seen
        for question in [q for q in record.questions if q.answers][:1]
    ]
    worth = [answer_worth(said, question.answers) for _, question, said in asked]

    def picture(row: int) -> Mistake:
        record, question, said = asked[row]
        text = f"{question.text} “{said}” ({worth[row]:.2f}). People: "
        text = plain_text(text + answers_text(question.answers))
        return Mistake(key=record.key, picture=picture_of(record), text=text)

    groups = _ends(worth, ("Right answers", "Wrong answers"), picture, count)
    return SuitePictures(note=", the first question of each", groups=groups)


def _of_captions(
    seen: Seen, categories: Sequence[str], settings: Mapping[str, Any], count: int
) -> SuitePictures:
    """captioning: by CIDEr-D."""
    cider = cider_of_images([record for record, _ in seen], {r.key: said for r, said in seen})

    def picture(row: int) -> Mistake:
        record, said = seen[row]
        people = "” “".join(record.captions or (record.caption,))
        text = plain_text(f"“{said}” ({cider[row]:.2f}). People: “{people}”")
        return Mistake(key=record.key, picture=picture_of(record), text=text)

    titles = "Closest to what people said", "Farthest from what people said"
    return SuitePictures(note=", CIDEr-D among these", groups=_ends(cider, titles, picture, count))


def _ends(
    values: Sequence[float], titles: tuple[str, str], picture: Callable[[int], Mistake], count: int
) -> tuple[tuple[str, tuple[Mistake, ...]], ...]:
    """The highest values and the lowest; what scored 0 is never good, and what is as good as the
    best never bad."""
    order = sorted(range(len(values)), key=lambda row: (-values[row], row))
    good = [row for row in order if values[row] > 0][:count]
    rest = [row for row in order if row not in good]
    bad = [row for row in rest[::-1] if values[row] == 0 or values[row] < max(values)][:count]
    return (titles[0], tuple(map(picture, good))), (titles[1], tuple(map(picture, bad)))


def _overlap(box: Sequence[float], others: Sequence[Sequence[float]]) -> float:
    return float(box_iou([box], others).max())


_CHOOSE = {
    "detection": _of_boxes, "lvis": _of_boxes, "phrases": _of_phrases, "referring": _of_phrases,
    "segmentation": _of_masks, "vqa": _of_answers, "captioning": _of_captions,
}  # fmt: skip
