"""int8 weights for decoding, which reads every weight once per token: a quarter of float32's bytes.

Symmetric, with one scale for each output channel: w is about scale * kernel, the kernel's values from -127 to
127. Activations stay as they are. `quantize(model)` does it to a whole model; nothing is trained after that.
"""

from __future__ import annotations

from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from flax import nnx

from jax_models.layers import at_least_float32
from twinformers.errors import UsageError, WeightsError

#: Up to so many rows, inputs that a CPU converts at a time.
FEW_ROWS, TILE = 32, 64


def rounded(weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The nearest int8 values, ties to even; the scales in the weight's dtype. [in, out] -> same, [out]"""
    wide = weight.astype(at_least_float32(weight.dtype))
    # Reciprocals throughout: a division by a constant, or by one number a column, may mean them or not.
    scale = (jnp.max(jnp.abs(wide), axis=0) * (1 / 127)).astype(weight.dtype)  # [out]
    scale = jnp.where(scale == 0, 1, scale)
    # Of the scale as it is stored, so that the values make up for its rounding.
    values = jnp.round(wide * (1 / scale.astype(wide.dtype)))
    return jnp.clip(values, -127, 127).astype(jnp.int8), scale


def whole(x: jax.Array, weight: jax.Array, scale: jax.Array) -> jax.Array:
    """What accelerators do in one: the conversion becomes a part of the product."""
    return (x @ weight.astype(x.dtype)) * scale


def tiled(x: jax.Array, weight: jax.Array, scale: jax.Array) -> jax.Array:
    """The same, TILE inputs at a time: converted at once, the weights would go to memory and come back."""
    wide = x.astype(at_least_float32(x.dtype))

    def add(y, start):
        tile = jax.lax.dynamic_slice_in_dim(weight, start, TILE).astype(y.dtype)  # [TILE, out]
        return y + jax.lax.dynamic_slice_in_dim(wide, start, TILE, axis=-1) @ tile, None

    nothing = jnp.zeros((*x.shape[:-1], weight.shape[1]), wide.dtype)
    y, _ = jax.lax.scan(add, nothing, jnp.arange(0, len(weight), TILE))
    return (y * scale).astype(x.dtype)


@jax.custom_jvp
def product(x: jax.Array, weight: jax.Array, scale: jax.Array) -> jax.Array:
    """(x W) * scale in the dtype of x. [..., in], [in, out], [out] -> [..., out]"""
    if x.size > FEW_ROWS * x.shape[-1] or x.shape[-1] % TILE:
        return whole(x, weight, scale)
    return jax.lax.platform_dependent(x, weight, scale, cpu=tiled, default=whole)


@product.defjvp
def refuse(*_: Any) -> NoReturn:
    """Rounded weights do not learn: their gradient is zero wherever there is one."""
    raise UsageError(
        "an int8 model has no gradients",
        where="quantized",
        expected="a model that only computes",
        found="a derivative of one of its products",
        hint="train the model as it was loaded, and quantise what comes out",
    )


class QuantizedLinear(nnx.Module):
    """x W + b, the weight rounded to int8. [..., in] -> [..., out]"""

    def __init__(self, weight: jax.Array, bias: Any):
        kernel, scale = rounded(weight)
        self.kernel = nnx.Param(kernel)  # [in, out] int8
        self.scale = nnx.Param(scale)  # [out]
        self.bias = bias

    def __call__(self, x: jax.Array) -> jax.Array:
        y = product(x, self.kernel[...], self.scale[...])
        return y if self.bias is None else y + self.bias[...]


def quantize(model: Any) -> Any:
    """Replace every linear layer of a model by its int8 form, in place; the model is returned.

    A head that is tied to the embedding becomes a matrix of its own: looking up reads one row and stays as it
    is. Raises UsageError for a model without linear layers or one quantised before, WeightsError for weights
    that are not finite.
    """
    modules = list(nnx.iter_modules(model))
    if any(isinstance(module, QuantizedLinear) for _, module in modules):
        raise UsageError(
            "the model is int8 already", where="quantize", hint="quantise a model as it was loaded, once"
        )
    linears: list[tuple[str, Any, Any, Any]] = [
        (".".join(map(str, (*path, name))), module, child.kernel[...], child.bias)
        for path, module in modules
        for name, child in nnx.iter_children(module)
        if isinstance(child, nnx.Linear)
    ]
    if not linears or not hasattr(model, "config"):
        raise UsageError(
            "there is nothing to quantise",
            where="quantize",
            expected="a model with a configuration and linear layers",
            found=type(model).__name__,
        )
    if model.config.tie_word_embeddings:
        linears.append(("lm_head", model, model.embed.embedding[...].T, None))
        model.config = model.config.replace(tie_word_embeddings=False)
    for path, _, weight, _ in linears:
        if not jnp.isfinite(weight).all():
            raise WeightsError(
                "a weight is not finite",
                where=path,
                expected="numbers",
                found="NaN or infinity",
                hint="look at what wrote the checkpoint: one such weight spoils every output",
            )
    while linears:  # each weight is let go of as soon as it is rounded
        path, module, weight, bias = linears.pop()
        setattr(module, path.rpartition(".")[2], QuantizedLinear(weight, bias))
    return model
