"""A vector per cell: the backbone's tokens, averaged over the cell's pixels; and what it tells.

    vectors, number = pooled(tokens, labels, patch)         # training: tensors, with gradients
    pool = TokenPool(patch, D, window); pool.add(y, x, tokens)   # inference: tile by tile ...
    rows = pool.of(labels, ids, corner, scales)             # ... (n, D) of the cells `ids`
    rows = type_rows(rows, table, zoom)                     # ... with their outlines, (n, D + 8)
    head = linear_type_head(rows, types, count); type_probabilities(head, rows)

The tokens are those of the last block, normalised each to mean 0 and variance 1, at the scale at
which the network sees the image. A token counts for a cell by the pixels that both share.

Letters: n cells, D token width, K types, B crops, N tokens of a crop, P pairs.
"""
from __future__ import annotations

import math
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import runs

PENALTY = 0.1           # of the squared weights of a linear head, beside the mean cross-entropy
# columns of cells.cell_table that tell types beside vectors: what depends on the cell alone
OUTLINE = ("area_px", "perimeter_px", "major_axis_px", "minor_axis_px", "eccentricity", "solidity",
           "extent", "circularity")
VOTES = 20              # neighbours that tell a type, at most


# ------------------------------------------------------------------------------------------ pooling

def token_sums(cell: Tensor, token: Tensor, weight: Tensor, tokens: Tensor, n: int
               ) -> tuple[Tensor, Tensor]:
    """Sums (n, D) of tokens (N, D) over pixels, each of a cell (P,) and a token (P,); weights (n,).
    """
    N = len(tokens)
    pairs, index = torch.unique(cell * N + token, return_inverse=True)       # far fewer than pixels
    weight = weight.new_zeros(len(pairs)).index_add(0, index, weight)
    row = pairs // N
    sums = tokens.new_zeros(n, tokens.shape[1]).index_add(
        0, row, tokens[pairs % N] * weight[:, None].to(tokens.dtype))
    return sums, weight.new_zeros(n).index_add(0, row, weight)


def even_vector_lengths(tokens: Tensor) -> Tensor:
    """Tokens (..., D) with mean 0 and variance 1 each, float32."""
    return F.layer_norm(tokens.float(), tokens.shape[-1:])


