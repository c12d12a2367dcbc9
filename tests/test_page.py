"""The page: its server asked directly, and clicked through in a real browser.

The browser is Debian's chromium with selenium; without them those tests skip.
"""
import http.client
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import urllib.parse
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import test_images
import tifffile
from conftest import ROOT

import cells
import data
import edits
import images
import learning
import model
import page
import runs
import segment
import synthetic
import train_seg

WEIGHTS = str(ROOT / "final_models" / "demo_synthetic.pt")
HOSTILE = "<img src=x onerror=alert(1)>.tif"


def drawn(seed, size=(192, 256), count=14):
    field = synthetic.field(seed, size, count, diameter=28)
    return field.pixels[field.channels.index("ER")], field.labels


def wait_until(holds, seconds=60.0, what="it"):
    end = time.monotonic() + seconds
    while not (value := holds()):
        assert time.monotonic() < end, f"{what} did not happen within {seconds} s"
        time.sleep(0.05)
    return value


class Site:
    """A folder with its server, and a client of it."""

    def __init__(self, folder, **keys):
        keys = {"weights": WEIGHTS, "browser": False, "learn_steps": 4, **keys}
        self.folder = Path(folder)
        self.project = page.Project(self.folder, page.Config(**keys))
        self.out = self.project.out
        self.server = page.Server(self.project, 0)
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)

    def __enter__(self):
        self.project.__enter__()
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()
        self.project.__exit__()

    def ask(self, path, body=None, headers=None, token=None, method=None, **query):
        """Status and content."""
        connection = http.client.HTTPConnection("127.0.0.1", self.server.server_port, timeout=60)
        headers = {"X-Token": self.server.token if token is None else token, **(headers or {})}
        content = json.dumps(body).encode() if isinstance(body, dict) else body
        where = path + ("?" + urllib.parse.urlencode(query) if query else "")
        connection.request(method or ("GET" if body is None else "POST"), where, content,
                           {name: value for name, value in headers.items() if value is not None})
        answer = connection.getresponse()
        self.headers, content = answer.headers, answer.read()
        connection.close()
        if answer.headers.get("Content-Encoding") == "deflate":
            content = zlib.decompress(content)
        return answer.status, content

    def json(self, path, body=None, **query):
        status, content = self.ask(path, body, **query)
        assert status == 200, content
        return json.loads(content)

    def edit(self, image, what, revision=None, **more):
        if revision is None:
            revision = self.json("/image", image=image)["revision"]
        return self.json("/edit", {"image": image, "what": what, "revision": revision, **more})

    def find(self, *names):
        for name in names:
            self.json("/find", {"image": name})
        self.wait()

    def wait(self):
        wait_until(lambda: not self.project.queue and not self.project.working, 120, "the search")


@pytest.fixture
def folder(tmp_path):
    """Two drawn images, one below a folder, one with labels of others beside it."""
    for name, seed in (("a", 1), ("more/b", 2)):
        path = tmp_path / "images" / f"{name}.tif"
        path.parent.mkdir(exist_ok=True)
        pixels, labels = drawn(seed)
        tifffile.imwrite(path, pixels)
    images.write_labels(tmp_path / "images" / "more" / "b_masks.tif", labels)
    return tmp_path / "images"


@pytest.fixture
def site(folder):
    with Site(folder) as site:
        yield site


# -------------------------------------------------------------------------------------- the server

@pytest.mark.smoke
def test_only_this_page_on_this_machine_is_answered(site):
    for token in ("", "wrong", "é"):
        assert site.ask("/news", token=token.encode().decode("latin-1"))[0] == 403
    port = site.server.server_port
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("GET", f"/?token={site.server.token}")                 # as the browser does
    assert connection.getresponse().status == 200
    connection.close()
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", ""):
        assert site.ask("/news", headers={"Host": host})[0] == 403
    for host in (f"127.0.0.1:{port}", "localhost:8000", "[::1]:9"):           # ssh -L 8000:...
        assert site.ask("/news", headers={"Host": host})[0] == 200
    for origin in ("http://evil.example", "null", "http://127.0.0.1:1",
                   f"https://127.0.0.1:{port}"):
        assert site.ask("/news", headers={"Origin": origin})[0] == 403
        assert site.ask("/find", {}, headers={"Origin": origin})[0] == 403
    assert site.ask("/news", headers={"Sec-Fetch-Site": "cross-site"})[0] == 403
    assert site.ask("/news", headers={"Origin": f"http://127.0.0.1:{port}"})[0] == 200
    assert site.server.server_address[0] == "127.0.0.1"


@pytest.mark.smoke
def test_hostile_requests_get_one_sentence_and_no_file(site):
    for path in ("/page.py", "/../page.py", "/%2e%2e/etc/passwd", "/a.tif", "/cells/page.json"):
        assert site.ask(path)[0] == 404
    for image in ("../../etc/passwd", "/etc/passwd", "a.tif", "a\x00", ""):
        status, content = site.ask("/image", image=image)
        assert status == 400 and "no such image" in json.loads(content)["error"]
    for body in (b"[]", b"{", b"\xff", b"1"):
        assert site.ask("/edit", body)[0] == 400
    huge = {"Content-Length": str(page.LONGEST + 1)}
    assert site.ask("/edit", b"{}", headers=huge)[0] == 413
    assert site.ask("/edit", b"{}", headers={"Content-Length": "-1"})[0] == 413
    for line in ([], [[1]], [[1, float("nan")]], "x", [[1, 1e9]], {"a": 1}, None):
        status, content = site.ask("/edit", json.dumps(
            {"image": "a", "what": "draw", "revision": 0, "line": line}).encode())
        assert status == 400 and json.loads(content)["error"]
    assert site.ask("/edit", {"image": "a", "what": "draw", "revision": 0})[0] == 400
    assert site.ask("/edit", {"image": "a", "what": "wipe", "revision": 0})[0] == 400
    assert site.ask("/pixels", image="a", z=0, row=-1, column=0)[0] == 400
    assert site.ask("/pixels", image="a", z=99, row=0, column=0)[0] == 400
    assert site.ask("/labels", image="a", z=0, row=0, column=-1)[0] == 400
    assert site.ask("/learn", {"what": "use", "weights": "/etc/passwd"})[0] == 400
    assert site.ask("/learn", {"what": "close"})[0] == 400
    assert site.json("/news")["problem_count"] == 0


def test_the_page_may_run_nothing_but_itself(site):
    status, content = site.ask("/")
    policy = site.headers["Content-Security-Policy"]
    nonce = policy.split("script-src 'nonce-")[1].split("'")[0]
    assert status == 200 and f'<script nonce="{nonce}">'.encode() in content
    assert b"NONCE" not in content and "default-src 'none'" in policy and "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy and site.headers["X-Frame-Options"] == "DENY"
    assert nonce not in site.ask("/")[1].decode()                 # another each time
    text = (ROOT / "page.html").read_text(encoding="utf-8")
    assert max(map(len, text.splitlines())) <= 100
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(",
                 "http://", "https://", "style="):
        assert word not in text.replace('content="width', ""), word


def test_links_do_not_lead_out_of_the_folder(folder, tmp_path):
    tifffile.imwrite(tmp_path / "secret.tif", np.zeros((9, 9), np.uint8))
    (folder / "link.tif").symlink_to(tmp_path / "secret.tif")
    (folder / "inside.tif").symlink_to(folder / "a.tif")
    with Site(folder) as site:
        assert sorted(site.project.names) == ["a", "inside", "more_b"]    # and no masks, no labels


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, np.int16])
def test_tiles_are_the_image(tmp_path, dtype):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 250, (2, 700, 600)).astype(dtype)
    tifffile.imwrite(tmp_path / "x.tif", pixels, metadata={"axes": "CYX"}, imagej=dtype != np.int16,
                     ome=dtype == np.int16)
    picture = page.Picture(page.Entry(tmp_path / "x.tif", None, None), page.Config())
    about = picture.about()
    kind = np.uint8 if about["bits"] == 8 else np.uint16
    tile = np.frombuffer(picture.tile(0, 1, 1), kind).reshape(2, 700 - 512, 600 - 512)
    shown = pixels[:, 512:, 512:].astype(float)
    if dtype in (np.uint8, np.uint16):
        np.testing.assert_array_equal(tile, shown)
    else:
        assert np.corrcoef(tile.ravel(), shown.ravel())[0, 1] > 0.99999
    half = np.frombuffer(picture.tile(1, 0, 0), kind).reshape(2, 350, 300)
    means = pixels.astype(float).reshape(2, 350, 2, 300, 2).mean((2, 4))
    if dtype == np.uint16:
        np.testing.assert_allclose(half, means, atol=0.5)
    picture.close()


