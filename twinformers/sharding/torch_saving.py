"""A PyTorch twin on a mesh into one folder, of which each process writes a part."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from twinformers.checkpoints.dtypes import numpy_dtype
from twinformers.checkpoints.porting import SHARD_SIZE
from twinformers.errors import UsageError
from twinformers.sharding import AXES
from twinformers.sharding.groups import Group
from twinformers.sharding.saving import Held, Shards, save
from twinformers.sharding.torch_loading import cut_axes, own_index


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
    """Save a PyTorch twin from where its parts lie; every process calls this alike, and sees the destination.

    The folder is Hugging Face's ("hf"), or with `to="torch"` or `to="jax"` a twin's own. Every process
    writes files of its own, and has its share, a tensor and a few blocks of 4 MB in memory. `source` is where
    tokenizer and generation settings come from; the rest as in `port`. The destination appears whole or
    not at all.
    -> the SHA-256 of each file, by its name

    An error in one process is raised in all of them: those of `port`, and UsageError for a model without a
    mesh.
    """
    if not hasattr(model, "mesh"):
        raise UsageError(
            "the model is on no mesh",
            where=type(model).__name__,
            expected="what `shard` or `load_sharded` returned",
        )
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # an evaluation leaves something gathered, which would be copied whole
    group = Processes(model.mesh.device_type)
    return save(
        Shards(model.config, "torch", _held(model), group),
        group,
        destination,
        to=to,
        dtype=dtype,
        source=source,
        overwrite=overwrite,
        shard_size=shard_size,
    )


class Processes(Group):
    """torch.distributed's processes; their blocks travel by where their backend wants them."""

    def __init__(self, device: str):
        self.index, self.count, self._device = dist.get_rank(), dist.get_world_size(), device

    def total(self, block: np.ndarray, to: int | None = None) -> np.ndarray:
        sent = torch.from_numpy(block).to(self._device)
        if to is None:
            dist.all_reduce(sent)
        else:
            dist.reduce(sent, to)
        return sent.cpu().numpy()


def _held(model: nn.Module) -> dict[str, Held]:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: _one(tensor.detach(), model.mesh) for name, tensor in tensors}


def _one(tensor: torch.Tensor, mesh: Any) -> Held:
    """One parameter. Of processes that have the same part, the first one along each axis gives it."""
    cut = cut_axes(tensor)
    gives = all(mesh.get_local_rank(name) == 0 for name in AXES if name not in cut)
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    fetch: Callable[[], np.ndarray] = partial(_array, local)
    parts = [(own_index(tensor), fetch)] if gives else []
    return Held(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), parts)


def _array(tensor: torch.Tensor) -> np.ndarray:
    """A tensor in numpy's memory, or its own. numpy's bfloat16 is unknown to torch: the bits are passed."""
    tensor = tensor.cpu()
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(numpy_dtype("bfloat16"))
    return tensor.numpy()
