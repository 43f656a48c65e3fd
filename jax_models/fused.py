"""Attention by JAX's own kernels, and the choice between them and the einsum of `layers`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.backend import get_backend

from jax_models import layers
from twinformers.errors import UsageError

#: Queries that `blocks` takes together.
BLOCK = 128
#: Up to so many queries the keys stand on the left of their product: decoding, and checking of guesses.
FEW = 8


def _cudnn_can(q: jax.Array, k: jax.Array) -> bool:
    """Whether cuDNN is there and takes the dtype and the shapes, in training and on every NVIDIA GPU."""
    T, S, H = q.shape[1], k.shape[1], q.shape[3]
    fits = q.dtype.itemsize == 2 and H % 8 == 0 and H <= 128 and T % 2 == S % 2 == 0
    return fits and "cuda" in get_backend().platform_version


def _whole(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """The einsum, its weights divided by their sum once they have met the values: one array less to write.

    Shapes as in `kernel`.
    """
    (B, T, N, H), (S, K) = q.shape, k.shape[1:3]
    q = q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, H)  # [B, K, R, H]
    if T <= FEW:  # XLA would turn the keys to have them on the right; the scores are less to turn
        scores = jnp.einsum("bskh,bkrh->bksr", k, q).swapaxes(2, 3)  # [B, K, R, S]
    else:
        scores = jnp.einsum("bkrh,bskh->bkrs", q, k)  # [B, K, R, S]
    scores = scores * H**-0.5
    scores = scores.astype(layers.at_least_float32(scores.dtype)).reshape(B, K, N // K, T, S)
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(scores.dtype).min)
    # Softmax does not change with what is taken off all scores of a query: no gradient is owed for it.
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    weights = weights.reshape(B, K, -1, S)  # [B, K, R, S]
    narrow = weights.astype(v.dtype)
    x = jnp.einsum("bkrs,bskh->bkrh", narrow, v, preferred_element_type=weights.dtype)  # [B, K, R, H]
    x = (x / weights.sum(-1, keepdims=True)).astype(v.dtype)
    return x.reshape(B, N, T, H).swapaxes(1, 2)  # [B, T, N, H]


def blocks(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Attention for a CPU: of a prompt, each block of queries meets only the keys up to its own end.

    What lies beyond is hidden from it where the rule is causal and keys lie in the order of their positions;
    whether that is so, the mask says when the program runs. If not, all meet all. Shapes as in `kernel`.
    """
    T, S = q.shape[1], k.shape[1]
    ends = range(BLOCK, T, BLOCK)  # of all blocks but the last, which meets all keys
    if not ends or S < T:
        return _whole(q, k, v, mask)
    seen_behind = jnp.stack([mask[:, end - BLOCK : end, end:].any() for end in ends])

    def by_block(q, k, v, mask):
        parts = [
            _whole(q[:, end - BLOCK : end], k[:, :end], v[:, :end], mask[:, end - BLOCK : end, :end])
            for end in ends
        ]
        last = ends[-1]
        return jnp.concatenate([*parts, _whole(q[:, last:], k, v, mask[:, last:])], axis=1)

    return jax.lax.cond(seen_behind.any(), _whole, by_block, q, k, v, mask)


def kernel(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """cuDNN on a GPU where it can, `blocks` on a CPU, else what `jax.nn.dot_product_attention` has XLA do.

    q [B, T, N, H], k and v [B, S, K, H], mask [B, T, S] -> [B, T, N, H]. A row that sees nothing gets
    something finite. Without cuDNN float16 is left to the einsum: the library asks XLA for a product of it
    that neither a CPU nor a TPU has.
    """
    # vs torch: the library leaves the choice of its implementation to the caller
    mask = jnp.broadcast_to(mask, (q.shape[0], q.shape[1], k.shape[1]))
    library = partial(jax.nn.dot_product_attention, mask=mask[:, None])  # [B, 1, T, S]
    cpu, plain = partial(blocks, mask=mask), partial(library, implementation="xla")
    if q.dtype == jnp.float16:
        cpu = plain = partial(layers.attend, mask=mask)
    cuda = partial(library, implementation="cudnn") if _cudnn_can(q, k) else plain
    # The device is known when the program is lowered, not yet here.
    return jax.lax.platform_dependent(q, k, v, cpu=cpu, cuda=cuda, default=plain)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    *,
    rate: float = 0.0,
    key: jax.Array | None = None,
) -> jax.Array:
    """What `layers.attend` computes, by the kernel; by the einsum itself where weights are dropped.

    The kernel would draw its own random numbers: which weights are dropped is for the key to say. The
    library's softmax is float32 whatever it is given, so float64 is left to the einsum too.
    """
    if (key is not None and rate > 0) or q.dtype == jnp.float64:  # vs torch: whose kernels know float64
        return layers.attend(q, k, v, mask, rate=rate, key=key)
    return kernel(q, k, v, mask)


#: What computes attention, by name.
ATTENTIONS = {"einsum": layers.attend, "fused": attend}


def use_attention(model: nnx.Module, name: str) -> None:
    """Let every attention of a model compute by "einsum", which is the default, or by "fused".

    Before it is split or compiled: what is, keeps what it had. Raises UsageError for another name, and for a
    model whose attention cannot be chosen.
    """
    if name not in ATTENTIONS:
        raise UsageError(
            "unknown attention", where="attention", expected=" or ".join(ATTENTIONS), found=repr(name)
        )
    set_attention(model, ATTENTIONS[name])


def set_attention(model: nnx.Module, function: Callable[..., Any]) -> None:
    """Let every attention of a model compute by a function like `layers.attend`.

    Raises UsageError for a model whose attention cannot be chosen.
    """
    modules = [m for _, m in nnx.iter_modules(model) if "attend" in vars(m)]
    if not modules:
        raise UsageError(
            "the model has no attention to choose",
            where="attention",
            expected="a module with the attribute `attend`",
            found=type(model).__name__,
        )
    for module in modules:
        module.attend = function  # type: ignore[attr-defined]
