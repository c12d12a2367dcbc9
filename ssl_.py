"""Self-supervised learning: DINO, iBOT and KoLeo losses, Sinkhorn-Knopp, heads, block masks, teacher.

    head = Head(dim)                              z = head(tokens): unit vectors; head.prototypes(z): logits
    targets = balanced(logits / temperature)      (B, K), what the teacher says
    dino_loss(student, targets, 0.1); ibot_loss(...); koleo_loss(cls)
    update(teacher, student, momentum)

Written from the papers: DINO (Caron et al., 2021), iBOT (Zhou et al., 2022), SwAV for Sinkhorn-Knopp (Caron
et al., 2020), KoLeo (Sablayrolles et al., 2019), DINOv2 and v3 for how they go together. Every loss is a mean
over this process's share of the batch; whatever looks across the batch (Sinkhorn-Knopp, KoLeo) looks across
all processes of the group, so that n processes with a share each learn what one with the whole batch learns.

Letters: B images, V views of an image, K prototypes, D token width, b bottleneck, M masked patches, h w token
grid.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.utils.checkpoint import checkpoint


# ---------------------------------------------------------------------------------------- across processes

def in_group() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


class _Gather(torch.autograd.Function):
    """Rows of all processes, in the order of their ranks. Gradients go back to the process the rows came
    from."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(distributed.get_world_size())]
        distributed.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        distributed.all_reduce(gradient)
        return gradient.chunk(distributed.get_world_size())[distributed.get_rank()]


def gathered(x: Tensor) -> Tensor:
    """(B, ...) of this process -> (all B, ...), differentiable."""
    return _Gather.apply(x) if in_group() else x


def _log_sum_of_group(x: Tensor) -> Tensor:
    """log of the sum of exp(x) over the processes, element by element."""
    if not in_group():
        return x
    peak = x.clone()
    distributed.all_reduce(peak, distributed.ReduceOp.MAX)
    total = (x - peak).exp()
    distributed.all_reduce(total)
    return peak + total.log()


# ---------------------------------------------------------------------------------------------------- heads

class Prototypes(nn.Linear):
    """K logits of unit vectors; no bias. They begin at length 1, so that the first logits are cosines.

    unit : they are kept at length 1. A head that may shrink its prototypes can make all its answers alike, which
        small batches and short training from scratch lead it to; DINOv3, with batches in the thousands, lets them be.
    """

    def __init__(self, bottleneck: int, count: int, unit: bool = False):
        super().__init__(bottleneck, count, bias=False)
        self.unit = unit
        nn.init.normal_(self.weight, std=bottleneck ** -0.5)

    def forward(self, z: Tensor) -> Tensor:
        weight = F.normalize(self.weight, dim=1) if self.unit else self.weight
        with torch.autocast(z.device.type, enabled=False):     # bfloat16 has 1/256 of a cosine: 0.4 of a logit at 0.01
            return F.linear(z.float(), weight)                 # (..., K)


class Head(nn.Module):
    """Token -> unit vector of `bottleneck` numbers; `prototypes` makes logits of it, where there is room for them."""

    def __init__(self, dim: int, prototypes: int = 8192, hidden: int = 2048, bottleneck: int = 256,
                 unit: bool = False):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(),
                                 nn.Linear(hidden, bottleneck))
        self.prototypes = Prototypes(bottleneck, prototypes, unit)
        for layer in self.mlp[::2]:
            nn.init.trunc_normal_(layer.weight, std=layer.in_features ** -0.5)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.mlp(x).float(), dim=-1, eps=1e-6)             # (..., b)


# --------------------------------------------------------------------------------------------------- teacher

