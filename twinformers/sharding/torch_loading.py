"""Weights straight into a PyTorch twin's shards: a process reads and holds its own, and no more."""

from __future__ import annotations

import importlib
import math
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from twinformers.checkpoints import opened
from twinformers.checkpoints.dtypes import check_dtype
from twinformers.checkpoints.porting import entries
from twinformers.loading import tensor_of
from twinformers.sharding import DATA, FSDP, TENSOR
from twinformers.sharding.parts import Parts
from twinformers.sharding.torch_side import cut, gather_once


def load_sharded(
    source: Any,
    mesh: DeviceMesh,
    dtype: str = "float32",
    *,
    compute_dtype: str | None = None,
    attention: str = "einsum",
    check: bool = False,
) -> Any:
    """`shard(load(source, "torch", dtype), mesh)` without the whole model; every process calls this alike.

    A tensor is cut where it is read: from safetensors and Orbax a process reads the rows, or the chunks, of
    its own shard; what is packed or quantised is read whole, one tensor at a time. The model is the same to
    the last bit.
    `compute_dtype` is that of `shard`, the rest as in `load`. Raises the errors of both.
    """
    check_dtype(dtype)
    with opened(source, check=check) as checkpoint:
        config: Any = checkpoint.config
        plan = entries(checkpoint, "torch", dtype)  # which compares all headers first
        cls = getattr(importlib.import_module(f"torch_models.{config.architecture}"), config.model_class)
        with torch.device("meta"):  # shapes only
            model = cls(config, dtype=getattr(torch, dtype))
        if attention != "einsum":
            importlib.import_module("torch_models.fused").use_attention(model, attention)
        cut(model, mesh, compute_dtype)
        model.to_empty(device=mesh.device_type)
        # Before there are weights: the memory of a block that is gathered then never adds to theirs.
        gather_once(model)
        tensors = dict([*model.named_parameters(), *model.named_buffers()])
        for entry in plan:
            _fill(tensors[entry.name].detach(), Parts(checkpoint, entry.name, "torch", dtype))
    return model.eval()


def _fill(tensor: torch.Tensor, parts: Parts) -> None:
    """Put this process's part of a parameter in its place. A process may have none of it."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    if local.numel():
        local.copy_(tensor_of(parts(own_index(tensor))))


def own_index(tensor: torch.Tensor) -> tuple[slice, ...]:
    """Which part of a tensor this process holds, a slice for each axis; all of what lies on no mesh.

    "tensor" cuts first, and "fsdp" what that leaves. The last parts of an axis that does not divide are
    smaller, or empty.
    """
    ranges = [(0, n) for n in tensor.shape]
    for name, axis in cut_axes(tensor).items():
        first, last = ranges[axis]
        mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]  # what is cut is a DTensor
        part = mesh.get_local_rank(name)
        size = math.ceil((last - first) / mesh.size(mesh.mesh_dim_names.index(name)))
        ranges[axis] = min(first + part * size, last), min(first + (part + 1) * size, last)
    return tuple(slice(first, last) for first, last in ranges)


def cut_axes(tensor: torch.Tensor) -> dict[str, int]:
    """The axes of the mesh that cut a tensor, in that order, each with the axis of it that it cuts."""
    if not isinstance(tensor, DTensor):
        return {}
    places: Any = dict(zip(tensor.device_mesh.mesh_dim_names or (), tensor.placements, strict=True))
    return {n: places[n].dim for n in (TENSOR, FSDP, DATA) if n in places and not places[n].is_replicate()}
