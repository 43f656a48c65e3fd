"""Weights straight into shards: each process reads and holds what its own devices keep, and no more."""

from __future__ import annotations

import importlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_models import skeleton
from twinformers.checkpoints import opened
from twinformers.checkpoints.base import Checkpoint
from twinformers.checkpoints.dtypes import check_dtype
from twinformers.checkpoints.porting import entries
from twinformers.errors import UsageError
from twinformers.sharding.jax_side import sharding
from twinformers.sharding.parts import Parts


def load_sharded(
    source: Any, mesh: Mesh, dtype: str = "float32", *, attention: str = "einsum", check: bool = False
) -> Any:
    """A Flax twin on a mesh, of which every process calls this alike; `load` for models that one cannot hold.

    A tensor is cut where it is read. From safetensors and from a folder that `port --to jax` wrote, a process
    reads the rows of its own devices and has the shards of one tensor in memory at a time, whatever the
    tensor's layout; of what else Orbax has written it reads chunks. What is packed or quantised is read
    whole, one tensor at a time. `source`, `dtype`, `attention` and `check` as in `load`. Raises its errors,
    and UsageError for parameters without a rule.
    """
    check_dtype(dtype)
    if dtype == "float64" and not jax.config.read("jax_enable_x64"):
        raise UsageError(
            "JAX would silently make float32 of float64",
            where="dtype",
            hint="call inside `with jax.enable_x64(True):`, or set JAX_ENABLE_X64=1",
        )
    with opened(source, check=check) as checkpoint:
        config: Any = checkpoint.config
        cls = getattr(importlib.import_module(f"jax_models.{config.architecture}"), config.model_class)
        shapes = skeleton(cls, config, dtype=jnp.dtype(dtype))
        if attention != "einsum":
            importlib.import_module("jax_models.fused").use_attention(shapes, attention)
        graphdef, state = nnx.split(shapes)
        params: dict[Any, Any] = nnx.to_pure_dict(state)
        for entry in entries(checkpoint, "jax", dtype):  # which compares all headers first
            *parents, leaf = [int(part) if part.isdecimal() else part for part in entry.name.split(".")]
            node: Any = params
            for part in parents:
                node = node[part]
            node[leaf] = _array(checkpoint, entry.name, entry.shape, dtype, mesh)
    return nnx.merge(graphdef, params)


def _array(checkpoint: Checkpoint, name: str, shape: tuple[int, ...], dtype: str, mesh: Mesh) -> jax.Array:
    parts: Any = Parts(checkpoint, name, "jax", dtype)
    place = sharding(name, shape, mesh) if parts.trains else NamedSharding(mesh, PartitionSpec())
    array = jax.make_array_from_callback(shape, place, parts)
    # The next tensor is read when this one lies where it belongs, so that no two wait in memory.
    return jax.block_until_ready(array)
