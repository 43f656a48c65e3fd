"""Attention by JAX's own kernels, and the choice between them and the einsum of `layers`."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.backend import get_backend

from jax_models import layers
from twinformers.errors import UsageError


def _cudnn_can(q: jax.Array, k: jax.Array) -> bool:
    """Whether cuDNN is there and takes the dtype and the shapes, in training and on every NVIDIA GPU."""
    T, S, H = q.shape[1], k.shape[1], q.shape[3]
    fits = q.dtype.itemsize == 2 and H % 8 == 0 and H <= 128 and T % 2 == S % 2 == 0
    return fits and "cuda" in get_backend().platform_version


def kernel(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """`jax.nn.dot_product_attention`: by cuDNN on a GPU where it can, by XLA everywhere else.

    q [B, T, N, H], k and v [B, S, K, H], mask [B, T, S] -> [B, T, N, H]. A row that sees nothing gets the
    mean of v. Without cuDNN float16 is left to the einsum: the library asks XLA for a product of it that
    neither a CPU nor a TPU has.
    """
    # vs torch: the library leaves the choice of its implementation to the caller
    every = jnp.broadcast_to(mask, (q.shape[0], q.shape[1], k.shape[1]))[:, None]  # [B, 1, T, S]
    library = partial(jax.nn.dot_product_attention, mask=every)
    plain = partial(library, implementation="xla")
    if q.dtype == jnp.float16:
        plain = partial(layers.attend, mask=mask)
    if not _cudnn_can(q, k):
        return plain(q, k, v)
    # The device is known when the program is lowered, not yet here.
    return jax.lax.platform_dependent(q, k, v, cuda=partial(library, implementation="cudnn"), default=plain)


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

    The kernel would draw its own random numbers: which weights are dropped is for the key to say. Its
    softmax is float32 whatever it is given, so float64 is left to the einsum too.
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
    modules = [m for _, m in nnx.iter_modules(model) if "attend" in vars(m)]
    if not modules:
        raise UsageError(
            "the model has no attention to choose",
            where="attention",
            expected="a module with the attribute `attend`",
            found=type(model).__name__,
        )
    for module in modules:
        module.attend = ATTENTIONS[name]  # type: ignore[attr-defined]
