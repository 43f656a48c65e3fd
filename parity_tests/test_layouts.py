"""Layouts for decoding compute what the model as loaded does, and reach the products that they are for."""

from __future__ import annotations

import re
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from test_llama import LIMIT, TINY, difference, inputs, run_torch

import jax_models.generate
import jax_models.layouts
import torch_models.generate
import torch_models.layouts
import twinformers
from jax_models import functional
from jax_models.layers import KVCache, store
from jax_models.layouts import apart
from torch_models.layers import linear
from twinformers.checkpoints.preset import PresetCheckpoint
from twinformers.configs import Sampling, preset
from twinformers.errors import UsageError
from twinformers.parity.reference import precise, reference_model

CONFIGS = {
    "grouped": TINY,
    "tied": TINY.replace(tie_word_embeddings=True),
    "multi-head": TINY.replace(num_key_value_heads=TINY.num_attention_heads),
}
ENGINES = {"jax": jax_models.generate, "torch": torch_models.generate}
LAYOUTS = {"jax": jax_models.layouts.for_decoding, "torch": torch_models.layouts.for_decoding}
PROMPTS = [[5, 6, 7], list(range(40, 61)), [9]]


def laid_out(config, framework, dtype="float32", **options):
    with jax.enable_x64(dtype == "float64"):
        return twinformers.load(
            PresetCheckpoint("test", config), framework, dtype, "cpu", decoding=True, **options
        )


@pytest.mark.parametrize("chunk", [None, 7], ids=["whole", "cached"])
@pytest.mark.parametrize("name", CONFIGS)
def test_joined_flax_matches_torch_and_transformers(name, chunk):
    config, (tokens, positions) = CONFIGS[name], inputs(CONFIGS[name])
    expected = run_torch(config, tokens, positions, "cpu")
    with jax.enable_x64(True):
        model = laid_out(config, "jax", "float64")
        cache = model.empty_cache(len(tokens), 512) if chunk else None
        out = []
        for start in range(0, tokens.shape[1], chunk or tokens.shape[1]):
            part = slice(start, start + (chunk or tokens.shape[1]))
            logits, cache = model(jnp.asarray(tokens[:, part]), jnp.asarray(positions[:, part]), cache)
            out.append(np.asarray(logits))
        found = np.concatenate(out, 1)
        assert difference(found, expected, positions) <= LIMIT
        if chunk is None:
            with precise("float64"), torch.no_grad():
                theirs = reference_model(PresetCheckpoint("test", config), "float64")
                logits = theirs(torch.tensor(tokens[:1]).long()).logits.numpy()
            assert difference(found[:1], logits, positions[:1]) <= LIMIT


@pytest.mark.parametrize("name", CONFIGS)
def test_a_joined_product_is_computed_once(name):
    config = CONFIGS[name]
    apply, params = functional(laid_out(config, "jax"))
    tokens, positions = np.zeros((1, 16), np.int32), np.arange(16, dtype=np.int32)[None]
    text = jax.jit(apply).lower(params, tokens, positions).compile().as_text()
    shapes = re.findall(r"f32\[(\d+),(\d+)\]\S* dot\(", text)
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    for width in (heads * config.head_dim, 2 * config.intermediate_size):
        assert sum(str(width) in shape for shape in shapes) == config.num_hidden_layers, shapes


def test_joined_parts_add_their_own_bias():
    class Projections(nnx.Module):
        config = hidden = None

        def __init__(self):
            for number, name in enumerate(("q_proj", "k_proj", "v_proj")):
                layer = nnx.Linear(6, 4 + number, rngs=nnx.Rngs(number))
                layer.bias[...] = jnp.arange(4.0 + number) + number
                setattr(self, name, layer)

    model, x = Projections(), jnp.linspace(-1, 1, 2 * 3 * 6).reshape(2, 3, 6)
    by_hand = [
        np.asarray(x) @ np.asarray(p.kernel[...]) + np.asarray(p.bias[...])
        for p in (model.q_proj, model.k_proj, model.v_proj)
    ]
    LAYOUTS["jax"](model)
    for part, expected in zip((model.q_proj, model.k_proj, model.v_proj), by_hand, strict=True):
        assert not isinstance(part, nnx.Linear)
        assert np.allclose(part(x), expected, rtol=0, atol=1e-5) and part(x).shape == expected.shape


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_torch_is_as_close_to_the_truth(name):
    config, (tokens, positions) = CONFIGS[name], inputs(CONFIGS[name])
    truth = run_torch(config, tokens, positions, "cpu")
    plain = difference(run_torch(config, tokens, positions, "cpu", "float32"), truth, positions)
    model = laid_out(config, "torch")
    with torch.inference_mode():
        found = model(torch.tensor(tokens), torch.tensor(positions))[0].numpy()
        loaded_here = laid_out(config, "torch")  # has no packed weights, and works
        assert torch.isfinite(loaded_here(torch.tensor(tokens), torch.tensor(positions))[0]).all()
    assert 0 < difference(found, truth, positions) <= 3 * plain


