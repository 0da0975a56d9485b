"""The one record that flows from sources to the model: the grounded sample."""

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

Task = Literal["detection", "grounding", "pairs", "vqa", "captioning", "referring"]
TASKS: tuple[str, ...] = get_args(Task)

Box = tuple[float, float, float, float]
Span = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Region:
    """One box and the words that name it."""

    box: Box
    """x0, y0, x1, y1 in pixels of the stored image, EXIF orientation applied."""
    spans: tuple[Span, ...] = ()
    """[start, end) character offsets into the caption; empty for detection data."""
    phrase: str = ""
    """The words of the spans, or the category name."""
    category: int | None = None
    """Index into the shard set's category names; detection data only."""
    score: float = 1.0
    """1 for human labels, the teacher's confidence for pseudo labels."""
    mask: dict[str, Any] | None = None
    """COCO run-length encoding {"size": [h, w], "counts": str}."""
    crowd: bool = False
    """A group that names no single object: not trained on, and forgiven in evaluation."""
    area: float | None = None
    """In square pixels, as the source states it, where mask or box say something else: evaluation
    sorts objects by it into small, medium and large."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked of an image (task `vqa`)."""

    id: str
    text: str
    answers: tuple[str, ...] = ()
    """Those of several people, ten in VQAv2; empty where they are kept secret."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One image with its text and regions."""

    key: str
    """Unique in the shard set; letters, digits, `_` and `-` only (it names the tar members)."""
    image: bytes
    """JPEG, PNG or WebP as found."""
    image_format: Literal["jpg", "png", "webp"]
    width: int
    height: int
    """Of the stored image after EXIF orientation is applied."""
    task: Task
    caption: str = ""
    """As given; empty for detection data, whose prompt is built from category names."""
    captions: tuple[str, ...] = ()
    """All captions of the image (task `captioning`), `caption` being the first."""
    regions: tuple[Region, ...] = ()
    questions: tuple[Question, ...] = ()
    """Task `vqa`."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Source name, url, licence, teacher digest, label settings digest."""
