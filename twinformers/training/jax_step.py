"""A training step for every causal Flax twin: one compiled program from the batch to the new weights.

The state is given up and returned. Micro-batches follow one another in a scan, blocks are computed again in
the backward pass by policy, and the cross-entropy takes the sequence piece by piece: a piece's gradient is
taken at once, so that the logits of the whole never exist and no product of the head is made twice.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.extend.core import Var
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_models.layers import at_least_float32, subkey
from jax_models.random import fold_in, key
from twinformers.errors import UsageError
from twinformers.sharding import SEQUENCE
from twinformers.sharding.jax_side import tree_shardings
from twinformers.sharding.scanned import Scanned
from twinformers.training.adamw import AdamW, optax_adamw
from twinformers.training.step import Batch, Metrics, StepOptions, check_batch, check_model, random_batch

POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}
#: On a CPU, XLA drops what keeps a recomputation from being moved ahead, and the memory stays as it was.
CPU_OPTIONS = {"xla_disable_hlo_passes": "cse_barrier_expander"}


class State(NamedTuple):
    """What an update changes, and what it reads besides. A step consumes it and returns the next."""

    params: Any  # the master weights, a nested dictionary
    fixed: Any  # what does not train, alike
    optimizer: Any  # optax's state, the moments in it
    updates: int  # made so far


def make_step(model: Any, recipe: AdamW, *, mesh: Mesh | None = None, **options: Any) -> Step:
    """A training step: `state = step.init(model)`, then `state, metrics = step(state, batch)`.

    `model` gives the structure and may be abstract; `options` are fields of `StepOptions`. On a mesh the
    state is placed by the rules of `twinformers.sharding`, and stays so; batches are for `shard_batch`.
    Raises UsageError for a bad option, a model that is no language model, weights narrower than float32, and
    a `chunk` on a mesh with an axis "sequence".
    """
    return Step(model, recipe, StepOptions(**options), mesh=mesh)


class Step:
    """The compiled step of one model structure; see `make_step`."""

    def __init__(self, model: Any, recipe: AdamW, options: StepOptions, *, mesh: Mesh | None = None):
        # vs torch: split once and pass pure leaves; see jax_models.functional
        graphdef, params, _ = _split(model)
        self._graphdef = self._computing = graphdef
        if options.compute_dtype is not None:
            self._computing = nnx.graphdef(_computing(model, jnp.dtype(options.compute_dtype)))
        check_model(model.config, {x.dtype.name for x in jax.tree.leaves(params)})
        self._config, self._recipe, self._options = model.config, recipe, options
        self._optimizer, self._clip = optax_adamw(recipe)
        self._mesh, places = mesh, None
        self._flat = mesh is None or SEQUENCE not in mesh.shape
        if options.chunk is not None and not self._flat:
            raise UsageError(
                "pieces of a row would lie on one device each, where devices share out its tokens",
                where="chunk",
                expected="none, or a mesh without sequence",
                found=str(options.chunk),
            )
        if mesh is not None:
            at, opened = self.places(params), NamedSharding(mesh, PartitionSpec())
            places = at.params, at.optimizer, Metrics(opened, opened)
        on_cpu = all(isinstance(x, jax.Array) and x.platform() == "cpu" for x in jax.tree.leaves(params))
        self._compiled = jax.jit(
            self._update,
            donate_argnums=(0, 1),
            out_shardings=places,
            compiler_options=CPU_OPTIONS if on_cpu and options.remat != "none" else None,
        )

    def init(self, model: Any) -> State:
        """The state before the first update, with a copy of the model's weights: the model stays whole."""
        _, params, fixed = _split(model)
        if self._mesh is not None:
            # Made on the devices that keep it: the whole would not fit on one.
            places = self.places(params)
            params = jax.device_put(params, places.params, may_alias=False)
            start = jax.jit(self._optimizer.init, out_shardings=places.optimizer)
            return State(params, jax.tree.map(jnp.copy, fixed), start(params), 0)
        params, fixed = jax.tree.map(jnp.copy, (params, fixed))
        return State(params, fixed, self._optimizer.init(params), 0)

    def abstract(self, model: Any) -> State:
        """What `init` gives, as shapes that know where they lie on the mesh: all that `lower` needs."""
        _, params, fixed = _split(model)
        state = State(params, fixed, jax.eval_shape(self._optimizer.init, params), 0)
        if self._mesh is None:
            return state
        places = self.places(params)
        put = partial(jax.tree.map, lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at))
        return state._replace(
            params=put(params, places.params), optimizer=put(state.optimizer, places.optimizer)
        )

    def places(self, params: Any) -> State:
        """Where the step's mesh has each part of the state: moments lie with their parameters."""
        at = tree_shardings(params, self._mesh)  # type: ignore[arg-type]  # only with a mesh
        opened = NamedSharding(self._mesh, PartitionSpec())  # type: ignore[arg-type]  # only with a mesh
        moments = optax.tree_map_params(
            self._optimizer,
            lambda _, place: place,
            jax.eval_shape(self._optimizer.init, params),
            at,
            transform_non_params=lambda _: opened,
        )
        return State(at, None, moments, 0)

    def __call__(self, state: State, batch: Batch) -> tuple[State, Metrics]:
        """One update. Raises UsageError for a batch that does not fit."""
        with self._on_mesh():
            params, optimizer, metrics = self._compiled(*self._arguments(state, batch))
        return State(params, state.fixed, optimizer, state.updates + 1), metrics

    def lower(self, state: State, batch: Batch) -> Any:
        """The step for a state and a batch of these shapes, lowered and not run: what compilers analyse."""
        with self._on_mesh():
            return self._compiled.lower(*self._arguments(state, batch))

    def model(self, state: State) -> Any:
        """The twin with the state's weights, which are its own until the next step consumes them."""
        return nnx.merge(self._graphdef, state.params, state.fixed)

    def _on_mesh(self) -> Any:
        return jax.set_mesh(self._mesh) if self._mesh is not None else contextlib.nullcontext()

    def _arguments(self, state: State, batch: Batch) -> tuple[Any, ...]:
        check_batch(batch, self._config.vocab_size, self._options.accumulate)
        number = state.updates + 1
        return state.params, state.optimizer, state.fixed, batch, self._recipe.rate(number), number

    def _twin(self, params: Any, fixed: Any) -> Any:
        """The model as it computes: in the dtype asked for, its blocks computed again where asked for."""
        dtype = self._options.compute_dtype
        if dtype is not None:
            params, fixed = jax.tree.map(lambda x: x.astype(dtype), (params, fixed))
        model = nnx.merge(self._computing, params, fixed)
        if self._options.remat != "none":
            _rematerialise(model, POLICIES[self._options.remat])
        return model

    def _update(self, params, optimizer, fixed, batch, rate, number):
        accumulate, seed = self._options.accumulate, self._options.seed
        targets = jnp.where(batch.positions >= 0, batch.targets, -1)  # [B, T]
        # One mean over the whole batch: micro-batches and pieces may hold different numbers of real tokens.
        total = jnp.maximum(jnp.sum(targets >= 0), 1)
        update_key = None if seed is None else fold_in(key(seed), number)

        def learn(carry, micro):
            index, tokens, positions, targets = micro

            def hidden(params):
                twin = self._twin(params, fixed)
                return twin.hidden(tokens, positions, key=subkey(update_key, index))[0]

            x, back = jax.vjp(hidden, params)  # [B/n, T, D]
            loss, of_head, of_x = self._cross_entropy(params, fixed, x, targets, total)
            (of_hidden,) = back(of_x)
            return jax.tree.map(jnp.add, carry, (loss, _plus(of_hidden, of_head))), None

        # Row r goes to micro-batch r mod n, so that each of them is spread over devices as the batch is.
        micros = [x.reshape(-1, accumulate, x.shape[1]).swapaxes(0, 1) for x in (*batch[:2], targets)]
        nothing = jnp.zeros((), optax.tree.dtype(params)), jax.tree.map(jnp.zeros_like, params)
        (loss, gradients), _ = jax.lax.scan(learn, nothing, (jnp.arange(accumulate), *micros))
        # As a number of the state's own kind, which is not Python's: else the second step compiles again.
        optimizer.hyperparams["learning_rate"] = jnp.asarray(rate, loss.dtype)
        changes, optimizer = self._optimizer.update(self._clip(gradients), optimizer, params)
        metrics = Metrics(loss, optax.tree.norm(gradients))
        return jax.tree.map(jnp.add, params, changes), optimizer, metrics

    def _cross_entropy(self, params, fixed, x, targets, total):
        """Loss over `total` tokens, its gradients by the head's leaves (by number) and by x. [B, T, D]"""
        leaves, structure = jax.tree.flatten(params)

        def cost(mine, x, targets):
            merged = jax.tree.unflatten(structure, [mine.get(n, leaf) for n, leaf in enumerate(leaves)])
            # The cast is made here, so that the pieces' gradients add up in the dtype of the weights.
            if self._flat:  # as one matrix: see jax_models.layers.Linear
                x, targets = x.reshape(-1, x.shape[-1]), targets.reshape(-1)
            return _cost(self._twin(merged, fixed).head(x), targets) / total

        B, T, D = x.shape
        size = min(self._options.chunk or T, T)
        rest = -T % size
        pieces = (
            jnp.pad(x, ((0, 0), (0, rest), (0, 0))).reshape(B, -1, size, D).swapaxes(0, 1),
            jnp.pad(targets, ((0, 0), (0, rest)), constant_values=-1).reshape(B, -1, size).swapaxes(0, 1),
        )  # [T/size, B, size, D], [T/size, B, size]

        def learn(carry, piece):
            loss, (of_mine, of_x) = jax.value_and_grad(cost, argnums=(0, 1))(mine, *piece)
            return jax.tree.map(jnp.add, carry, (loss, of_mine)), of_x

        mine = {n: leaves[n] for n in _read(cost, dict(enumerate(leaves)), *(p[0] for p in pieces))}
        nothing = jnp.zeros((), optax.tree.dtype(params)), jax.tree.map(jnp.zeros_like, mine)
        (loss, of_mine), of_x = jax.lax.scan(learn, nothing, pieces)
        return loss, of_mine, of_x.swapaxes(0, 1).reshape(B, -1, D)[:, :T]


