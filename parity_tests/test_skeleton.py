"""A model's shapes without values are those of the model itself."""

from __future__ import annotations

import importlib

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jax_models import skeleton
from twinformers.configs import preset

PRESETS = ("llama-tiny", "gpt2-tiny", "mistral-tiny", "bert-tiny", "transformer-tiny")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", PRESETS)
def test_shapes_are_those_of_the_model(name, dtype):
    config = preset(name)
    cls = getattr(importlib.import_module(f"jax_models.{config.architecture}"), config.model_class)
    found = nnx.split(skeleton(cls, config, dtype=jnp.dtype(dtype)))
    expected = nnx.split(cls(config, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0)))
    assert found[0] == expected[0]
    shapes = [
        {str(path): (leaf.shape, leaf.dtype) for path, leaf in jax.tree.leaves_with_path(state)}
        for _, state in (found, expected)
    ]
    assert shapes[0] == shapes[1] and {dtype} == {str(dtype) for _, dtype in shapes[0].values()}
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(found[1]))


def test_a_model_that_asks_for_other_keys_is_told_so():
    def build(*, rngs):
        return nnx.Linear(2, rngs.width(), rngs=rngs)

    with pytest.raises(AttributeError, match="width"):
        skeleton(build)