@pytest.mark.parametrize("rows", [1, 2, 8, 33])
@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
def test_packed_product_matches_numpy_and_follows_the_weight(rows, biased):
    rng = np.random.default_rng(0)
    model = laid_out(TINY, "torch")
    weight = model.layers[0].mlp.gate_proj.weight
    bias = torch.tensor(rng.standard_normal(len(weight)), dtype=torch.float32) if biased else None
    x = torch.tensor(rng.standard_normal((rows, 1, weight.shape[1])), dtype=torch.float32)

    def close():
        expected = x.double().numpy() @ weight.detach().double().numpy().T + (bias.numpy() if biased else 0)
        with torch.no_grad():
            found = linear(x, weight, bias)
        assert found.shape == expected.shape
        return np.abs(found.numpy() - expected).max() <= 1e-5 * np.abs(expected).max()

    assert weight.packed is not None and close()
    with torch.no_grad():
        weight.add_(1.0)
    assert close()  # not with what was packed before


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=0.8, top_k=50, repetition_penalty=1.2)]
)
@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_generation_gives_the_same_tokens(framework, sampling):
    config = CONFIGS["tied"]
    plain = twinformers.load(PresetCheckpoint("test", config), framework, "float32", "cpu")
    runs = [
        list(ENGINES[framework].Generator(m).stream(PROMPTS, max_new_tokens=30, sampling=sampling))
        for m in (plain, laid_out(config, framework))
    ]
    assert runs[0] == runs[1] and len(runs[0]) == 30


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_a_grown_cache_holds_what_it_held(framework):
    engine = ENGINES[framework]
    model = twinformers.load(PresetCheckpoint("test", TINY), framework, "float32", "cpu")
    put = jnp.asarray if framework == "jax" else torch.tensor
    tokens = np.random.default_rng(0).integers(0, TINY.vocab_size, (2, 16)).astype(np.int32)
    positions = np.tile(np.arange(16, dtype=np.int32), (2, 1))
    outputs = []
    for length in (17, 16):  # long enough at once, and only after it has grown
        cache = model.empty_cache(2, length)
        _, cache = model(put(tokens), put(positions), cache)
        grown = engine.grow(cache, 17)
        assert grown.k.shape == grown.v.shape == (*cache.k.shape[:3], 18, TINY.head_dim)
        assert (np.asarray(grown.positions)[:, -1] == -1).all()
        logits, _ = model(put(tokens[:, :1]), put(np.full((2, 1), 16, np.int32)), grown)
        outputs.append(np.asarray(logits.detach() if framework == "torch" else logits))
    assert np.abs(outputs[0] - outputs[1]).max() <= 1e-6 * np.abs(outputs[0]).max()
    assert engine.grow(grown, 5).positions.shape == grown.positions.shape  # it never shrinks


