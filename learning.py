"""What the page learns: rounds of training on images that were corrected by hand, and types of
cells from a few that were marked.

    rounds = learning.Learning(project)
    rounds.start()                     train_seg.py on the images that are done, or on with the last
    rounds.status()                    its state, loss and AP
    rounds.use(weights)                those of a round, or the ones before it
    types = learning.Types(project)
    types.teach()                      a linear head on the marked cells of all images
    types.of(opened)                   the type of each cell of an image

A round has a folder of its own: set/ with copies of images and labels, config.yaml, the run of
train_seg.py, and round.json: its state, the weights before and after, and what both score on the
images that were held out, in whole groups. Only better weights are used.
"""
from __future__ import annotations

import itertools
import json
import math
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import runs

with runs.lazy():
    import numpy as np
    import yaml

    import cells
    import data
    import images
    import metrics
    import model
    import segment
    import vectors

TRAINER = Path(__file__).resolve().parent / "train_seg.py"
DAMAGED = "remove it, the labels stay"
HELD = 0.2                      # of the images that are done, in whole groups
SEEN = 24.0                     # px, at least: as large the network sees the median cell


def _cut_column(labels: np.ndarray) -> int:
    """Where two thirds of the cells lie on the left, and one at least on either side."""
    _, cell, size = np.unique(labels[labels > 0], return_inverse=True, return_counts=True)
    x = np.sort(np.bincount(cell, np.nonzero(labels)[1]) / size)             # of their centres
    if len(x) < 2:
        raise ValueError(f"the one image that is done has {len(x)} cells; learning needs 2, one to "
                         "learn from and one to compare by, or a second image")
    first = min(max(1, round(2 / 3 * len(x))), len(x) - 1)
    return min(max(1, math.ceil((x[first - 1] + x[first]) / 2)), labels.shape[1] - 1)


