"""ssl_.py: closed forms, slow versions, and one process against two."""
import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import model
import runs
import ssl_
import train_ssl
from augment import Draws


def small_vit(seed=0, **options):
    torch.manual_seed(seed)
    return model.ViT(
        **{**dict(dim=32, depth=3, heads=2, patch=8, registers=2, layerscale=0.5), **options}
    )


def small_learners(prototypes=24):
    student = ssl_.Learner(small_vit(), prototypes, hidden=32, bottleneck=16)
    return student, copy.deepcopy(student).requires_grad_(False)


def small_batch(B=4, L=3, seed=0):
    rng = torch.Generator().manual_seed(seed)
    mask = ssl_.block_masks(seed, np.arange(B), 4, 4).reshape(2 * B, -1)
    weight = (1 / np.maximum(mask.sum(1, keepdims=True), 1) * np.ones(mask.shape))[mask]
    return ssl_.Batch(
        torch.randn(2 * B, 3, 32, 32, generator=rng),
        torch.randn(L * B, 3, 16, 16, generator=rng),
        torch.from_numpy(mask),
        torch.from_numpy(np.flatnonzero(mask)),
        torch.from_numpy(weight).float(),
        torch.ones(3, 2),
    )


# ----------------------------------------------------------------------------------- Sinkhorn-Knopp

def slow_sinkhorn(logits, iterations):
    """As the papers have it: a K x B matrix, its rows and columns scaled in turn."""
    Q = logits.double().exp().T
    K, B = Q.shape
    Q = Q / Q.sum()
    for _ in range(iterations):
        Q = Q / Q.sum(1, keepdim=True) / K
        Q = Q / Q.sum(0, keepdim=True) / B
    return (Q * B).T


@pytest.mark.smoke
@pytest.mark.parametrize("scale", [1.0, 25.0])
def test_sinkhorn_is_the_papers(scale):
    logits = torch.randn(40, 13, generator=torch.Generator().manual_seed(0)) * scale
    for iterations in (1, 3):
        assert torch.allclose(
            ssl_.balanced_targets(logits, iterations).double(),
            slow_sinkhorn(logits, iterations),
            atol=1e-5,
        )


def test_sinkhorns_marginals():
    """Rows sum to 1; in time all prototypes are used alike, though one was liked best by all."""
    logits = torch.randn(60, 12, generator=torch.Generator().manual_seed(1))
    logits = logits + 3 * F.one_hot(torch.tensor(4), 12)
    targets = ssl_.balanced_targets(logits, 200)
    assert torch.allclose(targets.sum(1), torch.ones(60), atol=1e-5)
    assert torch.allclose(targets.sum(0), torch.full((12,), 60 / 12), atol=1e-3)
    assert logits.softmax(1).sum(0)[4] > 3 * 60 / 12


def test_sinkhorn_does_not_depend_on_parts():
    logits = torch.randn(37, 11, generator=torch.Generator().manual_seed(2)) * 5
    whole = ssl_.sinkhorn(lambda: [logits])
    assert torch.allclose(whole, ssl_.sinkhorn(lambda: logits.split(4)), atol=1e-5)


# ------------------------------------------------------------------------------------------- losses

@pytest.mark.smoke
def test_dino_loss_is_the_mean_over_pairs():
    torch.manual_seed(0)
    student, targets = torch.randn(5, 6, 7), torch.randn(2, 6, 7).softmax(-1)
    terms = [-(targets[t] * (student[v] / 0.1).log_softmax(-1)).sum(-1).mean()
             for t in range(2) for v in range(5) if v != t]
    assert len(terms) == 2 + 2 * 3
    assert torch.allclose(ssl_.dino_loss(student, targets, 0.1), torch.stack(terms).mean())
    alone = ssl_.dino_loss(student[:2], targets, 0.1)                      # without local views
    assert torch.allclose(alone, torch.stack([terms[0], terms[4]]).mean())


