"""What `test_sharding.py` has a process with eight simulated devices do: one device against all of them."""

from __future__ import annotations

import contextlib
import json
import sys
from functools import partial

import jax
import numpy as np
from flax import nnx

import twinformers
from jax_models import functional
from twinformers.checkpoints.preset import PresetCheckpoint
from twinformers.configs import preset
from twinformers.sharding.jax_side import make_mesh, shard, shard_batch, sharded_cache, shardings
from twinformers.sharding.splash import use_splash
from twinformers.training.adamw import AdamW
from twinformers.training.jax_step import make_step
from twinformers.training.step import random_batch

ROWS, LENGTH = 8, 13
#: Data, fsdp, tensor, and sequence, which is for rows of even length.
AXES = ("data", "fsdp", "tensor", "sequence")


def far(left, right):
    """The largest difference of any array, relative to that array's largest value."""
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    arrays = [(np.asarray(a), np.asarray(b)) for a, b in pairs]
    return max(float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-300)) for a, b in arrays)


def share(arrays):
    """The part of some arrays that the device with the most of them holds."""
    held = dict.fromkeys(jax.devices(), 0)
    for piece in (piece for x in arrays for piece in x.addressable_shards):
        held[piece.device] += piece.data.nbytes
    return max(held.values()) / sum(x.nbytes for x in arrays)


def decoded(model, tokens, positions, place, empty_cache):
    """Logits of three calls with a cache."""
    apply, params = functional(model)
    step = jax.jit(apply)
    cache, out = empty_cache(model, ROWS, 32), []
    for part in (slice(0, 7), slice(7, 8), slice(8, None)):
        logits, cache = step(params, *place((tokens[:, part], positions[:, part])), cache)
        out.append(np.asarray(logits))
    return np.concatenate(out, 1)


def trained(model, batch, mesh=None):
    """Losses and gradient norms of two updates, and the weights after them."""
    step = make_step(model, AdamW(clip=0.5), mesh=mesh)
    state, told = step.init(model), []
    for _ in range(2):
        state, metrics = step(state, batch)
        told += [metrics.loss, metrics.norm]
    return told, state.params


def calls(model, method):
    """A compiled method of a model, with the parameters as its first argument."""
    graphdef, state = nnx.split(model)
    return jax.jit(lambda state, *given: getattr(nnx.merge(graphdef, state), method)(*given)), state


def translated(config, mesh):
    """The encoder-decoder: a full pass with its gradients, and cached decoding, on one device and on all."""
    source = PresetCheckpoint("test", config)
    one, many = (twinformers.load(source, "jax", "float64", jax.devices()[0]) for _ in range(2))
    shard(many, mesh)
    tokens = np.random.default_rng(0).integers(0, config.target_vocab_size, (2, ROWS, LENGTH), np.int32)
    positions = np.tile(np.arange(LENGTH, dtype=np.int32), (2, ROWS, 1))
    positions[0, 1] = np.r_[np.arange(LENGTH - 3), [-1] * 3]  # a shorter source
    positions[1, 2] = np.r_[[-1] * 4, np.arange(LENGTH - 4)]  # a target that begins later
    given = tokens[0], positions[0], tokens[1], positions[1]
    real = (positions[1] >= 0)[..., None]
    found = []
    for model, place in ((one, lambda tree: tree), (many, lambda tree: shard_batch(tree, mesh))):
        whole, state = calls(model, "__call__")
        logits, _ = whole(state, *place(given))

        def cost(state, *given, whole=whole):
            return ((whole(state, *given)[0] * real) ** 2).sum()

        gradients = jax.jit(jax.grad(cost))(state, *place(given))
        memory = calls(model, "encode")[0](state, *place(given[:2]))
        cross = calls(model, "cross_cache")[0](state, memory, place(given[1]))
        cache = model.empty_cache(ROWS, 32) if model is one else sharded_cache(model, ROWS, 32, mesh)
        out = []
        for part in (slice(0, 7), slice(7, 8), slice(8, LENGTH)):
            piece = place((tokens[1][:, part], positions[1][:, part]))
            step, cache = calls(model, "decode")[0](state, *piece, cross, cache)
            out.append(np.asarray(step))
        found.append((np.asarray(logits) * real, np.concatenate(out, 1) * real, gradients))
    (left, _, wanted), (right, cached, got) = found
    scale = max(float(np.abs(g).max()) for g in jax.tree.leaves(wanted))
    gaps = [
        float(np.abs(np.asarray(a) - np.asarray(b)).max() / max(np.abs(a).max(), 1e-3 * scale))
        for a, b in zip(jax.tree.leaves(wanted), jax.tree.leaves(got), strict=True)
    ]
    weights = jax.tree.leaves(nnx.to_pure_dict(nnx.state(many, nnx.Param)))
    return {
        "share": share(weights),
        "forward": far(left, right),
        "cache": far(left, cached),
        "gradients": max(gaps),
    }


