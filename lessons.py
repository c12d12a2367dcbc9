"""What the instructed network learns from: instructions as tensors, and the losses of cells, pixels and texts.

    bank = Bank(histology.pairs_of(folder, "train"), net.words, columns, encoder)
    warm_up(net, bank, steps, lr, seed)                       the text side alone, in seconds
    even_loss(net.similarity(vectors, cells), belongs)        of each text both sides weigh the same

Letters: T texts, M cells, E width of the common space.
"""
from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

import instructions
import runs
from answer import KINDS
from instructions import TASKS


class Bank:
    """Instructions as tensors: their sentence vectors, what they mean, and to which classes they belong.

    classes : columns of `member`, ground first, then cell classes, then regions.
    """

    def __init__(self, lines: list[dict], words, classes: list[str], encoder):
        unique = {line["instruction"]: line for line in lines}
        self.lines = list(unique.values())
        self.vectors = encoder(list(unique))                                 # (N, 384)
        self.task = torch.tensor([TASKS.index(line["task"]) if line["task"] else -1 for line in self.lines])
        self.kind = torch.tensor([KINDS.index(line["kind"]) for line in self.lines])
        self.tissue = torch.tensor([1 + instructions.TISSUES.index(line["tissue"]) if line["tissue"] else 0
                                    for line in self.lines])
        self.names = torch.zeros(len(self.lines), len(words.names))
        self.member = torch.full((len(self.lines), len(classes)), -1, dtype=torch.int8)
        groups: dict[tuple, list[int]] = {}
        for row, line in enumerate(self.lines):
            for target in line["targets"]:
                if target in words.names:
                    self.names[row, words.names.index(target)] = 1
            if line["kind"] == "known":
                self.member[row] = torch.from_numpy(self.belonging(line, words, classes))
            about = ((line["task"], *line["targets"]) if line["kind"] == "known"
                     else (line["targets"][:1], len(line["targets"])))
            groups.setdefault((line["kind"], *map(str, about)), []).append(row)
        self.known = [torch.tensor(rows) for key, rows in groups.items() if key[0] == "known"]
        self.vain = [[torch.tensor(rows) for key, rows in groups.items() if key[0] == kind]
                     for kind in KINDS[1:] if any(key[0] == kind for key in groups)]

    @staticmethod
    def belonging(line: dict, words, classes: list[str]) -> np.ndarray:
        """(classes,) int8. An instruction about areas says nothing of cells, and the other way round."""
        targets, about_areas = line["targets"], set(line["targets"]) & set(words.regions)
        columns = [i for i, name in enumerate(classes) if name in instructions.CONCEPTS]
        found = np.zeros(len(classes), np.int8)
        if about_areas:
            found[[i for i, name in enumerate(classes) if name in words.regions]] = -1
            found[[classes.index(name) for name in about_areas]] = 1
            return found
        found[0] = -1                                                        # ground is no cell
        found[columns] = instructions.membership([classes[i] for i in columns], targets,
                                                 line["task"] == "exclude")
        return found

    def draw(self, count: int, generator, vain: float = 0.2):
        """(count,) rows: task and targets evenly, or in vain each kind and what it names, then any wording."""
        luck = torch.rand(3, count, generator=generator).tolist()
        rows = []
        for unknown, group, place in zip(*luck):
            groups = self.known
            if unknown < vain and self.vain:
                groups, group = self.vain[int(group * len(self.vain))], group * len(self.vain) % 1
            group = groups[int(group * len(groups))]
            rows.append(group[int(place * len(group))])
        return torch.stack(rows)

    def to(self, device: str) -> Bank:
        for name in ("vectors", "task", "kind", "tissue", "names", "member"):
            setattr(self, name, getattr(self, name).to(device))
        return self


def even_loss(logits, member):
    """Cross-entropy of (T, M) logits, member +1, -1 or 0 unknown: of each text both sides weigh the same."""
    loss = F.softplus(-logits * member)
    sides = []
    for side in (1, -1):
        mask = member == side
        sides.append((loss * mask).sum(1) / mask.sum(1).clamp(min=1))        # (T,)
    there = (member == 1).any(1).float() + (member == -1).any(1).float()
    return ((sides[0] + sides[1]) / there.clamp(min=1)).mean()


def text_loss(net, bank: Bank, rows):
    """What a text says: task, kind, names, tissue."""
    said = net.read(bank.vectors[rows])
    has_task = bank.task[rows] >= 0
    return (F.cross_entropy(said.task[has_task], bank.task[rows][has_task])
            + F.cross_entropy(said.kind, bank.kind[rows])
            + 10 * F.binary_cross_entropy_with_logits(said.names, bank.names[rows])
            + F.cross_entropy(said.tissue, bank.tissue[rows]))


def warm_up(net, bank: Bank, steps: int, lr: float, seed: int) -> None:
    """Teach the text side alone, against one free vector per class that stands for its cells.

    Texts are learned in seconds, images in hours: an image side that begins with texts in their places has
    only to learn where each class lies. The vectors are thrown away.
    """
    torch.manual_seed(seed)
    device = bank.vectors.device
    classes = torch.nn.Parameter(torch.randn(bank.member.shape[1], net.words.width, device=device))
    parts = [net.reader, net.to_space, net.to_task, net.to_kind, net.to_names, net.to_tissue]
    learning = [classes, net.temperature, net.offset, *(p for part in parts for p in part.parameters())]
    optimiser = torch.optim.AdamW(learning, weight_decay=0.05)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = runs.cosine(step, steps, lr, 0.01 * lr, min(50, steps // 2))
        generator = torch.Generator().manual_seed(seed * 1_000_003 - 1 - step)
        rows = bank.draw(64, generator).to(device)
        logits = net.similarity(net.read(bank.vectors[rows]).vectors, F.normalize(classes, dim=-1))
        more = bank.draw(256, generator, 0.5).to(device)
        (even_loss(logits, bank.member[rows]) + text_loss(net, bank, more)).backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)


def even_classes(logits, kind):
    """Cross-entropy, every class that occurs weighing the same."""
    if not len(kind):
        return logits.sum()                                                  # 0, with a gradient
    each = F.cross_entropy(logits, kind, reduction="none")
    count = torch.bincount(kind, minlength=logits.shape[1]).clamp(min=1)
    return (each / count[kind]).sum() / len(kind.unique())


def with_areas(belongs, member, area):
    """`belongs` (T, M), but texts about areas judge pixels by the number of their area (M,), 0 outside.

    member : (T, regions)
    """
    about = (member == 1).any(1)                                             # (T,)
    table = torch.cat((torch.full_like(member[:, :1], -1), member), 1)       # (T, 1 + regions)
    return torch.where(about[:, None], table[:, area], belongs)
