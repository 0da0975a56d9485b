"""A check by hand: boxes by lot as a CSV, and what the CSV says once people filled it in."""

import argparse
import csv
import io
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from glipv2.jobs.card_text import plain_text
from glipv2.pipeline import storage
from glipv2.pipeline.errors import ConfigError, DataError
from glipv2.pipeline.records import Record, Region

COLUMNS = ("number", "key", "phrase", "x0", "y0", "x1", "y1", "score", "caption", "right")
"""The last is for people: 1 if the box shows what the phrase names, else 0."""
VERDICTS = {"1": True, "yes": True, "y": True, "0": False, "no": False, "n": False, "": None}
"""What may stand there, whatever its case; None is not checked."""
FORMULA = ("=", "+", "-", "@", "＝", "＋", "－", "＠")  # noqa: RUF001 (as wide as East Asian letters)
"""A cell that begins so would be run by a spreadsheet."""
MAX_TEXT = 1000
Z95 = 1.959964
"""95 % of a normal distribution lie within so many standard deviations."""
MAX_LISTED = 10


ABOUT = """\
How many of a labelled set's boxes are right, from a check by hand. `glipv2 view --csv` draws boxes
by lot and shows each on a page, numbered; you write 1, yes or y for right, 0, no or n for wrong
into the file's last column, in any spreadsheet, and leave empty what you can't tell. This then
prints the precision of the labels with its 95 % interval, of all and by score: where it falls,
label.score_threshold should lie. 200 boxes tell it to within 7 %, 50 to within 14 %."""
EXAMPLE = """\
example:
  glipv2 view data/web --out check.html --csv check.csv --count 200
  glipv2 label audit check.csv"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Turn the parser of `glipv2 label` into that of `glipv2 label audit`."""
    parser.usage, parser.description, parser.epilog = "%(prog)s audit FILE", ABOUT, EXAMPLE
    parser.add_argument("recipe", metavar="audit", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="FILE", help="the CSV that you filled in")


@dataclass
class Checked:
    """Boxes that were judged, and how many are right."""

    number: int = 0
    right: int = 0

    @property
    def precision(self) -> float:
        return self.right / self.number

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the precision."""
        n, share = self.number, self.precision
        middle, scale = share + Z95**2 / (2 * n), 1 + Z95**2 / n
        spread = Z95 * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n**2))
        return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


@dataclass
class Audit:
    """What a filled-in file says."""

    total: Checked = field(default_factory=Checked)
    tenths: dict[int, Checked] = field(default_factory=dict)
    """By score: 7 is 0.7 to 0.8, 10 is 1, as given."""
    unchecked: int = 0

    def add(self, score: float, verdict: bool | None) -> None:
        if verdict is None:
            self.unchecked += 1
            return
        for checked in (self.total, self.tenths.setdefault(int(score * 10), Checked())):
            checked.number += 1
            checked.right += verdict


def write_boxes(url: str, boxes: Iterable[tuple[int, Record, Region, str]]) -> None:
    """(number on the page, record, its region, the region's name) as a CSV for any spreadsheet."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    for number, record, region, name in boxes:
        corners = (round(side, 2) for side in region.box)
        words = (_cell(record.key), _cell(name))
        writer.writerow(
            (number, *words, *corners, round(region.score, 4), _cell(record.caption), "")
        )
    storage.write_bytes(url, text.getvalue().encode("utf-8-sig"))  # Excel needs the mark


def _cell(text: str) -> str:
    """Text on one line that no spreadsheet takes for a formula."""
    line = " ".join(plain_text(text[:MAX_TEXT]).split())
    return f"'{line}" if line.startswith(FORMULA) else line


def print_audit(files: Sequence[str]) -> int:
    """`glipv2 label audit FILE`."""
    if len(files) != 1:
        raise ConfigError("give one checked file: glipv2 label audit FILE.csv")
    print("\n".join(_lines(read_audit(files[0]))))  # noqa: T201 - the answer of the command
    return 0


def read_audit(url: str) -> Audit:
    """The verdicts of a file of `write_boxes`, however a spreadsheet has stored it since.

    DataError, with the lines, for anything else in it, and when nothing was checked.
    """
    cure = "give a file that glipv2 view --csv wrote"
    text = storage.read_bytes(url).decode("utf-8-sig", errors="replace")
    head = text.partition("\n")[0]
    reader = csv.DictReader(
        io.StringIO(text, newline=""), delimiter=max(",;\t", key=head.count), restval=""
    )
    audit, wrong = Audit(), list[str]()
    try:
        missing = [name for name in ("score", "right") if name not in (reader.fieldnames or ())]
        if missing:
            raise DataError(f"{url}, line 1: no column {' or '.join(missing)}; {cure}")
        for row in reader:
            if not any(row.values()):  # spreadsheets may end a table so
                continue
            try:
                audit.add(_score(row["score"]), _verdict(row["right"]))
            except ValueError as error:
                wrong.append(f"line {reader.line_num}: {error}")
    except csv.Error as error:
        line = reader.reader.line_num  # DictReader's own is that of its last good row
        raise DataError(f"{url}, line {line}: {error}; {cure}") from error
    if wrong:
        more = f"\n  and {len(wrong) - MAX_LISTED} more" if len(wrong) > MAX_LISTED else ""
        raise DataError(f"{url}:\n  " + "\n  ".join(wrong[:MAX_LISTED]) + more)
    if not audit.total.number:
        raise DataError(f"{url}: nothing is checked yet; write 1 or 0 into its column right")
    return audit


def _score(text: str) -> float:
    try:
        score = float(text.replace(",", "."))  # as some countries write it
    except ValueError:
        score = math.nan
    if not 0 <= score <= 1:
        raise ValueError(f"score is {plain_text(text[:40])!r}, not a number from 0 to 1")
    return score


def _verdict(text: str) -> bool | None:
    said = text.strip().lower()
    if said not in VERDICTS:
        raise ValueError(f"right is {plain_text(text[:40])!r}, not 1, 0, yes, no, y, n or empty")
    return VERDICTS[said]


def _lines(audit: Audit) -> Iterator[str]:
    total = audit.total
    yield f"checked    {total.number:,} of {total.number + audit.unchecked:,} boxes"
    yield f"precision  {total.precision:.3f}, 95 % interval {_range(total)}"
    yield ""
    yield f"{'score':12}{'checked':>9}{'right':>9}{'precision':>11}   95 % interval"
    for tenth, part in sorted(audit.tenths.items(), reverse=True):
        band = "1 (given)" if tenth == 10 else f"{tenth / 10:.1f} to {(tenth + 1) / 10:.1f}"
        yield (
            f"{band:12}{part.number:>9,}{part.right:>9,}{part.precision:>11.3f}   {_range(part)}"
        )


def _range(checked: Checked) -> str:
    low, high = checked.interval
    return f"{low:.3f} to {high:.3f}"