def test_dino_loss_of_who_knows_nothing():
    targets = F.one_hot(torch.tensor([[1, 2], [0, 3]]), 8).float()
    assert math.isclose(
        ssl_.dino_loss(torch.zeros(6, 2, 8), targets, 0.1).item(), math.log(8), rel_tol=1e-6
    )


def test_ibot_is_a_loop_over_crops():
    """Each crop's mean over its masked patches, their mean over all crops, in chunks of 3."""
    torch.manual_seed(0)
    counts, K, b = [4, 0, 1, 5, 0, 2], 9, 6
    z, t = (F.normalize(torch.randn(12, b), dim=1) for _ in range(2))
    mine, theirs = (torch.nn.Linear(b, K, bias=False) for _ in range(2))
    z.requires_grad_()
    theirs.requires_grad_(False)
    weight = torch.cat([torch.full((n,), 1 / n) for n in counts if n])
    found = ssl_.ibot_loss(z, t, weight, len(counts), mine, theirs, 0.1, 0.05, chunk=3)
    gradients = torch.autograd.grad(found, (z, mine.weight))

    targets = slow_sinkhorn(theirs(t) / 0.05, 3).float()
    expected, first = 0, 0
    for n in counts:
        if n:
            rows = slice(first, first + n)
            log_p = (mine(z[rows]) / 0.1).log_softmax(1)
            expected = expected - (targets[rows] * log_p).sum(1).mean()
        first += n
    expected = expected / len(counts)
    assert torch.allclose(found, expected, rtol=1e-5)
    for got, wanted in zip(gradients, torch.autograd.grad(expected, (z, mine.weight)), strict=True):
        assert torch.allclose(got, wanted, atol=1e-6)


def test_ibot_never_holds_all_logits():
    torch.manual_seed(0)
    sizes = []
    z, prototypes = torch.randn(500, 4, requires_grad=True), torch.nn.Linear(4, 50, bias=False)
    prototypes.register_forward_hook(lambda module, given, out: sizes.append(len(out)))
    kept = 0

    def pack(tensor):
        nonlocal kept
        kept += tensor.numel()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        theirs = copy.deepcopy(prototypes).requires_grad_(False)
        ssl_.ibot_loss(z, z.detach(), torch.ones(500) / 500, 1, prototypes, theirs, 0.1, 0.04,
                       chunk=40).backward()
    assert max(sizes) == 40 and kept < 500 * 50


def test_unit_prototypes_give_cosines_and_cannot_shrink():
    torch.manual_seed(0)
    free, unit = ssl_.Prototypes(6, 9), ssl_.Prototypes(6, 9, unit=True)
    unit.load_state_dict(free.state_dict())
    z = F.normalize(torch.randn(4, 6), dim=1)
    assert torch.allclose(
        unit(z), F.cosine_similarity(z[:, None], free.weight[None], dim=2), atol=1e-6
    )
    # cosines of 8 bits would be noise at cold temperatures
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(unit(z.bfloat16()), unit(z.bfloat16().float()))
    unit(z).square().sum().backward()
    # no pull along their own direction
    assert (unit.weight.grad * unit.weight).sum(1).abs().max() < 1e-6


@pytest.mark.smoke
def test_koleo_of_known_points():
    x = torch.tensor([[3.0, 0.0], [-0.5, 0.0]])  # opposite: 2 apart, whatever their length
    assert math.isclose(ssl_.koleo_loss(x).item(), -math.log(2), rel_tol=1e-6)
    square = torch.tensor([[1.0, 0], [0, 2], [-3, 0], [0, -4]])  # neighbours are sqrt(2) apart
    assert math.isclose(ssl_.koleo_loss(square).item(), -math.log(2) / 2, rel_tol=1e-6)


