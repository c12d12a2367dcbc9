"""muon.py: directions made equally long; vectors learn as with AdamW; both learn a problem that has a bad shape."""
from __future__ import annotations

import numpy as np
import pytest
import torch

import muon
from muon import Muon


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (16, 16)])
def test_singular_values_come_near_one_and_vectors_stay(shape):
    left, _, right = torch.linalg.svd(torch.randn(shape, generator=torch.Generator().manual_seed(0)), full_matrices=False)
    values = torch.logspace(0, -1, min(shape))                               # the least is a tenth of the largest
    found = muon.orthogonal((left @ torch.diag(values) @ right)[None])[0]
    seen = left.T @ found @ right.T
    assert 0.6 < seen.diagonal().min() and seen.diagonal().max() < 1.25
    assert (seen - torch.diag(seen.diagonal())).abs().max() < 1e-4
    assert torch.allclose(muon.orthogonal((7 * left @ torch.diag(values) @ right)[None])[0], found, atol=1e-5), "size does not count"
    assert muon.orthogonal(torch.zeros(1, *shape)).abs().max() == 0


def test_products_in_bfloat16_are_nearly_those_in_float32():
    torch.manual_seed(0)
    gradient, found = torch.randn(20, 48) @ torch.diag(torch.logspace(0, -1, 48)), []
    for products in (torch.float32, torch.bfloat16):
        parameter = torch.nn.Parameter(torch.zeros(20, 48))
        parameter.grad = gradient.clone()
        Muon([dict(params=[parameter], matrix=True)], lr=0.01, products=products).step()
        found.append(parameter.detach())
    assert not torch.equal(*found) and found[1].dtype == torch.float32
    assert torch.cosine_similarity(found[0].flatten(), found[1].flatten(), dim=0) > 0.995


def test_vectors_are_adamws():
    torch.manual_seed(0)
    start, gradients = torch.randn(5), torch.randn(20, 5)
    mine, torchs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    pairs = [(mine, Muon([dict(params=[mine], weight_decay=0.1)], lr=0.01)),
             (torchs, torch.optim.AdamW([torchs], lr=0.01, weight_decay=0.1))]
    for gradient in gradients:
        for parameter, optimiser in pairs:
            parameter.grad = gradient.clone()
            optimiser.step()
    assert not torch.allclose(mine, start, atol=0.05) and torch.allclose(mine, torchs, atol=1e-6)


@pytest.mark.parametrize("shape", [(32, 96), (96, 32), (8, 4, 3, 3)])
def test_updates_are_as_large_as_adamws(shape):
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.zeros(shape))
    optimiser = Muon([dict(params=[parameter], matrix=True)], lr=0.01)
    parameter.grad = torch.randn(shape)
    optimiser.step()
    assert 0.001 < parameter.detach().square().mean().sqrt() < 0.0025        # 0.2 learning rates, values of 0.7 to 1.2
    assert (parameter.detach() * parameter.grad).sum() < 0


def loss_after(make, steps: int = 120) -> float:
    """A linear layer that learns another one from inputs of which some directions are hundreds of times as strong."""
    torch.manual_seed(0)
    weight, wanted = torch.nn.Parameter(torch.zeros(24, 24)), torch.randn(24, 24) / 5
    strength = torch.linalg.qr(torch.randn(24, 24))[0] * torch.logspace(0, -2, 24)
    x = torch.randn(500, 24) @ strength.T
    optimiser, losses = make(weight), []
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = 0.1 * (1 - step / steps)
        loss = (x @ weight.T - x @ wanted.T).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses[-1] / losses[0]


def test_it_learns_what_adamw_learns_slowly():
    ours, adamw = loss_after(lambda w: Muon([dict(params=[w], matrix=True)], lr=0.1)), loss_after(lambda w: torch.optim.AdamW([w], lr=0.1))
    assert ours < 1e-3 and ours < adamw / 3


def test_it_goes_on_from_what_was_saved():
    torch.manual_seed(0)
    layers = [torch.nn.Linear(6, 9) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())

    def optimiser(layer):
        return Muon([dict(params=[layer.weight], matrix=True), dict(params=[layer.bias])], lr=0.01, weight_decay=0.1)

    def run(layer, optimiser, steps):
        for seed in steps:
            x = torch.randn(30, 6, generator=torch.Generator().manual_seed(seed))
            optimiser.zero_grad()
            (layer(x) - x.sum(1, keepdim=True)).square().mean().backward()
            optimiser.step()
    first, second = optimiser(layers[0]), optimiser(layers[1])
    run(layers[0], first, range(6))
    run(layers[1], second, range(3))
    again = optimiser(layers[1])
    again.load_state_dict(second.state_dict())
    run(layers[1], again, range(3, 6))
    assert np.array_equal(layers[0].weight.detach(), layers[1].weight.detach()) and np.array_equal(layers[0].bias.detach(), layers[1].bias.detach())
