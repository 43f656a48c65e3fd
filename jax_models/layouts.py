"""Weights and cache laid out for decoding: a step reads all once, so how they lie decides its speed."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_models.layers import KVCache
from twinformers.errors import UsageError

#: Projections of one input, by their names in every twin.
TOGETHER: tuple[tuple[str, ...], ...] = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
#: Bytes of which an address must be a multiple, for XLA to read a NumPy array where it lies.
ALIGNED = 64


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


class _At:
    """What `cache.k.at` gives: the one way in which `layers.store` writes."""

    def __init__(self, cache: Apart):
        self.cache = cache

    def __getitem__(self, index: tuple[int, jax.Array, slice, jax.Array]) -> _At:
        self.layer, _, _, self.slots = index  # every row writes, and every head
        return self

    def set(self, x: jax.Array) -> Apart:
        """The cache with x [B, T, K, H] in the slots [B, T] of one layer."""
        B, T, K, H = x.shape
        heads = jnp.broadcast_to(jnp.arange(0, B * K, K, dtype=self.slots.dtype)[:, None], (B, T))
        layers = list(self.cache.layers)
        layers[self.layer] = jax.lax.scatter(
            layers[self.layer],  # [B K, S+1, H]
            jnp.stack([heads, self.slots], axis=-1).reshape(B * T, 2),
            x.reshape(B * T, K, H),
            jax.lax.ScatterDimensionNumbers(
                update_window_dims=(1, 2), inserted_window_dims=(1,), scatter_dims_to_operand_dims=(0, 1)
            ),
            mode="promise_in_bounds",
        )
        return replace(self.cache, layers=tuple(layers))


@partial(jax.tree_util.register_dataclass, data_fields=["layers"], meta_fields=["batch"])
@dataclass(frozen=True)
class Apart:
    """A cache's keys, or its values, with an array for each layer; for `layers.store` it is one array of all.

    A product reads such an array where it lies; out of the one for all layers, XLA would copy its part first.
    Rows and heads are one axis, as the product has them: if what is written had another shape than what is
    read, XLA would write it twice.
    """

    layers: tuple[jax.Array, ...]  # L x [B K, S+1, H]
    batch: int

    @property
    def dtype(self) -> jnp.dtype:
        return self.layers[0].dtype

    @property
    def at(self) -> _At:
        return _At(self)

    def __getitem__(self, layer: int) -> jax.Array:
        x = self.layers[layer]
        return x.reshape(self.batch, -1, *x.shape[1:])  # [B, K, S+1, H]


def apart(cache: KVCache) -> KVCache:
    """The same cache with each layer's keys and values in arrays of their own."""
    # vs torch: a layer of an array is a view of it there, and nothing is copied
    k, v = (
        Apart(tuple(layer.reshape(-1, *layer.shape[2:]) for layer in x), x.shape[1])
        for x in (cache.k, cache.v)
    )
    return cache._replace(k=k, v=v)  # type: ignore[arg-type]  # it is used as an array


def _groups(model: Any) -> list[tuple[nnx.Module, tuple[str, ...]]]:
    """The modules with projections of one input, and these projections' names."""
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
    return found


def _params(model: nnx.Module) -> list[nnx.Param]:
    return [node for _, node in nnx.iter_graph(model) if isinstance(node, nnx.Param)]


def _aligned(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


def _join(module: nnx.Module, names: tuple[str, ...], kernel: nnx.Param) -> None:
    stop = 0
    for name in names:
        linear = getattr(module, name)
        start, stop = stop, stop + linear.kernel.shape[1]
        setattr(module, name, Part(kernel, linear.bias, start, stop))


class Room:
    """A piece of a CPU's memory for all parameters of a model, laid out for decoding.

    NumPy asks Linux for large pages (2 MiB) where it allocates 4 MiB or more, XLA does not: with a five
    hundredth of the addresses to look up, one core reads up to a quarter faster. Of the model, only the
    shapes are read: `room[param][...] = array` for each parameter, then `room.model(device)`, once. Raises
    UsageError for a model that is no causal decoder with linear layers.
    """

    def __init__(self, model: Any):
        self._model, self._groups = model, _groups(model)
        joined = [[getattr(module, name).kernel for name in names] for module, names in self._groups]
        within = {id(kernel) for kernels in joined for kernel in kernels}
        alone = [[p] for p in _params(model) if id(p) not in within]
        sizes = (_aligned(p.size * p.dtype.itemsize) for p in _params(model))
        memory = np.empty(sum(sizes) + ALIGNED, np.uint8)
        start = -memory.ctypes.data % ALIGNED
        self._arrays: list[tuple[np.ndarray, nnx.Param]] = []
        self._views: dict[int, np.ndarray] = {}
        for params in [*joined, *alone]:
            *lead, _ = params[0].shape
            shape = *lead, sum(p.shape[-1] for p in params)
            size = math.prod(shape) * params[0].dtype.itemsize
            array = memory[start : start + size].view(params[0].dtype).reshape(shape)
            start += _aligned(size)
            self._arrays.append((array, params[0]))
            stop = 0
            for p in params:
                self._views[id(p)] = array[..., stop : stop + p.shape[-1]]
                stop += p.shape[-1]

    def __getitem__(self, param: nnx.Param) -> np.ndarray:
        return self._views[id(param)]

    def model(self, device: Any = None) -> Any:
        """The model with its parameters in this piece of memory, which must not be written any more.

        XLA reads them where they lie, and keeps the whole piece alive.
        """
        for number, (array, param) in enumerate(self._arrays):
            placed = jax.device_put(array, device, may_alias=True)
            if number < len(self._groups):
                _join(*self._groups[number], nnx.Param(placed))
            else:
                param.set_value(placed)
        return self._model


def for_decoding(model: Any) -> Any:
    """Join the projections that read the same input, in place; the model is returned.

    On a CPU, XLA reads one matrix of 3072 columns a third faster than two of 1536; there, all parameters move
    to a `Room` besides. The joined model computes the same, and is for computing alone: its parameters are no
    longer those of the weight map. Raises UsageError for a model that is no causal decoder with linear
    layers.
    """
    # vs torch: joins what one call reads together; there the order of the elements is changed
    groups, params = _groups(model), _params(model)
    if {device.platform for device in params[0][...].devices()} == {"cpu"}:
        room = Room(model)
        for param in params:
            room[param][...] = param[...]
        return room.model(params[0][...].sharding)
    for module, names in groups:
        _join(module, names, nnx.Param(jnp.concatenate([getattr(module, n).kernel[...] for n in names], 1)))
    return model
