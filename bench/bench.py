"""Speed, as ratios in one run on one machine: every row stands beside what it is compared with.

    python bench/bench.py                         everything but what is slow
    python bench/bench.py watershed segment       some of it: watershed, metrics, segment,
                                                  processor;
                                                  threads, ssl, stream, seams, memory (slow)

Medians of several runs; the header names hardware and versions. With a CUDA device the network and
the watershed run there as well.
"""
from __future__ import annotations

import importlib
import platform
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def hardware() -> str:
    import torch
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((line.split(":")[1].strip() for line in info.read_text().splitlines()
                    if "model name" in line), cpu)
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{cpu}, {torch.get_num_threads()} threads{gpu}"


def versions() -> str:
    from importlib.metadata import version
    packages = ("torch", "numpy", "scipy", "scikit-image")
    return ", ".join([f"Python {platform.python_version()}",
                      *(f"{name} {version(name)}" for name in packages)])


def seconds(run, repeats: int = 5) -> float:
    """Median wall time, after one run that warms up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def table(title: str, head: list[str], rows: list[list[str]]) -> None:
    """A Markdown table, to be pasted as it is."""
    print(f"\n**{title}**\n\n| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    sys.stdout.flush()


def cells_map(size: int, cells: int, seed: int = 0, cap: float | None = None,
              levels: int | None = None,
              blur: float = 1.0):
    """Touching round cells as a network would draw them: (size, size) float32 in [0, 1]."""
    import numpy as np
    from scipy import ndimage
    rng = np.random.default_rng(seed)
    y, x = (rng.random((2, cells)) * size).astype(int)
    away = np.ones((size, size), bool)
    away[y, x] = False
    distance, nearest = ndimage.distance_transform_edt(away, return_indices=True)
    owner = np.zeros((size, size), int)
    owner[y, x] = np.arange(cells)
    owner = owner[tuple(nearest)]  # Voronoi regions, cut to discs: some touch, some do not
    inside = distance < np.sqrt(size * size / cells / np.pi) * rng.uniform(0.6, 1.1, cells)[owner]
    border = (owner != np.roll(owner, 1, 0)) | (owner != np.roll(owner, 1, 1))
    d = ndimage.distance_transform_edt(inside & ~border)
    d = (
        np.minimum(d, cap) / cap
        if cap
        else d / np.maximum(ndimage.maximum(d, owner, np.arange(cells))[owner], 1)
    )
    d = ndimage.gaussian_filter(d, blur)
    return (np.round(d * levels) / levels if levels else d).astype(np.float32)


def watershed() -> None:
    import torch
    from scipy import ndimage
    from skimage.segmentation import watershed as theirs

    from watershed import watershed as ours
    rows = []
    for name, cap, levels in (("smooth", None, None), ("capped at 4 px", 4.0, None),
                              ("capped at 6 px, 16 levels", 6.0, 16)):
        d = cells_map(2048, 2000, cap=cap, levels=levels)
        reference = seconds(lambda: theirs(-d, ndimage.label(d > 0.47)[0], mask=d > 0.09), 3)
        expected, got = theirs(-d, ndimage.label(d > 0.47)[0], mask=d > 0.09), ours(d)
        took = seconds(lambda: ours(d), 7)
        rows.append([f"{name}, CPU", f"{reference:.3f} s", f"{took:.3f} s",
                     f"{reference / took:.1f} x",
                     f"{(expected == got).mean():.2%}"])
        if torch.cuda.is_available():
            on_gpu = torch.from_numpy(d).cuda()

            def run():
                ours(on_gpu)
                torch.cuda.synchronize()
            took = seconds(run, 7)
            rows.append([f"{name}, GPU", f"{reference:.3f} s", f"{took:.4f} s",
                         f"{reference / took:.0f} x",
                         f"{(expected == ours(on_gpu).cpu().numpy()).mean():.2%}"])
    table("Watershed, 2048 x 2048 px, 2,000 cells", ["map", "scikit-image", "watershed.py",
                                                     "faster", "same pixels"], rows)


def cell_pair(size: int = 2048, cells: int = 5000, move: float = 2.0, seed: int = 0):
    """Two int32 label images of touching cells about size / sqrt(cells) px wide; the second's
    centres are moved."""
    import numpy as np
    from scipy.spatial import cKDTree
    rng, across = np.random.default_rng(seed), int(np.ceil(np.sqrt(cells)))
    pitch = size / across  # px
    grid = np.stack(np.divmod(np.arange(cells), across), axis=1)
    centres = (grid + 0.5 + rng.uniform(-0.25, 0.25, (cells, 2))) * pitch
    pixels = np.indices((size, size)).transpose(1, 2, 0).reshape(-1, 2)
    for points in (centres, centres + rng.normal(0, move, (cells, 2))):
        distance, nearest = cKDTree(points).query(pixels, workers=2)
        yield np.where(distance < 0.6 * pitch, nearest + 1, 0).reshape(size, size).astype(np.int32)


def metrics() -> None:
    """All scores at ten thresholds of two 2048 x 2048 images of 5,000 cells, against one joint
    bincount of them."""
    import numpy as np

    from metrics import THRESHOLDS, match, scores
    truth, pred = cell_pair()

    def joint():
        np.bincount(truth.ravel() * np.int64(pred.max() + 1) + pred.ravel())
    reference, ours = seconds(joint, 15), seconds(lambda: scores(truth, pred), 15)
    rows = [["one joint np.bincount", f"{reference * 1e3:.0f} ms", "1"],
            ["metrics.scores, every score, ten thresholds", f"{ours * 1e3:.0f} ms",
             f"{ours / reference:.2f}"]]
    try:
        from cellpose.metrics import average_precision
        from stardist.matching import matching
        matching(truth[:64, :64], pred[:64, :64])            # numba compiles on the first call
        theirs: dict = {}
        for name, run in (("stardist.matching",
                           lambda: theirs.update(s=matching(truth, pred, thresh=THRESHOLDS))),
                          ("cellpose.metrics.average_precision",
                           lambda: theirs.update(c=average_precision(truth, pred,
                                                                     list(THRESHOLDS))))):
            took = seconds(run, 1)
            rows.append([f"{name}, ten thresholds", f"{took * 1e3:.0f} ms",
                         f"{took / reference:.0f}"])
        tps = [match(truth, pred, t).tp for t in THRESHOLDS]
        assert tps == [one.tp
                       for one in theirs["s"]] == theirs["c"][1].tolist(), "peers count other pairs"
    except ImportError as missing:
        rows.append([f"peers left out ({missing}); see tests/requirements-peers.txt", "-", "-"])
    table("Scores of a pair of 2048 x 2048 label images, 5,000 cells each",
          ["what", "time", "ratio"], rows)


def mosaic(size: int, channel: str = "ER"):
    """A synthetic field repeated, every other copy mirrored, to (size, size) uint16; yields tiles
    of 512 px row by row."""
    import numpy as np

    import synthetic
    field = synthetic.field(0, 1024, 260)
    one = field.pixels[field.channels.index(channel)]
    block = np.block([[one, one[:, ::-1]], [one[::-1], one[::-1, ::-1]]])
    for y in range(0, size, 512):
        for x in range(0, size, 512):
            y0, x0 = y % 2048, x % 2048
            yield block[y0:y0 + 512, x0:x0 + 512][:size - y, :size - x]


def whole_image(size: int, folder: Path) -> Path:
    """mosaic() as a tiled, compressed TIFF."""
    import numpy as np
    import tifffile
    path = folder / f"mosaic_{size}.tif"
    full = (np.pad(t, [(0, 512 - t.shape[0]), (0, 512 - t.shape[1])]) for t in mosaic(size))
    tifffile.imwrite(path, full, shape=(size, size), dtype=np.uint16, tile=(512, 512),
                     compression="zlib",
                     bigtiff=True, photometric="minisblack")
    return path


def segment() -> None:
    """infer.py's work on one image, part by part, with the weights that ship."""
    import tempfile
    from collections import Counter

    import infer
    import model
    import runs
    device, rows = runs.pick_device("auto"), []
    with tempfile.TemporaryDirectory() as folder:
        for name, size in (("tiny", 1024), ("tiny", 2048),
                           ("s8", 1024 if device == "cpu" else 2048)):
            weights = model.find_weights(name)
            network = model.load(weights).ready(device)
            path = whole_image(size, Path(folder))
            times = []
            for _ in range(3):
                clock, start = Counter[str](), time.perf_counter()
                infer.segment_file(path, path.stem, Path(folder), network,
                                   infer.Config(), clock=clock)
                times.append((time.perf_counter() - start, clock))
            took, clock = sorted(times, key=lambda one: one[0])[1]
            rows.append([weights.stem, f"{size} x {size}", f"{took:.2f} s",
                         f"{size**2 / 1e6 / took:.2f}",
                         *(f"{clock[part] / took:.1%}" for part in ("read", "network", "watershed",
                                                                    "measure", "write"))])
    table(f"infer.py, one image to all its files, on the {'CPU' if device == 'cpu' else 'GPU'}",
          ["network", "px", "time", "MP/s", "read", "network", "watershed", "measure", "write"],
          rows)


