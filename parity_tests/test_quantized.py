"""int8 weights: the rounding against plain numpy, the models against each other and against transformers."""

from __future__ import annotations

import inspect

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from flax import nnx
from test_grouping import as_side
from test_llama import LIMIT, difference, inputs

import jax_models.quantized as of_jax
import torch_models.quantized as of_torch
import twinformers
from twinformers.checkpoints.preset import PresetCheckpoint
from twinformers.configs import preset
from twinformers.errors import UsageError, WeightsError
from twinformers.parity.reference import precise, reference_model
from twinformers.training.adamw import AdamW

TINY = preset("llama-tiny")
CONFIGS = {
    "untied": TINY,
    "tied": TINY.replace(tie_word_embeddings=True),
    "transformer": preset("transformer-tiny"),
}
DTYPES = {"float64": np.float64, "float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def by_hand(weight):
    """[out, in] -> int8 and scales, one number after another, from the definition."""
    kind = weight.dtype.type
    wide = np.float64 if kind is np.float64 else np.float32
    values, scales = np.zeros(weight.shape, np.int8), np.zeros(len(weight), kind)
    for o, row in enumerate(weight):
        scales[o] = kind(max(abs(wide(w)) for w in row) * wide(1 / 127))
        scales[o] = scales[o] if scales[o] else kind(1)
        for i, w in enumerate(row):
            nearest = round(wide(w) * (wide(1) / wide(scales[o])))  # Python rounds half to even
            values[o, i] = min(max(nearest, -127), 127)
    return values, scales


def both(weight):
    """The rounded weight in each framework, as numpy: [out, in] and [out]."""
    with jax.enable_x64(weight.dtype == np.float64):
        kernel, scale = map(np.asarray, of_jax.rounded(jnp.asarray(weight.T)))
    tensor = torch.from_numpy(weight.astype(np.float64)).to(getattr(torch, weight.dtype.name))
    values, scales = of_torch.rounded(tensor)
    return (kernel.T, scale), (values.numpy(), scales.double().numpy().astype(weight.dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_matches_plain_numpy(dtype):
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((40, 37)) * np.exp(rng.standard_normal((40, 1)) * 3)
    weight[0] = 0  # a channel without a largest value
    weight[1] = np.r_[127, np.arange(36) - 17.5]  # ties: the scale is 1
    weight[2] = np.r_[np.full(20, -1.0), np.full(17, 0.3)]  # the largest is negative
    weight = weight.astype(DTYPES[dtype])
    values, scales = by_hand(weight)
    assert (np.abs(values).max(axis=1) == 127)[1:].all() and not values[0].any()
    assert values[1, 1:4].tolist() == [-18, -16, -16]
    for found, scale in both(weight):
        assert found.dtype == np.int8 and scale.dtype == DTYPES[dtype]
        assert np.array_equal(found, values) and scale.tobytes() == scales.tobytes()
        error = np.abs(found * scale.astype(np.float64)[:, None] - weight.astype(np.float64))
        # Half a step, and what rounding the scale cuts off of the largest.
        unit = 127 * float(ml_dtypes.finfo(weight.dtype).eps)
        assert (error <= (0.5 + unit) * scale.astype(np.float64)[:, None]).all()


def test_rounding_matches_plain_numpy_where_much_is_near_a_tie():
    """What was eight bits wide before, as in a GGUF file: an ulp decides about many values."""
    rng = np.random.default_rng(3)
    weight = rng.integers(-126, 127, (64, 512)) * rng.standard_normal((64, 1)).astype(np.float32)
    weight = weight.astype(np.float32)
    values, scales = by_hand(weight)
    quotient = weight.astype(np.float64) / scales[:, None]
    assert (np.abs(np.abs(quotient - np.floor(quotient)) - 0.5) < 1e-5).sum() > 100
    for found, scale in both(weight):
        assert np.array_equal(found, values) and scale.tobytes() == scales.tobytes()


def twin(framework, config, dtype="float64", quantize="int8"):
    with jax.enable_x64(dtype == "float64"):
        return twinformers.load(PresetCheckpoint("test", config), framework, dtype, quantize=quantize)


def leaves(model):
    """The weights of a twin by path, as numpy, kernels the way torch has them."""
    if isinstance(model, torch.nn.Module):
        return {name: x.numpy() for name, x in model.state_dict().items()}
    found = {".".join(map(str, p)): np.asarray(x[...]) for p, x in nnx.to_flat_state(nnx.state(model))}
    return {n.replace("kernel", "weight"): x.T if n.endswith("kernel") else x for n, x in found.items()}


#: How many linear layers each has, the head among them.
COUNTS = {"untied": 3 * 7 + 1, "tied": 3 * 7 + 1, "transformer": 2 * 6 + 3 * 10 + 1}


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", COUNTS)
def test_both_twins_hold_the_same_bits(name, dtype):
    left, right = (leaves(twin(framework, CONFIGS[name], dtype)) for framework in ("jax", "torch"))
    rounded = [path for path, x in right.items() if x.dtype == np.int8]
    assert len(rounded) == COUNTS[name] and sum(x.dtype == np.int8 for x in left.values()) == len(rounded)
    for path in rounded:
        assert left[path].dtype == np.int8 and np.array_equal(left[path], right[path])
        scale = path.replace("weight", "scale")
        assert left[scale].dtype == np.dtype(dtype) and left[scale].tobytes() == right[scale].tobytes()


def logits(framework, model, tokens, positions, chunk=None):
    """Of the whole at once, or in chunks with a cache. [B, T, V]"""
    parts = [slice(s, s + chunk) for s in range(0, tokens.shape[1], chunk)] if chunk else [slice(None)]
    out = []
    with jax.enable_x64(True), torch.inference_mode():
        cache = model.empty_cache(len(tokens), 512) if chunk else None
        put = jnp.asarray if framework == "jax" else torch.tensor
        for part in parts:
            found, cache = model(put(tokens[:, part]), put(positions[:, part]), cache)
            out.append(np.asarray(found))
    return np.concatenate(out, 1)


def spelled_out(config):
    """A checkpoint whose linear layers hold what the int8 values and the scales multiply to."""
    source = as_side(config, "torch", "float64")
    if config.tie_word_embeddings:
        source.config = config.replace(tie_word_embeddings=False)
        source.arrays["lm_head.weight"] = source.arrays["embed.weight"]
    for name, array in source.arrays.items():
        if array.ndim == 2 and name != "embed.weight":
            values, scales = by_hand(array)
            source.arrays[name] = values * scales[:, None]
    return source


@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize("name", ["untied", "tied"])
def test_logits_match_twin_and_transformers(name, chunk):
    config = CONFIGS[name]
    tokens, positions = inputs(config)
    with precise("float64"), torch.inference_mode():
        theirs = reference_model(spelled_out(config), "float64")
        truth = theirs(torch.tensor(tokens[:1]).long()).logits.numpy()
    found = [logits(f, twin(f, config), tokens, positions, chunk) for f in ("jax", "torch")]
    assert difference(*found, positions) <= LIMIT
    for ours in found:
        assert difference(ours[:1], truth, positions[:1]) <= LIMIT
    # It is another model than before, if not by much.
    before = logits("torch", twin("torch", config, quantize=None), tokens, positions)
    assert 1e-4 < difference(found[0], before, positions) < 0.2


@pytest.mark.parametrize("rows", [1, 2, 32, 33])
@pytest.mark.parametrize("shape", [(300, 128), (7, 128), (64, 96)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_product_matches_its_definition(shape, rows, dtype):
    """Whatever computes it: the ways for few rows, at the row where another takes over; sizes out of step."""
    rng, (out, size), kind = np.random.default_rng(2), shape, DTYPES[dtype]
    weight, x, bias = (rng.standard_normal(s).astype(kind) for s in (shape, (rows, 1, size), out))
    values, scales = by_hand(weight)
    exact = [a.astype(np.float64) for a in (x, values, scales, bias)]
    truth = exact[0] @ exact[1].T * exact[2] + exact[3]
    ours = of_jax.QuantizedLinear(jnp.asarray(weight.T), nnx.Param(jnp.asarray(bias)))
    left = np.asarray(jax.jit(ours)(jnp.asarray(x)))
    assert left.dtype == kind
    weight, x, bias = (
        torch.from_numpy(a.astype(np.float32)).to(getattr(torch, dtype)) for a in (weight, x, bias)
    )
    theirs = of_torch.QuantizedLinear(weight, torch.nn.Parameter(bias))
    with torch.inference_mode():
        right = theirs(x)
    assert right.dtype == x.dtype
    # Rounding at each of the products and sums, of values between 0 and 255 where they are so stored.
    most = np.abs(exact[0]) @ (np.abs(exact[1]) + 256).T * exact[2]
    for found in (left.astype(np.float64), right.double().numpy()):
        assert (
            found.shape == truth.shape
            and (np.abs(found - truth) <= float(ml_dtypes.finfo(kind).eps) * most).all()
        )


def test_a_cpu_decodes_with_the_tables():
    model = twin("torch", TINY, "float32")
    tables = [m.table for m in model.modules() if isinstance(m, of_torch.QuantizedLinear)]
    before = logits("torch", model, *inputs(TINY, length=10))
    for table in tables:
        assert table.dtype == torch.uint8
        table.fill_(0)
    assert not np.array_equal(logits("torch", model, *inputs(TINY, length=10)), before)
    assert np.isfinite(logits("torch", model, *inputs(TINY))).all()
    assert twin("torch", TINY).lm_head.table is None  # float64 takes no shortcut


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_the_cache_stays_as_it_was(framework):
    cache = twin(framework, TINY, "float32").empty_cache(1, 16)
    assert str(cache.k.dtype).removeprefix("torch.") == "float32"


def test_generate_gives_the_same_tokens_in_both_frameworks():
    from jax_models.generate import Generator as JaxGenerator
    from torch_models.generate import Generator as TorchGenerator

    prompts = [[3, 5, 7], [11, 13, 17, 19, 23, 29, 31]]
    for config in CONFIGS["untied"], CONFIGS["tied"]:
        left = JaxGenerator(twin("jax", config, "float32"))
        right = TorchGenerator(twin("torch", config, "float32"))
        for sampling in (twinformers.Sampling(), twinformers.Sampling(temperature=0.8, top_k=20, seed=1)):
            options = {"max_new_tokens": 12, "sampling": sampling}
            assert list(left.stream(prompts, **options)) == list(right.stream(prompts, **options))


# What is refused


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_an_int8_model_is_not_trained(framework):
    from importlib import import_module

    make_step = import_module(f"twinformers.training.{framework}_step").make_step
    with pytest.raises(UsageError, match=r"^model: small updates") as error:
        make_step(twin(framework, TINY, "float32"), AdamW())
    assert "int8" in error.value.found


def test_a_derivative_is_refused():
    tokens, positions = inputs(TINY)
    graphdef, rounded, rest = nnx.split(
        twin("jax", TINY, "float32"), lambda _, x: x[...].dtype == jnp.int8, ...
    )
    cost = lambda rest: nnx.merge(graphdef, rounded, rest)(tokens, positions)[0].sum()  # noqa: E731
    with pytest.raises(UsageError, match="an int8 model has no gradients"):
        jax.grad(cost)(rest)
    model = twin("torch", TINY, "float32")
    out = model(torch.tensor(tokens), torch.tensor(positions))[0]  # computing is allowed
    with pytest.raises(UsageError, match="an int8 model has no gradients"):
        out.sum().backward()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_what_cannot_be_rounded_is_refused(framework):
    quantize = {"jax": of_jax, "torch": of_torch}[framework].quantize
    model = twin(framework, TINY, "float32")
    with pytest.raises(UsageError, match="int8 already"):
        quantize(model)
    empty = nnx.Embed(3, 4, rngs=nnx.Rngs(0)) if framework == "jax" else torch.nn.Embedding(3, 4)
    with pytest.raises(UsageError, match="nothing to quantise") as error:
        quantize(empty)
    assert error.value.found == type(empty).__name__
    with pytest.raises(UsageError, match=r"^quantize: unknown quantisation") as error:
        twin(framework, TINY, "float32", "int3")
    assert (error.value.expected, error.value.found) == ("int8, or nothing", "'int3'")


@pytest.mark.parametrize("framework", ["jax", "torch"])
@pytest.mark.parametrize("path", ["layers.1.mlp.up_proj", "lm_head"])
def test_a_weight_that_is_not_finite_is_named(framework, path):
    source = as_side(CONFIGS["untied" if path == "lm_head" else "tied"], "torch")
    source.arrays[f"{path}.weight"][3, 5] = np.nan
    with pytest.raises(WeightsError, match=f"^{path}: a weight is not finite"):
        twinformers.load(source, framework, quantize="int8")


#: A mistake: whose, in which function, what stands there and what is put in its place; and what must see it.
MISTAKES = {
    "values cut off": (of_torch, "rounded", "torch.round(", "torch.trunc(", "rounding"),
    "half away from zero": (
        of_jax,
        "rounded",
        "jnp.round(",
        "(lambda v: jnp.trunc(v + 0.5 * jnp.sign(v)))(",
        "rounding",
    ),
    "one scale per input": (of_torch, "rounded", "dim=1", "dim=0", "bits"),
    "the sign forgotten": (of_jax, "rounded", "jnp.abs(wide)", "wide", "rounding"),
    "128 steps": (of_torch, "rounded", "1 / 127", "1 / 128", "rounding"),
    "no scale": (of_torch, "product", " * scale", "", "logits"),
    "tied head left as it was": (
        of_jax,
        "quantize",
        "if model.config.tie_word_embeddings",
        "if False",
        "bits",
    ),
    "the table's offset forgotten": (of_torch, "tabled", "[1.0, -128.0]", "[1.0, 0.0]", "product"),
    "a tile left out": (of_jax, "tiled", "jnp.arange(0,", "jnp.arange(TILE,", "product"),
}
CHECKS = {
    "rounding": lambda: test_rounding_matches_plain_numpy("float32"),
    "bits": lambda: test_both_twins_hold_the_same_bits("tied", "float32"),
    "logits": lambda: test_logits_match_twin_and_transformers("untied", None),
    "product": lambda: test_product_matches_its_definition((300, 128), 2, "float32"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_planted_mistake_is_caught(name, monkeypatch):
    module, function, old, new, check = MISTAKES[name]
    text = inspect.getsource(getattr(module, function))
    assert old in text
    wrong = dict(vars(module))
    exec("from __future__ import annotations\n" + text.replace(old, new), wrong)
    monkeypatch.setattr(module, function, wrong[function])
    with pytest.raises((AssertionError, RuntimeError)):
        CHECKS[check]()