def test_koleo_of_duplicates_is_finite_and_its_gradient_parts_near_ones():
    twins = torch.tensor([[1.0, 2.0], [1.0, 2.0], [-1.0, 0.5]], requires_grad=True)
    loss = ssl_.koleo_loss(twins)
    loss.backward()
    assert math.isfinite(loss.item()) and twins.grad.isfinite().all()
    near = torch.tensor([[1.0, 0.1], [1.0, -0.1], [-1.0, 0.0]], requires_grad=True)
    ssl_.koleo_loss(near).backward()
    assert near.grad[0, 1] < 0 < near.grad[1, 1]  # downhill: away from each other


def test_teacher_at_the_ends_of_its_momentum():
    teacher, student = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    before = copy.deepcopy(teacher)
    ssl_.update_teacher(teacher, student, 1.0)
    assert torch.equal(teacher.weight, before.weight)
    ssl_.update_teacher(teacher, student, 0.75)
    assert torch.allclose(teacher.weight, 0.75 * before.weight + 0.25 * student.weight)
    ssl_.update_teacher(teacher, student, 0.0)
    assert torch.equal(teacher.weight, student.weight) and torch.equal(teacher.bias, student.bias)


def test_no_gradient_reaches_the_teacher():
    student, teacher = small_learners()
    teacher.requires_grad_(True)  # even if one forgot to forbid it
    found = student(teacher, small_batch(), 0.05, train_ssl.Loss())
    found["loss"].backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(
        p.grad is not None and p.grad.isfinite().all() and p.grad.any()
        for p in student.parameters()
    )


def test_losses_fall_when_the_student_follows():
    """A few steps on one batch with a fixed teacher: the student comes to say what it says."""
    student, teacher = small_learners()
    batch, optimiser = small_batch(), torch.optim.Adam(student.parameters(), 3e-3)
    teacher.load_state_dict(ssl_.Learner(small_vit(1), 24, hidden=32, bottleneck=16).state_dict())
    values = []
    for _ in range(40):
        found = student(teacher, batch, 0.05, train_ssl.Loss())
        optimiser.zero_grad()
        found["loss"].backward()
        optimiser.step()
        values.append((found["kl"].item(), found["ibot"].item()))
    assert values[-1][0] < 0.5 * values[0][0] and values[-1][1] < values[0][1]


# ------------------------------------------------------------------------------------ masks, health

@pytest.mark.smoke
def test_masks():
    numbers = np.arange(200)
    masks = ssl_.block_masks(3, numbers, 14, 10, (0.1, 0.5))               # (2, B, N)
    count = masks.sum(2)
    assert ((count > 0).sum(0) == 1).all()  # half of the crops: one view of each sample
    share = count.max(0) / 140
    assert (
        0.095 < share.min() < 0.13 and 0.47 < share.max() <= 0.5 and abs(share.mean() - 0.3) < 0.03
    )
    assert 0.35 < (count[0] > 0).mean() < 0.65
    assert np.array_equal(masks[:, 50:60], ssl_.block_masks(3, numbers[50:60], 14, 10, (0.1, 0.5)))
    assert not np.array_equal(masks, ssl_.block_masks(4, numbers, 14, 10, (0.1, 0.5)))
    hidden = masks.reshape(2, 200, 14, 10)  # blocks, not grains: neighbours are alike
    assert (hidden[:, :, 1:] & hidden[:, :, :-1]).sum() > 0.7 * hidden[:, :, 1:].sum()


def test_measures_of_health():
    assert ssl_.perplexity(torch.tensor([5.0, 5, 5, 5, 0])) == pytest.approx(4)
    assert ssl_.perplexity(torch.tensor([0.0, 7, 0])) == pytest.approx(1)
    corners = torch.cat((torch.eye(6), -torch.eye(6)))  # centred, all directions alike
    assert ssl_.student_effective_rank(corners) == pytest.approx(6)
    line = torch.tensor([[1.0, 1], [3, 3], [4, 4]])
    assert ssl_.student_effective_rank(line) == pytest.approx(1, abs=1e-6)
    wide = torch.randn(20000, 16, generator=torch.Generator().manual_seed(0))
    assert ssl_.student_feature_std(wide) == pytest.approx(1, abs=0.02)
    assert ssl_.student_feature_std(torch.ones(9, 4)) == pytest.approx(0, abs=1e-9)


