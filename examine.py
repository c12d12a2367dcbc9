"""How good the instructed network is: tallies over tiles and instructions, and the report in words.

    asked = Asked(net, vectors)                    asked.mask(view, text): label image of what the text means
    judge(line, asked.reply(view, text), ...)      one pair of the test set
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np

import instructions


class Asked:
    """A network and the vectors of many instructions, encoded once."""

    def __init__(self, net, vectors: dict):
        import answer
        import torch
        self.net, self.answer = net, answer
        with torch.inference_mode():
            said = net.read(torch.stack(list(vectors.values())))
        self.said = {text: (vector, reading) for text, vector, reading in
                     zip(vectors, said.vectors, answer.interpret(said, net.words))}

    def reply(self, view, text: str):
        return self.answer.reply(view, text, *self.said[text], self.net)

    def mask(self, view, text: str, area: bool = False) -> np.ndarray:
        """Label image of a text's cells, or areas, by similarity alone: guardrails are judged apart."""
        if area:
            return self.answer.areas(view, self.said[text][0], self.net)
        mine = self.answer.chosen(view, self.said[text][0][None], self.net.words, self.net)[0]
        return view.labels * np.append(False, mine)[view.labels]


class Tally:
    """AP@0.5 and Dice of one class, pooled over tiles: many have no cell of it."""

    def __init__(self):
        self.tp = self.fp = self.fn = self.both = self.sum = self.images = 0

    def add(self, true: np.ndarray, found: np.ndarray) -> None:
        import metrics
        match = metrics.match(true, found, 0.5)
        self.tp, self.fp, self.fn = self.tp + match.tp, self.fp + match.fp, self.fn + match.fn
        self.both += int(((true > 0) & (found > 0)).sum())
        self.sum += int((true > 0).sum() + (found > 0).sum())
        self.images += 1

    def scores(self) -> dict:
        cells = self.tp + self.fp + self.fn
        return {"AP@0.5": self.tp / cells if cells else None,
                "Dice": 2 * self.both / self.sum if self.sum else None,
                "true": self.tp + self.fn, "found": self.tp + self.fp}


def of_fixed(view, name: str, net) -> np.ndarray:
    """Label image of the cells whose likeliest class of the fixed-class control is of this concept."""
    import torch
    with torch.inference_mode():
        best = net.classify(view.cells).argmax(1).tolist() if len(view.cells) else []
    mine = instructions.membership([net.words.classes[i] for i in best], [name]) > 0
    return view.labels * np.append(False, mine)[view.labels]


def mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return float(np.mean(values)) if values else None


def iou(a: np.ndarray, b: np.ndarray) -> float:
    union = ((a > 0) | (b > 0)).sum()
    return float(((a > 0) & (b > 0)).sum() / union) if union else 1.0


def judge(line: dict, reply, areas: set[str], right: Counter, counted: list) -> None:
    """One pair into the tallies: right {(what, whether): number}, counted [(true count, answered count)]."""
    asked_back, targets = reply.status == "question", set(line["targets"])
    checks = {"stain": reply.kind == "image", "tissue": reply.kind == "tissue",
              "text": asked_back and reply.kind not in ("image", "tissue")}
    if line["kind"] != "known":                                # the text must have told, not the picture
        beside = " beside a trained concept" * (len(targets) > 1)
        right[f"asked back: {line['kind']}{beside}", checks["text"]] += 1
    elif line["status"] == "question":
        right["asked back: another tissue than the training's", checks["tissue"]] += 1
    else:
        for name, alarm in checks.items():
            right[f"false alarm of the {name} check", alarm] += 1
        if line["task"] == "presence" and not targets & areas:
            said = reply.found.count > 0 if reply.found else None
            right["presence: yes or no", said == (line["count"] > 0)] += 1
        if asked_back:
            return
        right["task understood", reply.task == line["task"]] += 1
        right["targets understood", set(reply.targets) == targets] += 1
        if len(targets) == 1 and line["task"] != "exclude" and not targets & areas:
            true, said = line["count"], reply.found.count
            counted.append((true, said))
            right["present cells seen" if true else "absent cells not seen", (said > 0) == (true > 0)] += 1


def image_files(folder: str, count: int = 20) -> list[Path]:
    """The first images of a folder, without label files."""
    files = sorted(file for end in ("png", "tif", "jpg") for file in Path(folder).rglob(f"*.{end}"))
    labels = ("_nuclei", "_cells", "_types", "_labels", "_masks")
    files = [file for file in files if not file.stem.endswith(labels)]
    if not files:
        raise FileNotFoundError(f"{folder}: no images in it (png, tif, jpg)")
    return files[:count]


def corner(path: Path) -> np.ndarray:
    """Up to 500 x 500 px of an image, its first channel or three."""
    import data
    pixels = data.read_image(path).pixels[:3, :500, :500]
    return pixels if len(pixels) in (1, 3) else pixels[:1]


def in_words(result: dict) -> str:
    """The report as Markdown."""
    import report

    def shown(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"
    ways, keys = ("text", "shuffled", "fixed"), ("AP@0.5", "Dice")
    rows = [[name, str(scores["text"]["true"]),
             *(shown(scores.get(way, {}).get(key)) for key in keys for way in ways)]
            for name, scores in result["classes"].items() if scores]
    rates = [[name, f"{rate['right'] / rate['of']:.1%}", f"{rate['right']} of {rate['of']}"]
             for name, rate in sorted(result["rates"].items()) if rate["of"]]
    counting, same = result["counting"], result["paraphrases"]
    return "\n".join((
        report.markdown(["class", "true cells", *(f"{key} {way}" for key in keys for way in ways)], rows),
        report.markdown(["what", "share", "n"], rates),
        f"Counting: mean absolute error {shown(counting['mean_absolute_error'])} at a mean true count of "
        f"{shown(counting['mean_true_count'])} (n = {counting['n']}).",
        f"Five wordings of one question: mean IoU of their masks {shown(same['mean_iou'])} "
        f"({same['pairs']} pairs).",
        f"{result['tiles']} tiles, {result['pairs']} pairs, torch {result['torch']}, {result['weights']}.\n"))
