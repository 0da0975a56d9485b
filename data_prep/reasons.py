"""Every reason for which a reader leaves something out, and what it means to the user.

Readers note into one `Dropped`; the closing table and dataset.json show the same codes.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

MAX_NOTES = 10_000
"""Places of one reason that are listed for a shard; what comes after them is only counted."""
MAX_WHERE = 300
Unit = Literal["sample", "box", "kept"]


class Reason(NamedTuple):
    unit: Unit
    """What was dropped: the whole sample or one box; "kept" was mended and is still there."""
    meaning: str


REASONS: dict[str, Reason] = {
    "annotation_unreadable": Reason("sample", "annotation is not valid XML or UTF-8, or is empty"),
    "image_repeated": Reason("sample", "image id occurs a second time in the annotations"),
    "image_missing": Reason("sample", "no image file where the annotation points"),
    "image_outside_folder": Reason("sample", "image path leads out of the image folder"),
    "image_wrong_extension": Reason("sample", "file name says another format than its bytes"),
    "image_format": Reason("sample", "neither JPEG, PNG nor WebP"),
    "image_too_large": Reason("sample", "more bytes, pixels or scans than are decoded"),
    "image_undecodable": Reason("sample", "truncated or damaged image"),
    "size_mismatch": Reason("sample", "annotation was made for another image size"),
    "boxes_too_many": Reason("sample", "more boxes than a record may hold"),
    "row_unreadable": Reason("sample", "row is not valid JSON, CSV or UTF-8, or lacks a field"),
    "caption_empty": Reason("sample", "no letters in the caption"),
    "caption_is_filename": Reason("sample", "caption only repeats the file's name"),
    "boxes_missing": Reason("sample", "caption without a usable box"),
    "entry_missing": Reason("sample", "points to an entry that the other file lacks"),
    "row_mismatch": Reason("sample", "image row and label row have different keys"),
    "text_missing": Reason("sample", "no caption beside the image"),
    "texts_too_many": Reason("sample", "more captions or questions than a record may hold"),
    "question_missing": Reason("sample", "image without a usable question"),
    "markup_unreadable": Reason("sample", "bracket of a phrase is broken or doesn't close"),
    "key_repeated": Reason("sample", "key or member occurs a second time in its tar"),
    "image_ambiguous": Reason("sample", "several images under one key"),
    "tar_damaged": Reason("sample", "tar can't be read from that byte on; earlier samples stay"),
    "image_small": Reason("sample", "shorter side below --min-side"),
    "image_narrow": Reason("sample", "sides differ more than --max-aspect allows"),
    "caption_short": Reason("sample", "fewer words than --min-words"),
    "caption_long": Reason("sample", "more words than --max-words"),
    "caption_language": Reason("sample", "caption in a language not among --languages"),
    "duplicate": Reason("sample", "image and text occurred before"),
    "duplicate_look": Reason("sample", "looks like an earlier image of another file"),
    "excluded": Reason("sample", "looks like an image of an --exclude set"),
    "box_unreadable": Reason("box", "box is missing or not four numbers"),
    "box_not_finite": Reason("box", "box holds NaN or infinity"),
    "box_inverted": Reason("box", "right of box lies left of its left, or bottom above top"),
    "box_empty": Reason("box", "box without area"),
    "box_outside": Reason("box", "box lies wholly outside the image"),
    "box_normalised": Reason("box", "box within the first pixel: shares of the image, not pixels"),
    "category_unknown": Reason("box", "category is missing or not in the list"),
    "category_rare": Reason("box", "category has fewer objects than asked for"),
    "phrase_empty": Reason("box", "no letters in the words that name the box"),
    "span_missing": Reason("box", "no words of the caption name the box"),
    "score_unreadable": Reason("box", "score is no number from 0 to 1"),
    "box_clipped": Reason("kept", "box reached over the edge and was clipped"),
    "mask_unreadable": Reason("kept", "mask is not valid and was left out; the box stays"),
    "caption_cut": Reason("kept", "caption was cut to the longest length kept"),
    "span_unusable": Reason("kept", "span lies outside its caption or holds no word"),
    "phrase_without_box": Reason("kept", "phrase without boxes: it stays in the caption only"),
    "caption_unreadable": Reason("kept", "one of several captions is no text and was left out"),
    "question_unreadable": Reason("kept", "question lacks its ids or text and was left out"),
    "question_repeated": Reason("kept", "question id occurs twice for its image; the first stays"),
    "answer_unreadable": Reason("kept", "answer is missing or no text and was left out"),
    "member_refused": Reason("kept", "tar member is a link, a device or leads out; never read"),
    "member_ignored": Reason("kept", "tar member is no image, text or JSON; never read"),
    "label_missing": Reason("kept", "image without a label file, kept as a negative"),
    "no_boxes": Reason("kept", "image without boxes, kept as a negative"),
}


class Note(NamedTuple):
    reason: str
    where: str
    """File or row."""
    like: str = ""
    """The image of another set that the sample looks like."""


class Dropped(Counter[str]):
    """How often each reason was met, and where; of bounded size, however much is noted."""

    def __init__(self, counts: Mapping[str, int] | None = None, notes: Iterable[Note] = ()) -> None:
        super().__init__(counts or {})
        self.notes = list(notes)
        """Of each reason the first MAX_NOTES."""

    def __reduce__(self) -> tuple[type["Dropped"], tuple[dict[str, int], list[Note]]]:
        return Dropped, (dict(self), self.notes)

    def note(self, reason: str, where: str, like: str = "") -> None:
        """Count one of REASONS; `where` names the file or row for the user."""
        if reason not in REASONS:
            raise KeyError(f"{reason} is not among REASONS")
        self[reason] += 1
        if self[reason] <= MAX_NOTES:
            self.notes.append(Note(reason, where[:MAX_WHERE], like[:MAX_WHERE]))

    def take(self) -> "Dropped":
        """All that was noted, which is forgotten here."""
        taken = Dropped(self, self.notes)
        self.clear()
        self.notes = []
        return taken

    @property
    def unlisted(self) -> Counter[str]:
        """How often each reason was met beyond what `notes` lists."""
        return Counter(self) - Counter(note.reason for note in self.notes)

    @property
    def first(self) -> dict[str, str]:
        """Where each reason was met first."""
        return {note.reason: note.where for note in reversed(self.notes)}
