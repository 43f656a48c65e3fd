"""One update after another with PyTorch and torch.optim."""

from __future__ import annotations

import torch

from torch_models.random import fold_in, key
from twinformers.loading import load
from twinformers.training.numbers import Batch
from twinformers.training.state import Arrays, TrainState, Weights


def smoothed_loss(
    logits: torch.Tensor, labels: torch.Tensor, real: torch.Tensor, smoothing: float
) -> torch.Tensor:
    """Cross-entropy with labels smoothed over the whole vocabulary (Szegedy et al. 2016, arXiv:1512.00567).

    The mean over real tokens. logits [B, T, V], labels and real [B, T] -> []
    """
    costs = -torch.log_softmax(logits, dim=-1)  # [B, T, V]
    right = torch.take_along_dim(costs, labels[:, :, None].long(), dim=-1)[:, :, 0]  # [B, T]
    cost = (1 - smoothing) * right + smoothing * torch.mean(costs, dim=-1)
    return torch.sum(torch.where(real, cost, 0)) / torch.sum(real)


class Trainer:
    """Holds the model and the optimizer of one run: `loss = trainer.update(batch, step, rate)`."""

    def __init__(self, state: TrainState):
        settings = state.settings
        self._model = load(Weights(state.config, state.weights, {}), "torch", settings.dtype).train()
        self._smoothing = settings.label_smoothing
        self._named = dict(self._model.named_parameters())
        # The rate is set before each update. Fused: one pass over all parameters instead of several.
        self._optimizer = torch.optim.Adam(self._named.values(), betas=(0.9, 0.98), eps=1e-9, fused=True)
        for name, parameter in self._named.items():
            self._optimizer.state[parameter] = {
                "step": torch.tensor(float(state.step)),
                "exp_avg": torch.tensor(state.first[name], dtype=parameter.dtype),
                "exp_avg_sq": torch.tensor(state.second[name], dtype=parameter.dtype),
            }
        self._key = key(settings.seed) if settings.dropout else None

    def update(self, batch: Batch, step: int, rate: float) -> float:
        """Learn from one batch, the `step`-th from 0 on; the loss before that."""
        *inputs, labels = map(torch.from_numpy, batch)
        logits, _ = self._model(*inputs, key=None if self._key is None else fold_in(self._key, step))
        loss = smoothed_loss(logits, labels, inputs[-1] >= 0, self._smoothing)
        self._optimizer.zero_grad()
        loss.backward()
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        return loss.item()

    def arrays(self) -> dict[str, Arrays]:
        """Weights and moments, by the names of the twin's own parameters."""
        kept = {n: self._optimizer.state[p] for n, p in self._named.items()}
        return {
            "weights": {n: p.detach().numpy().copy() for n, p in self._named.items()},
            "first": {n: s["exp_avg"].numpy().copy() for n, s in kept.items()},
            "second": {n: s["exp_avg_sq"].numpy().copy() for n, s in kept.items()},
        }
