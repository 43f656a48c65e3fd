"""Splash attention, by Pallas' interpreter on a CPU, against the einsum of PyTorch; and its contract."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jax_models.layers
import torch_models.layers
import twinformers
from jax_models import functional
from twinformers.checkpoints.preset import PresetCheckpoint
from twinformers.configs import preset
from twinformers.errors import UsageError
from twinformers.sharding.scanned import scan_layers
from twinformers.sharding.splash import attend, splash, use_splash

LENGTH = 256
#: float32, in which the kernel computes: a few hundred sums of products of size 1.
LIMIT = 2e-6
interpreted = partial(splash, interpret=True)


def heads(key_heads, keys=LENGTH, dtype="float32"):
    rng = np.random.default_rng(0)
    shapes = ((2, LENGTH, 4, 64), (2, keys, key_heads, 64), (2, keys, key_heads, 64))
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def causal(padding=0, keys=LENGTH):
    """Two rows, the second with padding at its end; slots beyond the call are empty."""
    positions = np.tile(np.arange(LENGTH, dtype=np.int32), (2, 1))
    if padding:
        positions[1, -padding:] = -1
    late = np.full((2, keys - LENGTH), -1, np.int32)
    mask = np.asarray(jax_models.layers.visible(positions, np.concatenate([positions, late], 1)))
    return mask.copy(), positions >= 0  # PyTorch wants it writable


def truth(q, k, v, mask, pull=None):
    leaves = [torch.from_numpy(x.astype(np.float64)).requires_grad_() for x in (q, k, v)]
    out = torch_models.layers.attend(*leaves, torch.from_numpy(mask))
    if pull is not None:
        (out * torch.from_numpy(pull)).sum().backward()
    return out.detach().numpy(), [x.grad.numpy() for x in leaves] if pull is not None else []


@pytest.mark.parametrize("padding", [0, 70])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_splash_and_its_gradients_match_the_einsum(key_heads, padding):
    arrays, (mask, real) = heads(key_heads), causal(padding)
    pull = np.random.default_rng(1).standard_normal(arrays[0].shape) * real[:, :, None, None]
    right, of_right = truth(*arrays, mask, pull)
    out, back = jax.vjp(lambda *x: interpreted(*x, mask), *arrays)
    assert np.abs(np.asarray(out) - right)[real].max() <= LIMIT * np.abs(right[real]).max()
    for mine, theirs in zip(back(jnp.asarray(pull, jnp.float32)), of_right, strict=True):
        assert np.abs(np.asarray(mine) - theirs).max() <= 5 * LIMIT * np.abs(theirs).max()


def test_of_a_cache_the_slots_of_the_call_are_read():
    arrays, (mask, _) = heads(2, keys=LENGTH + 1), causal(keys=LENGTH + 1)
    right, _ = truth(*arrays, mask)
    assert np.abs(np.asarray(interpreted(*arrays, mask)) - right).max() <= LIMIT * np.abs(right).max()


@pytest.mark.parametrize("broken", ["window", "later", "left", "slots"])
def test_a_mask_that_the_kernel_does_not_compute_is_no_number(broken):
    keys = LENGTH + 1 if broken == "slots" else LENGTH
    arrays, (mask, _) = heads(2, keys), causal(keys=keys)
    mask = mask.copy()
    if broken == "window":
        mask[1] &= np.tri(LENGTH, k=-200, dtype=bool).T | ~np.tri(LENGTH, k=-200, dtype=bool)
        mask[1] &= ~np.tri(LENGTH, k=-200, dtype=bool)
    elif broken == "later":
        mask[1, 3, 9] = True
    elif broken == "left":
        mask[1, 100, 2] = False
    else:
        mask[1, 100, LENGTH] = True
    out = np.asarray(interpreted(*arrays, mask))
    assert np.isfinite(out[0]).all() and np.isnan(out[1]).all()


@pytest.mark.parametrize("case", ["decode", "short", "float64", "dropout"])
def test_what_the_kernel_lacks_is_left_to_the_einsum(case):
    q, k, v = heads(2)
    mask, options = causal()[0], {}
    with jax.enable_x64(case == "float64"):
        if case == "decode":
            q, mask = q[:, -1:], mask[:, -1:]
        elif case == "short":
            q, mask = q[:, :100], mask[:, :100]
        elif case == "float64":
            q, k, v = (x.astype(np.float64) for x in (q, k, v))
        else:
            options = {"rate": 0.4, "key": jax.random.key_data(jax.random.key(3))}
        given = [jnp.asarray(x) for x in (q, k, v, mask)]
        assert (attend(*given, **options) == jax_models.layers.attend(*given, **options)).all()


@pytest.mark.parametrize("scanned", [False, True])
def test_a_model_with_splash_matches_the_einsum(scanned):
    config = preset("llama-tiny")
    checkpoint = PresetCheckpoint("test", config)
    tokens = np.random.default_rng(2).integers(0, config.vocab_size, (2, 128)).astype(np.int32)
    positions = np.tile(np.arange(128, dtype=np.int32), (2, 1))
    found = []
    for chosen in (False, True):
        model = twinformers.load(checkpoint, "jax", "float32")
        if chosen:
            use_splash(model, interpret=True)
            model = scan_layers(model) if scanned else model
        apply, params = functional(model)
        full, _ = jax.jit(apply)(params, tokens, positions)
        cached, _ = jax.jit(apply)(params, tokens, positions, model.empty_cache(2, 128))
        found.append((np.asarray(full), np.asarray(cached)))
    for left, right in zip(*found, strict=True):
        assert (left != right).any(), "the kernel was not asked"
        assert np.abs(left - right).max() <= 1e-5 * np.abs(left).max()
    with pytest.raises(UsageError, match="no attention to choose"):
        use_splash(model.norm)
