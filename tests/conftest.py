"""Puts the flat folder on the path, finds ../shared, and starts the S3 server of tests."""
import contextlib
import gc
import os
import sys
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config) -> None:
    """The whole suite runs in two processes, a file in one of them; single files and -k in one."""
    if hasattr(config, "workerinput"):                        # this is one of the two
        return
    options = config.option
    whole = all(Path(name).is_dir() for name in config.args) and not (
        options.keyword or options.collectonly or options.usepdb)
    if whole and config.pluginmanager.hasplugin("xdist") and options.numprocesses is None:
        options.numprocesses, options.dist = 2, "loadfile"
        options.loadscopereorder = False                      # or the slowest file would come last
        os.environ["OMP_NUM_THREADS"] = "1"                   # theirs


def pytest_collection_modifyitems(items) -> None:
    """The slowest file first: nobody waits for it while the other process has no more to do."""
    items.sort(key=lambda item: item.path.name != "test_weights.py")


def write_geojson(path, labels, columns=None, origin=(0, 0), names=()) -> None:
    """Write the outlines of labels as infer.py does, at once."""
    import cells
    writer = cells.GeoWriter(path, names)
    writer.add(cells.polygons(labels, origin).items(), columns or {})
    writer.close()


@pytest.fixture(scope="session")
def shared() -> Path:
    """Reference outputs and labelled images, not in the repository: without them tests skip."""
    folder = Path(os.environ.get("DINOCELL_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"needs the reference data folder {folder.name}/ beside the checkout (or "
                    "DINOCELL_SHARED)")
    return folder


@pytest.fixture(scope="session")
def jump_server():
    """See jump_fields.py."""
    import jump_fields
    from fault_proxy import FaultyS3
    with FaultyS3((jump_fields.BUCKET, "cells")) as server:
        jump_fields.fill(server)
        yield server


@pytest.fixture
def server(jump_server, monkeypatch):
    """The server without faults, named by AWS_ENDPOINT_URL; no thread, no socket is left over."""
    import s3
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", jump_server.url)
    monkeypatch.setattr(s3, "QUIET", 0.3)                     # quick complaints
    monkeypatch.setattr(s3, "LONGEST", 0.5)
    monkeypatch.setattr(s3, "READ", 2.0)
    jump_server.set()
    before = sockets()
    yield jump_server
    assert not [t.name for t in threading.enumerate() if t.name.startswith("fields")]
    if sockets() > before:                                    # a cycle may hold them yet
        gc.collect()
    assert sockets() <= before


def sockets() -> int:
    found = 0
    for number in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else ():
        with contextlib.suppress(FileNotFoundError):          # the listing itself
            found += os.readlink(f"/proc/self/fd/{number}").startswith("socket:")
    return found
