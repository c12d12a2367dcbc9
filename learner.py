"""Student and teacher of self-supervised pretraining: a backbone that takes crops of two sizes at once, two
heads.

    student = Learner(vit, prototypes=8192)
    teacher = copy.deepcopy(student).requires_grad_(False)
    found = student(teacher, batch, temperature, weights)         # found["loss"].backward(), ssl_.update(...)

The student's forward does a whole step's loss, the teacher's part included, so that DistributedDataParallel
sees one call. Losses in float32, whatever autocast says outside.

Letters: B fields, L local views, G = 2 B global crops, N patch tokens of one, M masked ones, D width, b
bottleneck, K prototypes.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

import ssl_
from model import Tokens, ViT, rope_table


class Batch(NamedTuple):
    """What one step is computed from, all on one device."""
    large: Tensor                       # (2 B, 3, S, S), first views, then second ones
    small: Tensor                       # (L B, 3, s, s)
    mask: Tensor                        # (2 B, N) bool, hidden from the student
    index: Tensor                       # (M,) where the mask is true, flat; from the host: no waiting for a GPU
    weight: Tensor                      # (M,) 1 / masked patches of the same crop
    jitter: Tensor                      # (depth, 2) factors on the coordinates, of large and of small crops


class Encoder(nn.Module):
    """A backbone that takes crops of several sizes in one pass, and computes nothing for padding.

    The tokens of all crops lie end to end: norms and MLPs, which see one token at a time, run over all of
    them at once; only attention, which must not look from crop to crop, goes size by size.
    """

    def __init__(self, vit: ViT):
        super().__init__()
        self.vit = vit

    def forward(self, crops: list[Tensor], mask: Tensor | None = None, jitter: Tensor | None = None
                ) -> list[Tokens]:
        """crops : (B_i, 3, H_i, W_i) each; mask : (B_0, N_0), of the first; jitter : (depth, sizes)."""
        vit, plain = self.vit, 1 + self.vit.registers
        grids = [(x.shape[2] // vit.patch, x.shape[3] // vit.patch) for x in crops]
        tokens = [vit.embed(x, mask if i == 0 else None) for i, x in enumerate(crops)]        # (B_i, T_i, D)
        shapes, lengths = [t.shape for t in tokens], [t.shape[0] * t.shape[1] for t in tokens]
        x = torch.cat([t.flatten(0, 1) for t in tokens])                     # (all tokens, D)
        ropes = [rope_table(vit.periods, *grid, plain) for grid in grids]
        for depth, block in enumerate(vit.blocks):
            if jitter is not None:
                ropes = [rope_table(vit.periods, *g, plain, jitter[depth, i]) for i, g in enumerate(grids)]
            parts = zip(block.norm1(x).split(lengths), shapes, ropes)
            parts = [block.attn(part.view(shape), rope, block.scale1).flatten(0, 1) for part, shape, rope in parts]
            x = x + torch.cat(parts)
            x = x + block.mlp(x)
        parts = [part.view(shape) for part, shape in zip(vit.norm(x).split(lengths), shapes)]
        return [Tokens(t[:, 0], t[:, 1:plain], t[:, plain:]) for t in parts]


class Learner(nn.Module):
    """A backbone with a head for class tokens and one for patches."""

    def __init__(self, vit: ViT, prototypes: int = 8192, hidden: int = 2048, bottleneck: int = 256,
                 unit: bool = False):
        super().__init__()
        self.encoder = Encoder(vit)
        self.dino = ssl_.Head(vit.dim, prototypes, hidden, bottleneck, unit)
        self.ibot = ssl_.Head(vit.dim, prototypes, hidden, bottleneck, unit)

    def forward(self, teacher: Learner, batch: Batch, temperature: float, config) -> dict[str, Tensor]:
        """Losses of this process's fields, and what tells whether all is well; `temperature` is the
        teacher's.

        config : weights dino, ibot, koleo; `temperature` of the student; `chunk` of ibot_loss.
        """
        B = len(batch.large) // 2
        with torch.no_grad():
            seen, = teacher.encoder([batch.large])
            logits = teacher.dino.prototypes(teacher.dino(seen.cls)).float() / temperature     # (2 B, K)
            hidden = teacher.ibot(seen.patches.flatten(0, 1)[batch.index])                     # (M, b)
        # View by view: were both balanced together, each could keep to prototypes of its own, and never agree.
        targets = torch.cat([ssl_.balanced(part) for part in logits.chunk(2)])
        crops = [batch.large] + [batch.small] * (len(batch.small) > 0)
        large, *small = self.encoder(crops, batch.mask, batch.jitter)
        cls = torch.cat([large.cls] + [tokens.cls for tokens in small])         # ((2 + L) B, D)
        student = self.dino.prototypes(self.dino(cls)).unflatten(0, (-1, B))                   # (2 + L, B, K)
        dino = ssl_.dino_loss(student, targets.unflatten(0, (2, B)), config.temperature)
        guessed = self.ibot(large.patches.flatten(0, 1)[batch.index])                          # (M, b)
        ibot = ssl_.ibot_loss(guessed, hidden, batch.weight, 2 * B, self.ibot.prototypes, teacher.ibot.prototypes,
                              config.temperature, temperature, config.chunk)
        koleo = sum(ssl_.koleo_loss(part) for part in large.cls.chunk(2))
        entropy = -(targets * targets.clamp(min=1e-30).log()).sum(1).mean()
        chosen = targets.new_zeros(targets.shape[1]).index_add_(0, targets.argmax(1), targets.new_ones(2 * B))
        return dict(loss=config.dino * dino + config.ibot * ibot + config.koleo * koleo,
                    dino=dino, ibot=ibot, koleo=koleo, teacher_entropy=entropy, kl=dino.detach() - entropy,
                    chosen=chosen, cls=seen.cls.float())


def flops(learner: Learner, size: int, local_size: int, local_views: int) -> float:
    """Of one field's step: the student on all views, forward and twice that backward, the teacher on the two
    large ones.

    A multiplication and an addition are two. Linear layers, patch embedding and attention are counted; heads
    on class tokens too, but not iBOT's, whose work depends on the masks (a hundredth of the whole).
    """
    vit = learner.encoder.vit
    D, P = vit.dim, vit.patch

    def forward(side: int) -> float:
        N = (side // P) ** 2
        T = 1 + vit.registers + N
        return vit.depth * (24 * T * D * D + 4 * T * T * D) + 2 * N * D * 3 * P * P

    head = 2 * sum(p.numel() for p in learner.dino.parameters())
    large, small = 2 * (forward(size) + head), local_views * (forward(local_size) + head)
    return 3 * (large + small) + large
