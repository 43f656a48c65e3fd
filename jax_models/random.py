"""Random numbers from explicit keys: JAX's own generator, named as its PyTorch twin names it.

The generator is threefry2x32 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") in JAX's
partitionable form, in which element n of an array depends on the key and on n alone.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def key(seed: int) -> jax.Array:
    """The key of a seed in [0, 2^32). uint32 [2]"""
    # vs torch: wrapped to the raw form, so that both frameworks pass two plain integers around
    return jax.random.key_data(jax.random.key(seed, impl="threefry2x32"))


def fold_in(key: jax.Array, data: jax.Array | int) -> jax.Array:
    """A new key that depends on `key` and on an integer. uint32 [2] -> [2]"""
    return jax.random.fold_in(key, data)


def bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Uniform 32-bit integers, uint32."""
    return jax.random.bits(key, shape, jnp.uint32)


def uniform(key: jax.Array, shape: tuple[int, ...], low: float = 0.0) -> jax.Array:
    """Uniform float32 in [low, 1), whatever the precision around it."""
    return jax.random.uniform(key, shape, jnp.float32, minval=low)


def gumbel(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Standard Gumbel noise in float32: adding it to logits and taking the largest draws from the softmax."""
    return -jnp.log(-jnp.log(uniform(key, shape, float(jnp.finfo(jnp.float32).tiny))))
