"""A run in PyTorch: step, evaluation, and distributed checkpoints of all that an update changes."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import datetime
import importlib
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.api import CheckpointException

from torch_models.layers import at_least_float32
from twinformers.errors import FormatError, first_line
from twinformers.loading import find_device, load
from twinformers.sharding.mesh import mesh_sizes
from twinformers.training.state import Arrays, Weights
from twinformers.training.step import Batch
from twinformers.training.text.processes import Processes, check_alone
from twinformers.training.text.settings import TextSettings
from twinformers.training.torch_step import make_step


@contextlib.contextmanager
def scope(settings: TextSettings) -> Iterator[None]:
    """What a run has to be within: nothing but silence about checkpoints that a single process writes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torch.distributed.checkpoint")
        yield


#: How long a process waits for the others to speak: the first one may tokenize for hours.
A_DAY = datetime.timedelta(days=1)


class Connected(Processes):
    """The processes that torchrun launched, which talk through gloo in groups of their own."""

    def __init__(self, mesh: Any):
        self.mesh, self.index, self.count = mesh, dist.get_rank(), dist.get_world_size()
        self._group = dist.new_group(backend="gloo", timeout=A_DAY)

    def gather(self, text: str) -> list[str]:
        said: list[Any] = [None] * self.count
        dist.all_gather_object(said, text, group=self._group)
        return said

    def any(self, flag: bool) -> bool:
        told = torch.tensor(int(flag))
        dist.all_reduce(told, op=dist.ReduceOp.MAX, group=self._group)
        return bool(told)


@contextlib.contextmanager
def connected(settings: TextSettings, distributed: bool) -> Iterator[Processes]:
    """The processes of a run and their mesh; `distributed` says that there must be several.

    Raises UsageError where torchrun has not launched them, and for a mesh that does not fit them.
    """
    launched = int(os.environ.get("WORLD_SIZE", 1)) > 1
    check_alone(distributed or launched, settings.mesh)
    if settings.mesh is None:
        yield Processes()
        return
    sharding = importlib.import_module("twinformers.sharding.torch_side")
    sharding.check_launched("--no-python twinformers train text ...")
    device = find_device("torch", settings.device)
    kind = device.type if device is not None else "cuda" if torch.cuda.is_available() else "cpu"
    if not dist.is_initialized():
        if kind == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        # Checkpoints are planned through gloo while the devices talk through NCCL.
        dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo")
        # Not before: processes that have once parted do not find each other again.
        atexit.register(dist.destroy_process_group)
    yield Connected(sharding.make_mesh(**mesh_sizes(settings.mesh), device=kind))


class Trainer:
    """Model, optimizer and step of one run: `loss, norm = trainer.update(batch)`.

    On a mesh every process has the same batches, and keeps its own rows of them.
    """

    def __init__(self, config: Any, settings: TextSettings, weights: Arrays, mesh: Any = None):
        source, options = Weights(config, weights, {}), settings.step_options
        device: Any = settings.device if mesh is None else mesh.device_type
        model = load(source, "torch", settings.dtype, device, attention=settings.attention)
        for x in (*model.parameters(), *model.buffers()):
            # In memory of PyTorch's own, as what is restored: products may depend on how memory is aligned.
            x.data = x.data.clone()
        self._mesh, self._group = mesh, None
        if mesh is not None:
            # A group for the thread that writes checkpoints: the updates go on meanwhile.
            self._group = dist.new_group(backend="gloo")
            self._sharding = importlib.import_module("twinformers.sharding.torch_side")
            model = self._sharding.shard(model, mesh, compute_dtype=options.compute_dtype)
            options = dataclasses.replace(options, compute_dtype=None)  # the weights are gathered in it
        self._step = make_step(model, settings.recipe, **vars(options))
        self._state = self._step.init(model.train())

    @property
    def updates(self) -> int:
        return self._state.updates

    def update(self, batch: Batch) -> tuple[Any, Any]:
        """Learn from one batch; the loss before that and the gradient's length, still on their device."""
        self._state, metrics = self._step(self._state, self._placed(batch))
        return metrics.loss, metrics.norm

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> tuple[float, int]:
        """The cross-entropy summed over a batch without dropout, and its targets.

        In the weights' dtype; on a mesh in that in which the weights are gathered.
        """
        model = self._step.model(self._state)
        device = next(model.parameters()).device
        tokens, positions, targets = (torch.as_tensor(x, device=device) for x in self._placed(batch))
        logits, _ = model(tokens, positions)  # [B, T, V]
        wide = logits.to(at_least_float32(logits.dtype)).flatten(0, 1)
        total = nn.functional.cross_entropy(wide, targets.flatten().long(), ignore_index=-1, reduction="sum")
        count = (targets >= 0).sum()
        if self._mesh is not None:
            model.reshard()  # what a call without a backward pass has left gathered
            total, count = (self._sharding.summed(x, self._mesh) for x in (total, count))
        return total.item(), int(count)

    def _placed(self, batch: Batch) -> Batch:
        return batch if self._mesh is None else self._sharding.shard_batch(batch, self._mesh)

    def _flat(self) -> dict[str, torch.Tensor]:
        """Weights and, once there are any, moments by name."""
        result = {f"weights.{name}": x for name, x in self._state.model.state_dict().items()}
        for name, p in self._state.model.named_parameters():
            for kind, x in self._state.optimizer.state.get(p, {}).items():
                result[f"{kind}.{name}"] = x
        return result

    def save(self, folder: Path) -> Callable[[], object]:
        """Begin to write the state, of which a copy is made first; what is returned waits for the end."""
        alone = self._group is None
        future: Any = checkpoint.async_save(
            self._flat(), checkpoint_id=folder / "state", process_group=self._group, no_dist=alone
        )

        def finish() -> None:
            try:
                future.result()
            except CheckpointException as error:  # no Exception, and silent about what happened
                raise OSError(_reason(error)) from error

        return finish

    def restore(self, folder: Path, updates: int) -> None:
        """Put a checkpoint's state in the place of this one. Raises FormatError where it does not fit."""
        for p in self._state.model.parameters():
            if p.requires_grad:
                self._state.optimizer.state[p] = {
                    "step": torch.zeros((), dtype=torch.float32, device=p.device),
                    "exp_avg": torch.zeros_like(p, memory_format=torch.preserve_format),
                    "exp_avg_sq": torch.zeros_like(p, memory_format=torch.preserve_format),
                }
        try:
            checkpoint.load(
                self._flat(),
                checkpoint_id=folder / "state",
                process_group=self._group,
                no_dist=self._group is None,
            )
        except (Exception, CheckpointException) as error:
            raise FormatError(
                "the checkpoint cannot be read",
                where=str(folder),
                found=_reason(error),
                hint="it may be of another version of this program or of PyTorch",
            ) from None
        self._state = self._state._replace(updates=updates)

    def weight(self, name: str) -> np.ndarray:
        """A weight by the twin's own name, gathered: every process asks for it."""
        x = self._state.model.state_dict()[name].detach()
        return (x if self._mesh is None else x.full_tensor()).cpu().numpy().copy()


def _reason(error: BaseException) -> str:
    """What went wrong in the first of the processes in which something did."""
    failures = error.failures if isinstance(error, CheckpointException) else {}
    return first_line(next((cause for cause, _ in failures.values()), error))
