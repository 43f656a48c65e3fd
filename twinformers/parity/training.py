"""Training as a check: the same recipe in optax and torch.optim, compared after every update.

`training` hands the Flax twin's state to the PyTorch twin before each update, so that every step is judged
alone. `training-run` lets both run on their own. Weights and both moments are compared, by parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from twinformers.checkpoints import Checkpoint
from twinformers.loading import load
from twinformers.parity.gradients import flat_jax, loss_jax, loss_torch
from twinformers.parity.kinds import Inputs, kind
from twinformers.parity.recording import Activations, to_numpy, widened
from twinformers.training.adamw import AdamW, optax_adamw, torch_adamw
from twinformers.weight_maps import weight_map

#: Weights, first and second moments, by the PyTorch twin's names and in its layout.
State = dict[str, Activations]
SEED = 0


class FlaxRun:
    """The Flax twin under optax: a compiled update, pure leaves, donated state."""

    def __init__(
        self, checkpoint: Checkpoint, dtype: str, device: Any, recipe: AdamW, attention: str = "einsum"
    ):
        import jax
        import jax.numpy as jnp

        from jax_models import functional

        apply, params = functional(load(checkpoint, "jax", dtype, device, attention=attention))
        self._leaves = weight_map(checkpoint.config).leaves("jax")
        frozen = {name for name, leaf in self._leaves.items() if not leaf.trains}
        # What does not train is no business of the optimizer: decay would move it without any gradient.
        self._fixed, self._params = _split(params, frozen)
        optimizer, clip = optax_adamw(recipe)
        self._optimizer = optimizer.init(self._params)

        @partial(jax.jit, donate_argnums=(0, 1))
        def update(params, optimizer_state, fixed, batch, targets, weights, rate, key):
            def cost(params):
                logits, _ = apply(_joined(fixed, params), *batch, key=key)
                return loss_jax(logits, targets, weights.astype(logits.dtype))

            loss, gradients = jax.value_and_grad(cost)(params)
            optimizer_state.hyperparams["learning_rate"] = jnp.asarray(rate, loss.dtype)
            changes, optimizer_state = optimizer.update(clip(gradients), optimizer_state, params)
            return jax.tree.map(jnp.add, params, changes), optimizer_state, loss

        self._update = update

    def update(self, batch: Inputs, targets: Any, weights: Any, number: int, rate: float) -> float:
        from jax_models.random import fold_in, key

        self._params, self._optimizer, loss = self._update(
            self._params,
            self._optimizer,
            self._fixed,
            batch,
            targets,
            weights,
            rate,
            fold_in(key(SEED), number),
        )
        return float(loss)

    def state(self) -> State:
        adam = self._optimizer.inner_state[0]
        trees = {"weights": self._params, "first": adam.mu, "second": adam.nu}
        return {
            what: {
                self._leaves[name].name("torch"): self._leaves[name].move(
                    widened(np.asarray(x)), "jax", "torch"
                )
                for name, x in flat_jax(tree).items()
            }
            for what, tree in trees.items()
        }


def _split(tree: Any, names: set[str], prefix: str = "") -> tuple[dict[Any, Any], dict[Any, Any]]:
    """The leaves with these dotted names, and the rest, each in dictionaries as deep as before."""
    named: dict[Any, Any] = {}
    rest: dict[Any, Any] = {}
    for k, x in tree.items():
        if isinstance(x, dict):
            named[k], rest[k] = _split(x, names, f"{prefix}{k}.")
        else:
            (named if f"{prefix}{k}" in names else rest)[k] = x
    return named, rest


def _joined(left: dict[Any, Any], right: dict[Any, Any]) -> dict[Any, Any]:
    both = left.keys() & right.keys()
    return left | right | {k: _joined(left[k], right[k]) for k in both}


class TorchRun:
    """The PyTorch twin under torch.optim."""

    def __init__(
        self, checkpoint: Checkpoint, dtype: str, device: Any, recipe: AdamW, attention: str = "einsum"
    ):
        self._model = load(checkpoint, "torch", dtype, device, attention=attention)
        self._optimizer, self._clip = torch_adamw(recipe, self._model)
        self._trained = {n: p for n, p in self._model.named_parameters() if p.requires_grad}

    def update(self, batch: Inputs, targets: Any, weights: Any, number: int, rate: float) -> float:
        import torch

        from torch_models.random import fold_in, key

        device = next(iter(self._trained.values())).device
        put = partial(torch.tensor, device=device)
        with torch.enable_grad():
            logits, _ = self._model(*map(put, batch), key=fold_in(key(SEED, device), number))
            loss = loss_torch(logits, put(targets), put(weights).to(logits.dtype))
            self._optimizer.zero_grad(set_to_none=True)
            loss.backward()
        for p in self._trained.values():
            if p.grad is None:  # the loss does not look at it: PyTorch would not even let it decay
                p.grad = torch.zeros_like(p)
        self._clip()
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        return loss.item()

    def state(self) -> State:
        kept = {n: self._optimizer.state[p] for n, p in self._trained.items()}
        return {
            "weights": {n: to_numpy(p)[1] for n, p in self._trained.items()},
            "first": {n: to_numpy(s["exp_avg"])[1] for n, s in kept.items()},
            "second": {n: to_numpy(s["exp_avg_sq"])[1] for n, s in kept.items()},
        }

    def adopt(self, state: State, updates: int) -> None:
        """Go on from another run's state after so many updates."""
        import torch

        with torch.no_grad():
            for name, p in self._trained.items():
                p.copy_(torch.from_numpy(state["weights"][name].copy()))
                if updates:
                    self._optimizer.state[p] = {
                        "step": torch.tensor(float(updates)),
                        "exp_avg": torch.from_numpy(state["first"][name].copy()).to(p),
                        "exp_avg_sq": torch.from_numpy(state["second"][name].copy()).to(p),
                    }


def train_twins(
    checkpoint: Checkpoint,
    dtype: str,
    devices: dict[str, Any],
    recipe: AdamW,
    *,
    free: bool,
    attention: str = "einsum",
    on_progress: Callable[[str], None] = lambda text: None,
) -> Iterator[tuple[int, dict[str, float], dict[str, State]]]:
    """Yield, after each update, its number and each twin's loss and state. `free`: neither sees the other."""
    calls, config = kind(checkpoint.config), checkpoint.config
    left = FlaxRun(checkpoint, dtype, devices["jax"], recipe, attention)
    right = TorchRun(checkpoint, dtype, devices["torch"], recipe, attention)
    for number in range(1, recipe.steps + 1):
        on_progress(f"update {number} of {recipe.steps}")
        batch = calls.batch(config, number)
        targets, weights = calls.targets(batch)
        if not free:
            right.adopt(left.state(), number - 1)
        arguments = (batch, targets, weights, number, recipe.rate(number))
        losses = {"jax": left.update(*arguments), "torch": right.update(*arguments)}
        yield number, losses, {"jax": left.state(), "torch": right.state()}
