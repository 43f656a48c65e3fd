"""Splash attention on a TPU: JAX's Pallas kernel, which holds no scores, in the place of the einsum.

Block-sparse FlashAttention (Dao et al. 2022, arXiv:2205.14135): blocks of keys that the causal rule hides are
never read. The kernel knows its mask when it is compiled, so it has a contract: a causal pass over tokens in
the order of their positions, padding at the end of a row or, without a cache, anywhere.
"""

from __future__ import annotations

import contextlib
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jax_models import layers
from jax_models.fused import set_attention
from twinformers.sharding import BATCH, SEQUENCE, TENSOR

#: Queries and keys of one block; what divides the sequence, the larger the better.
SIZES = (1024, 512, 256, 128)


def splash(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """Causal attention on one device, in half precision or float32.

    q [B, T, N, H], k and v [B, S, K, H], mask [B, T, S] -> [B, T, N, H]. T is a multiple of 128, S no less;
    of a cache, the first T slots are those of the call. A row whose mask is not what the kernel computes
    comes out as NaN: a mask is known only when the program runs. `interpret` runs on any device, slowly.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as library

    B, T, N, H = q.shape
    K = k.shape[2]
    k, v, rest, mask = k[:, :T], v[:, :T], mask[:, :, T:], mask[:, :, :T]
    real = jnp.diagonal(mask, axis1=1, axis2=2)  # [B, T]: a token sees itself
    causal = jnp.tril(jnp.ones((T, T), bool)) & real[:, :, None] & real[:, None, :]
    kept = (mask == causal).all((1, 2)) & ~rest.any((1, 2))  # [B]
    size = next(size for size in SIZES if T % size == 0)
    names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    sizes: Any = dict.fromkeys(names, size)
    sizes |= dict.fromkeys(("block_kv_compute", "block_kv_dkv_compute"), min(size, 512))
    kernel = library.make_splash_mqa_single_device(
        library.MultiHeadMask([library.CausalMask((T, T)) for _ in range(N // K)]),
        block_sizes=library.BlockSizes(**sizes),
        interpret=interpret,
    )
    heads = q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4) * H**-0.5  # [B, K, G, T, H]
    segments = library.SegmentIds(q=real.astype(jnp.int32), kv=real.astype(jnp.int32))
    each = jax.vmap(kernel, in_axes=(0, 0, 0, None))  # the key-value heads of a row
    # Nothing is gained by a higher precision than that of what is multiplied, and a TPU refuses to.
    narrow = q.dtype.itemsize == 2
    with jax.default_matmul_precision("default") if narrow else contextlib.nullcontext():
        x = jax.vmap(each)(heads, k.swapaxes(1, 2), v.swapaxes(1, 2), segments)  # [B, K, G, T, H]
    x = jnp.where(kept[:, None, None, None, None], x, jnp.nan)
    return x.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    *,
    rate: float = 0.0,
    key: jax.Array | None = None,
    mesh: Mesh | None = None,
    interpret: bool = False,
) -> jax.Array:
    """`splash` where it can, on each device of a mesh its rows and heads; else `layers.attend`.

    What shares out a row's tokens shares out its heads here, so that each device sees whole rows: between the
    two, all devices of that axis tell each other (Jacobs et al. 2023, arXiv:2309.14509).
    The einsum takes what the kernel does not have: dropout, float64, and calls of another length than a
    multiple of 128, such as the steps of decoding.
    """
    (B, T), (S, K) = q.shape[:2], k.shape[1:3]
    if (key is not None and rate > 0) or T % SIZES[-1] or S < T or q.dtype == jnp.float64:
        return layers.attend(q, k, v, mask, rate=rate, key=key)
    local = partial(splash, interpret=interpret)
    if mesh is None:
        return local(q, k, v, mask)
    rows = BATCH if B % (mesh.shape[BATCH[0]] * mesh.shape[BATCH[1]]) == 0 else None
    axes = (TENSOR, SEQUENCE) if SEQUENCE in mesh.shape else (TENSOR,)
    heads = axes if K % math.prod(mesh.shape[axis] for axis in axes) == 0 else None
    wide = PartitionSpec(rows, None, heads)
    # The compiler cannot cut a kernel of our own: each device is told its part.
    return jax.shard_map(
        local, mesh=mesh, in_specs=(wide, wide, wide, PartitionSpec(rows)), out_specs=wide, check_vma=False
    )(q, k, v, mask)


def use_splash(model: Any, mesh: Mesh | None = None, *, interpret: bool = False) -> Any:
    """Let every attention of a model compute by the kernel, in place; the model is returned.

    Before it is scanned, split or compiled. The model then answers causal passes only: see `splash`. Raises
    UsageError for a model whose attention cannot be chosen.
    """
    set_attention(model, partial(attend, mesh=mesh, interpret=interpret))
    return model
