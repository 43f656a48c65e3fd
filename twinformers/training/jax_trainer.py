"""One update after another with JAX and optax: a compiled step, pure leaves, donated state."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util

from jax_models import functional
from jax_models.random import fold_in, key
from twinformers.loading import load
from twinformers.training.numbers import Batch
from twinformers.training.state import Arrays, TrainState, Weights
from twinformers.weight_maps import weight_map

ADAM = optax.scale_by_adam(b1=0.9, b2=0.98, eps=1e-9)


def smoothed_loss(logits: jax.Array, labels: jax.Array, real: jax.Array, smoothing: float) -> jax.Array:
    """Cross-entropy with labels smoothed over the whole vocabulary (Szegedy et al. 2016, arXiv:1512.00567).

    The mean over real tokens. logits [B, T, V], labels and real [B, T] -> []
    """
    costs = -jax.nn.log_softmax(logits, axis=-1)  # [B, T, V]
    right = jnp.take_along_axis(costs, labels[:, :, None], axis=-1)[:, :, 0]  # [B, T]
    cost = (1 - smoothing) * right + smoothing * jnp.mean(costs, axis=-1)
    return jnp.sum(jnp.where(real, cost, 0)) / jnp.sum(real)


class Trainer:
    """Holds parameters and the optimizer's state of one run: `loss = trainer.update(batch, step, rate)`."""

    def __init__(self, state: TrainState):
        settings = state.settings
        apply, self._params = functional(
            load(Weights(state.config, state.weights, {}), "jax", settings.dtype)
        )
        self._leaves = weight_map(state.config).leaves("torch")
        self._optimizer = optax.ScaleByAdamState(
            jnp.asarray(state.step, jnp.int32), self._tree(state.first), self._tree(state.second)
        )
        self._key = key(settings.seed) if settings.dropout else None

        # vs torch: one compiled function; what goes in is given up, so that nothing is held twice
        @partial(jax.jit, donate_argnums=(0, 1))
        def update(params, optimizer, batch, rate, key):
            def cost(params):
                logits, _ = apply(params, *batch[:4], key=key)
                return smoothed_loss(logits, batch.labels, batch.positions >= 0, settings.label_smoothing)

            loss, gradients = jax.value_and_grad(cost)(params)
            steps, optimizer = ADAM.update(gradients, optimizer)
            params = jax.tree.map(lambda x, step: x - rate * step, params, steps)
            return params, optimizer, loss

        self._update = update

    def update(self, batch: Batch, step: int, rate: float) -> float:
        """Learn from one batch, the `step`-th from 0 on; the loss before that."""
        key = None if self._key is None else fold_in(self._key, step)
        self._params, self._optimizer, loss = self._update(self._params, self._optimizer, batch, rate, key)
        return float(loss)

    def arrays(self) -> dict[str, Arrays]:
        """Weights and moments, in the torch twin's names and layout."""
        trees = {"weights": self._params, "first": self._optimizer.mu, "second": self._optimizer.nu}
        return {name: self._flat(tree) for name, tree in trees.items()}

    def _flat(self, tree: dict[str, Any]) -> Arrays:
        flat = traverse_util.flatten_dict(tree)
        ours = {".".join(map(str, path)): np.asarray(x) for path, x in flat.items()}
        return {n: leaf.move(ours[leaf.name("jax")], "jax", "torch") for n, leaf in self._leaves.items()}

    def _tree(self, arrays: Arrays) -> dict[str, Any]:
        moved = {leaf.name("jax"): leaf.move(arrays[n], "torch", "jax") for n, leaf in self._leaves.items()}
        return jax.tree_util.tree_map_with_path(
            # A copy: what is donated must not be a numpy array's own memory.
            lambda path, x: jnp.array(moved[".".join(str(part.key) for part in path)], x.dtype, copy=True),
            self._params,
        )
