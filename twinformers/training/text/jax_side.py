"""A run in JAX: the compiled step, evaluation, and Orbax checkpoints of all that an update changes."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util

from jax_models.layers import at_least_float32
from twinformers.checkpoints.orbax import _orbax
from twinformers.configs import Config
from twinformers.errors import FormatError, first_line
from twinformers.loading import load
from twinformers.training.jax_step import make_step
from twinformers.training.state import Arrays, Weights
from twinformers.training.step import Batch
from twinformers.training.text.settings import TextSettings
from twinformers.weight_maps import weight_map


@contextlib.contextmanager
def scope(settings: TextSettings) -> Iterator[None]:
    """What a run has to be within: 64-bit numbers where it asks for them, and Orbax without its diary."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with jax.enable_x64(True) if settings.dtype == "float64" else contextlib.nullcontext():
            yield
    finally:
        logger.setLevel(before)


class Trainer:
    """Model, optimizer and step of one run: `loss, norm = trainer.update(batch)`."""

    def __init__(self, config: Any, settings: TextSettings, weights: Arrays):
        source = Weights(config, weights, {})
        model = load(source, "jax", settings.dtype, settings.device, attention=settings.attention)
        options = settings.step_options
        self._step = make_step(model, settings.recipe, **vars(options))
        self._state = self._step.init(model)
        self._config: Config = config
        graphdef, _ = nnx.split(model)
        del model

        @jax.jit
        def cost(state: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
            logits, _ = nnx.merge(graphdef, state)(batch.tokens, batch.positions)  # [B, T, V]
            costs = -jax.nn.log_softmax(logits.astype(at_least_float32(logits.dtype)), axis=-1)
            targets = batch.targets[..., None]  # [B, T, 1]
            chosen = jnp.take_along_axis(costs, jnp.maximum(targets, 0), axis=-1)
            return jnp.sum(jnp.where(targets >= 0, chosen, 0)), jnp.sum(targets >= 0)

        self._cost = cost

    @property
    def updates(self) -> int:
        return self._state.updates

    def update(self, batch: Batch) -> tuple[Any, Any]:
        """Learn from one batch; the loss before that and the gradient's length, still on their device."""
        self._state, metrics = self._step(self._state, batch)
        return metrics.loss, metrics.norm

    def evaluate(self, batch: Batch) -> tuple[float, int]:
        """The cross-entropy summed over a batch in the weights' dtype without dropout, and its targets."""
        total, count = self._cost(nnx.state(self._step.model(self._state)), batch)
        return float(total), int(count)

    def _flat(self) -> dict[str, Any]:
        """All arrays of the state by their paths in it."""
        tree = {"params": self._state.params, "fixed": self._state.fixed, "optimizer": self._state.optimizer}
        leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
        return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in leaves}

    def save(self, folder: Path) -> Callable[[], object]:
        """Begin to write the state; what is returned waits for the end."""
        ocp = _orbax()
        context = ocp.Context()
        # Weights do not compress, and trying takes a core from the training.
        context.array.saving.use_ocdbt = False
        context.array.saving.use_compression = False
        with context:
            # No copy is needed: on a CPU, Orbax looks at the arrays where they lie, and JAX does not give the
            # next update what somebody looks at, donated or not. From elsewhere, it has them when it returns.
            return ocp.save_async((folder / "state").resolve(), self._flat()).result

    def restore(self, folder: Path, updates: int) -> None:
        """Put a checkpoint's state in the place of this one. Raises FormatError where it does not fit."""
        ocp = _orbax()
        flat = self._flat()
        try:
            found = ocp.load((folder / "state").resolve(), flat)
        except Exception as error:  # Orbax raises many types, from its own to tensorstore's
            raise FormatError(
                "the checkpoint cannot be read",
                where=str(folder),
                found=first_line(error),
                hint="it may be of another version of this program or of Orbax",
            ) from None
        tree = {"params": self._state.params, "fixed": self._state.fixed, "optimizer": self._state.optimizer}
        whole = jax.tree.unflatten(jax.tree.structure(tree), [found[name] for name in flat])
        self._state = self._state._replace(**whole, updates=updates)

    def weights(self) -> Arrays:
        """The weights in the torch twin's names and layout."""
        pure = nnx.to_pure_dict(nnx.state(self._step.model(self._state)))
        flat = {".".join(map(str, path)): x for path, x in traverse_util.flatten_dict(pure).items()}
        leaves = weight_map(self._config).leaves("torch").items()
        return {n: leaf.move(np.asarray(flat[leaf.name("jax")]), "jax", "torch") for n, leaf in leaves}
