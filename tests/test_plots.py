"""Plots show the numbers they were given."""

import numpy as np
import pytest

from glipv2.jobs.plots import Series, histogram, line_plot, ranking


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


def test_the_bars_of_a_histogram_are_as_high_as_its_counts():
    plot = histogram("t", [2, 1, 4], "x", [-0.5, 0.5, 1.5, 2.5], 2)
    assert [bar.title.split(": ")[1] for bar in plot.bars] == ["2", "1", "4"]
    heights = [bar.height for bar in plot.bars]
    assert heights[2] == pytest.approx(4 * heights[1], abs=0.3)
    assert plot.summary == "t: 7 values, median 2"
    assert histogram("t", [0], "x", [0, 1], 0) is None


def test_the_bars_of_a_ranking_are_shares_of_the_highest_count():
    rank = ranking("t", [("a", 2000), ("b", 500)])
    assert rank.rows == (("a", 100.0, "2,000"), ("b", 25.0, "500"))
    assert ranking("t", []) is None
