"""report.py: charts by their coordinates, pages by a parser and, if there is one, a browser."""
import base64
import io
import json
import math
import os
import re
import shutil
import subprocess
import time
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

import report

# ------------------------------------------------------------------------------------------ browser

def browse(path):
    """What headless Chromium sees of a page: requests, errors, the size of pictures and charts.

    It speaks the DevTools protocol over a pair of pipes: JSON messages that end with a zero byte.
    """
    chromium = next(filter(None, map(shutil.which,
                                     ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("needs chromium on PATH to open the page")
    to_read, to_write = os.pipe(), os.pipe()                # what Chromium reads, what it writes
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe",
               "--no-first-run", "--disable-background-networking", "--disable-dev-shm-usage",
               "--window-size=1200,900", "about:blank"]
    shell = ["bash", "-c", f'exec "$0" "$@" 3<&{to_read[0]} 4>&{to_write[1]}', *command]
    browser = subprocess.Popen(shell, pass_fds=(to_read[0], to_write[1]), stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    os.close(to_read[0]), os.close(to_write[1])
    stream = os.fdopen(to_write[0], "rb")
    events, buffer, number = [], b"", 0

    def ask(method, session=None, **params):
        nonlocal buffer, number
        number += 1
        message = {"id": number, "method": method, "params": params}
        message |= {"sessionId": session} if session else {}
        os.write(to_read[1], json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in buffer:
                part = os.read(stream.fileno(), 1 << 16)
                assert part, "the browser went away"
                buffer += part
            line, _, buffer = buffer.partition(b"\0")
            answer = json.loads(line)
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]
            events.append(answer)
    try:
        target = ask("Target.createTarget", url="about:blank")["targetId"]
        session = ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            ask(f"{domain}.enable", session)
        ask("Page.navigate", session, url=path.resolve().as_uri())
        for _ in range(200):
            if any(event["method"] == "Page.loadEventFired" for event in events):
                break
            time.sleep(0.05)
            ask("Runtime.evaluate", session, expression="1")
        script = """[...document.querySelectorAll('img, svg')].map(e => {
            const {width, height} = e.getBoundingClientRect();
            return [Math.min(width, e.naturalWidth ?? 1e9),
                    Math.min(height, e.naturalHeight ?? 1e9)]})"""
        boxes = ask("Runtime.evaluate", session, expression=script,
                    returnByValue=True)["result"]["value"]
        script = "document.documentElement.scrollWidth - innerWidth"
        wide = ask("Runtime.evaluate", session, expression=script,
                   returnByValue=True)["result"]["value"]
        ask("Browser.close")
    finally:
        os.close(to_read[1])
        stream.close()
        browser.wait(30)
    said = [(event["method"], event["params"]) for event in events]
    urls = [params["request"]["url"] for method,
            params in said if method == "Network.requestWillBeSent"]
    errors = [params for method, params in said if method == "Runtime.exceptionThrown"
              or method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning")]
    assert path.resolve().as_uri() in urls, "the page was not loaded"
    requests = [url for url in urls if not url.startswith("data:")
                and url != path.resolve().as_uri()]
    return dict(requests=requests, errors=errors, boxes=boxes, overflow=wide)


def sample():
    styles = report.page_styles(["top", "a", "b <&>"], reference="top")
    series = {"top": [(0.5, 1), (0.9, 1)], "a": [(0.5, 0.8), (0.9, 0.2)],
              "b <&>": [(0.5, math.nan)]}
    chart = report.line_chart(series, styles, "IoU", "AP")
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    return report.page("Title & more", "note", [report.report_section(
        "set", "its note", report.legend(styles),
        report.side_by_side({"curve": chart}),
        report.html_table(["model", "AP"], [["a", report.Cell("0.5", "0.4–0.6", True)],
                                            ["b <&>", "-"]]),
        report.picture_strip("best", [report.picture(pixels, "truth: 3 cells")]))], "made by <me>")


def test_page_in_a_browser(tmp_path):
    path = tmp_path / "page.html"
    path.write_text(sample(), encoding="utf-8")
    seen = browse(path)
    assert seen["requests"] == [] and seen["errors"] == [] and seen["overflow"] <= 0
    assert len(seen["boxes"]) == 3 + 1 + 1 and all(w > 10 and h > 5 for w, h in seen["boxes"])


# --------------------------------------------------------------------------------------------- page

@pytest.mark.smoke
def test_page_is_whole_and_holds_everything():
    """Every tag is closed, text is escaped, and nothing refers to another file."""
    class Tags(HTMLParser):
        def __init__(self):
            super().__init__()
            self.open, self.outside = [], []

        def handle_starttag(self, tag, attributes):
            self.outside += [v for k, v in attributes if k in ("src", "href")
                             and not v.startswith("data:")]
            if tag not in ("meta", "link", "img"):
                self.open.append(tag)

        def handle_endtag(self, tag):
            assert self.open.pop() == tag
    page, tags = sample(), Tags()
    tags.feed(page)
    assert tags.open == [] and tags.outside == []
    assert "<script" not in page and "default-src 'none'" in page and not re.search("https?:", page)
    assert "b &lt;&amp;&gt;" in page and "b <&>" not in page and "made by &lt;me&gt;" in page
    assert "<b>0.5</b><small>0.4–0.6</small>" in page


def test_picture_carries_its_pixels():
    """Up to 256 colours come back exactly."""
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(16) * 16, np.arange(8)[:, None] * 30
    html = report.picture(pixels, 'a "b"')
    png = base64.b64decode(re.search(r"base64,([^\"]+)\"", html)[1])
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png)).convert("RGB")), pixels)
    assert 'width="16" height="8"' in html and "a &quot;b&quot;" in html