def test_loading_puts_every_parameter_where_decoding_reads_it():
    model = laid_out(TINY, "jax")
    arrays = jax.tree.leaves(nnx.to_pure_dict(nnx.state(model)))
    places = sorted((x.unsafe_buffer_pointer(), x.nbytes) for x in arrays)
    for (start, size), (following, _) in pairwise(places):
        assert start % 64 == 0 and 0 <= following - (start + size) < 64  # one piece of memory, nothing twice
    plain = twinformers.load(PresetCheckpoint("test", TINY), "jax", "float32", "cpu")
    attn, joined = plain.layers[1].attn, model.layers[1].attn
    expected = [p.kernel[...] for p in (attn.q_proj, attn.k_proj, attn.v_proj)]
    assert np.array_equal(joined.v_proj.kernel[...], np.concatenate(expected, axis=1))
    assert np.array_equal(
        model.layers[1].mlp.down_proj.kernel[...], plain.layers[1].mlp.down_proj.kernel[...]
    )
    again = LAYOUTS["jax"](plain)  # what was loaded without
    for x, y in zip(arrays, jax.tree.leaves(nnx.to_pure_dict(nnx.state(again))), strict=True):
        assert np.array_equal(x, y)


@pytest.mark.parametrize("tokens", [1, 5])
def test_a_cache_with_its_layers_apart_is_the_same_cache(tokens):
    rng, (L, B, K, S, H) = np.random.default_rng(0), (3, 2, 4, 9, 8)
    k, v = (jnp.asarray(rng.standard_normal((L, B, K, S, H)), jnp.float32) for _ in "kv")
    whole = KVCache(k, v, jnp.zeros((B, S), jnp.int32))
    slots = jnp.asarray(rng.permuted(np.tile(np.arange(S), (B, 1)), axis=1)[:, :tokens], jnp.int32)
    cut = apart(whole)
    for layer in (2, 0):
        new = [jnp.asarray(rng.standard_normal((B, tokens, K, H)), jnp.float32) for _ in "kv"]
        whole, *expected = store(whole, layer, slots, *new)
        cut, *found = store(cut, layer, slots, *new)
        assert all(np.array_equal(x, y) for x, y in zip(found, expected, strict=True))
    for one, parts in ((whole.k, cut.k), (whole.v, cut.v)):
        assert np.array_equal(one, np.stack([parts[layer] for layer in range(L)]))


def test_the_compiled_loop_copies_no_layer_of_the_cache():
    config = TINY.replace(num_key_value_heads=2, head_dim=24)
    generator = jax_models.generate.Generator(laid_out(config, "jax", attention="fused"))
    seen = []
    loop = generator._loop
    generator._loop = lambda *args, **options: seen.append(args) or loop(*args, **options)
    list(generator.stream([[1, 2, 3]], max_new_tokens=4))
    text = loop.lower(*seen[0]).compile().as_text()
    layer = {2, 24, seen[0][5].positions.shape[1]}  # heads, size, slots
    copies = [
        line.strip()
        for line in text.splitlines()
        if (shape := re.search(r"= f32\[([\d,]+)\]\S* (?:copy|transpose|slice)\(", line))
        and {int(n) for n in shape[1].split(",")} - {1} == layer
    ]
    assert not copies, copies


def test_argmax_is_the_first_maximum():
    rows = np.random.default_rng(0).integers(0, 5, (6, 40)).astype(np.float32)
    rows[0] = -np.inf
    rows[1, 7] = np.nan
    found = np.asarray(jax_models.generate.argmax(jnp.asarray(rows)))
    assert np.array_equal(np.delete(found, 1), np.delete(rows.argmax(axis=1), 1)) and found[1] == 39


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_what_cannot_be_laid_out_is_refused(framework):
    translator = twinformers.load("preset:transformer-tiny", framework)
    with pytest.raises(UsageError, match="decoding"):
        LAYOUTS[framework](translator)
    projection = translator.decoder[0].self_attn.q_proj  # as it was
    assert isinstance(projection, nnx.Linear if framework == "jax" else torch.nn.Linear)
    assert framework == "jax" or not hasattr(projection.weight, "packed")
    with pytest.raises(UsageError, match="decoding"):
        twinformers.load("preset:transformer-tiny", framework, decoding=True)
    with pytest.raises(UsageError, match="decoding"):
        LAYOUTS[framework](nnx.Linear(2, 2, rngs=nnx.Rngs(0)) if framework == "jax" else torch.nn.Identity())


def test_int8_needs_no_layout():
    for framework in ("jax", "torch"):
        model = laid_out(preset("llama-tiny"), framework, quantize="int8")
        assert type(model.layers[0].attn.q_proj).__name__ == "QuantizedLinear"