# ------------------------------------------------------------------------------------------ encoder

@pytest.mark.smoke
def test_packed_is_one_by_one():
    vit = small_vit()
    encoder, batch = ssl_.PackedViT(vit), small_batch()
    large, small = encoder([batch.large, batch.small], batch.mask)
    for got, wanted in ((large, vit(batch.large, batch.mask)), (small, vit(batch.small))):
        for name in ("cls", "registers", "patches"):
            assert torch.allclose(getattr(got, name), getattr(wanted, name), atol=1e-5), name


def test_jitter_scales_coordinates_block_by_block():
    vit, x = small_vit(), torch.randn(2, 3, 24, 16)
    jitter = torch.tensor([[0.5, 2.0], [1.3, 0.7], [1.0, 1.9]])
    got = ssl_.PackedViT(vit)([torch.randn(1, 3, 8, 8), x], None, jitter)[1].cls
    tokens = vit.embed(x, None)
    for block, (_, factor) in zip(vit.blocks, jitter, strict=True):
        tokens = block(tokens, model.rope_table(vit.periods, 3, 2, 3, factor))
    assert torch.allclose(got, vit.norm(tokens)[:, 0], atol=1e-5)
    assert not torch.allclose(got, vit(x).cls, atol=1e-3)


def test_views_are_balanced_each_alone_or_together():
    """Together is DINOv2's way; a view whose prototypes are its own shows the difference."""
    student, teacher = small_learners()
    batch = small_batch()
    alone, both = (student(teacher, batch, 0.05, train_ssl.Loss(together=together))
                   for together in (False, True))
    assert all(torch.isfinite(found["loss"]) for found in (alone, both))
    assert not torch.allclose(alone["dino"], both["dino"])
    twice = batch._replace(large=torch.cat([batch.large.chunk(2)[0]] * 2))       # equal views
    alone, both = (student(teacher, twice, 0.05, train_ssl.Loss(together=together))
                   for together in (False, True))
    assert torch.allclose(alone["teacher_entropy"], both["teacher_entropy"], atol=1e-5)


# ------------------------------------------------------------------------------------ two processes

