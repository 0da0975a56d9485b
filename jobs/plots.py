"""Geometry of the small plots; `pieces.html` draws them as SVG, rankings as a list with bars.

Drawn here rather than by a plotting library, so that they take the page's fonts and colours (dark
mode included) and stay readable on a phone: each is about as wide as one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

WIDTH, HEIGHT = 360, 210
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 10, 36
"""Margins of the drawing area, for tick labels."""
BINS = 80
"""A series with more points is averaged over this many equal parts of the common x axis."""
FEW = 12
"""A series of so few points gets a dot at each."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line; points are (x, y), x ascending."""

    name: str
    points: Sequence[tuple[float, float]]
    style: str = "accent"
    """A class of page.css: teacher, student, control, accent, second."""


@dataclass(frozen=True, kw_only=True)
class Tick:
    """A grid line and its label."""

    at: float
    text: str


@dataclass(frozen=True, kw_only=True)
class Line:
    """A series in plot coordinates."""

    name: str
    style: str
    points: str
    """SVG `points`."""
    dots: tuple[tuple[float, float], ...]
    """Single points worth a dot: of short series all."""


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A bar of a histogram in plot coordinates."""

    x: float
    y: float
    width: float
    height: float
    title: str


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A drawing, ready for its template."""

    title: str
    summary: str
    """The plot in words, for screen readers."""
    x_label: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    lines: tuple[Line, ...] = ()
    bars: tuple[Bar, ...] = ()
    marker: Tick | None = None
    """A vertical line with a label."""
    width: int = WIDTH
    height: int = HEIGHT
    area: tuple[int, int, int, int] = field(
        default=(LEFT, TOP, WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM)
    )
    """x, y, width, height of the drawing area."""


def line_plot(
    title: str,
    series: Sequence[Series],
    x_label: str,
    y_range: tuple[float, float] | None = None,
    marker: tuple[float, str] | None = None,
) -> Plot | None:
    """Lines over a common grid; None if no series holds two numbers to join.

    Without `y_range` the axis starts at 0 and cuts off the peaks of the first steps of a training
    run (the highest 2 % of the points).
    """
    x_last = max((x for s in series for x, _ in s.points), default=0.0)
    smooth = {s.name: _binned(s.points, x_last / BINS) for s in series}
    everything = np.concatenate([xy for xy in smooth.values() if len(xy)] or [np.zeros((0, 2))])
    if not len(everything):
        return None
    x_low, x_high = float(everything[:, 0].min()), float(everything[:, 0].max())
    if 0 < x_low < 0.25 * x_high:  # steps are read from 0
        x_low = 0.0
    y_low, y_high = y_range or (0.0, float(np.quantile(everything[:, 1], 0.98)) * 1.08)
    if y_range is None and everything[:, 1].min() < 0:
        y_low = float(everything[:, 1].min())
    x_axis = _Axis(x_low, max(x_high, x_low + 1e-9), LEFT, WIDTH - RIGHT)
    y_axis = _Axis(y_low, max(y_high, y_low + 1e-9), HEIGHT - BOTTOM, TOP)
    lines = tuple(_line(s, smooth[s.name], x_axis, y_axis) for s in series if len(smooth[s.name]))
    ends = ", ".join(f"{s.name} ends at {smooth[s.name][-1, 1]:.3g}" for s in series
                     if len(smooth[s.name]))  # fmt: skip
    return Plot(
        title=title,
        summary=f"{title} over {x_label}: {ends}",
        x_label=x_label,
        x_ticks=x_axis.ticks(4),
        y_ticks=y_axis.ticks(4),
        lines=lines,
        marker=Tick(at=x_axis.place(marker[0]), text=marker[1]) if marker else None,
    )


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """Names with their counts, the highest first."""

    title: str
    rows: tuple[tuple[str, float, str], ...]
    """Name, length of its bar in percent, count as text."""
    note: str = ""


def ranking(title: str, counted: Sequence[tuple[str, int]], note: str = "") -> Ranking | None:
    """Bars beside names; `counted` has the highest first. None without any."""
    if not counted:
        return None
    most = counted[0][1]
    rows = tuple((name, round(100 * count / most, 1), f"{count:,}") for name, count in counted)
    return Ranking(title=title, rows=rows, note=note)


def histogram(
    title: str, counts: Sequence[int], x_label: str, edges: Sequence[float], middle: float
) -> Plot | None:
    """Bars of `counts` between ascending `edges`; `middle` is the median. None without counts."""
    if not sum(counts):
        return None
    x_axis = _Axis(edges[0], edges[-1], LEFT, WIDTH - RIGHT)
    y_axis = _Axis(0, max(max(counts) * 1.08, 2), HEIGHT - BOTTOM, TOP)
    bars = []
    for count, low, high in zip(counts, edges, edges[1:], strict=False):
        left, right, top = x_axis.place(low), x_axis.place(high), y_axis.place(count)
        width, height = round(max(right - left - 1.5, 1), 1), round(HEIGHT - BOTTOM - top, 1)
        bars.append(
            Bar(x=left, y=top, width=width, height=height, title=f"{low:g}–{high:g}: {count}")
        )
    return Plot(
        title=title,
        summary=f"{title}: {sum(counts)} values, median {middle:.3g}",
        x_label=x_label,
        x_ticks=x_axis.ticks(5),
        y_ticks=y_axis.ticks(3, whole=True),
        bars=tuple(bars),
    )


@dataclass(frozen=True)
class _Axis:
    """Numbers low..high laid out between two plot coordinates."""

    low: float
    high: float
    start: float
    end: float

    def place(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + float(share) * (self.end - self.start), 1)

    def ticks(self, wanted: int, whole: bool = False) -> tuple[Tick, ...]:
        """About `wanted` round numbers inside the axis; `whole` for counts."""
        rough = (self.high - self.low) / wanted
        scale = 10.0 ** math.floor(math.log10(rough))
        step = next(scale * m for m in (1, 2, 2.5, 5, 10) if scale * m >= rough * 0.999)
        step = max(1.0, float(math.ceil(step))) if whole else step
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return tuple(
            Tick(at=self.place(k * step), text=_number(k * step)) for k in range(first, last + 1)
        )


def _line(series: Series, points_N2: np.ndarray, x_axis: _Axis, y_axis: _Axis) -> Line:
    placed = [(x_axis.place(x), y_axis.place(y)) for x, y in points_N2]
    return Line(
        name=series.name,
        style=series.style,
        points=" ".join(f"{x},{y}" for x, y in placed),
        dots=tuple(placed) if len(placed) <= FEW else (),
    )


def _binned(points: Sequence[tuple[float, float]], width: float) -> np.ndarray:
    """(N, 2): means over stretches of x of this width; non-finite points are left out."""
    points_N2 = np.asarray(points, dtype=np.float64).reshape(-1, 2)
    points_N2 = points_N2[np.isfinite(points_N2).all(1)]
    if len(points_N2) <= BINS or width <= 0:
        return points_N2
    bin_N = (points_N2[:, 0] // width).astype(np.int64)
    starts = np.flatnonzero(np.diff(bin_N, prepend=bin_N[0] - 1))
    sums = np.add.reduceat(points_N2, starts, axis=0)
    return sums / np.diff(starts, append=len(points_N2))[:, None]


def _number(value: float) -> str:
    """Short: 2000 is 2k."""
    if abs(value) >= 1000 and value % 100 == 0:
        return f"{value / 1000:g}k"
    return f"{value:.6g}"
