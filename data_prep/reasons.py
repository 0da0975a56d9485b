"""Every reason for which a reader leaves something out, and what it means to the user.

Readers note into one `Dropped`; the closing table and dataset.json show the same codes.
"""

from collections import Counter
from typing import Literal, NamedTuple

Unit = Literal["sample", "box", "kept"]


class Reason(NamedTuple):
    unit: Unit
    """What was dropped: the whole sample or one box; "kept" was mended and is still there."""
    meaning: str


REASONS: dict[str, Reason] = {
    "annotation_unreadable": Reason("sample", "annotation is not valid XML or lacks its parts"),
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
    "box_unreadable": Reason("box", "box is missing or not four numbers"),
    "box_not_finite": Reason("box", "box holds NaN or infinity"),
    "box_inverted": Reason("box", "right of box lies left of its left, or bottom above top"),
    "box_empty": Reason("box", "box without area"),
    "box_outside": Reason("box", "box lies wholly outside the image"),
    "category_unknown": Reason("box", "category is missing or not in the list"),
    "crowd": Reason("box", "crowd region: no single object"),
    "box_clipped": Reason("kept", "box reached over the edge and was clipped"),
    "mask_unreadable": Reason("kept", "mask is not valid and was left out; the box stays"),
    "caption_cut": Reason("kept", "caption was cut to the longest length kept"),
    "no_boxes": Reason("kept", "image without boxes, kept as a negative"),
}


class Dropped(Counter[str]):
    """How often each reason was met, and where first."""

    def __init__(self) -> None:
        super().__init__()
        self.first: dict[str, str] = {}

    def note(self, reason: str, where: str) -> None:
        """Count one of REASONS; `where` names the file or row for the user."""
        if reason not in REASONS:
            raise KeyError(f"{reason} is not among REASONS")
        self[reason] += 1
        self.first.setdefault(reason, where)
