"""A Flax twin on a mesh into one folder, of which each process writes a part."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from twinformers.checkpoints.porting import SHARD_SIZE
from twinformers.sharding.groups import Group
from twinformers.sharding.saving import Held, Shards, save
from twinformers.sharding.scanned import STACKED
from twinformers.weight_maps import Leaf, weight_map


def save_sharded(
    model: Any,
    destination: str | Path,
    *,
    to: str = "hf",
    dtype: str = "keep",
    source: Any = None,
    overwrite: bool = False,
    shard_size: int = SHARD_SIZE,
) -> dict[str, str]:
    """Save a Flax twin from where its parts lie; every process calls this alike, and sees the destination.

    The folder is Hugging Face's ("hf"), or with `to="torch"` or `to="jax"` a twin's own. Every process
    writes files of its own, and has its share, a tensor and a few blocks of 4 MB in memory. `source` is where
    tokenizer and generation settings come from; the rest as in `port`. A scanned model is saved layer by
    layer. The destination appears whole or not at all.
    -> the SHA-256 of each file, by its name

    An error in one process is raised in all of them: those of `port`, and UsageError for a model that is not
    on a mesh of all processes.
    """
    held = _held(model)
    group = Processes()
    return save(
        Shards(model.config, "jax", held, group),
        group,
        destination,
        to=to,
        dtype=dtype,
        source=source,
        overwrite=overwrite,
        shard_size=shard_size,
    )


class Processes(Group):
    """JAX's processes. They add up on one device each, whatever the mesh of the model."""

    def __init__(self) -> None:
        self.index, self.count = jax.process_index(), jax.process_count()

    def total(self, block: np.ndarray, to: int | None = None) -> np.ndarray:
        if self.count == 1:
            return block
        device, at, add = _adder()
        size = 1 << (block.size - 1).bit_length()  # of each size, a program is compiled
        row = np.pad(block, (0, size - block.size))[None] if size > block.size else block[None]
        rows = jax.make_array_from_single_device_arrays((self.count, size), at, [jax.device_put(row, device)])
        return np.asarray(add(rows).addressable_data(0))[: block.size]


@functools.cache
def _adder() -> tuple[jax.Device, NamedSharding, Callable[[jax.Array], jax.Array]]:
    """This process's device, where the rows [count, n] lie that it has one of, and what adds them up."""
    first = {device.process_index: device for device in reversed(jax.devices())}
    mesh = Mesh(np.array([first[n] for n in range(jax.process_count())], dtype=object), ("process",))
    rows, everywhere = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("process",), ()))
    add = jax.jit(lambda rows: rows.sum(0, dtype=rows.dtype), out_shardings=everywhere)
    return first[jax.process_index()], rows, add


def _held(model: Any) -> dict[str, Held]:
    """What this process gives, by the names that the model has with each layer on its own."""
    flat = {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(nnx.state(model))}
    held, used = {}, set()
    for name, leaf in weight_map(model.config).leaves("jax").items():
        number = re.search(r"\.(\d+)\.", name)
        stack = name.replace(number[0], f".0.{STACKED}.", 1) if number else ""
        if name in flat:
            held[name] = _one(flat[name], leaf, None)
        elif number and stack in flat:
            held[name] = _one(flat[stack], leaf, int(number[1]))
        used |= {name, stack}
    left = {name: Held(array.shape, array.dtype.name, []) for name, array in flat.items() if name not in used}
    return held | left  # of which nothing is written: the table knows no such names


def _one(array: jax.Array, leaf: Leaf, layer: int | None) -> Held:
    """One parameter, or one layer of a stack of them."""
    first = 0 if layer is None else 1
    pieces = [piece for piece in array.addressable_shards if piece.replica_id == 0]
    if not leaf.trains and array.is_fully_addressable and jax.process_index():
        pieces = []  # a buffer that never went on a mesh: each process has one
    parts = [(piece.index[first:], functools.partial(_fetched, piece.data, layer)) for piece in pieces]
    return Held(array.shape[first:], array.dtype.name, parts)


def _fetched(data: jax.Array, layer: int | None) -> np.ndarray:
    """A device's part in numpy; on a CPU, in the same memory where that may be."""
    if layer is not None:
        data = data[layer]
    elif data.platform() != "cpu":
        data = data.copy()  # what JAX fetches, it keeps beside the array for as long as that lives
    return np.asarray(data)
