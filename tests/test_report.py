"""report.py: charts by their coordinates, pages by a parser and, where one is installed, by a browser."""
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


# ------------------------------------------------------------------------------------------------ browser

def browse(path):
    """What a headless Chromium sees of a page: requests, errors, and the size of every picture and chart.

    Spoken to over a pair of pipes in the DevTools protocol: JSON messages that end with a zero byte.
    """
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
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
            return [Math.min(width, e.naturalWidth ?? 1e9), Math.min(height, e.naturalHeight ?? 1e9)]})"""
        boxes = ask("Runtime.evaluate", session, expression=script, returnByValue=True)["result"]["value"]
        wide = ask("Runtime.evaluate", session, returnByValue=True,
                   expression="document.documentElement.scrollWidth - innerWidth")["result"]["value"]
        ask("Browser.close")
    finally:
        os.close(to_read[1])
        stream.close()
        browser.wait(30)
    said = [(event["method"], event["params"]) for event in events]
    urls = [params["request"]["url"] for method, params in said if method == "Network.requestWillBeSent"]
    errors = [params for method, params in said if method == "Runtime.exceptionThrown"
              or method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning")]
    assert path.resolve().as_uri() in urls, "the page was not loaded"
    requests = [url for url in urls if not url.startswith("data:") and url != path.resolve().as_uri()]
    return dict(requests=requests, errors=errors, boxes=boxes, overflow=wide)


def sample():
    looks = report.looks(["top", "a", "b <&>"], reference="top")
    series = {"top": [(0.5, 1), (0.9, 1)], "a": [(0.5, 0.8), (0.9, 0.2)], "b <&>": [(0.5, math.nan)]}
    chart = report.chart(series, looks, "IoU", "AP")
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    return report.page("Title & more", "note", [report.section(
        "set", "its note", report.legend(looks), report.side_by_side(report.titled("curve", chart)),
        report.table(["model", "AP"], [["a", report.Cell("0.5", "0.4–0.6", True)], ["b <&>", "-"]]),
        report.strip("best", [report.picture(pixels, "truth: 3 cells")]))], "made by <me>")


def test_page_in_a_browser(tmp_path):
    path = tmp_path / "page.html"
    path.write_text(sample(), encoding="utf-8")
    seen = browse(path)
    assert seen["requests"] == [] and seen["errors"] == [] and seen["overflow"] <= 0
    assert len(seen["boxes"]) == 3 + 1 + 1 and all(w > 10 and h > 5 for w, h in seen["boxes"])


def test_browser_would_notice(tmp_path):
    """The test above can fail: a page that fetches and throws is caught doing so."""
    path = tmp_path / "bad.html"
    path.write_text('<img src="other.png"><svg width="0" height="0"></svg><script>nothing.there()</script>')
    seen = browse(path)
    assert [url.rpartition("/")[2] for url in seen["requests"]] == ["other.png"] and seen["errors"]
    assert [0, 0] in seen["boxes"]


# --------------------------------------------------------------------------------------------------- page

def test_page_is_whole_and_holds_everything():
    """Every tag is closed, text is escaped, and nothing refers to another file."""
    class Tags(HTMLParser):
        def __init__(self):
            super().__init__()
            self.open, self.outside = [], []

        def handle_starttag(self, tag, attributes):
            self.outside += [v for k, v in attributes if k in ("src", "href") and not v.startswith("data:")]
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


# -------------------------------------------------------------------------------------------------- charts

def parsed(svg):
    return ElementTree.fromstring(svg)


def lines(svg):
    return [[tuple(map(float, point.split(","))) for point in line.get("points").split()]
            for line in parsed(svg).iter("polyline")]


def test_chart_places_points_on_its_axes():
    """y = 0 and 1 lie on the grid lines called so, x in proportion, on a logarithmic axis in ratio."""
    looks = report.looks(["a"])
    svg = report.chart({"a": [(10, 0), (20, 1), (40, 0.5)]}, looks, "x", "y", log=True)
    (a, b, c), = lines(svg)
    grid = [float(line.get("y1")) for line in parsed(svg).iter("line") if line.get("class") == "grid"]
    assert a[1] == max(grid) and b[1] == min(grid) and c[1] == pytest.approx((a[1] + b[1]) / 2, abs=0.1)
    assert b[0] - a[0] == pytest.approx(c[0] - b[0], abs=0.11)
    (a, b, c), = lines(report.chart({"a": [(10, 0), (20, 1), (40, 0.5)]}, looks, "x", "y"))
    assert (c[0] - b[0]) == pytest.approx(2 * (b[0] - a[0]), abs=0.2)
    labels = [text.text for text in parsed(svg).iter("text")]
    assert {"0.0", "1.0", "10", "20", "x", "y"} <= set(labels)


def test_chart_with_gaps_and_without_points():
    svg = report.chart({"a": [(1, 0.2), (2, 0.3), (3, math.nan), (4, 0.5), (5, 0.6)], "b": []},
                       report.looks(["a", "b"]), "x", "y")
    assert [len(line) for line in lines(svg)] == [2, 2]
    assert len(list(parsed(svg).iter("title"))) == 4
    assert lines(report.chart({}, {}, "x", "y")) == []
    assert lines(report.chart({"a": [(3, 0.5)]}, report.looks(["a"]), "x", "y", log=True)) == []
    assert "nan" not in svg.lower()


def test_looks_differ():
    names = [f"m{i}" for i in range(8)]
    looks = report.looks(["top", *names], reference="top")
    assert len({looks[name] for name in names}) == 8 and not looks["top"].marker
    assert looks == report.looks(["top", *names], reference="top")


@pytest.mark.parametrize("low,high,expected", [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (3, 3, [3])])
def test_ticks(low, high, expected):
    assert report.ticks(low, high) == pytest.approx(expected)


def test_log_ticks():
    assert report.log_ticks(8, 120) == pytest.approx([10, 20, 30, 50, 100])
    assert report.log_ticks(0.15, 0.6) == pytest.approx([0.2, 0.3, 0.5])


# ------------------------------------------------------------------------------------------------- Markdown

def test_markdown_and_its_place(tmp_path):
    text = report.markdown(["a", "b"], [["x|y", "1"]])
    assert text == "| a | b |\n| --- | --: |\n| x\\|y | 1 |\n"
    path = tmp_path / "d.md"
    report.put_between(path, "t", text)                               # a new document
    assert path.read_text() == f"<!-- begin t -->\n{text}<!-- end t -->\n"
    path.write_text("head\n" + path.read_text() + "tail")
    report.put_between(path, "t", "new\n")
    assert path.read_text() == "head\n<!-- begin t -->\nnew\n<!-- end t -->\ntail"
    with pytest.raises(ValueError, match="d.md: expected the lines <!-- begin u -->"):
        report.put_between(path, "u", text)


# ------------------------------------------------------------------------------------------------------ PNG

def read(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def test_matrices_shade_by_value(tmp_path):
    matrix = np.array([[1.0, 0.0], [-1.0, 0.5]])
    report.matrices(tmp_path / "m.png", {"one": matrix, "two": matrix}, ["A", "B"], cell=40)
    pixels = read(tmp_path / "m.png")
    left, top = 24 + 7, 56
    corner = pixels[top + 3::40, left + 3::40][:2, :2]                # inside the cells, beside their numbers
    assert corner[0, 1].tolist() == [255] * 3                         # 0 is white, 1 blue, -1 red
    assert corner[0, 0, 2] > corner[0, 0, 0] and corner[1, 0, 0] > corner[1, 0, 2]
    assert (corner[1, 1] > corner[0, 0]).all() and not list(tmp_path.glob("*.tmp"))
    half = pixels.shape[1] // 2
    np.testing.assert_array_equal(pixels[top:, :half], pixels[top:, half:])


def test_mosaic_puts_pictures_in_rows_and_columns(tmp_path):
    red, green = (np.full((5, 5, 3), colour, np.uint8) for colour in ((255, 0, 0), (0, 255, 0)))
    report.mosaic(tmp_path / "m.png", [[red, green], [green, red]], ["r", "s"], ["A", "B"], side=20)
    pixels = read(tmp_path / "m.png")
    at = pixels[24 + 10::26, 16 + 7 + 10::26][:2, :2]
    assert at.tolist() == [[[255, 0, 0], [0, 255, 0]], [[0, 255, 0], [255, 0, 0]]]


def test_heat_rises():
    colours = report.heat(np.array([[0.0, 1.0, 2.0, 3.0]]))[0].astype(int)
    assert colours[0].tolist() == [0, 0, 0] and colours[3].tolist() == [255, 255, 255]
    assert (np.diff(colours.sum(1)) > 0).all()
    assert not report.heat(np.ones((2, 2))).any()


def test_curves(tmp_path):
    report.curves(tmp_path / "c.png", {"loss": [(0, 1.0), (10, 0.1)], "score": [(0, math.nan)], "none": []})
    pixels = read(tmp_path / "c.png")
    assert pixels.shape == (300, 1120, 3) and (pixels[:, :560] == report.LINE).all(2).any()
    assert not (pixels[:, 560:] == report.LINE).all(2).any()
