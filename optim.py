"""Optimisers: Muon, the groups of parameters that learn alike, and the schedules of their rates.

    groups = parameter_groups(net, lr, traits)         # traits(name, parameter): a dict
    optimiser = Muon(groups, lr)                       # groups with matrix=True; AdamW: the others
    lr * cosine(step, steps, 1.0, 0.01, warmup)

Muon (Jordan et al., 2024) makes all directions of a layer learn equally fast: a gradient points
mostly in a few directions, so the matrix of the momentum is first made nearly orthogonal, by
polynomials that bring its singular values near 1. Updates are as large as AdamW's (Liu et al.,
2025): one learning rate and one weight decay serve both.
"""
from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

# ---------------------------------------------------------------------------------------- schedules

DECAY = 0.2             # share of the steps, the last ones, in which constant() falls


def cosine(step: int, steps: int, start: float, end: float, warmup: int = 0) -> float:
    """Rise from 0 to `start` in `warmup` steps, then fall along half a cosine to `end`."""
    if step < warmup:
        return start * (step + 1) / warmup
    share = (step - warmup) / max(1, steps - 1 - warmup)
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


def constant(step: int, steps: int, end: float, warmup: int = 0) -> float:
    """Rise from 0 to 1 in `warmup` steps, stay, and fall in a line to `end` over the last fifth.

    The number of steps may be chosen when the fall begins (Hägele et al., 2024).
    """
    fall = max(1, round(DECAY * steps))
    falling = end + (1 - end) * (steps - 1 - step) / fall
    return min(1.0, (step + 1) / max(1, warmup), max(end, falling))


def linear(step: int, steps: int, start: float, end: float) -> float:
    """Go straight from `start` at step 0 to `end` at step `steps`, and stay."""
    return start + (end - start) * min(1.0, step / steps) if steps else end


# ------------------------------------------------------------------------------------------- groups

def parameter_groups(net: nn.Module, lr: float, traits: Callable[[str, nn.Parameter], dict]
                     ) -> list[dict]:
    """Group the parameters that learn by equal traits, in the order of the first of each.

    traits : (name, parameter) -> values of the group that an optimiser or a schedule reads.
    """
    groups: dict[tuple, dict] = {}
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            values = traits(name, parameter)
            group = groups.setdefault(tuple(values.values()), dict(params=[], lr=lr, **values))
            group["params"].append(parameter)
    return list(groups.values())


def decays(name: str, parameter: Tensor) -> bool:
    """Matrices decay; biases, norms, scales and tokens do not."""
    return parameter.ndim > 1 and "token" not in name


def parameter_blocks_above(name: str, vit: str, depth: int) -> int:
    """Blocks from a parameter to the end of the ViT, its block included; 0 above the ViT.

    vit : prefix of the names of the ViT's parameters.
    """
    if not name.startswith(vit):
        return 0
    part, _, rest = name.removeprefix(vit).partition(".")
    return depth - int(rest.partition(".")[0]) if part == "blocks" else depth + 1


# --------------------------------------------------------------------------------------------- Muon

# a x + b x^3 + c x^5, one after the other: each is closest to 1 where the one before takes singular
# values of .003 to 1 (a linear programme; Amsel et al., 2025). They end between .80 and 1.20, those
# of .001 at .29. Jordan's polynomial, five times, leaves .68 to 1.20 and takes a quarter longer.
POLYNOMIALS = ((8.3837, -24.7659, 18.3571), (4.0434, -3.0114, 0.5695), (3.5056, -2.6267, 0.5257),
               (2.4901, -1.8343, 0.4368))
SIZE = 0.2              # root mean square of AdamW's updates, in learning rates
MOMENTUM, BETAS = 0.95, (0.9, 0.999)                        # of Muon, and of AdamW


class Muon(torch.optim.Optimizer):
    """Muon for groups with matrix=True, their parameters as (out, rest); AdamW for the others.

    products : type that matrices are multiplied in; bfloat16 takes a third of the time where the
        device has it.
    """

    def __init__(self, groups: list[dict], lr: float, eps: float = 1e-8, weight_decay: float = 0.0,
                 products: torch.dtype = torch.float32):
        self.products = products
        super().__init__(groups, dict(lr=lr, eps=eps, weight_decay=weight_decay, matrix=False))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:   # type: ignore[override]  # takes no closure
        by_shape: dict[tuple, list] = {}            # made orthogonal together
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            if not group["matrix"]:
                torch._foreach_sub_(params, self._adamw(params, group["eps"]), alpha=group["lr"])
                continue
            for parameter, ahead in zip(params, self._nesterov(params), strict=True):
                ahead = ahead.flatten(1).to(self.products)                          # (out, rest)
                by_shape.setdefault(ahead.shape, []).append((parameter, ahead, group["lr"]))
        for shape, members in by_shape.items():
            changes = orthogonal(torch.stack([ahead for _, ahead, _ in members]))
            size = SIZE * math.sqrt(max(shape))
            for (parameter, _, lr), change in zip(members, changes, strict=True):
                parameter.sub_(change.view_as(parameter), alpha=lr * size)

    def _nesterov(self, params: list[Tensor]) -> tuple[Tensor, ...]:
        """Nesterov's momentum: the gradient, one step of momentum ahead."""
        gradients = [p.grad for p in params if p.grad is not None]
        momentum = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in params]
        torch._foreach_lerp_(momentum, gradients, 1 - MOMENTUM)
        return torch._foreach_lerp(gradients, momentum, MOMENTUM)

    def _adamw(self, params: list[Tensor], eps: float) -> tuple[Tensor, ...]:
        """AdamW's changes, in learning rates."""
        first, second = BETAS
        states = [self.state[p] for p in params]
        gradients = [p.grad for p in params if p.grad is not None]
        for state, parameter in zip(states, params, strict=True):
            if not state:
                state.update(step=0, mean=torch.zeros_like(parameter),
                             square=torch.zeros_like(parameter))
            state["step"] += 1
        mean, square = ([state[name] for state in states] for name in ("mean", "square"))
        torch._foreach_lerp_(mean, gradients, 1 - first)
        torch._foreach_mul_(square, second)
        torch._foreach_addcmul_(square, gradients, gradients, 1 - second)
        root = torch._foreach_div(square, [1 - second ** state["step"] for state in states])
        torch._foreach_sqrt_(root)
        torch._foreach_add_(root, eps)
        torch._foreach_mul_(root, [1 - first ** state["step"] for state in states])
        return torch._foreach_div(mean, root)


def orthogonal(matrix: Tensor) -> Tensor:
    """(k, n, m) with the same singular vectors; singular values above .001 norms come near 1."""
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if tall else matrix                       # the smaller product
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.01 + 1e-12)     # 1.01: bfloat16 may round up
    for a, b, c in POLYNOMIALS:
        square = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(square, square, square, beta=b, alpha=c)
        polynomial.diagonal(dim1=-2, dim2=-1).add_(a)
        x = torch.bmm(polynomial, x)
    return x.mT if tall else x
