"""Blocks of one shape as one block in a loop: what is compiled no longer grows with the depth.

A transformation of a Flax twin after loading. The weights of the blocks are stacked on a first axis, and
`jax.lax.scan` runs the one block over them: the same numbers, the code of a single layer.
"""

from __future__ import annotations

import inspect
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from twinformers.errors import UsageError

#: The part of a parameter's name that says: the first axis counts the layers.
STACKED = "stacked"


class Scanned(nnx.Module):
    """L blocks in one call: called as the first of them would be, it answers as the last of them does."""

    def __init__(self, blocks: list[Any]):
        graphdefs, states = zip(*(nnx.split(block) for block in blocks), strict=True)
        if any(graphdef != graphdefs[0] for graphdef in graphdefs):
            raise UsageError(
                "the blocks differ, so no loop can run over them",
                where="scan_layers",
                expected="blocks of one class, shape and attention",
                found=", ".join(sorted({type(block).__name__ for block in blocks})),
            )
        self.count = len(blocks)
        self.stacked = nnx.merge(graphdefs[0], jax.tree.map(_stack, *states))

    def __call__(self, x: jax.Array, *arguments: Any) -> Any:
        graphdef, state = nnx.split(self.stacked)
        names = list(inspect.signature(type(self.stacked).__call__).parameters)[2:]
        given = dict(zip(names, arguments, strict=False))
        if given.get("key") is not None:
            raise UsageError(
                "a loop over layers has one key for all of them: each would drop the same elements",
                where="key",
                expected="no key, or a model that was not scanned",
            )
        first, has_cache = given.get("i", 0), "cache" in given

        def one(carry, layer):
            params, i = layer
            x, cache = carry
            changed = {"cache": cache, "i": i}
            merged = nnx.merge(graphdef, params)
            out = merged(x, *(changed.get(name, value) for name, value in given.items()))
            return (out if has_cache else (out, None)), None

        numbers = first + jnp.arange(self.count)
        (x, cache), _ = jax.lax.scan(one, (x, given.get("cache")), (state, numbers))
        return (x, cache) if has_cache else x


def _stack(*leaves: Any) -> Any:
    """One array of some, on a new first axis; of shapes alone, their shape."""
    if isinstance(leaves[0], jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((len(leaves), *leaves[0].shape), leaves[0].dtype)
    return jnp.stack(leaves)


def scan_layers(model: Any) -> Any:
    """Put a loop in the place of each list of blocks, in place; the model is returned. It may be abstract.

    A decoder that attends to an encoder stays as it is.

    Parameters are then called `layers.0.stacked...` and have a first axis more. Dropout is refused when it is
    called for: its keys are given out layer by layer. Raises UsageError where blocks of a list differ, and
    for a model without any.
    """
    lists = {
        name: blocks
        for name, blocks in vars(model).items()
        # What a decoder reads of the encoder's output is made ahead, by layers that must be there one by one.
        if isinstance(blocks, nnx.List) and not hasattr(blocks[0], "cross_attn")
    }
    if not lists or any(isinstance(blocks[0], Scanned) for blocks in lists.values()):
        raise UsageError(
            "the model has no list of blocks",
            where="scan_layers",
            expected="a twin as it was loaded",
            found=type(model).__name__,
        )
    for name, blocks in lists.items():
        setattr(model, name, nnx.List([Scanned(list(blocks))]))
    return model