def memory(sizes: tuple[int, ...] = (1024, 4096, 20000)) -> None:
    """Peak memory (RSS) of the whole infer.py process on tiled 16-bit TIFFs.

    The largest takes minutes to hours.
    """
    import subprocess
    import tempfile
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for size in sizes:
            path = whole_image(size, Path(folder))
            watch = ("import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True); "
                     "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)")
            start = time.perf_counter()
            done = subprocess.run([sys.executable, "-c", watch, sys.executable,
                                   str(Path(__file__).resolve().parent.parent / "infer.py"),
                                   str(path),
                                   "weights=tiny", f"out={folder}/{size}"], capture_output=True,
                                  text=True)
            took = time.perf_counter() - start
            if done.returncode:
                raise RuntimeError(done.stderr)
            unit = 1 if sys.platform == "darwin" else 1024
            rows.append([f"{size} x {size}", f"{size**2 * 2 / 1e6:.0f} MB", f"{took:.0f} s",
                         f"{int(done.stdout.split()[-1]) * unit / 2**30:.2f} GiB"])
            table("Peak memory of infer.py", ["px", "16-bit image", "time", "peak RSS"], rows[-1:])


def seams(size: int = 4096) -> None:
    """One block against blocks of 1024 px on one large image: the cells must be the same."""
    import tempfile

    import data
    import model
    import segment
    from metrics import average_precision
    weights = model.find_weights("demo_synthetic")
    net = model.load(weights)
    with (
        tempfile.TemporaryDirectory() as folder,
        data.open_image(whole_image(size, Path(folder))) as source,
    ):
        limits = data.percentiles(source)
        one = segment.segment(source, net, limits=limits, block=size)
        many = segment.segment(source, net, limits=limits, block=1024)
    table(f"Seams: {size} x {size} px in one block against blocks of 1024 px, {weights.name}",
          ["cells in one block", "in blocks", "AP@0.9 of one against the other"],
          [[str(one.max()), str(many.max()), f"{average_precision(one, many, [0.9])[0]:.5f}"]])


def elsewhere(file: str, part: str):
    """A part with a file of its own, which takes its table from here."""
    return lambda: getattr(importlib.import_module(file), part)()


PARTS = {"watershed": watershed, "metrics": metrics, "segment": segment,
         "processor": elsewhere("bench_processor", "processor"),
         "threads": elsewhere("bench_processor", "threads"),
         "ssl": elsewhere("bench_ssl", "ssl"), "stream": elsewhere("bench_stream", "stream"),
         "seams": seams, "memory": memory}
SLOW = ("threads", "ssl", "stream", "seams", "memory")


if __name__ == "__main__":
    if "--help" in sys.argv or "-h" in sys.argv:
        sys.exit(print(__doc__.strip()))
    chosen = sys.argv[1:] or [part for part in PARTS if part not in SLOW]
    if unknown := set(chosen) - set(PARTS):
        sys.exit(f"error: unknown part '{min(unknown)}'; parts: {', '.join(PARTS)}")
    print(f"{hardware()}; {versions()}; {time.strftime('%Y-%m-%d')}")
    for part in chosen:
        PARTS[part]()