# ------------------------------------------------------------------------------------------- charts

def parsed(svg):
    return ElementTree.fromstring(svg)


def lines(svg):
    """The corners of each line that belongs to a series."""
    return [[tuple(map(float, point.split(","))) for point in line.get("points").split()]
            for line in parsed(svg).iter("polyline") if line.get("class") is None]


@pytest.mark.smoke
def test_lines_have_their_points_where_the_axes_say():
    """y = 0 and 1 lie on grid lines, x in proportion, on a logarithmic axis in ratio."""
    points, styles = {"a": [(10, 0), (20, 1), (40, 0.5)]}, report.page_styles(["a"])
    svg = report.line_chart(points, styles, "x", "y", log=True)
    (a, b, c), = lines(svg)
    grid = [float(y) for path in parsed(svg).iter("path") if path.get("class") == "grid"
            for y in re.findall(r" ([\d.]+)H", path.get("d"))]
    assert a[1] == max(grid) and b[1] == min(grid) and c[1] == pytest.approx((a[1] + b[1]) / 2,
                                                                             abs=0.1)
    assert b[0] - a[0] == pytest.approx(c[0] - b[0], abs=0.11)
    (a, b, c), = lines(report.line_chart(points, styles, "x", "y"))
    assert c[0] - b[0] == pytest.approx(2 * (b[0] - a[0]), abs=0.2)
    labels = [text.text for text in parsed(svg).iter("text")]
    assert {"0", "1", "10", "20", "x", "y"} <= set(labels)


def test_lines_with_gaps_and_without_points():
    svg = report.line_chart({"a": [(1, 0.2), (2, 0.3), (3, math.nan), (4, 0.5), (5, 0.6)], "b": []},
                            report.page_styles(["a", "b"]), "x", "y")
    assert [len(line) for line in lines(svg)] == [2, 2] and "nan" not in svg.lower()
    assert len(list(parsed(svg).iter("title"))) == 4
    assert lines(report.line_chart({}, {}, "x", "y")) == []
    assert lines(report.line_chart({"a": [(3, 0.5)]}, report.page_styles(["a"]), "x", "y",
                                   log=True)) == []


def test_dots_and_the_line_through_their_means():
    frame, styles = report.Frame([0, 10], [0, 1], "x", "y"), report.page_styles(["a", "b"])
    assert frame.across(5) == (frame.left + frame.right) / 2
    assert frame.up(0.5) == (frame.top + frame.bottom) / 2
    svg = report.dot_chart({"a": [(0, 0), (10, 1), (5, math.nan)], "b": [(5, 0.5)]}, styles, "x",
                           "y")
    a, b = (path.get("d") for path in parsed(svg).iter("path") if path.get("stroke-linecap"))
    assert a == f"M{frame.across(0)} {frame.up(0)}h.01M{frame.across(10)} {frame.up(1)}h.01"
    assert b == f"M{frame.across(5)} {frame.up(.5)}h.01" and lines(svg) == []
    svg = report.dot_chart({"a": [(0, 0), (10, 1), (10, 0)]}, styles, "x", "y", means=True)
    assert lines(svg) == [[(frame.across(0), frame.up(0)), (frame.across(10), frame.up(0.5))]]


