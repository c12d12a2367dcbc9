"""Muon: momentum of which every direction is as long as the others, so that all of a layer learns equally fast.

    optimiser = Muon([dict(params=matrices, matrix=True), dict(params=others, matrix=False)], lr=2e-3)

The gradient of a layer points mostly in a few directions. AdamW, which looks at each number alone, follows these; Muon (Jordan
et al., 2024) makes the momentum's matrix nearly orthogonal first, by a polynomial that brings all its singular values near 1.
What is no matrix (biases, norms, tokens), and the patch embedding and the head, are AdamW's. Updates are as large as
AdamW's would be (Liu et al., 2025), so that one learning rate and one weight decay serve both.
"""
from __future__ import annotations

import math

import torch
from torch import Tensor

# a x + b x^3 + c x^5, one after the other: each is the one that comes closest to 1 on where the one before leaves singular
# values between .003 and 1 (a linear programme; Amsel et al., 2025). After the last they are between .80 and 1.20, those of
# .001 at .29. Jordan's, one polynomial five times, leaves .68 to 1.20 and takes a quarter longer.
POLYNOMIALS = ((8.3837, -24.7659, 18.3571), (4.0434, -3.0114, 0.5695), (3.5056, -2.6267, 0.5257), (2.4901, -1.8343, 0.4368))
SIZE = 0.2                                  # root mean square of AdamW's updates, in learning rates


class Muon(torch.optim.Optimizer):
    """Groups of params with `matrix`: whether theirs are made orthogonal, as (out, rest); else AdamW."""

    def __init__(self, groups: list[dict], lr: float, momentum: float = 0.95, betas: tuple[float, float] = (0.9, 0.999),
                 eps: float = 1e-8, weight_decay: float = 0.0, products: torch.dtype = torch.float32):
        self.products = products                # bfloat16, where the device has it, takes a third of the time
        super().__init__(groups, dict(lr=lr, momentum=momentum, betas=betas, eps=eps, weight_decay=weight_decay, matrix=False))

    @torch.no_grad()
    def step(self, closure=None) -> None:
        alike: dict[tuple, list] = {}           # matrices of one shape are made orthogonal together
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            if not group["matrix"]:
                torch._foreach_sub_(params, self.vectors(params, group), alpha=group["lr"])
                continue
            for parameter, ahead in zip(params, self.ahead(params, group)):
                ahead = ahead.flatten(1)                                                   # (out, rest)
                alike.setdefault(ahead.shape, []).append((parameter, ahead.to(self.products), group["lr"]))
        for shape, members in alike.items():
            params, ahead, lrs = zip(*members)
            size = SIZE * math.sqrt(max(shape))
            for parameter, change, lr in zip(params, orthogonal(torch.stack(ahead)), lrs):
                parameter.sub_(change.view_as(parameter), alpha=lr * size)

    def ahead(self, params: list[Tensor], group: dict) -> list[Tensor]:
        """Nesterov's momentum: where the next step's gradient will lie."""
        momentum = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in params]
        torch._foreach_lerp_(momentum, [p.grad for p in params], 1 - group["momentum"])
        return torch._foreach_lerp([p.grad for p in params], momentum, group["momentum"])

    def vectors(self, params: list[Tensor], group: dict) -> tuple[Tensor, ...]:
        """AdamW's changes, in learning rates."""
        first, second = group["betas"]
        states, gradients = [self.state[p] for p in params], [p.grad for p in params]
        for state, parameter in zip(states, params):
            if not state:
                state.update(step=0, mean=torch.zeros_like(parameter), square=torch.zeros_like(parameter))
            state["step"] += 1
        mean, square = ([state[name] for state in states] for name in ("mean", "square"))
        torch._foreach_lerp_(mean, gradients, 1 - first)
        torch._foreach_mul_(square, second)
        torch._foreach_addcmul_(square, gradients, gradients, 1 - second)
        root = torch._foreach_div(square, [1 - second ** state["step"] for state in states])
        torch._foreach_sqrt_(root)
        torch._foreach_add_(root, group["eps"])
        torch._foreach_mul_(root, [1 - first ** state["step"] for state in states])
        return torch._foreach_div(mean, root)


def orthogonal(matrix: Tensor) -> Tensor:
    """(k, n, m) with the same singular vectors and singular values near 1, those below a thousandth of the norm aside."""
    wide = matrix.mT if matrix.shape[-2] > matrix.shape[-1] else matrix                    # the smaller product
    x = wide / (wide.norm(dim=(-2, -1), keepdim=True) * 1.01 + 1e-12)    # a hundredth for bfloat16: above 1 they leave the interval
    for a, b, c in POLYNOMIALS:
        square = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.mT if matrix.shape[-2] > matrix.shape[-1] else x
