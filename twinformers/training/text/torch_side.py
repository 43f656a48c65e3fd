"""A run in PyTorch: step, evaluation, and distributed checkpoints of all that an update changes."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.api import CheckpointException

from torch_models.layers import at_least_float32
from twinformers.errors import FormatError, first_line
from twinformers.loading import load
from twinformers.training.state import Arrays, Weights
from twinformers.training.step import Batch
from twinformers.training.text.settings import TextSettings
from twinformers.training.torch_step import make_step


@contextlib.contextmanager
def scope(settings: TextSettings) -> Iterator[None]:
    """What a run has to be within: nothing but silence about checkpoints that a single process writes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torch.distributed.checkpoint")
        yield


class Trainer:
    """Model, optimizer and step of one run: `loss, norm = trainer.update(batch)`."""

    def __init__(self, config: Any, settings: TextSettings, weights: Arrays):
        source = Weights(config, weights, {})
        model = load(source, "torch", settings.dtype, settings.device, attention=settings.attention)
        for x in (*model.parameters(), *model.buffers()):
            # In memory of PyTorch's own, as what is restored: products may depend on how memory is aligned.
            x.data = x.data.clone()
        self._step = make_step(model, settings.recipe, **vars(settings.step_options))
        self._state = self._step.init(model.train())

    @property
    def updates(self) -> int:
        return self._state.updates

    def update(self, batch: Batch) -> tuple[Any, Any]:
        """Learn from one batch; the loss before that and the gradient's length, still on their device."""
        self._state, metrics = self._step(self._state, batch)
        return metrics.loss, metrics.norm

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> tuple[float, int]:
        """The cross-entropy summed over a batch in the weights' dtype without dropout, and its targets."""
        model = self._step.model(self._state)
        device = next(model.parameters()).device
        tokens, positions, targets = (torch.as_tensor(x, device=device) for x in batch)
        logits, _ = model(tokens, positions)  # [B, T, V]
        wide = logits.to(at_least_float32(logits.dtype)).flatten(0, 1)
        total = nn.functional.cross_entropy(wide, targets.flatten().long(), ignore_index=-1, reduction="sum")
        return total.item(), int((targets >= 0).sum())

    def _flat(self) -> dict[str, torch.Tensor]:
        """Weights and, once there are any, moments by name."""
        result = {f"weights.{name}": x for name, x in self._state.model.state_dict().items()}
        for name, p in self._state.model.named_parameters():
            for kind, x in self._state.optimizer.state.get(p, {}).items():
                result[f"{kind}.{name}"] = x
        return result

    def save(self, folder: Path) -> Callable[[], object]:
        """Begin to write the state, of which a copy is made first; what is returned waits for the end."""
        future: Any = checkpoint.async_save(self._flat(), checkpoint_id=folder / "state", no_dist=True)

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
            checkpoint.load(self._flat(), checkpoint_id=folder / "state", no_dist=True)
        except (Exception, CheckpointException) as error:
            raise FormatError(
                "the checkpoint cannot be read",
                where=str(folder),
                found=_reason(error),
                hint="it may be of another version of this program or of PyTorch",
            ) from None
        self._state = self._state._replace(updates=updates)

    def weights(self) -> Arrays:
        """The weights by the twin's own names."""
        return {n: x.detach().cpu().numpy().copy() for n, x in self._state.model.state_dict().items()}


def _reason(error: BaseException) -> str:
    """What went wrong in the first of the processes in which something did."""
    failures = error.failures if isinstance(error, CheckpointException) else {}
    return first_line(next((cause for cause, _ in failures.values()), error))
