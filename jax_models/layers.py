"""What the architectures share: normalisation, rotary angles, the key-value cache, attention itself.

Axes: B batch, T query length, S key length, D hidden, N query heads, K key-value heads, G = N/K,
H head dimension, L layers. Softmax, norm statistics and rotary angles run in at least float32.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jax_models.random import bits, fold_in
from twinformers.errors import UsageError


def at_least_float32(dtype: jnp.dtype) -> jnp.dtype:
    """float32 for the half precisions, the dtype itself for float32 and float64."""
    return jnp.promote_types(dtype, jnp.float32)


class Linear(nnx.Linear):
    """nnx.Linear as a product of two matrices, whatever the number of axes. [..., in] -> [..., out]

    The gradient of a product over [B, T, in] sums over two axes; for that XLA's CPU compiler writes both
    operands once more, transposed. For a sum over one axis it does not: a quarter less for a training step.
    Where devices share out the tokens of a row, the two are no one axis.
    """

    def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]  # one argument, as everywhere
        if "sequence" in jax.sharding.get_abstract_mesh().shape:
            return super().__call__(x)
        # vs torch: its products take the axes together themselves
        flat = super().__call__(x.reshape(-1, x.shape[-1]))
        return flat.reshape(*x.shape[:-1], -1)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale (Zhang & Sennrich 2019, arXiv:1910.07467). [..., D] -> [..., D]"""

    def __init__(self, size: int, eps: float, *, dtype: jnp.dtype):
        self.eps = eps
        # vs torch: a leaf is a Param that wraps the array; Flax names it scale, torch weight
        self.scale = nnx.Param(jnp.ones(size, dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(at_least_float32(x.dtype))
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return wide.astype(x.dtype) * self.scale[...]


class LayerNorm(nnx.Module):
    """(x - mean) / sqrt(var + eps) * scale + bias (Ba et al. 2016, arXiv:1607.06450). [..., D] -> same"""

    def __init__(self, size: int, eps: float, *, dtype: jnp.dtype):
        self.eps = eps
        # vs torch: a leaf is a Param that wraps the array; Flax names it scale, torch weight
        self.scale = nnx.Param(jnp.ones(size, dtype))
        self.bias = nnx.Param(jnp.zeros(size, dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(at_least_float32(x.dtype))
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return wide.astype(x.dtype) * self.scale[...] + self.bias[...]


def subkey(key: jax.Array | None, data: jax.Array | int) -> jax.Array | None:
    """`fold_in` for a key that may be missing: without one nothing below drops anything."""
    return None if key is None else fold_in(key, data)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zero each element with probability `rate` and scale the others up; without a key, x itself.

    Srivastava et al. 2014. The key alone decides which: the masks of both frameworks are the same.
    """
    if key is None or rate == 0:
        return x
    keep = bits(key, x.shape) < jnp.uint32(round((1 - rate) * 2**32))
    return jnp.where(keep, x * (1 / (1 - rate)), 0)


#: Activations by Hugging Face's names; plain GELU is the exact one.
ACTIVATIONS = {
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


class KVCache(NamedTuple):
    """Keys and values seen so far. A token at position p lies in slot p mod S of its row.

    Slot S is scratch: what must not be kept is written there, and its position stays -1.
    """

    k: jax.Array  # [L, B, K, S+1, H]
    v: jax.Array  # [L, B, K, S+1, H]
    positions: jax.Array  # [B, S+1] int32, -1 where empty


class CrossCache(NamedTuple):
    """The encoder's output as the decoder's layers see it: computed once per source, never written again."""

    k: jax.Array  # [L, B, S, N, H]
    v: jax.Array  # [L, B, S, N, H]
    positions: jax.Array  # [B, S] int32, -1 for padding


class Context(NamedTuple):
    """What depends on the positions alone: computed once per call, read by every layer."""

    cos: jax.Array  # [B, T, H/2]
    sin: jax.Array  # [B, T, H/2]
    slots: jax.Array | None  # [B, T], where this call's keys and values go in the cache
    mask: jax.Array  # [B, T, S], True where a key is visible


def empty_cache(layers: int, batch: int, length: int, heads: int, size: int, *, dtype: jnp.dtype) -> KVCache:
    """A cache for `length` positions per row, nothing in it yet."""
    shape = (layers, batch, heads, length + 1, size)
    # vs torch: two allocations, not one array twice: a donated buffer may appear only once
    empty = jnp.full((batch, length + 1), -1, jnp.int32)
    return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), empty)


def place(positions: jax.Array, cache: KVCache, window: int | None = None) -> tuple[jax.Array, KVCache]:
    """Assign each token of a call its slot, and note the positions there. [B, T] -> [B, T]

    Padding goes to the scratch slot, and so does whatever a later token of the same call overwrites.
    With a sliding window, UsageError where the call would overwrite keys that its first token still sees.
    """
    T, length = positions.shape[1], cache.positions.shape[1] - 1
    if window is not None and T > 1 and length < window + T - 1:
        raise UsageError(
            f"a call of {T} tokens would overwrite keys that its window of {window} still sees",
            where="cache",
            expected=f"at least window + tokens - 1 = {window + T - 1} slots",
            found=f"{length} slots",
            hint="make the cache longer, or give the tokens in smaller chunks",
        )
    kept = (positions >= 0) & (positions > positions.max(axis=1, keepdims=True) - length)  # [B, T]
    slots = jnp.where(kept, positions % length, length)  # [B, T]
    rows = jnp.arange(positions.shape[0])[:, None]  # [B, 1]
    # vs torch: arrays are immutable; .at[].set returns a new one, which XLA writes in place when donated
    noted = cache.positions.at[rows, slots].set(jnp.where(kept, positions, -1))
    return slots, cache._replace(positions=noted)


def store(
    cache: KVCache, layer: int, slots: jax.Array, k: jax.Array, v: jax.Array
) -> tuple[KVCache, jax.Array, jax.Array]:
    """Put one layer's keys and values, each [B, T, K, H], into their slots, and give all that it has now.

    The cache and 2 x [B, S+1, K, H], in which the heads stand before the slots in memory: a product over one
    head then reads them as they lie.
    """
    rows = jnp.arange(slots.shape[0])[:, None]  # [B, 1]
    cache = cache._replace(
        k=cache.k.at[layer, rows, :, slots].set(k.astype(cache.k.dtype)),
        v=cache.v.at[layer, rows, :, slots].set(v.astype(cache.v.dtype)),
    )
    return cache, cache.k[layer].swapaxes(1, 2), cache.v[layer].swapaxes(1, 2)


def visible(
    positions: jax.Array, key_positions: jax.Array, window: int | None = None, *, causal: bool = True
) -> jax.Array:
    """Which keys each query sees: all up to its own position; never padding. [B, T], [B, S] -> [B, T, S]

    With a window, only those less than `window` positions away; without the causal rule, later ones too.
    """
    if window is not None and window < 1:
        raise UsageError(
            "bad value", where="window", expected="a positive number, or None", found=str(window)
        )
    distance = positions[:, :, None] - key_positions[:, None, :]  # [B, T, S]
    seen = jnp.broadcast_to(key_positions[:, None, :] >= 0, distance.shape)
    if causal:
        seen = seen & (distance >= 0)
    if window is not None:
        seen = seen & (jnp.abs(distance) < window)
    return seen


def rotary_angles(
    positions: jax.Array, frequencies: tuple[float, ...], dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of position times frequency, at least float32. [B, T] -> 2 x [B, T, H/2]"""
    wide = at_least_float32(dtype)  # bfloat16 cannot hold position 257
    angles = positions[:, :, None].astype(wide) * jnp.asarray(frequencies, wide)  # [B, T, H/2]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turn dimension j together with j + H/2 (Su et al. 2021, arXiv:2104.09864). [B, T, *, H] -> same"""
    first, second = jnp.split(x.astype(cos.dtype), 2, axis=-1)  # 2 x [B, T, *, H/2]
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]  # [B, T, 1, H/2]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def attention_weights(q: jax.Array, k: jax.Array, mask: jax.Array) -> jax.Array:
    """How much each query takes from each key, per head; a query's weights add up to 1, and padding gets 0.

    softmax(q k^T / sqrt(H)) (Vaswani et al. 2017, arXiv:1706.03762, eq. 1). Query head n reads key-value
    head n // G (Ainslie et al. 2023, arXiv:2305.13245). q [B, T, N, H], k [B, S, K, H], mask [B, T, S]
    -> [B, N, T, S], at least float32. A row that sees nothing gets equal weights: finite, unspecified.
    """
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    # One axis R = G T for all queries of a key-value head: no product has to reorder the scores.
    q = q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, H)  # [B, K, R, H]
    scores = jnp.einsum("bkrh,bskh->bkrs", q, k) * H**-0.5  # [B, K, R, S]
    scores = scores.astype(at_least_float32(scores.dtype)).reshape(B, K, N // K, T, S)
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(scores.dtype).min)
    return jax.nn.softmax(scores, axis=-1).reshape(B, N, T, S)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    *,
    rate: float = 0.0,
    key: jax.Array | None = None,
) -> jax.Array:
    """Scaled dot-product attention: each query's weighted mean of the values, per head.

    q [B, T, N, H], k and v [B, S, K, H], mask [B, T, S] -> [B, T, N, H]. `key` drops weights at `rate`.
    """
    B, T, N, H = q.shape
    S, K = v.shape[1:3]
    weights = dropout(attention_weights(q, k, mask).astype(v.dtype), rate, key)  # [B, N, T, S]
    weights = weights.reshape(B, K, -1, S)  # [B, K, R, S]
    return jnp.einsum("bkrs,bskh->bkrh", weights, v).reshape(B, N, T, H).swapaxes(1, 2)  # [B, T, N, H]


#: Which axes of a mesh share out each axis of an activation; of a residual, batch and tokens.
SHARED: dict[str, tuple[tuple[str, ...], ...]] = {"residual": (("data", "fsdp"), ("sequence",), ())}


def constrain(x: jax.Array, name: str) -> jax.Array:
    """Have an activation lie as its name says ("residual") under `jax.set_mesh`; without a mesh, x itself.

    What does not divide evenly is left to the compiler.
    """
    # vs torch: modules are wrapped for that from outside
    mesh, places = jax.sharding.get_abstract_mesh(), []
    for axes, size in zip(SHARED[name], x.shape, strict=True):
        parts = math.prod(mesh.shape.get(axis, 0) for axis in axes)
        places.append(axes if axes and parts and size % parts == 0 else None)
    if not any(places):
        return x
    return jax.lax.with_sharding_constraint(x, jax.sharding.PartitionSpec(*places))
