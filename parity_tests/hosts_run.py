"""What `test_hosts.py` has each of two processes do; four of the eight devices are its own."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from saving_run import most, refused
from sharded_run import LENGTH, ROWS, far

import twinformers
from jax_models import functional
from twinformers.checkpoints.orbax import _orbax
from twinformers.sharding import saving
from twinformers.sharding.jax_saving import save_sharded
from twinformers.sharding.jax_side import make_mesh, shard_batch, sharded_cache
from twinformers.sharding.loading import load_sharded
from twinformers.sharding.scanned import scan_layers
from twinformers.training.adamw import AdamW
from twinformers.training.jax_step import make_step
from twinformers.training.step import random_batch


def whole(tree):
    return jax.tree.map(lambda x: np.asarray(multihost_utils.process_allgather(x, tiled=True)), tree)


def results(model, tokens, positions, batch, mesh=None):
    """Logits with a cache in two calls, losses and norms of two updates, and the weights after them."""
    apply, params = functional(model)
    place = partial(shard_batch, mesh=mesh) if mesh else lambda tree: tree
    cache = sharded_cache(model, ROWS, 32, mesh) if mesh else model.empty_cache(ROWS, 32)
    step, logits = jax.jit(apply), []
    for part in (slice(0, 7), slice(7, LENGTH)):
        out, cache = step(params, *place((tokens[:, part], positions[:, part])), cache)
        logits.append(out)
    update = make_step(model, AdamW(clip=0.5), mesh=mesh)
    state, told = update.init(model), []
    for _ in range(2):
        state, metrics = update(state, place(batch))
        told += [metrics.loss, metrics.norm]
    return logits, told, state.params


def compare(folder):
    mesh = make_mesh(fsdp=4, tensor=2)
    model = load_sharded(folder, mesh, "float64")
    config = model.config
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (ROWS, LENGTH)).astype(np.int32)
    positions = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
    batch = random_batch(config, ROWS, LENGTH)
    found = whole(results(model, tokens, positions, batch, mesh))
    with jax.default_device(jax.local_devices()[0]):
        one = twinformers.load(folder, "jax", "float64", jax.local_devices()[0])
        truth = jax.tree.map(np.asarray, results(one, tokens, positions, batch))
    return {
        "logits": far(truth[0], found[0]),
        "update": far(truth[1:], found[1:]),
        "alone": refused(save_sharded, one, folder.parent / "alone"),
        **saved(model, folder),
    }


def saved(model, folder):
    """What saving says: as Hugging Face's, scanned as PyTorch's, over what is there, on a full disk."""
    place = folder.parent
    saving.BLOCK_BYTES = 10_000  # so that matrices take several
    sums = save_sharded(model, place / "saved", source=folder, shard_size=100_000)
    save_sharded(scan_layers(model), place / "scanned", to="torch", dtype="float32")
    save_sharded(model, place / "flax", to="jax", source=folder)
    return {
        "sums": sums,
        "exists": refused(save_sharded, model, place / "scanned"),
        "full": refused(save_sharded, model, place / "new" / "full", full=jax.process_index() == 1),
        "bad": refused(save_sharded, model, place / "bad", to="gguf"),
    }


def measure(folder, mesh_sizes):
    """Bytes that loading took at the most, of the weights that lie here, and of both and saving."""
    mesh = make_mesh(**mesh_sizes)
    _orbax()  # what its code takes, as JAX's, is none of a model's
    jax.block_until_ready(jax.jit(lambda x: x + 1)(np.zeros(8)))
    before = most()
    model = load_sharded(folder, mesh, "float32")
    after = most()
    _, params = functional(model)
    leaves = jax.tree.leaves(params)
    held = sum(piece.data.nbytes for x in leaves for piece in x.addressable_shards)
    save_sharded(model, folder.parent / "saved")
    return {
        "peak": after - before,
        "saving": most() - before,
        "held": held,
        "all": sum(x.nbytes for x in leaves),
    }


def main(index, port, folder, what):
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, index)
    assert (len(jax.devices()), len(jax.local_devices())) == (8, 4)
    return compare(Path(folder)) if what == "compare" else measure(Path(folder), what)


if __name__ == "__main__":
    print(json.dumps(main(*json.loads(sys.argv[1]))))
