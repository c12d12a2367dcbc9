"""optim.py: Muon against AdamW, groups in their order, schedules in closed form."""
import pytest
import torch

import optim
from optim import Muon


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (16, 16)])
def test_singular_values_come_near_one_and_vectors_stay(shape):
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(noise, full_matrices=False)
    values = torch.logspace(0, -1, min(shape))               # the least is a tenth of the largest
    found = optim.orthogonal((left @ torch.diag(values) @ right)[None])[0]
    seen = left.T @ found @ right.T
    assert seen.diagonal().min() > 0.6 and seen.diagonal().max() < 1.25
    assert (seen - torch.diag(seen.diagonal())).abs().max() < 1e-4
    larger = optim.orthogonal((7 * left @ torch.diag(values) @ right)[None])[0]
    assert torch.allclose(larger, found, atol=1e-5)                          # size does not count
    assert optim.orthogonal(torch.zeros(1, *shape)).abs().max() == 0


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
    assert 0.001 < parameter.detach().square().mean().sqrt() < 0.0025        # 0.2 learning rates
    assert (parameter.detach() * parameter.grad).sum() < 0


def loss_after(make, steps: int = 120) -> float:
    """A linear layer learns another from inputs a hundred times as strong in some directions."""
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
    ours = loss_after(lambda w: Muon([dict(params=[w], matrix=True)], lr=0.1))
    adamw = loss_after(lambda w: torch.optim.AdamW([w], lr=0.1))
    assert ours < 1e-3 and ours < adamw / 3


def test_it_goes_on_from_what_was_saved():
    torch.manual_seed(0)
    layers = [torch.nn.Linear(6, 9) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())

    def optimiser(layer):
        groups = [dict(params=[layer.weight], matrix=True), dict(params=[layer.bias])]
        return Muon(groups, lr=0.01, weight_decay=0.1)

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
    assert torch.equal(layers[0].weight, layers[1].weight)
    assert torch.equal(layers[0].bias, layers[1].bias)


# ------------------------------------------------------------------------------------------- groups

def test_groups_are_those_of_equal_traits_in_the_order_of_their_first():
    net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 3), torch.nn.Linear(3, 1))
    net[1].weight.requires_grad_(False)
    groups = optim.parameter_groups(net, 0.1, lambda name, parameter: dict(
        decays=optim.decays(name, parameter), first=name.startswith("0")))
    assert [(group["lr"], group["decays"], group["first"]) for group in groups] == [
        (0.1, True, True), (0.1, False, True), (0.1, False, False), (0.1, True, False)]
    wanted = [[net[0].weight], [net[0].bias], [net[1].bias, net[2].bias], [net[2].weight]]
    found = [[id(p) for p in group["params"]] for group in groups]
    assert found == [[id(p) for p in row] for row in wanted]


def test_blocks_above_a_parameter():
    names = {"vit.blocks.0.fc1.weight": 12, "vit.blocks.11.fc1.weight": 1, "vit.norm.bias": 13,
             "vit.cls_token": 13, "head.blocks.3.weight": 0}
    assert {name: optim.parameter_blocks_above(name, "vit.", 12) for name in names} == names
    assert not optim.decays("vit.register_tokens", torch.zeros(4, 8))
    assert not optim.decays("bias", torch.zeros(4)) and optim.decays("fc", torch.zeros(4, 8))


# ---------------------------------------------------------------------------------------- schedules

def test_a_cosine_rises_evenly_and_ends_where_it_should():
    rates = [optim.cosine(step, 101, 2.0, 0.5, 20) for step in range(101)]
    assert rates[0] == 0.1 and rates[19] == 2.0 == rates[20] and rates[100] == 0.5
    assert rates[60] == pytest.approx(1.25) and optim.cosine(500, 101, 2.0, 0.5, 20) == 0.5
    rising = [optim.cosine(step, 100, 0.996, 1.0) for step in range(100)]    # a teacher's momentum
    assert rising[0] == pytest.approx(0.996) and rising[99] == 1 and rising == sorted(rising)
    assert rising[50] == pytest.approx(0.998, abs=1e-4)


def test_a_constant_rate_falls_in_the_last_fifth():
    """In closed form; and until the fall begins it is the same whatever the number of steps."""
    rates = [optim.constant(step, 1000, 0.01, 100) for step in range(1000)]
    assert rates[0] == 0.01 and rates[49] == 0.5 and rates[-1] == 0.01
    assert set(rates[99:799]) == {1.0}
    assert rates[899] == pytest.approx(0.01 + 0.99 * 100 / 200)
    assert rates == rates[:100] + sorted(rates[100:], reverse=True)
    assert [optim.constant(step, 5000, 0.01, 100) for step in range(799)] == rates[:799]


def test_a_line_stays_at_its_end():
    rates = [optim.linear(step, 4, 0.04, 0.08) for step in (0, 1, 4, 9)]
    assert rates == pytest.approx([0.04, 0.05, 0.08, 0.08])
    assert optim.linear(0, 0, 0.04, 0.08) == 0.08
