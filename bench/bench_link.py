"""Linking beside other programs, in one run: stacks, movies, drawn movies, speed.

    python bench/bench_link.py [../shared/volumes] [network | cosine]

True labels of each plane, numbered anew at random, go into link.py, cellpose's stitch3D and
laptrack, where these are installed; laptrack as it comes and with the best of 12 settings by LNK,
which nobody knows who has no truth. network: the labels of infer.py on both movies instead. cosine:
whether the likeness of the network's vectors helps to link.
"""
from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import tifffile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import link  # noqa: E402
import metrics  # noqa: E402
import synthetic  # noqa: E402
from bench import hardware, table, versions  # noqa: E402

# The truth of this movie names no parents; these divisions are seen in it: daughter, mother.
DIVISIONS = {43: 5, 44: 5, 57: 8, 58: 8, 63: 20, 64: 20}
NETWORK = {"tracks_gowt1": 58, "tracks_sim_plus": 50}         # px, diameter of the cells
CUTOFFS = (15, 25, 40)                                        # px, of laptrack


def shuffled(volume: np.ndarray) -> list[np.ndarray]:
    rng, planes = np.random.default_rng(0), []
    for plane in volume:
        ids, index = np.unique(np.append(plane, 0), return_inverse=True)
        new = np.append(0, rng.permutation(len(ids) - 1) + 1)
        planes.append(new[index[:-1]].reshape(plane.shape).astype(np.int32))
    return planes


def timed(run):
    start = time.perf_counter()
    return run(), time.perf_counter() - start


# ------------------------------------------------------------------------------------------- slices

def stacks(folder: Path) -> None:
    try:
        from cellpose.utils import stitch3D
    except ImportError:
        stitch3D = None
    rows = []
    for file in sorted(folder.glob("stack_*/*/*_labels.tif")):
        truth = tifffile.imread(file).astype(np.int32)
        planes = np.stack(shuffled(truth))
        answers = [timed(lambda planes=planes: link.stitch(planes))]
        answers += [timed(lambda planes=planes: stitch3D(planes.copy()))] if stitch3D else []
        cells = str(len(np.unique(truth)) - 1)
        rows.append([file.name.removesuffix("_labels.tif"), cells, *(
            f"{metrics.average_precision(truth, found, 0.5):.3f} ({seconds:.2f} s)"
            for found, seconds in answers)])
    table("Slices, AP@0.5 in 3-D", ["stack", "cells", "link.stitch", "cellpose stitch3D"], rows)


# ------------------------------------------------------------------------------------------- frames

def movies(folder: Path):
    """Name, labels, tracks, and what the truth knows."""
    for file in sorted(folder.glob("tracks_*/*/*_labels.tif")):
        labels = tifffile.imread(file).astype(np.int32)
        listed = file.with_name(file.name.replace("_labels.tif", "_tracks.txt"))
        if listed.exists():
            yield file, labels, np.loadtxt(listed, dtype=int), "lineage as given"
            continue
        found = [np.flatnonzero((labels == k).any((1, 2))) for k in np.unique(labels)[1:]]
        tracks = np.array([(k, at[0], at[-1], 0) for k, at in zip(np.unique(labels)[1:], found)])
        yield file, labels, tracks, "no lineage"
        tracks = tracks.copy()
        tracks[:, 3] = [DIVISIONS.get(k, 0) for k in tracks[:, 0]]
        yield file, labels, tracks, "divisions by eye"


def laptrack_of(planes, cutoff: float, splitting: float | bool):
    """Labels and tracks by laptrack, measurement of the cells included."""
    import pandas
    from laptrack import LapTrack
    from skimage.measure import regionprops_table
    parts = [pandas.DataFrame(regionprops_table(plane, properties=("label", "centroid")))
             .assign(frame=t) for t, plane in enumerate(planes)]
    found, splits, _ = LapTrack(cutoff=cutoff ** 2, splitting_cutoff=splitting and splitting ** 2
                                ).predict_dataframe(
        pandas.concat(parts, ignore_index=True), ["centroid-0", "centroid-1"], "frame",
        only_coordinate_cols=False)
    if "frame" not in found:
        found = found.reset_index()
    time_of = "frame" if "frame" in found else "frame_y"
    parents = dict(zip(splits["child_track_id"], splits["parent_track_id"])) if len(splits) else {}
    volume = np.zeros((len(planes), *planes[0].shape), np.int32)
    spans: dict = {}
    for t, label, track in zip(found[time_of], found["label"], found["track_id"]):
        volume[t][planes[t] == label] = track + 1
        first, last = spans.get(track, (t, t))
        spans[track] = min(first, t), max(last, t)
    return volume, np.array([(k + 1, *spans[k], parents.get(k, -1) + 1) for k in sorted(spans)])


def beside(planes, truth, tracks, lineage: bool = True) -> list[str]:
    """TRA, LNK and seconds of link.track, and of laptrack's best setting."""
    def scored(answer):
        volume, rows = answer
        rows = rows if lineage else np.where(np.arange(4) == 3, 0, rows)
        found = metrics.track_scores(truth, volume, tracks, rows)
        return found["TRA"], found["LNK"], found["BC(1)"]

    answer, seconds = timed(lambda: link.track(planes))
    shown = "{:.4f} / {:.4f} / {:.2f}".format
    row = [shown(*scored(answer)), f"{seconds:.2f} s"]
    try:
        tried = [timed(lambda c=c, s=s: laptrack_of(planes, c, s))
                 for c in CUTOFFS for s in (False, *CUTOFFS)]
    except ImportError:
        return row
    best = max((answer for answer, _ in tried), key=lambda answer: scored(answer)[1])
    plain, seconds = tried[0]                                 # 15 px, no splitting: its defaults
    return [*row, shown(*scored(plain)), f"{seconds:.2f} s", shown(*scored(best))]


