"""AdamW with everything said: one recipe, and what optax and torch.optim must be told to follow it.

Loshchilov & Hutter 2019 (arXiv:1711.05101), decoupled decay. The libraries' defaults differ (decay 1e-4
against 0.01), so does the clipping's guard against a zero norm, and optax computes schedules in float32:
here both get the rate of each update as a plain number and share one formula for clipping.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """The recipe. Matrices decay (embeddings too), norm scales and biases do not.

    The rate grows linearly for `warmup` updates to `peak`, and falls with a cosine to `floor` at `steps`.
    """

    peak: float = 1e-3
    floor: float = 1e-4
    warmup: int = 5
    steps: int = 20
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0

    def rate(self, update: int) -> float:
        """The learning rate of update number 1, 2, ..., in plain floats."""
        if update <= self.warmup:
            return self.peak * update / self.warmup
        progress = min((update - self.warmup) / max(self.steps - self.warmup, 1), 1.0)
        return self.floor + (self.peak - self.floor) * (1 + math.cos(math.pi * progress)) / 2


def decays(shape: tuple[int, ...]) -> bool:
    """Whether a parameter of this shape decays: what multiplies does, what scales or shifts does not."""
    return len(shape) >= 2


def optax_adamw(recipe: AdamW) -> tuple[Any, Callable[[Any], Any]]:
    """optax's AdamW with a settable rate (`state.hyperparams["learning_rate"]`), and the clipping."""
    import jax
    import jax.numpy as jnp
    import optax

    from twinformers.sharding.scanned import STACKED

    def _decays(path: Any, x: Any) -> bool:
        stacked = any(getattr(part, "key", None) == STACKED for part in path)  # the first axis counts layers
        return decays(x.shape[stacked:])

    optimizer = optax.inject_hyperparams(
        optax.adamw, static_args=("b1", "b2", "eps", "weight_decay", "mask")
    )(
        learning_rate=recipe.peak,
        b1=recipe.b1,
        b2=recipe.b2,
        eps=recipe.eps,
        weight_decay=recipe.weight_decay,
        mask=lambda params: jax.tree_util.tree_map_with_path(_decays, params),
    )

    def clip(gradients: Any) -> Any:
        norm = jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(gradients)))
        # A norm of zero clips nothing: the quotient is infinite, and the smaller of the two is 1.
        return jax.tree.map(lambda g: g * jnp.minimum(recipe.clip / norm, 1.0), gradients)

    return optimizer, clip


def torch_adamw(recipe: AdamW, model: Any) -> tuple[Any, Callable[[], None]]:
    """torch.optim's AdamW with a settable rate (`group["lr"]`), and the clipping, in place.

    On a mesh (`twinformers.sharding.torch_side.shard`), each process updates its parts of the weights.
    """
    import torch

    trained = [p for p in model.parameters() if p.requires_grad]
    mesh = getattr(model, "mesh", None)
    groups = []
    # A fused update takes weights of one mesh, and those that "tensor" does not cut are on a smaller one.
    for own in dict.fromkeys(getattr(p, "device_mesh", None) for p in trained):
        here = [p for p in trained if getattr(p, "device_mesh", None) == own]
        groups += [
            {"params": [p for p in here if decays(tuple(p.shape))], "weight_decay": recipe.weight_decay},
            {"params": [p for p in here if not decays(tuple(p.shape))], "weight_decay": 0.0},
        ]
    optimizer = torch.optim.AdamW(
        groups, lr=recipe.peak, betas=(recipe.b1, recipe.b2), eps=recipe.eps, foreach=False
    )

    def clip() -> None:
        gradients: list[Any] = [p.grad for p in trained if p.grad is not None]
        if mesh is None:
            norm = torch.sqrt(sum((g * g).sum() for g in gradients))
        else:
            from twinformers.sharding.torch_side import total_norm

            norm = total_norm(gradients, mesh)
            gradients = [g.to_local() for g in gradients]
        for g in gradients:
            g.mul_(torch.clamp(recipe.clip / norm, max=1.0))

    return optimizer, clip