@pytest.mark.parametrize("size", [(2200, 2600), (2203, 2597)])
def test_a_slide_in_several_sizes_is_shown_from_the_smallest_that_will_do(tmp_path, size,
                                                                          monkeypatch):
    """Also with sizes that were rounded; what is shown is what is stored, at every zoom."""
    y, x = np.mgrid[:size[0], :size[1]]
    pixels = np.stack([y / 10, x / 11, (y + x) / 20], 2).astype(np.uint8)
    test_images.slide(tmp_path / "s.svs", pixels)
    picture = page.Picture(page.Entry(tmp_path / "s.svs", None, None), page.Config())
    assert sorted(picture.sizes) == [1, 2] and picture.step == 2
    for z in range(4):
        tile = np.frombuffer(picture.tile(z, 0, 0), np.uint8)
        h, w = (min(512, -(-n // (1 << z))) for n in size)
        middle = pixels[(1 << z) // 2::1 << z, (1 << z) // 2::1 << z].transpose(2, 0, 1)
        shown = tile.reshape(3, h, w)[:, :middle.shape[1], :middle.shape[2]].astype(int)
        assert np.abs(shown - middle[:, :512, :512][:, :h, :w]).max() <= 2 + (1 << z) // 4
    picture.close()
    monkeypatch.setattr(page, "LARGEST", 1 << 20)
    with Site(tmp_path) as site:
        status, content = site.ask("/image", image="s")
        assert status == 400 and "start with level=2" in json.loads(content)["error"]
    with Site(tmp_path, level=3) as site:
        assert site.json("/image", image="s")["width"] == -(-size[1] // 4)


def test_cells_are_those_of_infer_at_every_threshold(site):
    site.find("a")
    net = model.load(WEIGHTS).ready(runs.pick_device("auto"))
    pixels = data.read_image(site.folder / "a.tif").pixels
    book = site.project.open("a").book
    np.testing.assert_array_equal(book.labels, segment.segment(pixels, net))
    assert site.json("/news")["images"][0]["cells"] == book.labels.max() > 5
    setting = site.json("/image", image="a")["setting"]
    began = time.perf_counter()
    shown = site.json("/flood", {"image": "a", "setting": {**setting, "peak": 0.45}})
    assert time.perf_counter() - began < 2                        # a busy machine; alone .03 s
    assert "p" in shown["version"] and book.revision == 1         # a preview, nothing changed
    kept = site.json("/flood", {"image": "a", "setting": {**setting, "peak": 0.45}, "commit": True})
    assert kept["version"] == "2"
    np.testing.assert_array_equal(book.labels, segment.segment(pixels, net, peak=0.45))
    tile = np.frombuffer(site.ask("/labels", image="a", z=0, row=0, column=0)[1], "<i4")
    np.testing.assert_array_equal(tile.reshape(192, 256), book.labels)
    site.edit("a", "undo")
    np.testing.assert_array_equal(book.labels, segment.segment(pixels, net))


def test_undo_brings_back_thresholds_and_diameter(site):
    """Cells of one search beside the sliders of another would be a lie; also after a restart."""
    def shown():
        about = site.json("/image", image="a")
        return about["setting"]["peak"], about["diameter"], about["can_flood"], about["cells"]

    before = shown()
    site.json("/find", {"image": "a", "diameter": 30})
    site.wait()
    first, setting = shown(), site.json("/image", image="a")["setting"]
    assert first[1:3] == (30, True) and before[1:] == (None, False, 0)
    site.json("/flood", {"image": "a", "setting": {**setting, "peak": 0.3}, "commit": True})
    second = shown()
    site.json("/find", {"image": "a", "diameter": 18})
    site.wait()
    third = shown()
    assert (second[:2], third[:2]) == ((0.3, 30), (0.3, 18))
    drawn_ = site.edit("a", "draw", line=[[100, 5], [110, 5], [110, 15], [100, 15]])
    assert not drawn_["searched"] and not site.edit("a", "undo")["searched"]
    assert site.edit("a", "undo")["searched"]
    assert shown() == (0.3, 30, False, second[3])                 # its map is another's now
    assert site.edit("a", "undo")["searched"] and shown()[:2] == first[:2]
    assert site.edit("a", "undo")["searched"] and shown() == before
    for known in (first, second, third):
        assert site.edit("a", "redo")["searched"]
        assert shown()[:2] == known[:2] and shown()[3] == known[3]
    assert shown() == third
    site.edit("a", "undo")
    with Site(site.folder) as again:
        site = again
        assert shown() == (0.3, 30, False, second[3])
        site.edit("a", "redo")
        assert shown() == third


def test_a_search_that_is_stopped_leaves_its_diameter_unused(site, monkeypatch):
    site.find("a")
    before = site.json("/image", image="a")

    def stopped(*_, **__):
        assert site.project.of("a")["diameter"] == 40
        raise runs.Stopped

    with monkeypatch.context() as busy:
        busy.setattr(segment, "network_map", stopped)
        site.json("/find", {"image": "a", "diameter": 40})
        site.wait()
    after = site.json("/image", image="a")
    assert (after["diameter"], after["can_flood"], after["cells"]) == (None, True, before["cells"])
    site.json("/find", {"image": "a", "diameter": 40})
    site.wait()
    assert site.json("/image", image="a")["diameter"] == 40

    def undone(*_, **__):                                         # while it searches
        site.edit("a", "undo")
        raise runs.Stopped

    with monkeypatch.context() as busy:
        busy.setattr(segment, "network_map", undone)
        site.json("/find", {"image": "a", "diameter": 60})
        site.wait()
    assert site.json("/image", image="a")["diameter"] is None and not site.project.problems
    site.edit("a", "redo")
    search = segment.network_map

    def meanwhile(*given):                                        # a slider, while it searches
        setting = {**before["setting"], "peak": 0.9}
        site.json("/flood", {"image": "a", "setting": setting, "commit": True})
        assert site.json("/image", image="a")["setting"]["peak"] == 0.9
        return search(*given)

    monkeypatch.setattr(segment, "network_map", meanwhile)
    site.project.wanted["a"] = {"setting": before["setting"]}     # of a large image, it waits
    site.json("/find", {"image": "a", "diameter": 40})
    site.wait()
    shown = site.json("/image", image="a")
    assert shown["setting"]["peak"] == before["setting"]["peak"] and shown["diameter"] == 40


def test_a_preview_that_nobody_holds_is_gone(site):
    """A reload in the middle of a slide showed cells that clicks did not hit."""
    site.find("a")
    about = site.json("/image", image="a")
    site.json("/flood", {"image": "a", "setting": {**about["setting"], "peak": 0.8}})
    opened = site.project.open("a")
    assert opened.preview is not None
    status, content = site.ask("/edit", {"image": "a", "what": "remove", "cell": 1,
                                         "revision": about["revision"]})
    assert status == 409
    assert site.json("/image", image="a")["version"] == about["version"]
    assert opened.preview is None and opened.labels is opened.book.labels
    site.json("/flood", {"image": "a", "setting": about["setting"], "commit": True})
    assert site.json("/image", image="a")["revision"] == about["revision"]     # nothing changed


def test_labels_that_infer_writes_meanwhile_bring_no_thresholds(site):
    site.find("a")
    found = site.project.open("a").book.labels.copy()
    images.write_labels(site.out / "a_labels.tif", np.where(found == 1, 0, found))
    site.project.open("a").book.saved = False
    wait_until(lambda: site.json("/news")["problems"], 10, "the notice")
    assert "another program has written its labels" in site.json("/news")["problems"][-1]
    shown = site.json("/image", image="a")
    assert not shown["can_flood"] and shown["cells"] == found.max() - 1
    assert site.json("/news")["images"][0]["cells"] == found.max() - 1
    site.edit("a", "undo")
    assert site.json("/image", image="a")["can_flood"]            # as they were found
    site.edit("a", "redo")
    site.find("a")                                                # they are not of a hand
    np.testing.assert_array_equal(site.project.open("a").book.labels, found)


def test_a_full_disk_closes_no_image_with_unsaved_labels(folder, monkeypatch):
    for i in range(9):
        tifffile.imwrite(folder / f"z{i}.tif", drawn(1)[0][:64, :64])
    with Site(folder) as site:
        site.edit("a", "draw", line=[[100, 5], [110, 5], [110, 15], [100, 15]])
        with monkeypatch.context() as full:
            book = site.project.open("a").book
            full.setattr(book, "write_labels", lambda: (_ for _ in ()).throw(OSError(28, "full")))
            book.saved = False
            for i in range(9):                                    # each of them opens
                site.json("/image", image=f"z{i}")
            assert "a" in site.project.opened and not site.json("/news")["saved"]
        wait_until(lambda: site.json("/news")["saved"], 10, "the labels")
        assert (site.out / "a_labels.tif").exists()
        images.write_labels(site.out / "z8_labels.tif", np.ones((32, 32), np.int32))   # too small
        for i in range(9):
            site.json("/image", image=f"z{i}" if i < 8 else "a")
        assert len(site.project.opened) <= page.OPEN + 1


def test_images_with_cells_of_a_hand_are_searched(site):
    """With all others; labels of another program are not touched."""
    site.edit("a", "draw", line=[[100, 5], [110, 5], [110, 15], [100, 15]])
    images.write_labels(site.out / "more_b_labels.tif", drawn(2)[1])
    assert site.json("/find", {})["queued"] == 1
    site.wait()
    assert site.project.of("a")["cells"] > 3
    site.edit("more_b", "draw", line=[[100, 5], [110, 5], [110, 15], [100, 15]])
    assert site.json("/find", {})["queued"] == 0
    wait_until(lambda: site.json("/news")["saved"], 10, "the labels")
    images.write_labels(site.out / "a_labels.tif", drawn(1)[1])   # since it was searched
    site.project.open("a").book.saved = False
    wait_until(lambda: "weights" not in site.project.of("a"), 10)
    assert site.json("/find", {})["queued"] == 0


def test_thresholds_of_a_large_image_are_another_search(site, monkeypatch):
    """Its map is not kept: a slider that moves changes nothing, one let go runs the network."""
    monkeypatch.setattr(edits, "LARGE", 1 << 10)
    assert not site.json("/image", image="a")["can_flood"]
    site.find("a")
    about, book = site.json("/image", image="a"), site.project.open("a").book
    assert about["can_flood"] and site.project.open("a").seen is None
    before, setting = book.labels.copy(), {**about["setting"], "peak": 0.45}
    moved = site.json("/flood", {"image": "a", "setting": setting})
    assert moved == {"cells": int(before.max()), "version": about["version"]}
    site.json("/flood", {"image": "a", "setting": setting, "commit": True})
    site.wait()
    pixels = data.read_image(site.folder / "a.tif").pixels
    expected = segment.segment(pixels, model.load(WEIGHTS).ready(runs.pick_device("auto")),
                               peak=0.45)
    assert not np.array_equal(before, expected)
    np.testing.assert_array_equal(book.labels, expected)
    assert site.json("/image", image="a")["setting"]["peak"] == 0.45


def test_the_numbers_are_those_of_the_table(site):
    site.find("a")
    opened = site.project.open("a")
    table = cells.cell_table(opened.book.labels, data.read_image(site.folder / "a.tif").pixels)
    for i in range(0, len(table["id"]), 3):
        shown = site.json("/cell", image="a", cell=int(table["id"][i]))
        for name in ("area_px", "centroid_y_px", "centroid_x_px", "solidity", "perimeter_px",
                     "intensity_mean_1", "neighbours_touching", "touches_border"):
            assert shown[name] == pytest.approx(table[name][i]), name
        assert 0 < shown["certainty"] <= 1
    order = [row[0] for row in site.json("/least", image="a")]
    sure = opened.certainty(site.project.network())
    assert sorted(order, key=sure.get) == order and set(order) == set(table["id"].tolist())


def test_an_edit_is_on_the_disk_within_a_second_and_survives_a_kill(folder, tmp_path):
    """The server of another process is killed without warning right after it has answered."""
    code = ("import sys; sys.path.insert(0, sys.argv[1]); import page; "
            "page.main(page.Config(browser=False, weights=sys.argv[3]), [sys.argv[2]])")
    process = subprocess.Popen([sys.executable, "-c", code, str(ROOT), str(folder), WEIGHTS],
                               stdout=subprocess.PIPE, text=True)
    lines = [process.stdout.readline() for _ in range(2)]
    address = urllib.parse.urlsplit(lines[1].strip())
    asking = SimpleNamespace(server=SimpleNamespace(
        server_port=address.port, token=urllib.parse.parse_qs(address.query)["token"][0]))

    def edit(revision, line):
        status, content = Site.ask(asking, "/edit", {"image": "a", "what": "draw", "line": line,
                                                     "revision": revision})
        assert status == 200, content
    square = [[10, 10], [30, 10], [30, 30], [10, 30]]
    edit(0, square)
    wait_until((folder / "cells" / "a_labels.tif").exists, 5, "the TIFF")
    edit(1, [[x + 50, y] for x, y in square])
    process.kill()
    process.wait()
    with Site(folder) as site:
        site.json("/export", {})                        # before anybody has opened the image
        rows = (folder / "cells" / "a_cells.csv").read_text().splitlines()[1:]
        assert len(rows) == 2
        labels = site.project.open("a").book.labels
        assert sorted(np.unique(labels)) == [0, 1, 2] and (labels > 0).sum() == 800
    assert images.read_labels(folder / "cells" / "a_labels.tif").max() == 2


def test_the_second_window_is_told(site):
    square = [[10, 10], [30, 10], [30, 30], [10, 30]]
    site.edit("a", "draw", 0, line=square)
    status, content = site.ask("/edit", {"image": "a", "what": "draw", "revision": 0,
                                         "line": [[x + 5, y + 5] for x, y in square]})
    assert status == 409 and "another window" in json.loads(content)["error"]
    assert site.project.open("a").book.revision == 1
    assert site.json("/news", image="a")["version"] == "1"        # which the second window sees


def test_export_is_what_infer_writes(site):
    site.project.state["diameter"] = 31.0                     # as learnt for the folder
    site.find("a")
    site.edit("a", "draw", line=[[100, 5], [110, 5], [110, 15], [100, 15]])
    assert site.json("/export", {})["written"] == 1
    for end in ("_cells.csv", "_overlay.png", ".geojson", "_labels.tif"):
        assert (site.out / f"a{end}").exists(), end
    labels = images.read_labels(site.out / "a_labels.tif")
    np.testing.assert_array_equal(labels, site.project.open("a").book.labels)
    rows = (site.out / "a_cells.csv").read_text().splitlines()
    assert len(rows) - 1 == len(np.unique(labels)) - 1 and not (site.out / "more_b_cells.csv"
                                                                ).exists()
    header, row = (line.split(",") for line in (site.out / "summary.csv").read_text().splitlines())
    assert float(row[header.index("diameter_px")]) == 31
    site.edit("a", "undo")                                        # the journal goes on
    site.project.of("a")["diameter"] = 25.0                       # of this image alone
    assert site.json("/export", {})["written"] == 1
    header, row = (line.split(",") for line in (site.out / "summary.csv").read_text().splitlines())
    assert float(row[header.index("diameter_px")]) == 25


def test_an_image_that_was_replaced_does_not_take_the_cells_of_before(folder):
    with Site(folder) as site:
        site.find("a")
    with Site(folder) as site:                                    # unchanged: they are there
        assert site.json("/image", image="a")["cells"]
    file, = folder.glob("a.*")
    tifffile.imwrite(file, tifffile.imread(file)[::-1])
    with Site(folder) as site:
        status, content = site.ask("/image", image="a")
        assert status == 400 and "another image than that of" in json.loads(content)["error"]
        assert site.json("/export", {})["written"] == 0
        assert "left out of the export" in site.json("/news")["problems"][-1]
        kept = site.project.kept_files("a")
        kept[0].unlink()
        assert site.ask("/image", image="a")[0] == 400            # its edits would come back
        kept[1].unlink()
        site.project.of("a")["done"] = True
        assert not site.json("/image", image="a")["cells"] and "done" not in site.project.of("a")
        site.find("a")
        assert site.json("/image", image="a")["cells"]


def test_an_image_that_is_replaced_or_removed_while_the_page_is_open(folder):
    with Site(folder) as site:
        site.find("a")
        tifffile.imwrite(folder / "more/b.tif", drawn(2)[0])
        site.edit("more_b", "draw", line=[[100, 5], [110, 5], [110, 15], [100, 15]])
        site.json("/done", {"image": "a", "done": True})
        os.utime(folder / "a.tif", (1e9, 1e9))                    # the same pixels
        assert site.json("/image", image="a")["cells"]
        tifffile.imwrite(folder / "a.tif", tifffile.imread(folder / "a.tif")[::-1])
        status, content = site.ask("/image", image="a")
        assert status == 400 and "another image than that of" in json.loads(content)["error"]
        (folder / "a.tif").unlink()
        assert site.json("/export", {})["written"] == 1
        assert "a.tif: No such file" in site.json("/news")["problems"][-1]
        assert "no image is marked as done" in json.loads(site.ask("/learn", {"what": "start"})[1]
                                                          )["error"]


def test_images_of_one_name_keep_their_own_diameters_in_the_export(tmp_path):
    for name in "pq":
        (tmp_path / name).mkdir()
        tifffile.imwrite(tmp_path / name / "img.tif", drawn(1)[0])
    with Site(tmp_path) as site:
        for name in "pq":
            site.edit(f"{name}_img", "draw", line=[[100, 5], [110, 5], [110, 15], [100, 15]])
        site.project.state["diameter"], site.project.of("p_img")["diameter"] = 20.0, 77.0
        assert site.json("/export", {})["written"] == 2
        rows = {row["image"]: row for row in runs.read_table(site.out / "summary.csv")}
        assert [float(rows[f"{name}_img"]["diameter_px"]) for name in "pq"] == [77, 20]


def test_an_edit_during_the_export_is_kept_on_the_disk(site, monkeypatch):
    site.find("a")
    found = site.project.open("a").book.labels.copy()

    def meanwhile(*_, **__):
        site.edit("a", "draw", line=[[100, 5], [110, 5], [110, 15], [100, 15]])
        images.write_labels(site.out / "a_labels.tif", found)     # as infer.py does, of before
        return subprocess.CompletedProcess([], 0)

    monkeypatch.setattr(page.subprocess, "run", meanwhile)
    site.json("/export", {})
    book = site.project.open("a").book
    assert book.saved and not np.array_equal(book.labels, found)
    np.testing.assert_array_equal(images.read_labels(site.out / "a_labels.tif"), book.labels)


def test_two_exports_follow_each_other(site, monkeypatch):
    site.find("a")
    inside = []

    def running(command, **_):
        inside.append(Path(next(w for w in command if w.startswith("labels="))[7:], "a_labels.tif"))
        time.sleep(0.3)                                           # the other one would begin
        assert inside[-1].exists()
        seen.append(len(inside))
        return subprocess.CompletedProcess([], 0)

    seen: list[int] = []
    monkeypatch.setattr(page.subprocess, "run", running)
    with ThreadPoolExecutor(2) as threads:
        answers = [threads.submit(site.json, "/export", {}) for _ in range(2)]
        assert [answer.result()["written"] for answer in answers] == [1, 1]
    assert seen == [1, 2]                                         # not both before one was done


def test_the_size_is_judged_once(folder, monkeypatch):
    seen, judge = [], segment.seen_diameter

    def counted(*given):
        seen.append(judge(*given))
        return seen[-1]

    monkeypatch.setattr(segment, "seen_diameter", counted)
    with Site(folder, weights="tiny") as site:
        site.find("a")
        setting = site.json("/image", image="a")["setting"]
        site.json("/flood", {"image": "a", "setting": setting})
        site.json("/least", image="a")
        assert len(seen) == 1 and setting["diameter"] == seen[0]


def test_what_nobody_foresaw_ends_one_job_or_one_answer(site, monkeypatch):
    find = page.Project.find

    def full(project, name):
        if name == "a":
            raise MemoryError
        find(project, name)

    monkeypatch.setattr(page.Project, "find", full)
    site.find("a", "more_b")
    assert site.json("/news")["problems"] == ["a: out of memory"]
    assert site.json("/news")["images"][1]["cells"] > 0           # the next one was searched
    monkeypatch.setitem(page.GETS, "/news", lambda project, query: [][0])
    status, content = site.ask("/news")
    assert status == 500 and "out of range" in json.loads(content)["error"]


def test_the_list_counts_the_cells_there_are(folder):
    with Site(folder) as site:
        site.find("a")
        cell = min(site.project.open("a").book.boxes)
        before = site.edit("a", "remove", cell=cell)["cells"]
    with Site(folder) as site:
        assert site.json("/news")["images"][0]["cells"] == before


def test_done_and_diameter_are_remembered(folder):
    with Site(folder) as site:
        site.json("/done", {"image": "a", "done": True})
        site.json("/find", {"image": "a", "diameter": 28})
        site.wait()
        assert site.ask("/find", {"image": "a", "diameter": 0})[0] == 400
    with Site(folder) as site:
        about = site.json("/image", image="a")
        assert about["done"] and about["diameter"] == 28 and about["can_flood"]
        assert site.json("/news")["images"][0]["cells"] == about["cells"] > 0


def test_the_search_stops(site, monkeypatch):
    def slow(source, plan, progress):
        for k in range(1000):
            progress(k / 1000)
            time.sleep(0.01)
    monkeypatch.setattr(segment, "network_map", slow)
    site.json("/find", {})
    wait_until(lambda: site.json("/news")["working"].get("share", 0) > 0, 30)
    assert site.json("/news")["queue"] == 1
    site.json("/stop", {})
    wait_until(lambda: not site.project.working, 5, "the stop")
    assert not site.project.queue and site.json("/news")["images"][0]["cells"] is None


def test_a_search_of_all_passes_over_what_is_done_or_given(site):
    images.write_labels(site.out / "a_labels.tif", drawn(1)[1])   # by infer.py, say
    assert site.json("/find", {})["queued"] == 1                  # b alone
    site.wait()
    assert site.json("/find", {})["queued"] == 0
    site.project.state["weights"] = str(ROOT / "final_models" / "dinocell_tiny.pt")
    assert site.json("/find", {})["queued"] == 1                  # found with other weights
    site.json("/stop", {})
    site.json("/done", {"image": "more_b", "done": True})
    assert site.json("/find", {})["queued"] == 0
    assert site.json("/image", image="a")["cells"] == len(np.unique(drawn(1)[1])) - 1


def test_a_damaged_image_is_said_and_the_others_go_on(folder):
    (folder / "broken.tif").write_bytes(b"II*\0 not a TIFF")
    with Site(folder) as site:
        site.json("/find", {})
        site.wait()
        news = site.json("/news")
        assert len(news["problems"]) == 1 and "broken" in news["problems"][0]
        assert [row["cells"] is not None for row in news["images"]] == [True, False, True]
        assert site.ask("/image", image="broken")[0] == 400


def test_one_page_a_folder(folder):
    """Two would overwrite what the other remembers."""
    with (page.only_page(folder), pytest.raises(ValueError, match="another page.py has it open"),
          page.only_page(folder)):
        pass
    with page.only_page(folder):                                  # the first has ended
        pass
    with pytest.raises(ValueError, match="is the folder of the images"):
        page.Project(folder, page.Config(out=str(folder)))


def test_mistakes_at_the_start(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        page.Project(tmp_path / "none", page.Config())
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no image in this folder"):
        page.Project(tmp_path / "empty", page.Config())
    with pytest.raises(FileNotFoundError, match="no weights at .*none.pt"):
        page.Project(folder, page.Config(weights="none"))
    with pytest.raises(ValueError, match="2 folders, expected one"):
        page.main(page.Config(), ["a", "b"])
    shutil.copy(folder / "a.tif", folder / "a.tiff")
    with pytest.raises(ValueError, match="would both have the labels a_labels.tif"):
        page.Project(folder, page.Config())


def test_five_hundred_images_are_listed_at_once(tmp_path):
    for i in range(500):
        (tmp_path / f"i{i}.tif").touch()                          # opened only when looked at
    tifffile.imwrite(tmp_path / "i7.tif", np.zeros((8, 8), np.uint8))
    with Site(tmp_path) as site:
        began = time.perf_counter()
        news = site.json("/news")
        assert time.perf_counter() - began < 10 and len(news["images"]) == 500
        assert [row["name"] for row in news["images"][:3]] == ["i0", "i1", "i2"]
        assert site.json("/image", image="i7")["width"] == 8


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    """A TIFF of 20,000 x 20,000 px in tiles, empty but for a square of noise."""
    path = tmp_path_factory.mktemp("slide") / "slide.tif"
    noise = np.random.default_rng(0).integers(0, 200, (512, 512)).astype(np.uint8)
    empty, side = np.zeros((512, 512), np.uint8), -(-20000 // 512)
    tifffile.imwrite(path, (noise if k == 11 * side + 20 else empty for k in range(side * side)),
                     shape=(20000, 20000), dtype=np.uint8, tile=(512, 512), compression="zlib",
                     photometric="minisblack")
    return path


def test_a_slide_is_read_by_region_and_edited(slide):
    with Site(slide.parent) as site:
        about = site.json("/image", image="slide")
        assert (about["height"], about["width"]) == (20000, 20000)
        began = time.perf_counter()
        tile = np.frombuffer(site.ask("/pixels", image="slide", z=0, row=11, column=20)[1],
                             np.uint8)
        assert len(tile) == 512 * 512 and tile.max() == 199
        whole = np.frombuffer(site.ask("/pixels", image="slide", z=6, row=0, column=0)[1],
                              np.uint8).reshape(313, 313)
        assert time.perf_counter() - began < 2
        assert whole[88:96, 160:168].mean() == pytest.approx(99.5, abs=2) and whole.sum() < 7000
        square = [[15000, 9000], [15100, 9000], [15100, 9100], [15000, 9100]]
        assert site.edit("slide", "draw", 0, line=square)["cells"] == 1
        assert site.json("/cell", image="slide", cell=1)["area_px"] == 10000


@pytest.fixture
def stack(tmp_path):
    """Three planes (Z, Y, X) in which one drawn field moves, beside an image of its own."""
    pixels, labels = drawn(3, (128, 128), 6)
    planes = np.stack([np.roll(pixels, 3 * z, 1) for z in range(3)])
    tifffile.imwrite(tmp_path / "embryo.tif", planes, imagej=True, metadata={"axes": "ZYX"})
    tifffile.imwrite(tmp_path / "flat.tif", pixels)
    with Site(tmp_path) as site:
        site.truth = [np.roll(labels, 3 * z, 1) for z in range(3)]
        yield site


def test_planes_of_a_stack_are_images_and_one_result(stack):
    names = ["embryo_z1", "embryo_z2", "embryo_z3", "flat"]
    news = stack.json("/news")["images"]
    assert [(each["name"], each["stack"], each["place"]) for each in news] == [
        (name, "embryo" * (i < 3), i + 1 if i < 3 else 1) for i, name in enumerate(names)]
    first, third = (np.frombuffer(stack.ask("/pixels", image=name, z=0, row=0, column=0)[1],
                                  np.uint16).reshape(128, 128) for name in (names[0], names[2]))
    np.testing.assert_array_equal(np.roll(first, 6, 1), third)
    for name, labels in zip(names, [*stack.truth, stack.truth[0]]):
        images.write_labels(stack.out / f"{name}_labels.tif", labels)
    stack.edit("embryo_z2", "remove", cell=1)
    assert stack.json("/export", {})["written"] == 2
    linked = tifffile.imread(stack.out / "embryo_labels.tif")
    assert linked.shape == (3, 128, 128)
    for z, labels in enumerate(stack.truth):
        np.testing.assert_array_equal(linked[z] > 0, (labels > 0) & ((labels != 1) | (z != 1)))
    at = [np.argwhere(labels == 2)[0] for labels in stack.truth]
    assert len({int(linked[z][tuple(place)]) for z, place in enumerate(at)}) == 1
    assert len(runs.read_table(stack.out / "flat_cells.csv", ["id"])) == len(
        np.unique(stack.truth[0])) - 1
    assert not (stack.out / "embryo_z1_cells.csv").exists()


def test_linked_cells_of_a_stack_are_there_plane_by_plane(stack):
    """Also where they were found anew after a plane was looked at, but not corrected."""
    def write(truth):
        images.write_label_stack(stack.out / "embryo_labels.tif", iter(truth), (3, 128, 128),
                                 "ZYX", 6)

    write(stack.truth)
    assert stack.json("/find", {})["queued"] == 1                 # the flat one alone
    for z, labels in enumerate(stack.truth):
        opened = stack.project.open(f"embryo_z{z + 1}")
        np.testing.assert_array_equal(opened.book.labels, labels)
    stack.project.put_away("embryo_z1")
    others = [np.where(labels == 3, 0, labels) for labels in stack.truth]
    write(others)
    np.testing.assert_array_equal(stack.project.open("embryo_z1").book.labels, others[0])
    stack.edit("embryo_z1", "remove", cell=1)                     # corrections stay
    stack.project.put_away("embryo_z1")
    write(stack.truth)
    book = stack.project.open("embryo_z1").book
    np.testing.assert_array_equal(book.labels, np.where(others[0] == 1, 0, others[0]))
    other = np.where(others[1] == 2, 0, others[1])                # as do those of another program
    stack.project.put_away("embryo_z2")
    images.write_labels(stack.out / "embryo_z2_labels.tif", other)
    write(stack.truth)
    np.testing.assert_array_equal(stack.project.open("embryo_z2").book.labels, other)
    assert "has written the labels of its stack since" in stack.json("/news")["problems"][-1]


def test_masks_of_a_movie_are_no_images(tmp_path):
    pixels, labels = drawn(3, (128, 128), 6)
    tifffile.imwrite(tmp_path / "a.tif", pixels)
    (tmp_path / "results/m_ctc/01_RES").mkdir(parents=True)
    tifffile.imwrite(tmp_path / "results/m_ctc/01_RES/mask000.tif", labels.astype(np.uint16))
    with Site(tmp_path) as site:
        assert [each["name"] for each in site.json("/news")["images"]] == ["a"]


def test_cells_of_one_plane_are_not_shown_on_another(tmp_path):
    """Nor those of a single plane as those of the stack."""
    pixels, _ = drawn(3, (128, 128), 6)
    tifffile.imwrite(tmp_path / "embryo.tif", np.stack([pixels, np.roll(pixels, 40, 1), pixels]),
                     imagej=True, metadata={"axes": "ZYX"})
    with Site(tmp_path, plane=1) as site:
        site.find("embryo")
        cells = len(site.project.open("embryo").book.boxes)
        assert cells > 0
    with Site(tmp_path, plane=1) as site:
        assert len(site.project.open("embryo").book.boxes) == cells
    with Site(tmp_path, plane=2) as site, pytest.raises(
            ValueError, match="cells of plane=1 level=1, .*with plane=2 level=1; give anoth"):
        site.project.open("embryo")
    with Site(tmp_path) as site:
        assert len(site.json("/news")["images"]) == 3
        assert not site.project.open("embryo_z1").book.boxes


@pytest.mark.parametrize("axes,keys,count", [
    ("TZYX", {}, 1), ("TZYX", {"plane": 2}, 2), ("TZYX", {"time": 1}, 3), ("ZYX", {"plane": 1}, 1),
    ("TYX", {}, 2), ("YX", {}, 1)])
def test_what_is_a_plane(tmp_path, axes, keys, count):
    shape = [{"T": 2, "Z": 3, "Y": 16, "X": 16}[axis] for axis in axes]
    tifffile.imwrite(tmp_path / "a.tif", np.zeros(shape, np.uint8), imagej=True,
                     metadata={"axes": axes})
    found = page.images_of(tmp_path, tmp_path / "cells", page.Config(**keys))
    assert [entry.place for entry in found.values()] == list(range(1, count + 1))
    assert all(entry.open(None, 1).shape == (1, 16, 16) for entry in found.values()
               if len(axes) - len(keys) < 4)          # planes and frames of both: it asks for one


@pytest.fixture
def two_types(tmp_path, monkeypatch):
    """Bright round cells on the left, dim ones on the right, in two images, with their labels."""
    rng, folder = np.random.default_rng(0), tmp_path / "images"
    (folder / "cells").mkdir(parents=True)
    for name in "ab":
        y, x = np.mgrid[:192, :256]
        labels = np.zeros((192, 256), np.int32)
        centres = [(cy, cx) for cy in (32, 96, 160) for cx in (32, 96, 160, 224)]
        for i, (cy, cx) in enumerate(centres, 1):
            labels[(y - cy) ** 2 + (x - cx) ** 2 < 300] = i
        light = np.where(labels > 0, np.where(x < 128, 40000, 12000), 2000)
        tifffile.imwrite(folder / f"{name}.tif", (light + rng.integers(0, 900, light.shape)).astype(
            np.uint16))
        images.write_labels(folder / "cells" / f"{name}_labels.tif", labels)
    monkeypatch.chdir(tmp_path)                                   # python page.py images/
    with Site("images") as site:
        site.bright = {int(i) for i in np.unique(labels[:, :128]) if i}
        yield site


def taught(site, image="a"):
    return wait_until(lambda: (got := site.json("/types", image=image))["cells"] and got, 60,
                      "types")


def test_types_from_a_few_marks(two_types, monkeypatch, tmp_path):
    site = two_types
    assert site.json("/types", image="a")["types"] == []
    for x, name in ((32, "bright"), (96, "bright"), (160, "dim"), (224, "dim")):
        site.json("/mark", {"image": "a", "x": x, "y": 32, "type": name})
    got = site.json("/mark", {"image": "a", "x": 100, "y": 35, "type": "bright"})     # taken back
    assert len(got["marks"]) == 3 and [t["marks"] for t in got["types"]] == [1, 2]
    site.json("/teach", {})
    for image in "ab":                                            # the second had no mark at all
        types = {cell: name for cell, name, _ in taught(site, image)["cells"]}
        assert {cell for cell, name in types.items() if name == "bright"} == site.bright
        assert len(types) == 12
    row = site.json("/cell", image="b", cell=1)
    assert row["type"] == "bright" and row["type_probability"] > 0.5
    site.edit("a", "split", line=[[160, 5], [160, 60]])           # its parts are told anew
    wait_until(lambda: len(site.json("/types", image="a")["cells"]) == 13, 60)
    assert site.json("/export", {})["written"] == 2
    rows = runs.read_table(site.out / "b_cells.csv", ["id", "type"])
    assert {int(row["id"]) for row in rows if row["type"] == "bright"} == site.bright
    (site.out / ".page/vectors/a.npz").write_bytes(b"damaged")
    with monkeypatch.context() as elsewhere, Site(tmp_path / "images") as again:   # a restart
        elsewhere.chdir("/")
        assert len(taught(again, "b")["cells"]) == 12
        assert len(taught(again, "a")["cells"]) == 13             # the network runs again


def test_a_mark_lives_as_long_as_its_cell(two_types):
    """The mark of a removed cell is not shown, not counted, and back after an undo."""
    site = two_types
    def marks():
        got = site.json("/types", image="a")
        return [mark[0] for mark in got["marks"]], [each["marks"] for each in got["types"]]

    for x in (32, 96, 160):
        site.json("/mark", {"image": "a", "x": x, "y": 32, "type": "bright"})
    site.edit("a", "remove", cell=int(site.project.open("a").book.labels[32, 96]))
    assert marks() == ([32, 160], [2])
    site.project.put_away("a")                                    # as when others are opened
    site.edit("a", "undo")
    assert marks() == ([32, 96, 160], [3])
    site.edit("a", "merge", line=[[32, 32], [96, 32]])            # one cell, one mark
    assert marks()[1] == [2]
    site.project.put_away("a")                                    # counted as it was then
    assert [each["marks"] for each in site.project.types.known()] == [2]
    site.json("/mark", {"image": "a", "x": 64, "y": 32, "type": "bright"})        # taken away
    assert marks() == ([160], [1])
    assert "marked" not in site.project.of("a")                   # a killed page would go by it
    site.edit("a", "remove", cell=int(site.project.open("a").book.labels[32, 160]))
    site.edit("a", "draw", line=[[150, 22], [170, 22], [170, 42], [150, 42]])     # a new cell
    assert marks() == ([], [0])


def test_a_mark_goes_with_its_cell(two_types):
    """Whose outline no longer holds the place that was clicked."""
    site = two_types
    seen = site.json("/news")["marks"]
    site.json("/mark", {"image": "a", "x": 48, "y": 32, "type": "bright"})    # near the edge
    assert site.json("/news")["marks"] == seen + 1                # another window asks for it
    cell = int(site.project.open("a").book.labels[32, 48])
    for _ in range(3):
        site.edit("a", "shrink", cell=cell)
    opened = site.project.open("a")
    assert not opened.book.labels[32, 48] and list(opened.marked()) == [cell]
    site.edit("a", "undo")
    assert list(opened.marked()) == [cell]


def test_planes_that_an_export_finds_are_shown_where_they_were_looked_at_before(stack):
    stack.json("/image", image="embryo_z1")
    images.write_labels(stack.out / "embryo_z3_labels.tif", stack.truth[2])
    stack.json("/export", {})
    linked = tifffile.imread(stack.out / "embryo_labels.tif")
    assert linked[0].any()
    np.testing.assert_array_equal(stack.project.open("embryo_z1").book.labels > 0, linked[0] > 0)
    assert not stack.json("/news")["problems"]


def test_what_is_asked_for_again_is_told_again(site):
    for text, asked in (("a: x", True), ("b: y", False), ("b: y", False), ("a: x", True)):
        site.project.complain(text, asked)
    assert site.json("/news")["problems"] == ["a: x", "b: y", "a: x"]


def test_marks_that_mean_nothing(two_types):
    for values in ({"x": 1, "y": 1, "type": "a"}, {"x": -5, "y": 9e6, "type": "a"},
                   {"x": 32, "y": 32, "type": " "}, {"x": 32, "y": 32, "type": "a" * 61},
                   {"x": 32, "y": 32}, {"x": "left", "y": 32, "type": "a"}):
        assert two_types.ask("/mark", {"image": "a", **values})[0] == 400
    two_types.json("/mark", {"image": "a", "x": 32, "y": 32, "type": "<b>one</b>"})
    two_types.json("/teach", {})
    problem = wait_until(lambda: two_types.json("/news")["problems"], 60)[-1]
    assert "expected two types or more" in problem
    assert two_types.json("/types", image="a")["taught"] is None


TRAINER = """
import json, pathlib, shutil, signal, sys, time, yaml
config = yaml.safe_load(open(sys.argv[1]))
folder = pathlib.Path(config["output_base_dir"])
if not (folder / "met").exists():                   # the first time it waits for a signal
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(85))
    (folder / "met").touch()
    time.sleep(60)
(folder / "runs/learn").mkdir(parents=True, exist_ok=True)
with open(folder / "runs/learn/log.jsonl", "w") as log:
    for line in ({"step": 2, "loss": 0.5}, {"step": 4, "loss": 0.25, "val_AP@0.5": 0.7}):
        log.write(json.dumps(line) + "\\n")
(folder / "final_models").mkdir()
shutil.copy(config["init"], folder / "final_models/learn.pt")
"""


def test_rounds_of_learning(folder, tmp_path, monkeypatch):
    """A stop and its continuation, numbers, and the way back, with a trainer that brings the same
    weights: no better, so they are not used. The real one: test_learning_in_the_browser."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "train_seg.py").write_text(TRAINER)
    with Site(folder) as site:
        monkeypatch.setattr(learning, "TRAINER", tmp_path / "code" / "train_seg.py")
        refused = site.ask("/learn", {"what": "start"})[1]
        assert "no image is marked" in json.loads(refused)["error"]
        for name, seed in (("a", 1), ("more_b", 2)):
            images.write_labels(site.out / f"{name}_labels.tif", drawn(seed)[1])
            site.json("/done", {"image": name, "done": True})
        site.json("/learn", {"what": "start"})
        assert site.ask("/learn", {"what": "start"})[0] == 400    # it learns already
        wait_until((site.out / ".page/learn/round_1/met").exists)
        assert site.json("/news")["learning"]["state"] == "running"
    with Site(folder) as site:                                    # the page had ended meanwhile
        monkeypatch.setattr(learning, "TRAINER", tmp_path / "code" / "train_seg.py")
        assert site.json("/news")["learning"]["state"] == "stopped"
        run = site.out / ".page/learn/round_1/runs/learn"
        run.mkdir(parents=True)
        with runs.locked(run):                                    # its trainer outlived it
            refused = site.ask("/learn", {"what": "start"})
        assert refused[0] == 400 and b"that was killed still goes on" in refused[1]
        run.rmdir()
        site.json("/learn", {"what": "start"})                    # the same round goes on
        state = wait_until(lambda: (now := site.json("/news")["learning"])["state"] in
                           ("done", "failed") and now)
        assert state["state"] == "done", state["problem"]
        assert state["round"] == 1 and len(state["held"]) == 1
        assert state["loss"] == [[2, 0.5], [4, 0.25]] and state["AP"] == [[4, 0.7]]
        assert set(state["scores"]) == {"before", "after"} and state["diameter"] > 20
        assert not state["better"] or state["scores"]["after"]["AP"] > state["scores"]["before"][
            "AP"]
        site.json("/learn", {"what": "use", "weights": state["after"]})
        assert site.json("/news")["weights"] == "learn"
        assert site.json("/image", image="a")["usual_diameter"] == state["diameter"]
        site.json("/learn", {"what": "use", "weights": state["before"]})
        assert site.json("/news")["weights"] == "demo_synthetic"
        assert site.json("/image", image="a")["usual_diameter"] is None


def test_a_round_that_ended_while_comparing_goes_on(site):
    site.project.learning.of(1).mkdir(parents=True)
    site.project.learning.note(1, state="comparing")
    assert learning.Learning(site.project).status()["state"] == "stopped"


def test_a_second_click_begins_no_second_round(site, monkeypatch):
    """Also while the images of the first are still copied."""
    began, copied, prepare = [], [], site.project.learning.prepare

    def slowly(number):
        copied.append(number)
        time.sleep(0.5)
        prepare(number)

    def begin(command, **_):
        began.append(command)
        return SimpleNamespace(poll=lambda: 0)
    monkeypatch.setattr(site.project.learning, "prepare", slowly)
    monkeypatch.setattr(site.project.learning, "watch", lambda number: None)
    monkeypatch.setattr(learning.subprocess, "Popen", begin)
    images.write_labels(site.out / "a_labels.tif", drawn(1)[1])
    site.json("/done", {"image": "a", "done": True})
    with ThreadPoolExecutor(2) as pool:
        status = list(pool.map(lambda _: site.ask("/learn", {"what": "start"})[0], range(2)))
    assert sorted(status) == [200, 400] and len(began) == 1 and copied == [1]


def test_a_round_that_could_not_begin_leaves_no_images_to_the_next(site):
    images.write_labels(site.out / "a_labels.tif", np.zeros((192, 256), np.int32))
    site.json("/done", {"image": "a", "done": True})
    with pytest.raises(ValueError, match="the one image that is done has 0 cells"):
        site.project.learning.prepare(1)
    site.json("/done", {"image": "a", "done": False})
    images.write_labels(site.out / "more_b_labels.tif", drawn(2)[1])
    site.json("/done", {"image": "more_b", "done": True})
    site.project.learning.prepare(1)
    assert sorted(each.name for each in data.examples(site.project.learning.of(1) / "set")
                  ) == ["more_b_t1", "more_b_t2"]


def test_one_image_is_learnt_from_on_the_left(site):
    images.write_labels(site.out / "a_labels.tif", drawn(1)[1])
    site.json("/done", {"image": "a", "done": True})
    site.project.learning.prepare(1)
    record = site.project.learning.record(1)
    assert record["held"] == ["a_t2"] and record["images"] == ["a"]
    parts = {each.name: each for each in data.examples(site.project.learning.of(1) / "set")}
    whole = np.concatenate([parts[name].labels() for name in ("a_t1", "a_t2")], 1)
    np.testing.assert_array_equal(whole, drawn(1)[1])
    config = runs.load_config(train_seg.Config, site.project.learning.of(1) / "config.yaml")
    assert config.init == WEIGHTS and config.steps == 4


def test_images_of_ome_are_learnt_from_as_others(tmp_path):
    """An image without cells stays if others can be compared by, and is told of if not."""
    for name in ("a", "b", "c", "empty"):
        pixels, labels = drawn(1, (128, 128), 6)
        tifffile.imwrite(tmp_path / f"{name}.ome.tif", pixels)
    with Site(tmp_path) as site:
        for name in ("a", "b", "c", "empty"):
            images.write_labels(site.out / f"{name}.ome_labels.tif", labels * (name != "empty"))
            site.json("/done", {"image": f"{name}.ome", "done": True})
        site.project.learning.prepare(1)
        record = site.project.learning.record(1)
        there = [each.name for each in data.examples(site.project.learning.of(1) / "set")]
        assert there == [name.removesuffix(".ome") for name in record["images"]]
        assert record["held"] and {"a", "b", "c"} <= {*there}


@pytest.mark.parametrize("empty,full", [("a", "more_b"), ("more_b", "a")])
def test_an_image_without_cells_is_not_what_rounds_are_compared_by(site, empty, full):
    images.write_labels(site.out / f"{empty}_labels.tif", np.zeros((192, 256), np.int32))
    images.write_labels(site.out / f"{full}_labels.tif", drawn(1)[1])
    for name in (empty, full):
        site.json("/done", {"image": name, "done": True})
    site.project.learning.prepare(1)
    assert site.project.learning.record(1)["held"] == [f"{full}_t2"]


@pytest.mark.parametrize("columns", [(2, 20, 30), (200, 210, 230, 240), (100, 100), (0, 250)])
def test_both_parts_of_one_image_have_cells(columns):
    labels = np.zeros((64, 256), np.int32)
    for i, x in enumerate(columns):
        labels[12 * i:12 * i + 8, x:x + 6] = i + 1
    cut = learning._cut_column(labels)
    assert 0 < cut < 256 and labels[:, :cut].any() and labels[:, cut:].any()


def test_a_score_does_not_outlive_the_weights_it_was_fitted_for(tmp_path):
    model.change_weights_settings(WEIGHTS, tmp_path / "s.pt", score={"constant": 1.0})
    config = runs.from_dict(train_seg.Config, {"init": str(tmp_path / "s.pt"), "data": {
        "fields": 2}}, "x")
    assert model.load(tmp_path / "s.pt").settings.score and not train_seg.build_train_seg_net(
        config).settings.score


# ------------------------------------------------------------------------------------- the browser

@pytest.fixture(scope="module")
def chrome():
    """Headless Chromium."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium, and Debian's "
                                    "chromium and chromium-driver")
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (program and driver):
        pytest.skip("needs a browser: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                 "--window-size=1400,900"):
        options.add_argument(flag)
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield chrome
    chrome.quit()


class Person:
    """Somebody with a mouse in front of the page."""

    def __init__(self, chrome, address):
        self.chrome = chrome
        chrome.get(address)
        self.until("image && labels.size > 0 && pixels.size > 0", "the image is shown")

    def js(self, expression):
        return self.chrome.execute_script(f"return {expression}")

    def until(self, expression, what="", seconds=60):
        return wait_until(lambda: self.js(expression), seconds, what or expression)

    def actions(self):
        from selenium.webdriver.common.action_chains import ActionChains
        return ActionChains(self.chrome, duration=5)

    def click(self, name):
        self.chrome.find_element("id", name).click()

    def press(self, *keys):
        """Keys, together: Control first."""
        actions = self.actions()
        for key in keys[:-1]:
            actions.key_down(key)
        actions.send_keys(keys[-1])
        for key in keys[:-1]:
            actions.key_up(key)
        actions.perform()

    def offset(self, x, y):
        """From the canvas's middle to a point of the image."""
        view = self.js("[at.x, at.y, at.scale, view.clientWidth, view.clientHeight]")
        return (round((x - view[0]) * view[2] - view[3] / 2),
                round((y - view[1]) * view[2] - view[4] / 2))

    def point(self, x, y):
        self.actions().move_to_element_with_offset(self.chrome.find_element("id", "view"),
                                                   *self.offset(x, y)).perform()

    def drag(self, *points):
        """With the left button, in px of the image; waits for what the server says."""
        revision, canvas = self.js("image.revision"), self.chrome.find_element("id", "view")
        actions = self.actions().move_to_element_with_offset(canvas, *self.offset(*points[0]))
        actions.click_and_hold()
        for point in points[1:]:
            actions.move_to_element_with_offset(canvas, *self.offset(*point))
        actions.release().perform()
        return revision

    def edit(self, *points):
        revision = self.drag(*points)
        self.until(f"image.revision === {revision + 1}", "the edit")


def loop(x, y, r, n=14):
    return [(x + r * np.cos(t), y + r * np.sin(t)) for t in np.linspace(0, 2 * np.pi, n)]


@pytest.fixture
def discs(tmp_path):
    """An image with four bright discs, two of which touch, and their labels but for one."""
    y, x = np.mgrid[:240, :320]
    labels = np.zeros((240, 320), np.int32)
    for i, (cy, cx) in enumerate(((60, 60), (60, 99), (170, 80), (170, 220)), 1):
        labels[((y - cy) ** 2 + (x - cx) ** 2 < 400) & (labels == 0)] = i
    noise = np.random.default_rng(0).integers(0, 900, labels.shape)
    pixels = np.where(labels > 0, 40000, 3000) + noise
    tifffile.imwrite(tmp_path / "discs.tif", pixels.astype(np.uint16))
    (tmp_path / "cells").mkdir()
    images.write_labels(tmp_path / "cells" / "discs_labels.tif", labels * (labels < 4))
    with Site(tmp_path) as site:
        yield site


def test_a_person_corrects_an_image(chrome, discs):
    """One tool for all, then the keys; everything is there after a reload and on the disk."""
    from selenium.webdriver.common.keys import Keys
    person, book = Person(chrome, discs.server.address), discs.project.open("discs").book
    assert person.js("image.cells") == 3
    person.press("c")
    person.edit(*loop(220, 170, 20))                              # a loop draws
    assert abs((book.labels == 4).sum() - 1256) < 130
    person.edit((80, 140), (80, 200))                             # across splits
    assert person.js("image.cells") == 5
    person.edit((60, 60), (99, 60))                               # from cell to cell merges
    assert person.js("image.cells") == 4 and book.labels[60, 60] == book.labels[60, 99]
    person.point(220, 170)
    person.until("hovered === 4 && shownCell === 4", "the numbers")
    assert "area, px" in chrome.find_element("id", "numbers").text
    area = (book.labels == 4).sum()
    person.press("+")
    person.until("image.revision === 4")
    assert (book.labels == 4).sum() > area
    person.press(Keys.DELETE)
    person.until("image.revision === 5 && image.cells === 3")
    for revision, key in ((6, "z"), (7, "z"), (8, "y")):
        person.press(Keys.CONTROL, key)
        person.until(f"image.revision === {revision}")
    assert person.js("image.cells") == 4 and (book.labels == 4).sum() > area
    labels = book.labels.copy()
    person.drag((10, 220), (30, 225))                             # means nothing: nothing happens
    person.until("document.getElementById('note').textContent.includes('no cell')")
    person.press("x")
    person.edit(*loop(70, 170, 40))                               # a lasso deletes both halves
    assert person.js("image.cells") == 2
    person.press(Keys.CONTROL, "z")
    person.until("image.revision === 10")
    chrome.refresh()
    person.until("image && labels.size > 0")
    assert person.js("image.cells") == 4
    np.testing.assert_array_equal(book.labels, labels)
    wait_until(lambda: book.saved, 5)
    np.testing.assert_array_equal(images.read_labels(discs.out / "discs_labels.tif"), labels)
    errors = [line for line in chrome.get_log("browser") if "Failed to load" not in line["message"]]
    assert not errors


def test_search_sliders_and_done(chrome, site):
    person = Person(chrome, site.server.address)
    person.click("all")
    person.until("names.every(each => each.cells > 0) && image.can_flood", "the search", 120)
    assert person.js("image.diameter === null && $('diameter').placeholder") == str(
        round(site.project.open("a").state["used"]["diameter"]))   # how large the cells look
    before, revision = person.js("image.cells"), person.js("image.revision")
    slider = chrome.find_element("id", "slide-peak")
    person.actions().click_and_hold(slider).move_by_offset(-30, 0).perform()
    person.until(f"image.cells !== {before}", "the preview")
    assert person.js("image.revision") == revision
    person.actions().release().perform()
    person.until(f"image.revision === {revision + 1}")
    assert len(site.project.open("a").book.boxes) == person.js("image.cells") != before
    person.press("u")
    person.until("marked > 0 && shownCell === marked", "the least certain")
    person.press("f")
    assert person.js("mode") == "filled"
    person.click("done")
    person.until("image.name === 'more_b' && names[0].done", "the next image")
    person.press("p")
    person.until("image.name === 'a' && image.done")
    person.press("?")
    assert chrome.find_element("id", "help").is_displayed()
    assert not [line for line in chrome.get_log("browser") if line["level"] == "SEVERE"
                and line["source"] != "intervention"]         # a quick reload in a test, no person


@pytest.mark.parametrize("link, name", [("b+c", "b+c"), ("b%2Bc", "b+c"), ("b%2", "a")])
def test_a_link_shows_its_image(chrome, tmp_path, link, name):
    """As this page writes it, or a hand; the first image where it is damaged."""
    for stem in ("a", "b+c"):
        tifffile.imwrite(tmp_path / f"{stem}.tif", drawn(1)[0])
    with Site(tmp_path) as site:
        assert Person(chrome, f"{site.server.address}#{link}").js("image.name") == name


def test_a_slider_goes_through_a_stack(chrome, stack):
    for z, labels in enumerate(stack.truth):
        images.write_labels(stack.out / f"embryo_z{z + 1}_labels.tif", labels)
    person = Person(chrome, stack.server.address)
    rows = chrome.find_elements("css selector", "#list > div")
    assert [row.text.split()[0] for row in rows] == ["embryo", "flat"]
    assert chrome.find_element("id", "where").text == "1 of 3"
    scale = person.js("at.scale = at.scale * 2")
    person.press(".")
    person.until("image.name === 'embryo_z2' && labels.size > 0")
    assert person.js("at.scale") == scale                         # the view stays
    slider = chrome.find_element("id", "plane")
    person.actions().click_and_hold(slider).move_by_offset(300, 0).release().perform()
    person.until("image.name === 'embryo_z3' && pixels.get('0,0,0').name === 'embryo_z3'")
    person.press("n")
    person.until("image.name === 'flat'")
    assert not chrome.find_element("id", "stack").is_displayed()
    person.press("p")
    person.until("image.name === 'embryo_z3'", "the plane that was left")


def test_types_by_clicks(chrome, two_types):
    from selenium.webdriver.common.keys import Keys
    person = Person(chrome, two_types.server.address)
    for name in ("bright", "dim"):
        chrome.find_element("id", "newtype").send_keys(name, Keys.ENTER)
    assert person.js("tool") == "type" and person.js("chosen") == "dim"
    person.drag((160, 32))
    person.drag((224, 96))
    person.until("kinds.marks.length === 2")
    person.press("1")
    person.until("kinds.types[0].name === 'dim' ? chosen === 'dim' : chosen === 'bright'")
    chrome.execute_script("choose('bright')")
    person.drag((32, 32))
    person.drag((96, 96))
    person.until("kinds.marks.length === 4")
    person.press("r")
    person.until("byType && kinds.cells && kinds.cells.length === 12", "types")
    colours = person.js("[1, 4].map(cell => palette[colourOf(cell)])")
    assert colours == person.js("['bright', 'dim'].map("
                                "name => kinds.types.find(t => t.name === name).colour)")
    assert "6 here" in chrome.find_element("id", "types").text
    person.point(32, 96)
    person.until("document.getElementById('numbers').textContent.includes('typebright')")
    person.click("bytype")
    assert person.js("byType") is False
    assert not [line for line in chrome.get_log("browser") if line["level"] == "SEVERE"]


def test_keys_and_clicks_hit_what_is_shown(chrome, site):
    """The cell that U shows, not that where the mouse rests; the image that was shown when a slider
    was let go; the type that was chosen at the click."""
    from selenium.webdriver.common.keys import Keys
    person, book = Person(chrome, site.server.address), site.project.open("a").book
    person.click("all")
    person.until("names.every(each => each.cells > 0) && image.can_flood", "the search", 120)
    rows, columns = book.boxes[max(book.boxes)]
    person.point((columns.start + columns.stop) / 2, (rows.start + rows.stop) / 2)
    person.until("hovered > 0 && shownCell === hovered")
    resting = person.js("hovered")
    while person.js("marked") in (0, resting):
        person.press("u")
        person.until("shownCell === marked")
    shown, count = person.js("marked"), len(book.boxes)
    person.press(Keys.DELETE)
    person.until(f"image.cells === {count - 1}")
    assert shown not in book.boxes and resting in book.boxes
    other, before = site.project.open("more_b").book.revision, person.js("image.setting.peak")
    chrome.execute_script("""
      const fetched = window.fetch;
      window.fetch = async (path, how) => {
        if (path === "/flood") await new Promise(later => setTimeout(later, 700));
        return fetched(path, how);
      };
      $("slide-peak").value = 0.3;
      $("slide-peak").dispatchEvent(new Event("input"));
      $("slide-peak").dispatchEvent(new Event("change"));
      edit("draw", {line: [[1, 1], [9, 1], [9, 9], [1, 9]]});
      edit("remove", {cell: Math.max(...labels.get("0,0,0").values)});""")
    person.press("n")
    person.until("image.name === 'more_b'")
    assert site.project.of("a")["setting"]["peak"] == pytest.approx(0.3) != before
    assert site.project.open("more_b").book.revision == other
    assert [edits.what_of(line) for line in book.done] == ["find", "remove", "flood", "draw"]
    person.press("p")
    person.until("image.name === 'a'")
    chrome.execute_script("edit('undo'); edit('undo'); step(1)")  # the slider's: all anew, then on
    person.until("image.name === 'more_b'", "the next image after an undo")
    assert len(book.done) == 2


def test_enter_goes_past_a_damaged_image_and_takes_nothing_back(chrome, folder):
    from selenium.webdriver.common.keys import Keys
    (folder / "aa.tif").write_bytes(b"damaged")
    with Site(folder) as site:
        person = Person(chrome, site.server.address)
        person.until("image.name === 'a'")
        person.press(Keys.ENTER)
        person.until("image.name === 'more_b'", "the one after the damaged one")
        person.press("p")
        person.until("image.name === 'a' && !finishing")
        person.press(Keys.ENTER)
        person.until("image.name === 'more_b' && !finishing")
        assert site.project.of("a")["done"]
        person.click("done")
        person.until("image.done && !finishing", "the damaged one is the only one left")
        person.click("done")
        person.until("!image.done", "the button takes it back")


def test_two_fingers_zoom_and_draw_nothing(chrome, discs):
    person, book = Person(chrome, discs.server.address), discs.project.open("discs").book
    person.press("x")
    before = person.js("at.scale")
    chrome.execute_script("""
      const finger = (type, id, x, y) => view.dispatchEvent(new PointerEvent(type, {
        pointerId: id, pointerType: "touch", isPrimary: id === 1, clientX: x, clientY: y,
        bubbles: true, button: 0}));
      view.setPointerCapture = () => {};
      const box = view.getBoundingClientRect(),
        round = (id, ends) => {                    // a finger around all cells
          for (let i = 0; i <= 20; i++)
            finger("pointermove", id, box.x + box.width * (0.5 + 0.48 * Math.cos(i / 3.2)),
                   box.y + box.height * (0.5 + 0.48 * Math.sin(i / 3.2)));
        };
      finger("pointerdown", 1, 300, 300), finger("pointerdown", 2, 400, 300);
      for (let i = 1; i < 9; i++) finger("pointermove", 1, 300 - 10 * i, 300);
      window.scaled = at.scale;
      round(1);
      finger("pointerup", 1, 220, 300), finger("pointerup", 2, 400, 300);
      fit();
      finger("pointerdown", 1, box.x + box.width * 0.98, box.y + box.height / 2), round(1);
      finger("pointercancel", 1, 340, 340);
      finger("pointerup", 1, 340, 340);""")
    assert person.js("scaled") == pytest.approx(1.8 * before, rel=1e-3)
    assert person.js("line === null && pan === null")
    time.sleep(0.5)
    assert book.revision == 0


def test_two_windows_do_not_destroy_each_others_edits(chrome, discs):
    first = chrome.current_window_handle
    person, book = Person(chrome, discs.server.address), discs.project.open("discs").book
    chrome.switch_to.new_window("tab")
    try:
        other = Person(chrome, discs.server.address)
        other.press("d")
        chrome.execute_script("clearTimeout(timer); poll = () => {}")          # has not heard yet
        chrome.switch_to.window(first)
        person.press("d")
        person.edit(*loop(220, 170, 20))
        chrome.switch_to.window(chrome.window_handles[-1])
        other.drag(*loop(280, 40, 15))
        other.until("document.getElementById('note').textContent.includes('another window')")
        other.until("image.revision === 1 && image.cells === 4")
        other.edit(*loop(280, 40, 15))                            # repeated, it is taken
        assert len(book.boxes) == 5
    finally:
        chrome.close()
        chrome.switch_to.window(first)
    person.until("image.revision === 2 && image.cells === 5", "the first window hears of it")


def test_another_page_in_the_same_browser_gets_nothing(chrome, discs, tmp_path):
    """It even knows the port and the token."""
    import http.server
    port, token = discs.server.server_port, discs.server.token
    body = json.dumps({"image": "discs", "what": "remove", "cell": 1, "revision": 0})
    asked = [["/news?token=" + token, {}],
             ["/edit?token=" + token, {"method": "POST", "body": body}],
             ["/edit?token=" + token, {"method": "POST", "body": body, "mode": "no-cors"}],
             ["/news", {"headers": {"X-Token": token}}]]
    hostile = """<script>
      window.got = [];
      (async () => {
        for (const [path, more] of ASKED)
          try { window.got.push(await (await fetch("http://127.0.0.1:PORT" + path, more)).text()); }
          catch (error) { window.got.push(""); }
        window.done = true;
      })();
      </script><iframe id="frame" src="http://127.0.0.1:PORT/?token=TOKEN"></iframe>"""
    for name, value in (("ASKED", json.dumps(asked)), ("PORT", str(port)), ("TOKEN", token)):
        hostile = hostile.replace(name, value)

    class Evil(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(hostile.encode())

        def log_message(self, *_):
            pass
    evil = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Evil)
    threading.Thread(target=evil.serve_forever, daemon=True).start()
    try:
        chrome.get(f"http://127.0.0.1:{evil.server_port}/")
        wait_until(lambda: chrome.execute_script("return window.done"), 30)
        assert chrome.execute_script("return window.got") == [""] * 4
        assert discs.project.open("discs").book.revision == 0
        chrome.switch_to.frame("frame")
        assert not chrome.find_elements("id", "view")             # it may not be framed
    finally:
        chrome.switch_to.default_content()
        evil.shutdown()
        evil.server_close()


def test_a_file_name_that_is_a_script_is_a_name(chrome, tmp_path):
    tifffile.imwrite(tmp_path / HOSTILE, drawn(1)[0], imagej=True, metadata={
        "axes": "YX", "Labels": ["<script>window.bad = 1</script>"]})
    with Site(tmp_path) as site:
        person = Person(chrome, site.server.address)
        assert person.js("names[0].name") == HOSTILE[:-4]
        assert chrome.find_element("id", "title").text == HOSTILE[:-4]
        assert not person.js("document.querySelectorAll('main img, aside img, header img').length")
        assert person.js("window.bad") is None
        person.click("find")
        person.until("image.cells > 0", seconds=120)
        assert (tmp_path / "cells" / (HOSTILE[:-4] + "_labels.tif")).exists()


def test_a_folder_of_five_hundred(chrome, tmp_path):
    small = tmp_path / "i000.tif"
    tifffile.imwrite(small, drawn(1, (64, 64), 3)[0])
    for i in range(1, 500):
        os.link(small, tmp_path / f"i{i:03}.tif")
    with Site(tmp_path) as site:
        person = Person(chrome, site.server.address)
        assert person.js("document.querySelectorAll('#list > div').length") == 500
        last = chrome.find_elements("css selector", "#list > div")[-1]
        chrome.execute_script("arguments[0].scrollIntoView()", last)
        last.click()
        person.until("image.name === 'i499' && labels.size > 0")
        person.press("p")
        person.until("image.name === 'i498'")


def test_a_slide_scrolls(chrome, slide):
    shutil.rmtree(slide.parent / "cells", ignore_errors=True)
    with Site(slide.parent) as site:
        person = Person(chrome, site.server.address)
        view = chrome.find_element("id", "view")
        x, y = person.offset(10500, 5900)                         # where something is
        for _ in range(12):
            chrome.execute_script(
                "arguments[0].dispatchEvent(new WheelEvent('wheel', {deltaY: -300, bubbles: true, "
                "clientX: arguments[1], clientY: arguments[2]}))", view,
                view.rect["x"] + view.rect["width"] / 2 + x,
                view.rect["y"] + view.rect["height"] / 2 + y)
        person.until("at.scale > 1 && zoomLevel() === 0 && pixels.has('0,11,20')", "full detail")
        person.actions().click_and_hold(view).move_by_offset(-200, -100).release().perform()
        person.press("0")
        person.until("at.scale < .1 && coming.size === 0", "the whole again")


def test_learning_in_the_browser(chrome, site):
    for name, seed in (("a", 1), ("more_b", 2)):
        images.write_labels(site.out / f"{name}_labels.tif", drawn(seed)[1])
        site.json("/done", {"image": name, "done": True})
    person = Person(chrome, site.server.address)
    person.until("!document.getElementById('learn').disabled")
    person.click("learn")
    person.until("news.learning.state === 'running'", "the start")
    person.until("['done', 'failed'].includes(news.learning.state)", "the end", 240)
    text = chrome.find_element("id", "learntext").text
    assert "AP@0.5 on 1 held-out image" in text and "before" in text, text
    weights = person.js("news.weights")
    person.click("swap")
    person.until(f"news.weights !== '{weights}'", "the other weights")
