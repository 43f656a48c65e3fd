"""A run in JAX: the compiled step, evaluation, and Orbax checkpoints of all that an update changes."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util
from jax._src import distributed as coordination
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_models.layers import at_least_float32
from twinformers.checkpoints.orbax import _orbax
from twinformers.configs import Config
from twinformers.errors import FormatError, UsageError, first_line
from twinformers.loading import find_device, load
from twinformers.sharding.jax_side import make_mesh, shard_batch
from twinformers.sharding.loading import load_sharded
from twinformers.sharding.mesh import mesh_sizes
from twinformers.training.jax_step import make_step
from twinformers.training.state import Arrays, Weights
from twinformers.training.step import Batch
from twinformers.training.text.processes import Processes, check_alone
from twinformers.training.text.settings import TextSettings
from twinformers.weight_maps import weight_map


@contextlib.contextmanager
def scope(settings: TextSettings) -> Iterator[None]:
    """What a run has to be within: 64-bit numbers where it asks for them, and Orbax without its diary."""
    logger = logging.getLogger("absl")
    before, wide = logger.level, jax.config.values["jax_enable_x64"]
    logger.setLevel(logging.ERROR)
    try:
        if settings.dtype == "float64":
            # For all threads: Orbax restores arrays in its own, and would halve them there.
            jax.config.update("jax_enable_x64", True)
        with jax.enable_x64(True) if settings.dtype == "float64" else contextlib.nullcontext():
            yield
    finally:
        jax.config.update("jax_enable_x64", wide)
        logger.setLevel(before)


#: Milliseconds that a process waits for the others to speak: the first one may tokenize for hours.
A_DAY = 24 * 3600 * 1000
#: The coordination service keeps what was said: no number may come twice in the life of the processes.
MESSAGES = itertools.count()


class Connected(Processes):
    """All processes of JAX, which talk through its coordination service: no device has to be idle for it."""

    def __init__(self, mesh: Mesh | None):
        self.mesh, self.index, self.count = mesh, jax.process_index(), jax.process_count()

    def gather(self, text: str) -> list[str]:
        if self.count == 1:
            return [text]
        client: Any = coordination.global_state.client  # Orbax's barriers go the same way
        place = f"twinformers/{next(MESSAGES)}"
        client.key_value_set(f"{place}/{self.index}", f"={text}")  # nothing is a value, too
        return [client.blocking_key_value_get(f"{place}/{n}", A_DAY)[1:] for n in range(self.count)]

    def any(self, flag: bool) -> bool:
        return flag if self.count == 1 else bool(multihost_utils.process_allgather(np.array(flag)).any())


@contextlib.contextmanager
def connected(settings: TextSettings, distributed: bool) -> Iterator[Processes]:
    """The processes of a run and their mesh. With `distributed`, this process looks for the others first.

    Raises UsageError where it is not told about them, and for a mesh that does not fit the devices.
    """
    if distributed:
        _initialize()
    check_alone(jax.process_count() > 1, settings.mesh)
    if settings.mesh is None:
        yield Processes()
        return
    find_device("jax", settings.device)
    devices = jax.devices(settings.device.partition(":")[0]) if settings.device else None
    yield Connected(make_mesh(**mesh_sizes(settings.mesh), devices=devices))


def _initialize() -> None:
    """Let JAX find the other processes: by itself on TPU pods, under SLURM and Open MPI, else as told."""
    if jax.distributed.is_initialized():
        return
    told = {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}
    try:
        numbers: Any = {name: int(os.environ[v]) for name, v in told.items() if v in os.environ}
        jax.distributed.initialize(**numbers)
    except (ValueError, TypeError, RuntimeError) as error:
        raise UsageError(
            "this process cannot join the others",
            where="distributed",
            expected="a launch by SLURM, Open MPI or on a TPU pod, or the variables JAX_COORDINATOR_ADDRESS, "
            "JAX_NUM_PROCESSES and JAX_PROCESS_ID",
            found=first_line(error),
            hint="leave --distributed out for one process",
        ) from None


class Trainer:
    """Model, optimizer and step of one run: `loss, norm = trainer.update(batch)`.

    On a mesh every process has the same batches, and keeps its own rows of them.
    """

    def __init__(self, config: Any, settings: TextSettings, weights: Arrays, mesh: Mesh | None = None):
        source, attention = Weights(config, weights, {}), settings.attention
        if mesh is None:
            model = load(source, "jax", settings.dtype, settings.device, attention=attention)
        else:
            model = load_sharded(source, mesh, settings.dtype, attention=attention)
        options = settings.step_options
        self._step = make_step(model, settings.recipe, mesh=mesh, **vars(options))
        self._state = self._step.init(model)
        self._config: Config = config
        self._mesh = mesh
        graphdef, _ = nnx.split(model)
        del model

        @partial(jax.jit, out_shardings=None if mesh is None else NamedSharding(mesh, PartitionSpec()))
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
        self._state, metrics = self._step(self._state, self._placed(batch))
        return metrics.loss, metrics.norm

    def evaluate(self, batch: Batch) -> tuple[float, int]:
        """The cross-entropy summed over a batch in the weights' dtype without dropout, and its targets."""
        with jax.set_mesh(self._mesh) if self._mesh is not None else contextlib.nullcontext():
            total, count = self._cost(nnx.state(self._step.model(self._state)), self._placed(batch))
        return float(total), int(count)

    def _placed(self, batch: Batch) -> Batch:
        return batch if self._mesh is None else shard_batch(batch, self._mesh)

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

    def weight(self, name: str) -> np.ndarray:
        """A weight by the torch twin's name and in its layout, gathered: every process asks for it."""
        leaf = weight_map(self._config).leaves("torch")[name]
        pure = nnx.to_pure_dict(nnx.state(self._step.model(self._state)))
        flat = {".".join(map(str, path)): x for path, x in traverse_util.flatten_dict(pure).items()}
        x = flat[leaf.name("jax")]
        if not x.is_fully_addressable:
            x = multihost_utils.process_allgather(x, tiled=True)
        return leaf.move(np.asarray(x), "jax", "torch")