def encoded(config, mesh):
    """The encoder: a full pass with the gradients of all its parts, on one device and on all."""
    source = PresetCheckpoint("test", config)
    one, many = (twinformers.load(source, "jax", "float64", jax.devices()[0]) for _ in range(2))
    shard(many, mesh)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, config.vocab_size, (ROWS, LENGTH), np.int32)
    positions = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
    positions[1] = np.r_[[-1] * 4, np.arange(LENGTH - 4)]
    given = tokens, positions, rng.integers(0, config.type_vocab_size, (ROWS, LENGTH), np.int32)
    found = []
    for model, place in ((one, lambda tree: tree), (many, lambda tree: shard_batch(tree, mesh))):
        graphdef, state = nnx.split(model)

        def cost(state, real, *given, graphdef=graphdef):
            twin = nnx.merge(graphdef, state)
            logits, pooled = twin(*given)
            told = (logits * real, pooled, twin.next_sentence(pooled))
            return sum((x**2).sum() for x in told), told

        real = (positions >= 0)[..., None].astype(np.float64)
        run = jax.jit(jax.grad(cost, has_aux=True))
        found.append(run(state, *place((real, *given))))
    (wanted, left), (got, right) = found
    scale = max(float(np.abs(g).max()) for g in jax.tree.leaves(wanted))
    gaps = [
        float(np.abs(np.asarray(a) - np.asarray(b)).max() / max(np.abs(a).max(), 1e-3 * scale))
        for a, b in zip(jax.tree.leaves(wanted), jax.tree.leaves(got), strict=True)
    ]
    weights = jax.tree.leaves(nnx.to_pure_dict(nnx.state(many, nnx.Param)))
    return {"share": share(weights), "forward": far(left, right), "gradients": max(gaps)}


def splashed(config, mesh):
    """The kernel on each device's rows and heads, in Pallas' interpreter; the einsum on one device."""
    source = PresetCheckpoint("test", config)
    one, many = (twinformers.load(source, "jax", "float32", jax.devices()[0]) for _ in range(2))
    many = use_splash(shard(many, mesh), mesh, interpret=True)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (ROWS, 128), np.int32)
    positions = np.tile(np.arange(128, dtype=np.int32), (ROWS, 1))
    found = []
    for model, place in ((one, lambda tree: tree), (many, lambda tree: shard_batch(tree, mesh))):
        apply, params = functional(model)
        with jax.set_mesh(mesh) if model is many else contextlib.nullcontext():
            found.append(jax.jit(apply)(params, *place((tokens, positions)))[0])
    return {"forward": far(*found)}


def names(params):
    """Each array with its dotted name."""
    flat = jax.tree_util.tree_flatten_with_path(params)[0]
    return [(".".join(str(part.key) for part in path), x) for path, x in flat]


def main(sizes, changes, plant):
    assert len(jax.devices()) == 8
    by_kernel = changes.pop("splash", False)
    config = preset(changes.pop("preset", "llama-tiny")).replace(**changes)
    mesh = make_mesh(**dict(zip(AXES, sizes, strict=False)))
    if by_kernel:
        return splashed(config, mesh)
    if config.kind != "causal":
        return {"encoder": encoded, "encoder-decoder": translated}[config.kind](config, mesh)
    one, many = (
        twinformers.load(PresetCheckpoint("test", config), "jax", "float64", jax.devices()[0])
        for _ in range(2)
    )
    if plant:  # one weight in one place: what a wrong slice would do at the least
        kernel = many.layers[1].mlp.up_proj.kernel
        kernel[...] = kernel[...].at[3, 5].add(1.0)
    shard(many, mesh)
    weights = jax.tree.leaves(nnx.to_pure_dict(nnx.state(many, nnx.Param)))
    places = shardings(many, mesh)

    rng = np.random.default_rng(0)
    length = LENGTH + ("sequence" in mesh.shape)
    tokens = rng.integers(0, config.vocab_size, (ROWS, length)).astype(np.int32)
    positions = np.tile(np.arange(length, dtype=np.int32), (ROWS, 1))
    positions[1] = np.r_[[-1] * 4, np.arange(length - 4)]
    real = (positions >= 0)[..., None]

    def place(tree):
        return shard_batch(tree, mesh)

    expected = decoded(one, tokens, positions, lambda t: t, type(one).empty_cache) * real
    cached = decoded(many, tokens, positions, place, partial(sharded_cache, mesh=mesh)) * real
    apply, params = functional(many)
    whole = np.asarray(jax.jit(apply)(params, *place((tokens, positions)))[0]) * real
    batch = random_batch(config, ROWS, length)
    left, right = trained(one, batch), trained(many, place(batch), mesh)
    return {
        "tokens": share([place(tokens)]) * tokens.size,
        "share": share(weights),
        "share after": share(jax.tree.leaves(right[1])),
        "moved": [n for n, x in names(right[1]) if not x.sharding.is_equivalent_to(places[n], x.ndim)],
        "cache": far(expected, cached),
        "forward": far(expected, whole),
        "update": far(left, right),
    }


if __name__ == "__main__":
    print(json.dumps(main(*json.loads(sys.argv[1]))))
