"""The programs that a TPU slice would run, lowered from shapes alone: nothing here is computed."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_models import skeleton
from twinformers.configs import Config
from twinformers.errors import UsageError
from twinformers.parity.kinds import kind
from twinformers.sharding import BATCH
from twinformers.sharding.jax_side import cache_shardings, token_sharding, tree_shardings
from twinformers.sharding.scanned import scan_layers
from twinformers.sharding.splash import use_splash
from twinformers.training.adamw import AdamW
from twinformers.training.jax_step import make_step
from twinformers.training.step import Batch

MODES = ("train", "prefill", "decode")


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is asked of a slice; `sequence` is the length of a training row, of a prompt or of the cache."""

    config: Config
    mode: str
    batch: int
    sequence: int
    remat: str = "full"
    attention: str = "splash"
    accumulate: int = 1
    chunk: int | None = None

    def __post_init__(self) -> None:
        c: Any = self.config
        if self.mode not in MODES:
            raise UsageError("unknown mode", where="mode", expected=", ".join(MODES), found=repr(self.mode))
        if c.kind != "causal" and (self.mode, self.attention) != ("prefill", "einsum"):
            raise UsageError(
                "only a language model is trained or decodes here, and only that is causal throughout",
                where=c.architecture,
                expected="mode prefill, a pass over all inputs, and attention einsum",
                found=f"mode {self.mode}, attention {self.attention}",
            )
        for name in ("batch", "sequence"):
            if (value := getattr(self, name)) < 1:
                raise UsageError("bad value", where=name, expected="a positive number", found=str(value))
        if self.attention not in ("splash", "einsum"):
            raise UsageError(
                "unknown attention",
                where="attention",
                expected="splash or einsum",
                found=repr(self.attention),
            )
        if self.sequence > c.max_position_embeddings:
            raise UsageError(
                "the model was not made for so many positions",
                where="sequence",
                expected=f"at most max_position_embeddings = {c.max_position_embeddings}",
                found=str(self.sequence),
            )


@dataclass(frozen=True)
class Lowered:
    """A program ready to be compiled, and the bytes that each device holds when it starts, by kind."""

    program: Any
    held: dict[str, int]


def lower(work: Work, mesh: Mesh, *, layers: int | None = None) -> Lowered:
    """One step of the work on a mesh. With `layers`, a model of so many, written out one after another."""
    config: Any = work.config
    if layers is not None:
        config = config.replace(num_hidden_layers=layers)
    model = _skeleton(config, work, mesh, scanned=layers is None)
    build = {"train": _train}.get(work.mode, _generate) if config.kind == "causal" else _pass
    with jax.default_matmul_precision("default"):  # as a TPU multiplies unless told otherwise
        return build(model, work, mesh)


def _skeleton(config: Any, work: Work, mesh: Mesh, *, scanned: bool) -> Any:
    cls = getattr(importlib.import_module(f"jax_models.{config.architecture}"), config.model_class)
    dtype = jnp.float32 if work.mode == "train" else jnp.bfloat16
    model = skeleton(cls, config, dtype=dtype)
    if work.attention == "splash":
        use_splash(model, mesh)
    return scan_layers(model) if scanned else model


def _train(model: Any, work: Work, mesh: Mesh) -> Lowered:
    """An update: float32 weights and moments, the model in bfloat16."""
    step = make_step(
        model,
        AdamW(),
        mesh=mesh,
        compute_dtype="bfloat16",
        remat=work.remat,
        accumulate=work.accumulate,
        chunk=work.chunk,
    )
    shape = work.batch, work.sequence
    array = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=token_sharding(shape, mesh))
    state, batch = step.abstract(model), Batch(array, array, array)
    held = {
        "parameters": held_bytes(state.params),
        "optimizer": held_bytes(state.optimizer),
        "batch": held_bytes(batch),
    }
    return Lowered(step.lower(state, batch), held)


def _generate(model: Any, work: Work, mesh: Mesh) -> Lowered:
    """A prompt, or one token for each row of a cache that is full but for it; bfloat16 throughout."""
    graphdef, params, _ = nnx.split(model, nnx.Param, ...)  # type: ignore[misc]
    params = nnx.to_pure_dict(params)
    params = jax.tree.map(_placed, params, tree_shardings(params, mesh))
    cache = jax.eval_shape(lambda: model.empty_cache(work.batch, work.sequence))
    at = cache_shardings(cache, mesh)
    cache, narrow = jax.tree.map(_placed, cache, at), at.positions
    length = work.sequence if work.mode == "prefill" else 1
    tokens = jax.ShapeDtypeStruct((work.batch, length), jnp.int32, sharding=narrow)

    def step(params, tokens, positions, cache):
        twin = nnx.merge(graphdef, params)
        x, cache = twin.hidden(tokens, positions, cache)  # [B, T, D]
        return jnp.argmax(twin.head(x[:, -1:])[:, 0], axis=-1), cache  # [B]

    compiled = jax.jit(step, donate_argnames="cache", out_shardings=(narrow, at))
    with jax.set_mesh(mesh):
        program = compiled.lower(params, tokens, tokens, cache)
    held = {"parameters": held_bytes(params), "cache": held_bytes(cache), "batch": 2 * held_bytes(tokens)}
    return Lowered(program, held)


def _pass(model: Any, work: Work, mesh: Mesh) -> Lowered:
    """One pass over all inputs of a model that is no language model, each of them [B, T]; bfloat16."""
    graphdef, params, fixed = nnx.split(model, nnx.Param, ...)  # type: ignore[misc]
    params, fixed = nnx.to_pure_dict(params), nnx.to_pure_dict(fixed)
    everywhere = NamedSharding(mesh, PartitionSpec())
    params = jax.tree.map(_placed, params, tree_shardings(params, mesh))
    fixed = jax.tree.map(lambda x: _placed(x, everywhere), fixed)
    rows = NamedSharding(mesh, PartitionSpec(BATCH))
    given = [
        jax.ShapeDtypeStruct((work.batch, work.sequence), x.dtype, sharding=rows)
        for x in kind(work.config).inputs(work.config)
    ]

    def call(params, fixed, *given):
        return nnx.merge(graphdef, params, fixed)(*given)[0]

    with jax.set_mesh(mesh):
        program = jax.jit(call).lower(params, fixed, *given)
    held = {"parameters": held_bytes(params), "fixed": held_bytes(fixed), "batch": held_bytes(given)}
    return Lowered(program, held)


def _placed(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def held_bytes(tree: Any) -> int:
    """Bytes of a tree of placed shapes that one device holds."""
    return sum(
        int(np.prod(x.sharding.shard_shape(x.shape), dtype=np.int64)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
        if isinstance(x, jax.ShapeDtypeStruct)
    )