def share_of_losses(rank, world, B=6):
    """Losses of this process's share of one fixed batch, and gradients of the shared weights."""
    student, teacher = small_learners()
    batch = small_batch(B)
    own = torch.arange(rank * B // world, (rank + 1) * B // world)
    large, mask = (v.unflatten(0, (2, B))[:, own].flatten(0, 1) for v in (batch.large, batch.mask))
    weight = (1 / mask.sum(1, keepdim=True).clamp(min=1) * torch.ones(mask.shape))[mask]
    part = ssl_.Batch(large, batch.small.unflatten(0, (3, B))[:, own].flatten(0, 1), mask,
                         mask.flatten().nonzero()[:, 0], weight, batch.jitter)
    student.chunk = 5
    found = student(teacher, part, 0.05, train_ssl.Loss(koleo=1.0))
    found["loss"].backward()
    return ({name: found[name].detach() for name in ("dino", "ibot", "koleo", "teacher_entropy")},
            [p.grad for p in student.parameters()])


def one_of_two(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    losses, gradients = share_of_losses(rank, 2)
    for tensor in (*losses.values(), *gradients):
        torch.distributed.all_reduce(tensor)
        tensor /= 2
    if rank == 0:
        torch.save((losses, gradients), f"{folder}/found.pt")
    runs.leave(0)


def test_two_processes_with_half_the_batch_are_one_with_all(tmp_path):
    """Targets are balanced, and neighbours sought, over both; gradients cross over."""
    torch.multiprocessing.spawn(one_of_two, (str(tmp_path),), nprocs=2)
    losses, gradients = torch.load(tmp_path / "found.pt", weights_only=True)
    expected, wanted = share_of_losses(0, 1)
    for name, value in expected.items():
        assert losses[name].item() == pytest.approx(value.item(), rel=2e-5), name
    largest = max(g.abs().max() for g in wanted)
    assert max((a - b).abs().max() for a, b in zip(gradients, wanted, strict=True)) < 1e-4 * largest


# -------------------------------------------------------------------------------------------- views

KINDS = ssl_.view_stains(("a", "B", "c", "LowZBF"), ("lowzbf", "other"))


def draws(config, B, seed=0):
    V = 2 + config.locals
    return Draws.of(seed, np.arange(B)), Draws.of(seed, np.arange(V * B))


def ramp(H, W):
    """A pool whose channels say where one is, and limits that give the coordinates back."""
    y, x = np.mgrid[:H, :W]
    pixels = np.stack((y * 60000 // max(H, W), x * 60000 // max(H, W))).astype(np.uint16)
    pixels = torch.from_numpy(np.stack((pixels, pixels[::-1])).view(np.int16).copy())
    return pixels, torch.tensor([0.0, 60000.0]).expand(2, 2, 2)


@pytest.mark.smoke
def test_stains():
    assert KINDS == (4, (0, 1, 2), (3,))
    with pytest.raises(ValueError, match="all are brightfield"):
        ssl_.view_stains(("LowZBF",), ("lowzbf",))


@pytest.mark.smoke
@pytest.mark.parametrize("strategy", ["average", "single", "pairs", "average_single", "all"])
def test_strategies(strategy):
    config = train_ssl.Views(strategy=strategy, locals=6)
    w = ssl_.view_channel_weights(config, *draws(config, 400), KINDS)                 # (V, B, C)
    assert w.shape == (8, 400, 4) and np.allclose(w.sum(2), 1) and (w >= 0).all()
    mean = np.allclose(0, 0) & (np.abs(w - [1 / 3, 1 / 3, 1 / 3, 0]).max(2) < 1e-9)
    one = w.max(2) == 1
    if strategy == "average":
        assert mean.all()
    elif strategy == "single":
        assert one.all() and (w == w[0]).all() and (np.bincount(w[0].argmax(1)) > 60).all()
    elif strategy == "pairs":
        assert one.all() and (w[0] != w[1]).any(1).all()
        assert ((w[2:] == w[0]).all(2) | (w[2:] == w[1]).all(2)).all()
    elif strategy == "average_single":
        assert (
            mean[0].all() and one[1].all() and 0.25 < mean[2:].mean() < 0.35 and (mean | one).all()
        )
        assert (np.bincount(w[1].argmax(1)) > 60).all()
    else:
        bright = w[:, :, 3] == 1
        mixed = ~mean & ~one
        for part in (mean, bright, one & ~bright, mixed):
            assert 0.2 < part.mean() < 0.3
        assert (w[mixed][:, 3] == 0).all()


def test_a_step_shows_all_fields_in_the_same_stains():
    """Then no channel tells the fields of a step apart; the global views differ, and the steps."""
    pool, slots = Pool(), torch.arange(6)
    # channel c is c / 4 bright
    pool.pixels[:] = torch.arange(4, dtype=torch.int16)[:, None, None] * 10000
    pool.limits = torch.tensor([0.0, 40000.0]).expand(6, 4, 2)
    changes = ("light", "blur", "noise", "shot", "dim", "contrast", "brightness", "gamma")
    still = ssl_.view_light(dict.fromkeys(changes, 0.0))
    config = train_ssl.Views(size=16, local_size=8, locals=3, strategy="pairs")
    seen = []
    for step in range(6):
        large, small = ssl_.draw_views(
            pool, slots, np.arange(6) + 6 * step, step, 0, config, still, KINDS
        )
        assert large[:, 0].std((1, 2)).max() < 1e-5  # each view shows one channel
        seen.append(large[:, 0].mean((1, 2)).unflatten(0, (2, 6)))                # (2, 6)
    seen = torch.stack(seen)                                                      # (steps, 2, 6)
    assert (seen.std(2) < 1e-5).all() and len(seen[:, 0, 0].round(decimals=3).unique()) > 1
    assert (seen[:, 0] - seen[:, 1]).abs().min() > 0.1


def test_overlap_has_its_minimum_and_locals_lie_within():
    """In closed form for the global views; by sampling points for both and for the local ones."""
    config = train_ssl.Views(size=64, local_size=24, locals=3, overlap=0.4, scale=(0.6, 1.5))
    centre, matrix = ssl_.place_views(config, *draws(config, 60), (1080, 1080))
    at = (np.argwhere(np.ones((40, 40))) + 0.5) / 40 - 0.5
    shares, known = [], []

    def points(b, v, side):
        return at * side @ matrix[v, b].T + centre[v, b]

    def inside(p, b, v):
        return (np.abs((p - centre[v, b]) @ np.linalg.inv(matrix[v, b]).T) <= 32 + 1e-6).all(1)

    for b in range(60):
        side = 64 * np.sqrt(np.abs(np.linalg.det(matrix[:2, b])))                 # px of the field
        one = side.argmin()
        shares.append(inside(points(b, one, 64), b, 1 - one).mean())
        # in the frame
        apart = np.abs(np.linalg.inv(matrix[0, b]) @ (centre[1, b] - centre[0, b])) * side[0] / 64
        known.append((np.clip(side.sum() / 2 - apart, 0, side.min()) / side.min()).prod())
        for v in range(2, 5):
            p = points(b, v, 24)
            assert inside(p, b, 0).all() or inside(p, b, 1).all()
    assert np.abs(np.subtract(known, shares)).max() < 0.06 and min(known) >= 0.4 - 1e-9
    assert min(known) < 0.5 and max(known) > 0.9


def test_views_stay_in_the_field_when_there_is_room():
    config = train_ssl.Views(size=64, local_size=24, locals=2, overlap=0.6)
    centre, matrix = ssl_.place_views(config, *draws(config, 300), (400, 330))
    corner = np.array([(y, x) for y in (-32, 32) for x in (-32, 32)])
    reach = np.einsum("vbij,kj->vbki", matrix[:2], corner) + centre[:2, :, None]
    assert (
        reach.min() >= -1e-6 and (reach.reshape(-1, 2).max(0) <= np.array([400, 330]) + 1e-6).all()
    )
    assert reach[..., 0].min() < 15 and reach[..., 0].max() > 385          # and come to its edges


def test_gather_copies_what_is_neither_turned_nor_scaled():
    rng = np.random.default_rng(0)
    # the upper half: negative as int16
    raw = rng.integers(0, 65536, (3, 2, 20, 30), dtype=np.uint16)
    limits = torch.tensor([[[100.0, 60000.0], [0.0, 65535.0]]]).expand(3, 2, 2)
    got = ssl_.cut_view_crops(
        torch.from_numpy(raw.view(np.int16)),
        limits,
        torch.tensor([2, 0]),
        np.eye(2)[[0, 1]],
        np.array([[9.0, 12.0], [4.0, 26.0]]),
        np.stack([np.eye(2)] * 2),
        8,
    )
    assert torch.allclose(
        got[0, 0],
        torch.from_numpy(((raw[2, 0, 5:13, 8:16] - 100.0) / 59900).clip(0, 1)).float(),
        atol=1e-6,
    )
    assert torch.allclose(
        got[1, 0], torch.from_numpy(raw[0, 1, 0:8, 22:30] / 65535).float(), atol=1e-6
    )


def test_gather_looks_where_it_says():
    """On ramps of y and x, a turned, scaled, mirrored crop must read its own coordinates."""
    pixels, limits = ramp(90, 120)
    angle, centre = 0.7, np.array([40.0, 63.0])
    matrix = np.array([[np.cos(angle), np.sin(angle)], [np.sin(angle), -np.cos(angle)]]) * 1.7
    for channel in (0, 1):
        got = ssl_.cut_view_crops(
            pixels, limits, torch.tensor([0]), np.eye(2)[[channel]], centre[None], matrix[None], 20
        )
        at = np.arange(20) - 9.5
        where = np.stack(np.meshgrid(at, at, indexing="ij"), -1) @ matrix.T + centre - 0.5
        assert np.abs(got[0, 0].numpy() * 120 - where[..., channel]).max() < 0.01


def test_gather_mixes_channels_and_mirrors_beyond_the_border():
    pixels, limits = ramp(40, 40)
    got = ssl_.cut_view_crops(pixels, limits, torch.tensor([0, 1]),
                              np.array([[0.25, 0.75], [1.0, 0.0]]),
                       np.array([[20.0, 20.0], [0.0, 20.0]]), np.stack([np.eye(2)] * 2), 10)
    y, x = np.mgrid[15:25, 15:25]
    assert np.abs(got[0, 0].numpy() * 40 - (0.25 * y + 0.75 * x)).max() < 0.01
    upper = ssl_.cut_view_crops(
        pixels,
        limits,
        torch.tensor([0]),
        np.eye(2)[[0]],
        np.array([[0.0, 20.0]]),
        np.eye(2)[None],
        10,
    )
    assert np.allclose(upper[0, 0, :, 0].numpy() * 40, [5, 4, 3, 2, 1, 0, 1, 2, 3, 4], atol=0.01)


def test_a_channel_without_contrast_is_black():
    got = ssl_.cut_view_crops(
        torch.full((1, 1, 9, 9), 7, dtype=torch.int16),
        torch.tensor([[[7.0, 7.0]]]),
        torch.tensor([0]),
        np.eye(1),
        np.array([[4.0, 4.0]]),
        np.eye(2)[None],
        4,
    )
    assert (got == 0).all()


class Pool:
    def __init__(self, n=6, size=64):
        rng = np.random.default_rng(0)
        self.pixels = torch.from_numpy(
            rng.integers(0, 60000, (n, 4, size, size)).astype(np.uint16).view(np.int16)
        )
        self.limits = torch.tensor([500.0, 58000.0]).expand(n, 4, 2)


def test_views_depend_on_their_sample_alone():
    pool, config, numbers = (
        Pool(),
        train_ssl.Views(size=32, local_size=16, locals=3),
        np.arange(100, 106),
    )
    light = ssl_.view_light({"noise": 0.5, "gamma": 0.5})
    slots = torch.tensor([3, 1, 0, 5, 2, 4])
    large, small = ssl_.draw_views(pool, slots, numbers, 3, 7, config, light, KINDS)
    assert large.shape == (12, 3, 32, 32) and small.shape == (18, 3, 16, 16)
    some = ssl_.draw_views(pool, slots[[4, 1]], numbers[[4, 1]], 3, 7, config, light, KINDS)
    assert torch.allclose(some[0], large.unflatten(0, (2, 6))[:, [4, 1]].flatten(0, 1), atol=1e-6)
    assert torch.allclose(some[1], small.unflatten(0, (3, 6))[:, [4, 1]].flatten(0, 1), atol=1e-6)
    assert not torch.allclose(
        large, ssl_.draw_views(pool, slots, numbers + 6, 3, 7, config, light, KINDS)[0]
    )


def test_geometry_in_the_light_is_refused():
    with pytest.raises(ValueError, match="augment.elastic"):
        ssl_.view_light({"elastic": 0.5})