def pooled(tokens: Tensor, labels: Tensor, patch: int) -> tuple[Tensor, Tensor]:
    """Vectors (n, D) of all cells in crops, from tokens (B, N, D) and labels (B, S, S).

    Returns them with the place of each, (n, 2): crop and label.
    """
    B, N, D = tokens.shape
    b, y, x = labels.nonzero(as_tuple=True)                                  # (P,) each
    across, number = labels.shape[2] // patch, int(labels.max()) + 1
    key = b * number + labels[b, y, x].long()
    cells, cell = torch.unique(key, return_inverse=True)                     # (n,), (P,)
    token = b * N + (y // patch) * across + x // patch
    sums, area = token_sums(cell, token, torch.ones_like(cell, dtype=torch.float32),
                            even_vector_lengths(tokens).flatten(0, 1), len(cells))
    return sums / area[:, None], torch.stack((cells // number, cells % number), 1)


class TokenPool:
    """Tokens of tiles, kept until the cells that lie on them are known."""

    def __init__(self, patch: int, width: int, window: Tensor):
        self.patch, self.width, self.window = patch, width, window.cpu()     # px, D, (tile,)
        self.tiles: list[tuple[int, int, Tensor]] = []

    def add(self, y: int, x: int, tokens: Tensor) -> None:
        """Keep the tokens (N, D) of the tile whose corner is there, in px of the network."""
        self.tiles.append((y, x, even_vector_lengths(tokens).half().cpu()))

    def forget(self, row: int) -> None:
        """Drop the tiles that end above a row of the network."""
        self.tiles = [tile for tile in self.tiles if tile[0] + len(self.window) > row]

    def of(self, labels: np.ndarray, ids: np.ndarray, corner: tuple[int, int],
           scales: tuple[float, float]) -> np.ndarray:
        """(n, D) float32 of the cells `ids`, ascending, among labels (H, W).

        corner : (y, x) of the first pixel in the image; scales : px of the network for each px.
        """
        side = len(self.window)
        row = np.full(int(labels.max(initial=0)) + 1, -1)
        row[ids] = np.arange(len(ids))
        ys, xs = ((np.arange(length) + first + 0.5) * scale
                  for length, first, scale in zip(labels.shape, corner, scales))
        parts, whole = [], torch.full(labels.shape, 1e-12)   # sum of the windows over each pixel
        for y, x, tokens in self.tiles:
            rows, columns = (slice(*np.searchsorted(at, (begin, begin + side)))
                             for at, begin in ((ys, y), (xs, x)))
            down, over = (torch.from_numpy(at[part] - begin).long()          # px within the tile
                          for at, part, begin in ((ys, rows, y), (xs, columns, x)))
            share = self.window[down][:, None] * self.window[over]
            whole[rows, columns] += share
            parts.append((rows, columns, down, over, share, tokens))
        sums, weights = torch.zeros(len(ids), self.width), torch.zeros(len(ids))
        for rows, columns, down, over, share, tokens in parts:
            cell = torch.from_numpy(row[labels[rows, columns]])
            i, j = (cell >= 0).nonzero(as_tuple=True)
            if len(i):
                token = down[i] // self.patch * (side // self.patch) + over[j] // self.patch
                more, weight = token_sums(cell[i, j], token, (share / whole[rows, columns])[i, j],
                                          tokens.float(), len(ids))
                sums, weights = sums + more, weights + weight
        return (sums / weights.clamp(min=1e-12)[:, None]).numpy()


# -------------------------------------------------------------------------------------------- files

class CellVectors(NamedTuple):
    """Vectors of cells and the weights that made them: rows of others cannot be compared."""
    ids: np.ndarray                     # (n,)
    vectors: np.ndarray                 # (n, D) float32
    weights: str                        # digest of the file
    channels: tuple[str, ...] = ()      # those that vectors are of, side by side; (): one of all


def write_vectors(path: str | Path, table: CellVectors) -> None:
    """Write NAME_cells.npz: ids, vectors in float16, weights."""
    with runs.replacing(path) as beside, open(beside, "wb") as file:
        np.savez(file, ids=table.ids, vectors=table.vectors.astype(np.float16),
                 weights=np.array(table.weights), channels=np.array(table.channels, str))


def read_vectors(*paths: str | Path) -> CellVectors:
    """Vectors of files, one after the other; all must be of the same weights."""
    tables = []
    for path in paths:
        try:
            with np.load(path) as file:                      # refuses pickled objects
                tables.append(CellVectors(file["ids"], file["vectors"].astype(np.float32),
                                          str(file["weights"]),
                                          tuple(file["channels"].tolist())
                                          if "channels" in file else ()))
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path}: no vectors of cells ({error}); expected what infer.py "
                             "writes with embed=true") from None
        if tables[-1].weights != tables[0].weights:
            raise ValueError(f"{path}: vectors of weights {tables[-1].weights}, but {paths[0]} has "
                             f"those of {tables[0].weights}; run infer.py embed=true again with "
                             "one file of weights")
        if tables[-1].channels != tables[0].channels:
            raise ValueError(f"{path}: vectors of channels {', '.join(tables[-1].channels)}, but "
                             f"{paths[0]} has {', '.join(tables[0].channels) or 'one of all'}; "
                             "expected the same in all files")
    return CellVectors(np.concatenate([table.ids for table in tables]),
                       np.concatenate([table.vectors for table in tables]),
                       *tables[0][2:])


# -------------------------------------------------------------------------------------------- types

def linear_type_head(vectors: np.ndarray, types: np.ndarray, count: int, penalty: float = PENALTY
                     ) -> nn.Linear:
    """Linear map from vectors (n, D) to `count` types, from cells of known type (n,) 0..count - 1.

    Multinomial logistic regression on standardised vectors, every type of the same total weight;
    the standardisation becomes part of the map.
    """
    held = np.bincount(types, minlength=count)
    if len(vectors) != len(types) or not held.all():
        raise ValueError(f"{len(vectors)} vectors, {len(types)} types, cells of each type "
                         f"{held.tolist()}; expected a type for each vector, and one cell or more "
                         "of each type")
    x, y = torch.from_numpy(np.asarray(vectors, np.float64)), torch.from_numpy(types).long()
    mean, spread = x.mean(0), x.std(0, correction=0).clamp(min=1e-6)
    x = (x - mean) / spread
    balance = torch.from_numpy(len(types) / (count * held))
    weight = torch.zeros(count, x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(count, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = F.cross_entropy(x @ weight.T + bias, y, balance) + penalty / 2 * weight.square(
            ).sum()
        value.backward()
        return value

    optimiser.step(loss)  # type: ignore[arg-type, no-untyped-call]
    head = nn.Linear(x.shape[1], count)
    with torch.no_grad():
        head.weight.copy_(weight / spread)
        head.bias.copy_(bias - (weight / spread) @ mean)
    return head


@torch.inference_mode()
def type_probabilities(head: nn.Linear, rows: np.ndarray) -> np.ndarray:
    """(n, K) float32 of rows (n, width of the head)."""
    x = torch.from_numpy(np.asarray(rows, np.float32))
    return F.linear(x, head.weight.float().cpu(), head.bias.float().cpu()).softmax(1).numpy()


def type_rows(vectors: np.ndarray, table: dict[str, np.ndarray], zoom: float) -> np.ndarray:
    """What types are told from, (n, D + 8): vectors (n, D) of cells, and OUTLINE of their
    cells.cell_table().

    Lengths and areas are logarithms of px of the network; what is below 1 px counts as 1.
    """
    beside = [table[name].astype(np.float32) for name in OUTLINE]
    for i, name in enumerate(OUTLINE):
        if name.endswith("_px"):
            beside[i] = np.log(np.maximum(beside[i] * zoom ** (2 if name == "area_px" else 1), 1))
    return np.concatenate((vectors, np.stack(beside, 1)), 1)


# ------------------------------------------------------------------------ neighbours and retrieval

def vector_directions(vectors: np.ndarray) -> np.ndarray:
    """Vectors (n, D) of length 1."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def neighbour_types(known: np.ndarray, types: np.ndarray, asked: np.ndarray, k: int = VOTES,
                    beside: int = 0) -> np.ndarray:
    """Type (m,) of each of `asked` (m, D): that of most of its k nearest `known` (n, D), by cosine
    of vectors standardised by the known ones.

    beside : the last columns, such as outlines, that together weigh as much as all others.
    """
    mean, spread = known.mean(0), np.maximum(known.std(0), 1e-6)
    weight = np.ones(len(mean))
    if beside:
        weight[-beside:] = math.sqrt((len(mean) - beside) / beside)
    known, asked = (vector_directions((part - mean) / spread * weight) for part in (known, asked))
    k, found = max(1, min(k, int(np.bincount(types).min()))), []     # the rarest can win
    for begin in range(0, len(asked), 1024):
        nearest = np.argpartition(-(asked[begin:begin + 1024] @ known.T), k - 1, axis=1)[:, :k]
        votes = np.stack([(types[nearest] == t).sum(1) for t in range(types.max() + 1)], 1)
        found.append(votes.argmax(1))
    return np.concatenate([np.zeros(0, int), *found])


def vector_retrieval_precision(vectors: np.ndarray, names: Sequence[str]) -> float:
    """Mean average precision of finding, by cosine, the other rows of the same name.

    Rows whose name stands alone are searched among, but ask nothing.
    """
    x, names = vector_directions(vectors), np.asarray(names)
    scores = []
    for i, name in enumerate(names):
        others = np.delete(np.arange(len(names)), i)
        order = others[np.argsort(-(x[others] @ x[i]), kind="stable")]
        hit = names[order] == name
        if hit.any():
            scores.append((np.cumsum(hit)[hit] / (np.flatnonzero(hit) + 1)).mean())
    return float(np.mean(scores)) if scores else float("nan")
