"""Weights laid out for decoding: a step reads every one of them once, so how they lie decides its speed."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from twinformers.errors import UsageError

#: Projections of one input, by their names in every twin.
TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class Part(nnx.Module):
    """Some columns of a product that others share: x W[:, start:stop] + b. [..., in] -> [..., stop - start]

    Each asks for the whole product. Under `jit`, XLA sees that they ask for the same and computes it once.
    """

    def __init__(self, kernel: nnx.Param, bias: nnx.Param | None, start: int, stop: int):
        self.kernel, self.bias, self.start, self.stop = kernel, bias, start, stop

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.reshape(-1, x.shape[-1]) @ self.kernel[...]  # [rows, out of all parts]
        y = y[:, self.start : self.stop].reshape(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias[...]


def for_decoding(model: Any) -> Any:
    """Join the projections that read the same input, in place; the model is returned.

    On a CPU, XLA reads one matrix of 3072 columns a third faster than two of 1536. The joined model computes
    the same, and is for computing alone: its parameters are no longer those of the weight map. Raises
    UsageError for a model that is no causal decoder with linear layers.
    """
    # vs torch: joins what one call reads together; there the order of the elements is changed
    found = [
        (module, names)
        for _, module in nnx.iter_modules(model)
        for names in TOGETHER
        if all(isinstance(getattr(module, name, None), nnx.Linear) for name in names)
    ]
    if not found or not hasattr(model, "hidden"):
        raise UsageError(
            "there is nothing to lay out for decoding",
            where="decoding",
            expected="a causal decoder as it was loaded",
            found=type(model).__name__,
        )
    for module, names in found:
        linears = [getattr(module, name) for name in names]
        kernel = nnx.Param(jnp.concatenate([linear.kernel[...] for linear in linears], axis=1))
        stop = 0
        for name, linear in zip(names, linears, strict=True):
            start, stop = stop, stop + linear.kernel.shape[1]
            setattr(module, name, Part(kernel, linear.bias, start, stop))
    return model
