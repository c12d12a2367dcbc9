"""diagrams.py: forest plot, dots and histogram by their coordinates."""
import math
import re
from xml.etree import ElementTree

import diagrams
import pytest

import report


def test_diagrams_put_values_where_they_belong():
    looks = report.looks(["a", "b"])
    frame = diagrams.Frame([0, 10], [0, 1], "x", "y")
    assert frame.across(5) == (frame.left + frame.right) / 2
    assert frame.up(0.5) == (frame.top + frame.bottom) / 2
    dots = ElementTree.fromstring(
        diagrams.dots({"a": [(0, 0), (10, 1), (5, math.nan)], "b": [(5, 0.5)]}, looks, "x", "y")
    )
    paths = [path.get("d") for path in dots.iter("path")]
    assert paths[0] == f"M{frame.across(0)} {frame.up(0)}h.01M{frame.across(10)} {frame.up(1)}h.01"
    assert paths[1] == f"M{frame.across(5)} {frame.up(.5)}h.01"
    rows = [
        diagrams.Interval("nft", "a", 0.5, 0.2, 0.8, True),
        diagrams.Interval("nft", "b", -0.5, -0.8, -0.2, False),
        diagrams.Interval("<&>", "a", math.nan, math.nan, math.nan, False, "all equal"),
    ]
    forest = ElementTree.fromstring(diagrams.forest(rows, looks, "rho"))
    lines = [line for line in forest.iter("line") if line.get("stroke-width") == "2"]
    left, right = ((float(line.get("x1")) + float(line.get("x2"))) / 2 for line in lines)
    zero = next(
        line
        for line in forest.iter("line")
        if line.get("class") == "axis" and line.get("x1") == line.get("x2")
    )
    assert abs(left + right - 2 * float(zero.get("x1"))) < 0.3 and left > right
    assert [group.get("fill") for group in forest.iter("g")] == [looks["a"].colour, "#fff"]
    assert "a: all equal" in [text.text for text in forest.iter("text")]
    drawn = ElementTree.fromstring(
        diagrams.histogram({"a": [0.1, 0.1, 0.2], "b": []}, {"a": 0.1, "b": math.nan}, looks, "",
                           "")
    )
    heights = [float(h) for h in re.findall(r"L[\d.]+ ([\d.]+)", next(drawn.iter("path")).get("d"))]
    bottom = max(heights)
    assert sorted(bottom - h for h in heights if h < bottom)[1] == pytest.approx(
        2 * sorted(bottom - h for h in heights if h < bottom)[0], abs=0.2
    )  # twice as high
    assert len([line for line in drawn.iter("line") if line.get("stroke-dasharray")]) == 1
