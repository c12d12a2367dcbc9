"""Thresholds of the instructed network: of the watershed, of stain and tissue, of what is known, belongs, is there.

    scores = calibrate(net, bank, train_tiles, folder, 250, encoder)     on validation tiles and their own wordings
"""
from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import instructions
import histology


def calibrate(net, bank, train_tiles: list[histology.Tile], folder: Path, side: int, encoder) -> dict[str, float]:
    """Every threshold in net.words and the watershed's, on validation tiles and calibration wordings."""
    import torch
    import answer
    import metrics
    import segment
    import watershed
    net.cpu().eval()
    bank.to("cpu")
    words = net.words
    held = [part for part, _ in histology.parts_of(folder, "validation", side)]
    if not held:
        raise ValueError(f"{folder}/validation: no tiles; make the set with a larger hold_out=")
    distances = [segment.distances(histology.normalised(t.pixels), net, limits=segment.UNIT) for t in held]

    def precision(setting: watershed.Setting, *ious: tuple) -> list[float]:
        return [float(metrics.average_precision(tile.labels, watershed.flood(distance, setting), *ious).mean())
                for tile, distance in zip(held, distances)]

    def score(setting: watershed.Setting) -> float:            # each tissue counts the same
        values, by_tissue = precision(setting), {}
        for tile, value in zip(held, values):
            by_tissue.setdefault(tile.tissue, []).append(value)
        return float(np.mean([np.mean(some) for some in by_tissue.values()]))

    best = watershed.tune(score, min_area=(histology.LEAST,))
    net.settings = dataclasses.replace(net.settings, **best._asdict())
    scores = {"val_AP@0.5": float(np.mean(precision(best, (0.5,)))),
              **{name: value for name, value in best._asdict().items() if name != "min_area"}}

    # the tissue: how far tiles of an image lie from the others, image by image (or in six lots of them)
    tokens, lots = [], []
    own = [tile for tile in train_tiles if tile.tissue] or train_tiles       # of the others nobody said what they are
    for number, tile in enumerate(own):
        for box in histology.boxes_of(tile.labels.shape, side):
            pixels = torch.from_numpy(histology.normalised(histology.cut(tile, box).pixels))
            with torch.inference_mode():
                tokens.append(answer.embeddings(pixels, net)[1])
            lots.append(number % 6 if len(own) > 6 else number)
    tokens, lots = torch.stack(tokens), torch.tensor(lots)
    away = []
    for lot in lots.unique():
        if (lots != lot).any():
            fit_tissue(net, tokens[lots != lot])
            away += [net.strangeness(token) for token in tokens[lots == lot]]
    fit_tissue(net, tokens)
    words.tissue = float(np.quantile(away, 0.95)) if away else float("inf")
    named = [tile for tile in held if tile.tissue] or held
    stains = np.array([answer.stain(t.pixels)[0] for t in named])
    fakes = np.array([answer.stain(fake)[0] for t in named for fake in no_stain(t.pixels)])
    real = np.arange(len(stains) + len(fakes)) < len(stains)
    words.stain, scores["stain"] = best_line(np.append(stains, fakes), real)
    scores["tissue_line"] = words.tissue
    if words.classes:
        return scores

    with torch.inference_mode():
        said = net.read(bank.vectors)
        for row, name in enumerate(words.trained):
            mine = torch.tensor([line["targets"] == [name] and line["task"] not in ("exclude", "compare") and
                                 line["kind"] == "known" for line in bank.lines])
            net.prototypes[row] = torch.nn.functional.normalize(said.vectors[mine].sum(0), dim=0)
        lines = histology.pairs_of(folder, "validation")
        said = net.read(encoder([line["instruction"] for line in lines]))
        readings = answer.interpret(said, words)
        words.known, scores["known"] = best_line(np.array([r.confidence for r in readings]),
                                                        np.array([line["kind"] == "known" for line in lines]))
        cells, belong, most, there, areas, inside = [], [], [], [], [], []
        held = histology.relabelled(held)
        views = [answer.look(t.pixels, net, t.labels) for t in held]
        for line, vector in zip(lines, said.vectors):
            if line["kind"] != "known" or len(line["targets"]) > 1:
                continue
            for tile, view in zip(held, views):
                if set(line["targets"]) & set(words.regions):
                    plane = view.plane.flatten(1)[:, ::97]
                    areas.append(net.similarity(vector[None], plane.T)[0].sigmoid().numpy())
                    inside.append(tile.regions[line["targets"][0]].ravel()[::97])
                    continue
                member = instructions.membership(list(tile.classes.values()), line["targets"],
                                                 line["task"] == "exclude")
                if not len(member) or (member == 0).any():
                    continue
                p = net.similarity(vector[None], view.cells)[0].sigmoid().numpy()
                cells.append(p)
                belong.append(member > 0)
                most.append(p.max())
                there.append((member > 0).any())
    if cells:
        words.belongs, scores["belongs"] = best_line(np.concatenate(cells), np.concatenate(belong),
                                                            "F1")
        words.present, scores["present"] = best_line(np.array(most), np.array(there))
        words.present = max(words.present, words.belongs)
    if areas:
        words.pixel, scores["pixel"] = best_line(np.concatenate(areas), np.concatenate(inside), "F1")
    return scores


def best_line(values: np.ndarray, truth: np.ndarray, score: str = "balanced"
              ) -> tuple[float, float | None]:
    """(threshold, score) where `value >= threshold` tells truth best: balanced accuracy, or F1."""
    order = np.argsort(values, kind="stable")
    values, truth = np.asarray(values, float)[order], np.asarray(truth, bool)[order]
    ends = np.flatnonzero(np.diff(values) > 0) + 1         # a line midway between neighbours: these lie above
    if truth.all() or not truth.any() or not len(ends):
        return 0.5, None                                   # only one side there is: nothing to choose
    missed = np.cumsum(truth)[ends - 1]                                      # true ones below each line
    false = (~truth).sum() - (ends - missed)                                 # false ones above it
    hit = truth.sum() - missed
    if score == "F1":
        right = 2 * hit / (2 * hit + missed + false)
    else:
        right = 0.5 * (hit / truth.sum() + 1 - false / (~truth).sum())
    best = int(right.argmax())
    return float(values[ends[best] - 1] + values[ends[best]]) / 2, float(right[best])


def fit_tissue(net, tokens) -> None:
    """Mean and whitening of mean tokens (n, D); their covariance is shrunk by 0.3, as n is small."""
    import torch
    net.centre.copy_(tokens.mean(0))
    centred = tokens - tokens.mean(0)
    covariance = centred.T @ centred / max(len(tokens) - 1, 1)
    D = len(covariance)
    covariance = 0.7 * covariance + 0.3 * covariance.trace() / D * torch.eye(D) + 1e-6 * torch.eye(D)
    net.whiten.copy_(torch.linalg.inv(torch.linalg.cholesky(covariance)))


def no_stain(pixels: np.ndarray) -> Iterator[np.ndarray]:
    """What H&E is not, made from it: gray, negative, with its channels turned round, blank, noise."""
    yield np.repeat(pixels.mean(0, keepdims=True), 3, 0).astype(np.uint8)
    yield 255 - pixels
    yield pixels[[1, 2, 0]]
    yield pixels[[2, 0, 1]][::-1]
    yield np.full_like(pixels, 245)
    yield np.random.default_rng(0).integers(0, 256, pixels.shape, np.uint8)
