"""Blocks in a loop give the numbers of the list: outputs, cached decoding, gradients and updates."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from flax import nnx

import jax_models.random
import twinformers
from jax_models import functional
from twinformers.checkpoints.preset import PresetCheckpoint
from twinformers.configs import preset
from twinformers.errors import UsageError
from twinformers.parity.kinds import kind, real
from twinformers.sharding.scanned import Scanned, scan_layers
from twinformers.training.adamw import AdamW
from twinformers.training.jax_step import make_step
from twinformers.training.step import random_batch

LIMIT = 1e-12
NAMES = ["llama-tiny", "gpt2-tiny", "mistral-tiny", "transformer-tiny", "bert-tiny"]


def pair(name, attention="einsum", dtype="float64", **changes):
    """A model as a list of blocks, and the same as a loop."""
    checkpoint = PresetCheckpoint("test", preset(name).replace(**changes))
    one, other = (twinformers.load(checkpoint, "jax", dtype, attention=attention) for _ in range(2))
    return one, scan_layers(other)


def close(left, right, limit=LIMIT):
    left, right = np.asarray(left), np.asarray(right)
    assert left.shape == right.shape
    assert np.abs(left - right).max() <= limit * np.abs(left).max()


@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_cached_decoding_match_the_list(name):
    with jax.enable_x64(True):
        one, loop = pair(name)
        given = kind(one.config).inputs(one.config)
        logits = [jax.jit(functional(m)[0])(functional(m)[1], *given)[0] for m in (one, loop)]
        keep = real(np.asarray(logits[0]), given)
        close(np.asarray(logits[0])[keep], np.asarray(logits[1])[keep])
        if one.config.kind == "causal":
            tokens, positions = given
            found = []
            for model in (one, loop):
                apply, params = functional(model)
                cache, parts = model.empty_cache(len(tokens), 64), []
                for part in (slice(0, 5), slice(5, 6), slice(6, None)):
                    out, cache = jax.jit(apply)(params, tokens[:, part], positions[:, part], cache)
                    parts.append(np.asarray(out))
                found.append(np.concatenate(parts, 1))
            close(*(f[keep] for f in found))


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_updates_match_the_list_whatever_is_computed_again(remat):
    with jax.enable_x64(True):
        found = []
        for model in pair("llama-tiny"):
            step = make_step(model, AdamW(clip=0.5), remat=remat, accumulate=2, chunk=5)
            state, metrics = step.init(model), []
            for _ in range(2):
                state, told = step(state, random_batch(model.config, 4, 12))
                metrics += [float(x) for x in told]
            found.append((metrics, step.model(state)))
        (left, one), (right, loop) = found
        np.testing.assert_allclose(left, right, rtol=1e-10)
        (blocks,) = (b for b in loop.layers)
        for path in ("attn.q_proj.kernel", "mlp.down_proj.kernel", "mlp_norm.scale"):
            stacked, listed = blocks.stacked, list(one.layers)
            for part in path.split("."):
                stacked, listed = getattr(stacked, part), [getattr(b, part) for b in listed]
            close(np.stack([np.asarray(x[...]) for x in listed]), stacked[...], 1e-10)


def test_mixed_precision_keeps_the_loop_and_the_attention():
    one, loop = pair("llama-tiny", attention="fused", dtype="float32")
    losses = []
    for model in (one, loop):
        step = make_step(model, AdamW(), compute_dtype="bfloat16")
        twin = nnx.merge(step._computing, *(s for s in nnx.split(model)[1:]))
        assert {type(b) is Scanned for b in twin.layers} == {model is loop}
        attentions = [m.attend for _, m in nnx.iter_modules(twin) if "attend" in vars(m)]
        assert attentions and all(a.__module__ == "jax_models.fused" for a in attentions)
        losses.append(float(step(step.init(model), random_batch(model.config, 4, 12))[1].loss))
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_what_is_compiled_does_not_grow_with_the_depth():
    sizes = {}
    for layers in (2, 8):
        for scanned, model in enumerate(pair("llama-tiny", dtype="float32", num_hidden_layers=layers)):
            apply, params = functional(model)
            given = kind(model.config).inputs(model.config)
            sizes[scanned, layers] = jax.jit(apply).lower(params, *given).as_text().count("\n")
    assert sizes[1, 8] == sizes[1, 2]
    assert sizes[0, 8] > 2 * sizes[0, 2]


def test_a_layer_that_differs_is_seen():
    with jax.enable_x64(True):
        one, loop = pair("llama-tiny")
        kernel = loop.layers[0].stacked.mlp.up_proj.kernel
        kernel[...] = kernel[...].at[1, 3, 5].add(1.0)
        given = kind(one.config).inputs(one.config)
        left, right = (np.asarray(m(*given)[0]) for m in (one, loop))
        assert np.abs(left - right).max() > 1e-6


def test_what_cannot_be_looped_over_is_refused():
    one, loop = pair("llama-tiny", dtype="float32")
    with pytest.raises(UsageError, match="no list of blocks"):
        scan_layers(loop)
    with pytest.raises(UsageError, match="no list of blocks"):
        scan_layers(one.norm)
    one.layers[1].attn.head_dim += 1
    with pytest.raises(UsageError, match="blocks differ"):
        scan_layers(one)
    _, transformer = pair("transformer-tiny", dtype="float32")
    given = kind(transformer.config).inputs(transformer.config)
    with pytest.raises(UsageError, match="one key for all"):
        transformer(*given, key=jax_models.random.key(0))