HEAD = ["movie", "link.track TRA / LNK / BC(1)", "time", "laptrack", "time",
        "laptrack, best of 12"]


def all_movies(folder: Path) -> None:
    rows = [[f"{file.parent.parent.name}, {known}",
             *beside(shuffled(labels), labels, tracks, known != "no lineage")]
            for file, labels, tracks, known in movies(folder)]
    for speed in (0.1, 0.2, 0.3):
        movie = synthetic.movie(0, frames=40, size=320, cells=140, diameter=20, speed=speed)
        rows.append([f"drawn, {speed:g} diameters a frame",
                     *beside(shuffled(movie.labels), movie.labels, movie.tracks)])
    table("Frames", HEAD, rows)


def speed() -> None:
    """1,000 frames of 200 cells, 512 x 512 px."""
    rng, disc = np.random.default_rng(0), np.argwhere(np.hypot(*np.mgrid[-13:14, -13:14]) < 13) - 13
    home = np.stack(np.meshgrid(*[np.arange(18, 500, 33)] * 2), -1).reshape(-1, 2)[:200]
    place, frames = home.astype(float), []
    for _ in range(1000):
        place += rng.normal(0, 1.5, place.shape) - 0.05 * (place - home)
        frame = np.zeros((512, 512), np.uint16)
        for k, at in enumerate(place.round().astype(int), 1):
            y, x = (at + disc).clip(0, 511).T
            frame[y, x] = k
        frames.append(frame)
    work = time.process_time()
    (_, tracks), seconds = timed(lambda: link.track(frames))
    print(f"\n1,000 frames of 200 cells: {seconds:.1f} s, {time.process_time() - work:.1f} s of a "
          f"core; {len(tracks)} tracks")


def network(folder: Path) -> None:
    import infer
    rows = []
    with tempfile.TemporaryDirectory() as out:
        for file, labels, tracks, known in movies(folder):
            if known == "divisions by eye":
                continue
            name = file.name.removesuffix("_labels.tif")
            for weights in ("tiny", "s8"):
                config = infer.Config(out=f"{out}/{weights}", weights=f"dinocell_{weights}",
                                      time="all", diameter=str(NETWORK[file.parent.parent.name]))
                infer.main(config, [str(file.with_name(f"{name}.tif"))])
                found = tifffile.imread(f"{out}/{weights}/{name}_labels.tif")
                lines = np.loadtxt(f"{out}/{weights}/{name}_tracks.csv", delimiter=",",
                                   skiprows=1, usecols=(0, 3, 4, 1), dtype=int, ndmin=2)
                if known == "no lineage":
                    lines[:, 3] = 0
                score = metrics.track_scores(labels, found, tracks, lines - [0, 1, 1, 0])
                rows.append([file.parent.parent.name, weights, *(
                    f"{score[key]:.3f}" for key in ("SEG", "DET", "TRA", "LNK", "CT", "TF"))])
    table("The network's own labels", ["movie", "weights", "SEG", "DET", "TRA", "LNK", "CT", "TF"],
          rows)


def cosine(folder: Path, weights: str = "tiny") -> None:
    """Links whose gain also counts the cosine of both cells' vectors, by a weight."""
    import model
    import segment
    net, rows = model.load(model.find_weights(weights)).ready("cpu"), []
    for file, labels, tracks, known in movies(folder):
        if known == "no lineage":
            continue
        planes, diameter = shuffled(labels), NETWORK[file.parent.parent.name]
        pictures = tifffile.imread(file.with_name(file.name.replace("_labels.tif", ".tif")))
        each = np.concatenate([segment.cell_vectors(picture, plane, net, diameter=diameter)[1]
                               for picture, plane in zip(pictures, planes)])
        each = (each - each.mean(0)) / each.std(0).clip(1e-6)
        each /= np.linalg.norm(each, axis=1, keepdims=True)
        usual = link.track_likeness
        for weight in (0, 0.1, 0.25, 0.5, 1):
            def likeness(table, first, second, far, weight=weight, usual=usual, each=each):
                alike = (each[first] * each[second]).sum(1)
                return usual(table, first, second, far) + weight * (alike - 1)
            link.track_likeness = likeness
            try:
                volume, lines = link.track(planes)
            finally:
                link.track_likeness = usual
            found = metrics.track_scores(labels, volume, tracks, lines)
            rows.append([file.parent.parent.name, f"{weight:g}", f"{found['TRA']:.4f}",
                         f"{found['LNK']:.4f}"])
    table(f"The cosine of vectors ({weights}) as a part of the gain",
          ["movie", "weight", "TRA", "LNK"], rows)


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word not in ("network", "cosine")]
    shared = Path(words[0] if words else "../shared/volumes")
    if words and not shared.is_dir():
        sys.exit(__doc__)
    print(f"{hardware()}; {versions()}")
    if "network" in sys.argv:
        network(shared)
    elif "cosine" in sys.argv:
        cosine(shared)
    else:
        speed()
        stacks(shared)
        all_movies(shared)