@torch.no_grad()
def update(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher = momentum * teacher + (1 - momentum) * student, parameter by parameter."""
    mine, theirs = list(teacher.parameters()), [p.detach() for p in student.parameters()]
    torch._foreach_lerp_(mine, theirs, 1 - momentum)


# --------------------------------------------------------------------------------------------- Sinkhorn-Knopp

@torch.no_grad()
def sinkhorn(parts: Callable[[], Iterable[Tensor]], iterations: int = 3) -> Tensor:
    """What must be added to the logits so that softmax uses all prototypes equally: (K,) float32.

    parts : called once per iteration, gives the logits / temperature (m, K) of all samples of this process, part
    by part; they need never lie in memory together. Sums run over the samples of all processes.

    Scaling exp(logits) alternately, the columns (prototypes) to equal sums and the rows (samples) to 1,
    leaves a_k exp(l_ik) b_i; the last rows' step makes that softmax_k(l_ik + log a_k), so that log a is all
    one must keep. The numbers of samples and prototypes, which the textbook divides by, are factors common to
    all a_k: they cancel.
    """
    log_a = None
    for _ in range(iterations):
        total = None
        for logits in parts():
            logits = logits.float()
            if log_a is not None:
                logits = logits - (logits + log_a).logsumexp(1, keepdim=True)          # (m, K) times b_i
            part = logits.logsumexp(0)                                                 # (K,)
            total = part if total is None else torch.logaddexp(total, part)
        log_a = -_log_sum_of_group(total)
    return log_a


def balanced(logits: Tensor, iterations: int = 3) -> Tensor:
    """Targets (B, K), rows that sum to 1 and use the prototypes equally, from logits / temperature (B, K)."""
    logits = logits.float()
    return (logits + sinkhorn(lambda: [logits], iterations)).softmax(1)


# ---------------------------------------------------------------------------------------------------- losses

def dino_loss(student: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of every view of the student against the teacher's two, but no view against itself.

    student : (V, B, K) logits, the two global views first; targets : (2, B, K). The mean is over all 2 + 2 (V - 2)
    pairs, so that eight local views weigh as 16 terms against the 2 of the global ones.
    """
    log_p = (student.float() / temperature).log_softmax(-1)
    crossed = (targets.flip(0) * log_p[:2]).sum()
    local = (targets.sum(0) * log_p[2:]).sum()
    pairs = 2 + 2 * (len(student) - 2)
    return -(crossed + local) / (pairs * student.shape[1])


def ibot_loss(student: Tensor, teacher: Tensor, weight: Tensor, crops: int, student_prototypes: nn.Module,
              teacher_prototypes: nn.Module, temperature: float, teacher_temperature: float,
              chunk: int = 4096, iterations: int = 3) -> Tensor:
    """Cross-entropy on the masked patches, as the teacher sees them unmasked.

    student, teacher : (M, b) what the heads make of the masked patches; weight : (M,) 1 / masked patches in
    the crop;
    crops : global crops of this process, masked or not. The logits (M, K) exist only `chunk` rows at a time:
    for the gradient they are computed again, a matrix product each, instead of kept (15,000 patches at batch
    64 times 8,192 prototypes would be 0.5 GB each time, at 65,536 prototypes 4 GB).
    """
    def cross_entropy(z: Tensor, target: Tensor, w: Tensor) -> Tensor:
        with torch.no_grad():
            target = (teacher_prototypes(target).float() / teacher_temperature + log_a).softmax(1)
        log_p = (student_prototypes(z).float() / temperature).log_softmax(1)
        return -((target * log_p).sum(1) * w).sum()

    def logits() -> Iterable[Tensor]:
        return (teacher_prototypes(z).float() / teacher_temperature for z in teacher.split(chunk))

    log_a = sinkhorn(logits, iterations)
    parts = zip(student.split(chunk), teacher.split(chunk), weight.split(chunk))
    return sum(checkpoint(cross_entropy, *part, use_reentrant=False) for part in parts) / crops


def koleo_loss(x: Tensor) -> Tensor:
    """Push every embedding away from its nearest neighbour on any process (Sablayrolles et al., 2019, eq. 2).

    x : (B, D), at least 2 over all processes; rows are normalised here.
    """
    with torch.autocast(x.device.type, enabled=False):         # autocast would round the product to bfloat16
        x = F.normalize(x.float(), dim=-1)
        everyone = gathered(x)                                 # (all B, D)
        own = torch.arange(len(x), device=x.device)
        if in_group():
            own = own + distributed.get_rank() * len(x)
        with torch.no_grad():                                  # the choice of neighbour has no gradient
            cosines = x @ everyone.T
            cosines[own - own[0], own] = -2                    # < any cosine: never itself
            nearest = cosines.argmax(1)                        # (B,)
        return -((x - everyone[nearest]).norm(dim=-1) + 1e-8).log().mean()


# ---------------------------------------------------------------------------------------------------- masks

def block_masks(seed: int, numbers: np.ndarray, h: int, w: int, ratio: tuple[float, ...] = (0.1, 0.5),
                aspect: tuple[float, ...] = (0.3, 3.3)) -> np.ndarray:
    """Which patches to hide from the student: (2, B, h w) bool, for both global views of the samples
    `numbers` (B,).

    One of the two views, by chance, keeps all its patches: half of the crops are masked. In the other a share
    of the patches, drawn evenly from `ratio`, is hidden in blocks; as many as that exactly. A sample's mask
    depends on (seed, its number) alone.
    """
    masks = np.zeros((2, len(numbers), h, w), bool)
    for b, number in enumerate(numbers):
        rng = np.random.default_rng((seed, int(number)))
        mask = masks[rng.integers(2), b]
        left = max(1, round(rng.uniform(ratio[0], ratio[1]) * h * w))          # patches still to be hidden
        for _ in range(100):
            if left < 1:
                break
            area = rng.uniform(min(4, left), left)
            shape = math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))
            height, width = min(h, round(math.sqrt(area * shape))), min(w, round(math.sqrt(area / shape)))
            y, x = rng.integers(h - height + 1), rng.integers(w - width + 1)
            block = mask[y:y + height, x:x + width]
            new = block.size - block.sum()
            if 0 < new <= left:
                block[:] = True
                left -= int(new)
        free = np.flatnonzero(~mask)
        mask.flat[rng.choice(free, left, replace=False)] = True                # what no block fitted into
    return masks.reshape(2, len(numbers), h * w)


# ------------------------------------------------------------------------------------- is it still learning

def perplexity(counts: Tensor) -> float:
    """How many prototypes are in use: exp of the entropy of how often each was chosen, (K,) -> 1 to K."""
    p = counts.double() / counts.sum().clamp(min=1e-12)
    return math.exp(-(p * p.clamp(min=1e-300).log()).sum().item())


def effective_rank(x: Tensor) -> float:
    """exp of the entropy of the singular values of the centred rows (Roy & Vetterli, 2007): (B, D) -> 1 to
    min(B-1, D)."""
    s = torch.linalg.svdvals((x - x.mean(0)).double())
    p = s / s.sum().clamp(min=1e-12)
    return math.exp(-(p * p.clamp(min=1e-300).log()).sum().item())


def spread(x: Tensor) -> float:
    """Standard deviation of normalised rows times sqrt(D): 1 for directions spread evenly, 0 when all are
    alike."""
    x = F.normalize(x.double(), dim=-1)
    return (x.std(0).mean() * math.sqrt(x.shape[1])).item()