def test_intervals_of_a_forest():
    styles, nan = report.page_styles(["a", "b"]), math.nan
    svg = report.forest_chart([report.Interval("nft", "a", 0.5, 0.2, 0.8, True),
                               report.Interval("nft", "b", -0.5, -0.8, -0.2, False),
                               report.Interval("<&>", "a", nan, nan, nan, False, "all equal")],
                              styles,
                               "rho")
    left, right = (sum(x for x, _ in line) / 2 for line in lines(svg))
    zero = next(line for line in parsed(svg).iter("polyline") if line.get("class") == "axis")
    assert abs(left
               + right - 2 * float(zero.get("points").partition(",")[0])) < 0.3 and left > right
    assert [group.get("fill") for group in parsed(svg).iter("g")] == [styles["a"].colour, "#fff"]
    assert "a: all equal" in [text.text for text in parsed(svg).iter("text")]


def test_bars_of_a_histogram():
    """Two equal values stand twice as high as one; the marked value has its line, NaN none."""
    svg = report.histogram_chart({"a": [0.1, 0.1, 0.2], "b": []}, {"a": 0.1, "b": math.nan},
                                 report.page_styles(["a", "b"]), "", "")
    bars = next(path.get("d") for path in parsed(svg).iter("path") if path.get("fill-opacity"))
    tops = [float(y) for y in re.findall(r"L[\d.]+ ([\d.]+)", bars)]
    low, high = sorted(max(tops) - y for y in tops if y < max(tops))
    assert high == pytest.approx(2 * low, abs=0.2) and len(lines(svg)) == 1


def test_curves_in_a_file(tmp_path):
    """A chart for each series that has points; it needs no style from elsewhere."""
    report.write_curves(tmp_path / "c.svg", {"loss": [(0, 1.0), (10, 0.1)],
                                             "score": [(0, math.nan)],
                                             "none": []})
    text = (tmp_path / "c.svg").read_text()
    file = ElementTree.fromstring(text)
    namespace = "{http://www.w3.org/2000/svg}"
    assert (file.tag, file.get("width"), file.get("height")) == (f"{namespace}svg", "1040", "300")
    assert [len(list(chart.iter(f"{namespace}polyline")))
            for chart in file.iter(f"{namespace}svg")][1:] == [1, 0]
    assert "step; last 0.1" in text and set(re.findall(r"var\((--\w+)\)",
                                                       text)) <= set(re.findall(r"(--\w+):", text))


# ----------------------------------------------------------------------------------------- Markdown

@pytest.mark.smoke
def test_markdown_and_its_place(tmp_path):
    text = report.markdown(["a", "b"], [["x|y", "1"]])
    assert text == "| a | b |\n| --- | --: |\n| x\\|y | 1 |\n"
    path = tmp_path / "d.md"
    report.put_report_between(path, "t", text)                               # a new document
    assert path.read_text() == f"<!-- begin t -->\n{text}<!-- end t -->\n"
    path.write_text("head\n" + path.read_text() + "tail")
    report.put_report_between(path, "t", "new\n")
    assert path.read_text() == "head\n<!-- begin t -->\nnew\n<!-- end t -->\ntail"
    with pytest.raises(ValueError, match="d.md: expected the lines <!-- begin u -->"):
        report.put_report_between(path, "u", text)


# ---------------------------------------------------------------------------------------------- PNG

def read(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def test_matrices_shade_by_value(tmp_path):
    matrix = np.array([[1.0, 0.0], [-1.0, 0.5]])
    report.matrix_chart(tmp_path / "m.png", {"one": matrix, "two": matrix}, ["A", "B"], cell=40)
    pixels = read(tmp_path / "m.png")
    left, top = 24 + 7, 56
    corner = pixels[top + 3::40, left + 3::40][:2, :2]  # inside the cells, beside their numbers
    assert corner[0, 1].tolist() == [255] * 3                         # 0 is white, 1 blue, -1 red
    assert corner[0, 0, 2] > corner[0, 0, 0] and corner[1, 0, 0] > corner[1, 0, 2]
    assert (corner[1, 1] > corner[0, 0]).all() and not list(tmp_path.glob(".*"))
    half = pixels.shape[1] // 2
    np.testing.assert_array_equal(pixels[top:, :half], pixels[top:, half:])


def test_mosaic_puts_pictures_in_rows_and_columns(tmp_path):
    red, green = (np.full((5, 5, 3), colour, np.uint8) for colour in ((255, 0, 0), (0, 255, 0)))
    report.mosaic(tmp_path / "m.png", [[red, green], [green, red]], ["r", "s"], ["A", "B"], side=20)
    pixels = read(tmp_path / "m.png")
    at = pixels[24 + 10::26, 16 + 7 + 10::26][:2, :2]
    assert at.tolist() == [[[255, 0, 0], [0, 255, 0]], [[0, 255, 0], [255, 0, 0]]]
