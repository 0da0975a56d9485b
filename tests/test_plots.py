"""Plots show the numbers they were given."""

import numpy as np
import pytest

from glipv2.jobs.plots import Series, histogram, line_plot


def test_a_line_passes_through_its_points():
    plot = line_plot("t", [Series(name="s", points=[(0, 0), (5, 0.5), (10, 1)])], "x", (0, 1))
    left, top, width, height = plot.area
    points = [tuple(map(float, p.split(","))) for p in plot.lines[0].points.split()]
    assert points == [
        (left, top + height), (left + width / 2, top + height / 2), (left + width, top)
    ]  # fmt: skip
    assert [tick.text for tick in plot.y_ticks] == ["0", "0.25", "0.5", "0.75", "1"]
    assert "s ends at 1" in plot.summary


def test_long_series_are_averaged_and_keep_their_mean_and_nan_is_left_out():
    values = np.random.default_rng(0).normal(5, 1, 1600)
    values[7] = np.nan
    plot = line_plot("t", [Series(name="s", points=list(enumerate(values)))], "x", (0, 10))
    _, top, _, height = plot.area
    ys = [float(p.split(",")[1]) for p in plot.lines[0].points.split()]
    assert len(ys) == 80 or len(ys) == 81
    drawn_mean = 10 * (1 - (np.mean(ys) - top) / height)
    assert drawn_mean == pytest.approx(np.nanmean(values), abs=0.03)
    assert line_plot("t", [Series(name="s", points=[])], "x") is None


def test_a_histogram_counts_every_value_once():
    plot = histogram("t", [0, 0, 1, 2, 2, 2, 9], "x", [-0.5, 0.5, 1.5, 2.5])
    assert [bar.title.split(": ")[1] for bar in plot.bars] == ["2", "1", "4"]  # 9 joins the end
    heights = [bar.height for bar in plot.bars]
    assert heights[2] == pytest.approx(4 * heights[1], abs=0.3)
    assert histogram("t", [], "x", [0, 1]) is None