class Learning:
    """The rounds of a page.Project, which knows images, what is done, and the weights in use."""

    def __init__(self, project: Any):
        self.project = project
        self.folder = project.out / ".page" / "learn"
        self.starting = threading.Lock()
        self.process: subprocess.Popen | None = None
        self.watcher: threading.Thread | None = None
        if (number := self.latest()) and self.record(number)["state"] in ("running", "comparing"):
            self.note(number, state="stopped")          # the page ended with it

    def latest(self) -> int:
        """Number of the last round, 0 before the first."""
        numbers = [int(path.parent.name[6:]) for path in self.folder.glob("round_*/round.json")]
        return max(numbers, default=0)

    def of(self, number: int) -> Path:
        return self.folder / f"round_{number}"

    def record(self, number: int) -> dict:
        return runs.read_record(self.of(number) / "round.json", DAMAGED)

    def note(self, number: int, **values: Any) -> None:
        path = self.of(number) / "round.json"
        before = runs.read_record(path, DAMAGED) if path.exists() else {}
        runs.write_text(path, json.dumps(before | values, indent=1))

    def status(self) -> dict:
        """Where the last round stands, with its curves."""
        number = self.latest()
        if not number:
            return {"state": "none"}
        record = self.record(number)
        log = runs.log_history(self.of(number) / "runs" / "learn" / "log.jsonl")
        return {**record, "round": number, "active": self.project.state["weights"],
                "loss": [(line["step"], line["loss"]) for line in log if "loss" in line],
                "AP": [(line["step"], line["val_AP@0.5"]) for line in log if "val_AP@0.5" in line]}

    def start(self) -> None:
        """Begin a round with the images that are done, or go on with one that was stopped."""
        with self.starting:                             # images are copied for a while
            if self.process is not None:
                raise ValueError("it is learning already")
            number = self.latest()
            if (run := self.of(number) / "runs" / "learn").exists():
                with runs.locked(run, "the learning of a page that was killed still goes on; wait "
                                 "for its end"):
                    pass
            if not number or self.record(number)["state"] != "stopped":
                number += 1
                self.prepare(number)
            self.note(number, state="running", problem="")
            with open(self.of(number) / "output.txt", "w", encoding="utf-8") as output:
                self.process = subprocess.Popen(
                    [sys.executable, str(TRAINER), str(self.of(number) / "config.yaml")],
                    stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        self.watcher = threading.Thread(target=self.watch, args=(number,), daemon=True)
        self.watcher.start()

    def prepare(self, number: int) -> None:
        """Copy the images that are done, and write the configuration."""
        project = self.project
        done = [name for name, entry in project.names.items()
                if project.of(name).get("done") and entry.path.exists()]
        if not done:
            raise ValueError("no image is marked as done yet; correct one, and press Done")
        full = [name for name in done if project.open(name).book.boxes]
        if len(full) < 2:                               # no other can be compared by
            done = full or done[:1]
        known_as = {name: data.stem_of(Path(f"{name}.tif")).removesuffix("_img") for name in done}
        for name, other in itertools.combinations(done, 2):
            if known_as[name] == known_as[other]:
                raise ValueError(f"{name} and {other} would both be learnt from as "
                                 f"{known_as[name]}; rename one of them")
        folder = self.of(number) / "set"
        shutil.rmtree(folder, ignore_errors=True)       # of a round that could not begin
        folder.mkdir(parents=True)
        diameters = []
        for name in done:
            opened = project.open(name)
            with opened.for_network() as source:
                H, W = opened.size
                pixels, labels = source.region(0, H, 0, W), opened.book.labels.copy()
                channels = source.channels
            diameters.append(data.median_diameter(labels))
            # a single image is learnt from on the left; the right is held out, as the last frame
            # of a time-lapse would be
            cut = W if len(done) > 1 else _cut_column(labels)
            parts = {"": slice(0, W)} if cut == W else {"_t1": slice(0, cut), "_t2": slice(cut, W)}
            for end, part in parts.items():
                images.write_image(folder / f"{known_as[name]}{end}.tif",
                                   images.Image(pixels[:, :, part], channels, None))
                images.write_labels(folder / f"{known_as[name]}{end}_masks.tif", labels[:, part])
        config = learning_config(Path(project.state["weights"]), folder.parent,
                                 project.config.learn_steps)
        runs.write_text(folder.parent / "config.yaml", yaml.safe_dump(config, sort_keys=False))
        held = [each.name for each in data.hold_out(data.examples(folder), HELD, 0)]
        if len(full) > 1 and not {known_as[name] for name in full} & {*held}:   # none to find there
            for name in {*done} - {*full}:
                for end in ("", "_masks"):
                    (folder / f"{known_as[name]}{end}.tif").unlink()
            done = full
            held = [each.name for each in data.hold_out(data.examples(folder), HELD, 0)]
        self.note(number, state="stopped", before=project.state["weights"], images=done, held=held,
                  steps=config["steps"], diameter_before=project.state.get("diameter"),
                  diameter=round(float(np.median([d for d in diameters if d])), 1))

    def watch(self, number: int) -> None:
        """Wait for a run; if it came to its end, use its weights where they are better."""
        process = self.process
        assert process is not None
        code = process.wait()
        if code == 0:
            self.note(number, state="comparing")
            try:
                self.compare(number)
            except runs.FAILURES as error:              # the next round may begin
                self.note(number, state="failed", problem=runs.error_sentence(error))
        elif code in (runs.REQUEUE, 130, -signal.SIGTERM):      # the last: before its first step
            self.note(number, state="stopped")
        else:
            output = (self.of(number) / "output.txt").read_text(encoding="utf-8")
            self.note(number, state="failed", problem=last_line(output))
        self.process = None

    def compare(self, number: int) -> None:
        """Score old and new weights on the held-out images; the better ones are used."""
        folder, record = self.of(number), self.record(number)
        after = str((folder / "final_models" / "learn.pt").resolve())
        held = [example for example in data.examples(folder / "set")
                if example.name in record["held"]]
        device = self.project.config.device
        scores = {"before": held_out_scores(record["before"], held, record["diameter_before"],
                                            device),
                  "after": held_out_scores(after, held, record["diameter"], device)}
        better = scores["after"]["AP"] > scores["before"]["AP"]
        self.note(number, state="done", after=after, scores=scores, better=better)
        if better:
            self.use(after)

    def use(self, weights: str) -> None:
        """Use these weights, and the diameter of their cells, from now on; maps of others are made
        anew when they are asked for."""
        known: dict[str, float | None] = {}
        for number in range(1, self.latest() + 1):
            record = self.record(number)
            known.setdefault(record["before"], record["diameter_before"])
            if "after" in record:
                known[record["after"]] = record["diameter"]
        if weights not in known:
            raise ValueError("no such weights among those that were used here")
        with self.project.lock:
            self.project.state |= {"weights": weights, "diameter": known[weights]}
            self.project.remember()

    def stop(self) -> None:
        """Ask the run to save and stop."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)

    def close(self) -> None:
        self.stop()
        if self.watcher is not None:
            self.watcher.join(60)


class Types:
    """Types of cells for a page.Project, from the cells that were marked."""

    def __init__(self, project: Any):
        self.project = project
        self.net: Any = None                            # a network that tells types
        self.net_file = ""

    def names(self) -> list[str]:
        """Those that the weights in use tell, then those of the marks, the first marked first."""
        return list(dict.fromkeys([*self.project.network().type_names,
                                   *self.project.state.get("type_order", [])]))

    def known(self) -> list[dict]:
        """Name, colour and number of marks of each type."""
        opened, counts = self.project.opened, Counter[str]()
        for name, state in self.project.state["images"].items():
            counts.update(opened[name].marked_types() if name in opened else state.get(
                "marked", [type_ for _, _, type_ in state.get("marks", ())]))
        colours = cells.cell_type_colours(self.names())
        return [{"name": name, "colour": "#" + bytes(colour).hex(), "marks": counts[name]}
                for name, colour in colours.items()]

    def note(self, name: str) -> None:
        """Remember a type."""
        order = self.project.state.setdefault("type_order", [])
        if name not in order:
            order.append(name)

    @property
    def version(self) -> int:
        return self.project.state.get("types", {}).get("version", 0)

    def file(self) -> str | None:
        """Weights that tell types: those taught for the weights in use, or these themselves."""
        taught, weights = self.project.state.get("types", {}), self.project.state["weights"]
        if taught.get("weights") == weights and Path(taught["file"]).is_file():
            return taught["file"]
        return weights if self.project.network().type_names else None

    def teach(self) -> None:
        """Learn from the marks in all images; the result is a file of weights that tells types."""
        project, net = self.project, self.project.network()
        begin, rows, types = time.perf_counter(), [], []
        for name in (name for name in project.names if project.of(name).get("marks")):
            opened = project.open(name)
            found, marks = opened.cell_vectors(net), opened.marked()
            for cell, row in zip(found.ids.tolist(), found.vectors):
                if cell in marks:
                    rows.append(row)
                    types.append(marks[cell][2])
        names = [name for name in self.names() if name in types]
        if len(names) < 2:
            raise ValueError(f"cells of {runs.listed(names) or 'no type'} are marked, expected two "
                             "types or more")
        head = vectors.linear_type_head(
            np.stack(rows), np.array([names.index(name) for name in types]), len(names))
        weights = project.net_file
        typed = model.load(weights)
        file = project.out.resolve() / f"{Path(weights).stem}_types.pt"
        typed.set_types(head, names)
        model.save(typed, file, half=True)
        with project.lock:
            self.net, self.net_file = typed, str(file)
            project.state["types"] = {
                "file": str(file), "weights": weights, "marks": len(types),
                "version": self.version + 1, "seconds": round(time.perf_counter() - begin, 2)}
            project.remember()

    def of(self, opened: Any) -> dict[int, tuple[str, float]] | None:
        """Type and probability of each cell of an image; None: they are not known yet."""
        file, found = self.file(), opened.known_vectors()
        if file is None or found is None:
            return None
        if self.net_file != file:
            self.net, self.net_file = model.load(file), file
        share = self.net.type_probabilities(found.vectors)
        names = [self.net.type_names[i] for i in share.argmax(1)]
        told = zip(found.ids.tolist(), names, share.max(1).round(3).tolist())
        return {cell: (name, value) for cell, name, value in told if cell in opened.book.boxes}


def learning_config(weights: Path, folder: Path, steps: int) -> dict:
    """Configuration of train_seg.py for a few corrected images: the decoder learns, types stay.

    Their cells are scaled to the size that the network knows; two validations, for each searches
    the best thresholds, which takes as long as a hundred steps.
    """
    net = model.load(weights)
    return {"experiment": "learn", "output_base_dir": str(folder), "init": str(weights),
            "few": True,
            "data": {"root": str(folder), "sets": [{"path": "set"}], "share": HELD,
                     "diameter": max(SEEN, net.settings.diameter or 0)},
            "augment": {"scale": [0.5, 1.67]}, "cap": net.settings.cap, "crop": net.settings.tile,
            "batch": 8, "edge_weight": 3, "seam_weight": 10, "optimiser": "muon", "lr": 5e-4,
            "steps": steps, "warmup": min(20, steps - 1), "ema": 0.98,
            "val_every": -(-steps // 2), "log_every": min(5, max(1, steps // 10)),
            "save_every": max(1, steps // 10)}


def held_out_scores(weights: str, held: list, diameter: float | None,
                    device: str) -> dict[str, float]:
    """AP@0.5 and AP over IoU 0.5 to 0.95, mean over the images, with the weights' own thresholds.
    """
    net = model.load(weights).ready(runs.pick_device(device))
    precision = np.array([metrics.average_precision(
        example.labels(), segment.segment(example.image().pixels, net, diameter=diameter))
        for example in held])
    return {"AP@0.5": float(precision[:, 0].mean()), "AP": float(precision.mean())}


def last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1].removeprefix("error: ") if lines else "no word on why"