def _split(model: Any) -> tuple[Any, Any, Any]:
    """The structure, what trains and what does not, the latter two as nested dictionaries."""
    graphdef, params, fixed = nnx.split(model, nnx.Param, ...)  # type: ignore[misc]
    return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(fixed)


def _computing(model: Any, dtype: jnp.dtype) -> Any:
    """The structure of a model that computes in another dtype, its attention and its loops as they are.

    Flax's layers keep the dtype that they were made with, and would cast back to it.
    """
    narrow = nnx.merge(*nnx.split(model))
    for _, module in nnx.iter_modules(narrow):
        for name in ("dtype", "param_dtype"):
            if getattr(module, name, None) is not None:
                setattr(module, name, dtype)
    return narrow


def _cost(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Cross-entropy summed over the targets, in at least float32. [..., V], [...] -> []"""
    wide = jax.nn.log_softmax(logits.astype(at_least_float32(logits.dtype)), axis=-1)
    chosen = jnp.take_along_axis(wide, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]  # [...]
    return -jnp.sum(jnp.where(targets >= 0, chosen, 0))


def _read(function: Any, leaves: dict[int, Any], *args: Any) -> list[int]:
    """Which of the leaves a function looks at: the gradients of all others are zeros not worth carrying."""
    jaxpr = jax.make_jaxpr(function)(leaves, *args).jaxpr
    used = {v for equation in jaxpr.eqns for v in equation.invars if isinstance(v, Var)}
    return [n for n, v in zip(leaves, jaxpr.invars, strict=False) if v in used]


def _plus(tree: Any, more: dict[int, Any]) -> Any:
    """A tree with more added to some of its leaves, by number."""
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, [x + more[n] if n in more else x for n, x in enumerate(leaves)])


def _rematerialise(model: Any, policy: Any) -> None:
    """Let every block of a model store only what the policy says; the model is one trace's own."""
    for blocks in vars(model).values():
        for block in blocks if isinstance(blocks, nnx.List) else ():
            block = block.stacked if isinstance(block, Scanned) else block
            block.__class__ = _rematerialised(type(block), policy)


def _rematerialised(cls: Any, policy: Any) -> type:
    # vs torch: Python looks a call up in the class, so one instance changes by getting a class of its own
    @functools.wraps(cls.__call__)  # a loop over layers looks at what a block takes
    def call(self, *args, **kwargs):
        # Closed over: a block takes indices and caches that are no arrays, beside those that are.
        return jax.checkpoint(lambda: cls.__call__(self, *args, **kwargs), policy=policy)()

    return type(cls.__name__, (cls,), {"__call__": call})


def measure(model: Any, batch: int, length: int, repeats: int, **options: Any) -> float:
    """Median seconds of a training step on `batch` rows of `length` random tokens; `options` of the step."""
    step = make_step(model, AdamW(), **options)
    state, data = step.init(model), random_batch(model.config, batch, length)
    state, _ = jax.block_until_ready(step(state, data))  # compiles
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        state, _ = jax.block_until_ready(step(state, data))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
