"""Random numbers from explicit keys: JAX's generator in integer arithmetic, bit for bit.

The generator is threefry2x32 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") in JAX's
partitionable form, in which element n of an array depends on the key and on n alone.
"""

from __future__ import annotations

import math

import torch

MASK = 0xFFFFFFFF  # vs jax: torch has no complete uint32, so 32-bit words live in int64
ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def _threefry(key: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Twenty rounds on two words of counter."""
    keys = (key[0], key[1], key[0] ^ key[1] ^ 0x1BD11BDA)
    x, y = (x + keys[0]) & MASK, (y + keys[1]) & MASK
    for group in range(5):
        for turn in ROTATIONS[group % 2]:
            x = (x + y) & MASK
            y = (((y << turn) | (y >> (32 - turn))) & MASK) ^ x
        x = (x + keys[(group + 1) % 3]) & MASK
        y = (y + keys[(group + 2) % 3] + group + 1) & MASK
    return x, y


def key(seed: int, device: torch.device | str | None = None) -> torch.Tensor:
    """The key of a seed in [0, 2^32). int64 [2], each a 32-bit word"""
    return torch.tensor([0, seed], dtype=torch.int64, device=device)


def fold_in(key: torch.Tensor, data: torch.Tensor | int) -> torch.Tensor:
    """A new key that depends on `key` and on an integer. int64 [2] -> [2]"""
    word = torch.as_tensor(data, dtype=torch.int64, device=key.device)
    return torch.stack(_threefry(key, torch.zeros_like(word), word))


def bits(key: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Uniform 32-bit integers, in int64."""
    n = torch.arange(math.prod(shape), dtype=torch.int64, device=key.device)
    x, y = _threefry(key, n >> 32, n & MASK)
    return (x ^ y).reshape(shape)


def uniform(key: torch.Tensor, shape: tuple[int, ...], low: float = 0.0) -> torch.Tensor:
    """Uniform float32 in [low, 1), whatever the precision around it."""
    # 23 random bits as the fraction of a number in [1, 2), then shifted down
    one_to_two = ((bits(key, shape) >> 9) | 0x3F800000).to(torch.int32).view(torch.float32)
    return torch.clamp((one_to_two - 1.0) * (1.0 - low) + low, min=low)


def gumbel(key: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Standard Gumbel noise in float32: adding it to logits and taking the largest draws from the softmax."""
    return -torch.log(-torch.log(uniform(key, shape, torch.finfo(torch.float32).tiny)))
