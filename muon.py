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

POLYNOMIAL = (3.4445, -4.7750, 2.0315)      # a x + b x^3 + c x^5, five times: from .01 and more to between .7 and 1.2
SIZE = 0.2                                  # root mean square of AdamW's updates, in learning rates


class Muon(torch.optim.Optimizer):
    """Groups of params with `matrix`: whether theirs are made orthogonal, as (out, rest); else AdamW."""

    def __init__(self, groups: list[dict], lr: float, momentum: float = 0.95, betas: tuple[float, float] = (0.9, 0.999),
                 eps: float = 1e-8, weight_decay: float = 0.0, products: torch.dtype = torch.float32):
        self.products = products                # bfloat16, where the device has it, takes a third of the time
        super().__init__(groups, dict(lr=lr, momentum=momentum, betas=betas, eps=eps, weight_decay=weight_decay, matrix=False))

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    change = self.matrix if group["matrix"] else self.vector
                    change = change(parameter.grad, self.state[parameter], group)
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(change, alpha=group["lr"])

    def matrix(self, gradient: Tensor, state: dict, group: dict) -> Tensor:
        momentum = state.setdefault("momentum", torch.zeros_like(gradient))
        momentum.lerp_(gradient, 1 - group["momentum"])
        ahead = gradient.lerp(momentum, group["momentum"]).flatten(1)                      # (out, rest), Nesterov's
        return (orthogonal(ahead.to(self.products)) * SIZE * math.sqrt(max(ahead.shape))).view_as(gradient)

    @staticmethod
    def vector(gradient: Tensor, state: dict, group: dict) -> Tensor:
        first, second = group["betas"]
        if not state:
            state.update(step=0, mean=torch.zeros_like(gradient), square=torch.zeros_like(gradient))
        state["step"] += 1
        mean = state["mean"].lerp_(gradient, 1 - first) / (1 - first ** state["step"])
        square = state["square"].lerp_(gradient.square(), 1 - second) / (1 - second ** state["step"])
        return mean / (square.sqrt() + group["eps"])


def orthogonal(matrix: Tensor) -> Tensor:
    """(n, m) with the same singular vectors and singular values near 1, those below a hundredth of the norm aside."""
    a, b, c = POLYNOMIAL
    wide = matrix.mT if len(matrix) > matrix.shape[1] else matrix                          # the smaller product
    x = wide / (wide.norm() + 1e-12)
    for _ in range(5):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if len(matrix) > matrix.shape[1] else x
