"""A Flax twin on many devices: XLA's own partitioner (GSPMD, Xu et al. 2021, arXiv:2105.04663) does the rest.

Weights and batch are placed; `jax.jit` follows them, and puts in what the devices have to tell each other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from twinformers.errors import UsageError
from twinformers.sharding import BATCH, DATA, FSDP, SEQUENCE, TENSOR, axes
from twinformers.sharding.scanned import STACKED


def make_mesh(
    *,
    data: int = 1,
    fsdp: int = 1,
    sequence: int = 1,
    tensor: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh of so many devices along each axis; default all of JAX's. Raises UsageError for another number.

    Neighbours along "tensor" tell each other the most: they are next to each other in the list. There is an
    axis "sequence" only where it shares out something.
    """
    sizes = mesh_axes(data=data, fsdp=fsdp, sequence=sequence, tensor=tensor)
    devices = jax.devices() if devices is None else list(devices)
    if min(sizes.values()) < 1 or math.prod(sizes.values()) != len(devices):
        raise UsageError(
            "the mesh does not fit the devices",
            where="mesh",
            expected=f"positive sizes whose product is {len(devices)}",
            found=" x ".join(f"{name} {size}" for name, size in sizes.items()),
        )
    return Mesh(np.asarray(devices, dtype=object).reshape(tuple(sizes.values())), tuple(sizes))


def mesh_axes(*, data: int = 1, fsdp: int = 1, sequence: int = 1, tensor: int = 1) -> dict[str, int]:
    """The axes that a mesh of these sizes has, the one whose parts are farthest from each other first."""
    between = {SEQUENCE: sequence} if sequence != 1 else {}
    return {DATA: data, FSDP: fsdp, **between, TENSOR: tensor}


def sharding(name: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Where a parameter goes, by its dotted name. A stack of layers is not cut between them.

    What shares out a row's tokens keeps parts of the weights as well, cut further than by "fsdp" alone.
    """
    layers = (None,) if STACKED in name.split(".") else ()
    shape = shape[len(layers) :]
    cut: list[Any] = list(axes(name, shape, dict(mesh.shape)))
    if SEQUENCE in mesh.shape and FSDP in cut:
        place = cut.index(FSDP)
        if shape[place] % (mesh.shape[FSDP] * mesh.shape[SEQUENCE]) == 0:
            cut[place] = (FSDP, SEQUENCE)
    return NamedSharding(mesh, PartitionSpec(*layers, *cut))


def tree_shardings(params: Any, mesh: Mesh) -> Any:
    """Where each leaf of a nested dictionary of parameters goes, in a tree of that structure."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: sharding(".".join(str(part.key) for part in path), x.shape, mesh), params
    )


def shardings(model: nnx.Module, mesh: Mesh) -> dict[str, NamedSharding]:
    """Where each parameter of a model goes, by its dotted name. The model may be abstract."""
    return {
        name: sharding(name, leaf.get_value().shape, mesh) for name, (_, leaf) in _parameters(model).items()
    }


def shard(model: Any, mesh: Mesh) -> Any:
    """Place each parameter on the mesh, in place; the model is returned. UsageError as in `axes`."""
    places = shardings(model, mesh)
    placed = [
        (path, leaf.replace(jax.device_put(leaf.get_value(), places[name])))
        for name, (path, leaf) in _parameters(model).items()
    ]
    nnx.update(model, nnx.from_flat_state(placed))
    return model


def _parameters(model: nnx.Module) -> dict[str, tuple[Any, Any]]:
    """Path and variable of each parameter, by its dotted name."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): (path, leaf) for path, leaf in flat}


def shard_batch(tree: Any, mesh: Mesh) -> Any:
    """Place arrays whose first axis is the batch, as tokens and positions, row by row over the mesh.

    Where the mesh has an axis "sequence", it cuts the second axis, if that divides. With several processes
    each gives the whole batch in numpy, and keeps its own part. Raises UsageError where the rows cannot be
    shared out evenly.
    """
    parts = math.prod(mesh.shape[name] for name in BATCH)
    for x in jax.tree.leaves(tree):
        if np.shape(x)[0] % parts:
            raise UsageError(
                "the batch cannot be shared out",
                where="batch",
                expected=f"a multiple of {parts} rows ({' x '.join(BATCH)})",
                found=str(np.shape(x)[0]),
            )
    return jax.tree.map(lambda x: _placed(x, token_sharding(np.shape(x), mesh)), tree)


def token_sharding(shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Where an array goes whose axes are the batch and, if there are two, the tokens of a row."""
    parts = mesh.shape.get(SEQUENCE, 1)
    cut = [SEQUENCE] if parts > 1 and len(shape) > 1 and shape[1] % parts == 0 else []
    return NamedSharding(mesh, PartitionSpec(BATCH, *cut))


def _placed(x: Any, at: NamedSharding) -> jax.Array:
    if isinstance(x, np.ndarray):  # cut here: other processes' devices cannot be written to
        return jax.make_array_from_callback(x.shape, at, lambda index: x[index])
    return jax.device_put(x, at)


def cache_shardings(cache: Any, mesh: Mesh) -> Any:
    """Where a cache [L, B, K, S+1, H] goes: rows over the batch's axes, heads over "tensor"; if even."""
    B, K = cache.k.shape[1:3]
    rows = BATCH if B % math.prod(mesh.shape[name] for name in BATCH) == 0 else None
    heads = TENSOR if K % mesh.shape[TENSOR] == 0 else None
    wide = NamedSharding(mesh, PartitionSpec(None, rows, heads))
    return cache._replace(k=wide, v=wide, positions=NamedSharding(mesh, PartitionSpec(rows)))


def sharded_cache(model: Any, batch: int, length: int, mesh: Mesh) -> Any:
    """The model's empty cache, made on the devices that keep it."""
    make = partial(model.empty_cache, batch, length)
    return jax.jit(make, out_shardings=cache_shardings(jax.eval_shape(make), mesh))()
