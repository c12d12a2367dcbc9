"""Random values keyed by (seed, number of the sample, name of the value): hashes, not a stream.

    draws = Draws.of(seed, numbers, config)     # numbers (B,): no other sample of the run has them
    draws.happens("flip")                       # (B,) bool, by the probability config.flip
    draws.within("blur_px")                     # (B,) in the range config.blur_px

A sample does not depend on its batch, on ranks, workers or on what was drawn before. The few values per sample are
drawn on the host, so the host knows which samples an operation touches, and never waits for a GPU; noise() per pixel
is drawn on the device.
"""
from __future__ import annotations

import functools
import hashlib
import math

import numpy as np
import torch
from scipy.special import ndtri
from torch import Tensor

GOLDEN, FIRST, SECOND = (c - (1 << 64) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def scramble(z):
    """splitmix64 (Steele et al., 2014), int64 arrays or tensors: products wrap, masks make shifts logical."""
    z = z + GOLDEN
    z = (z ^ (z >> 30 & (1 << 34) - 1)) * FIRST
    z = (z ^ (z >> 27 & (1 << 37) - 1)) * SECOND
    return z ^ (z >> 31 & (1 << 33) - 1)


def hashed(text: str) -> int:
    """64 bits, signed."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


class Draws:
    """The random values of B samples, on the host, with the probabilities and ranges that they follow."""

    def __init__(self, key: np.ndarray, config=None):
        self.key, self.config = key, config                                  # (B,) int64

    @classmethod
    def of(cls, seed: int, numbers: np.ndarray, config=None) -> Draws:
        return cls(scramble(scramble(np.array([seed], np.int64)) ^ np.asarray(numbers, np.int64)), config)

    def at(self, rows: np.ndarray) -> Draws:
        return Draws(self.key[rows], self.config)

    def streams(self, name: str, channels: int = 1, length: int = 0) -> np.ndarray:
        """(B, channels) int64 where sequences of hashes begin: the i-th is scramble(stream + i GOLDEN)."""
        return scramble(self.key ^ hashed(name))[:, None] + GOLDEN * (length * np.arange(channels))

    def uniform(self, name: str, *shape: int) -> np.ndarray:
        """(B, *shape) in (0, 1)."""
        bits = scramble(self.streams(name, math.prod(shape), 1))
        return (((bits >> 12 & (1 << 52) - 1) + 0.5) * 2.0 ** -52).reshape(-1, *shape)

    def happens(self, name: str) -> np.ndarray:
        return self.uniform(f"{name} happens") < getattr(self.config, name)  # (B,) bool

    def within(self, name: str, limits: tuple[float, ...] | None = None) -> np.ndarray:
        """(B,) in a range of the configuration; factors and widths are in (1, 2) as often as in (2, 4)."""
        (low, high), u = limits or getattr(self.config, name), self.uniform(name)
        return low * (high / low) ** u if low > 0 else low + (high - low) * u

    def knots(self, name: str, strength: str, channels: int, n: int) -> np.ndarray:
        """(B, channels, n, n) normal values for smooth(), each sample with its own standard deviation."""
        return ndtri(self.uniform(name, channels, n, n)) * self.within(strength)[:, None, None, None]


@functools.lru_cache
def quantiles(device: torch.device) -> Tensor:
    """65,536 equally likely values of the normal distribution."""
    return torch.from_numpy(ndtri((np.arange(65536) + 0.5) / 65536)).float().to(device)


def noise(streams: Tensor, size: int) -> Tensor:
    """Standard normal values (k, C, S, S) for streams (k, C), on their device; 16 bits of a hash give one."""
    steps = GOLDEN * torch.arange(-(-size ** 2 // 4), device=streams.device)
    bits = scramble(streams[:, :, None] + steps).view(torch.int16)[..., :size ** 2]
    values = quantiles(streams.device).index_select(0, bits.flatten().int() + 32768)
    return values.view(*streams.shape, size, size)
