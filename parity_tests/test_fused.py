"""The frameworks' own attention kernels behind `use_attention`: the tests of the einsum, on real rows."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from test_attention import (
    FRAMEWORKS,
    GRADIENT_LIMIT,
    LAYERS,
    LENGTH,
    LIMIT,
    ROWS,
    SHAPES,
    WINDOW,
    Module,
    Shape,
    by_hand,
    check,
    draw,
    flat,
    heads,
    inputs,
    jax_gradients,
    mask_by_rule,
    moved,
    put,
    slices,
    torch_attention,
    torch_gradients,
    wide_softmax,  # noqa: F401  (a fixture)
)
from test_llama import TINY, difference
from test_llama import inputs as token_inputs

import jax_models.fused
import jax_models.random
import torch_models.fused
import torch_models.random
import twinformers
from jax_models import functional
from twinformers.checkpoints.preset import PresetCheckpoint
from twinformers.cli.app import run
from twinformers.configs import preset
from twinformers.errors import UsageError
from twinformers.parity.gradients import gradients_jax, gradients_torch
from twinformers.parity.kinds import kind, real
from twinformers.parity.twins import run_jax, run_torch

FUSED = {"jax": jax_models.fused, "torch": torch_models.fused}
RANDOM = {"jax": jax_models.random, "torch": torch_models.random}
WITH_A_CHOICE = [name for name in SHAPES if name != "one-head"]
CONFIGS = {
    "grouped-query": TINY,
    "multi-head": TINY.replace(num_key_value_heads=6),
    "multi-query": TINY.replace(num_key_value_heads=1),
    "transformer": preset("transformer-tiny"),
}


@pytest.fixture
def devices(jax_device, torch_device):
    return {"jax": jax_device, "torch": torch_device}


@pytest.fixture
def kernels(monkeypatch):
    """Counts how often each framework's kernel is called, or traced."""
    counts = dict.fromkeys(FRAMEWORKS, 0)

    def counted(framework, kernel, *arguments):
        counts[framework] += 1
        return kernel(*arguments)

    for framework, module in FUSED.items():
        monkeypatch.setattr(module, "kernel", partial(counted, framework, module.kernel))
    return counts


@pytest.fixture
def exact(wide_softmax, kernels, monkeypatch):  # noqa: F811
    """x64, and JAX's kernel in float64 too: with its softmax made float64, nothing keeps it from that."""
    monkeypatch.setitem(
        jax_models.fused.ATTENTIONS,
        "fused",
        lambda q, k, v, mask, **_: jax_models.fused.kernel(q, k, v, mask),
    )
    with jax.enable_x64(True):
        yield
    assert all(kernels.values()), f"a kernel was never called: {kernels}"


class Fused(Module):
    """A twin of `test_attention` that attends by the kernel."""

    def __init__(self, framework, *arguments, **options):
        super().__init__(framework, *arguments, **options)
        FUSED[framework].use_attention(self.module, "fused")
        self.call = self.module
        if framework == "jax":
            call, params = functional(self.module)
            self.call = partial(jax.jit(call, donate_argnames="cache"), params)


# The function


@pytest.mark.parametrize("key_heads", [1, 2, 6])
@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("causal", [True, False])
def test_kernel_matches_einsum_and_the_other_framework(causal, window, key_heads, devices, exact):
    arrays, (_, positions) = heads(key_heads), inputs()
    mask = mask_by_rule(positions, causal, window)
    found = {}
    for framework in FRAMEWORKS:
        given = [put(a, framework, devices[framework]) for a in (*arrays, mask)]
        fused = FUSED[framework].kernel(*given)
        found[framework] = flat(np.asarray(fused.tolist()))
        check(found[framework], flat(np.asarray(LAYERS[framework].attend(*given).tolist())), positions)
    check(found["jax"], found["torch"], positions)
    check(found["jax"], flat(torch_attention(*arrays, positions, causal, window)), positions)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_kernel_takes_one_mask_for_every_query(framework, devices):
    arrays, (_, positions) = heads(2), inputs()
    seen = (positions >= 0)[:, None, :]  # [B, 1, S], as an encoder's output is seen
    given = [put(a.astype(np.float32), framework, devices[framework]) for a in arrays]
    one, each = (
        FUSED[framework].kernel(*given, put(np.ascontiguousarray(mask), framework, devices[framework]))
        for mask in (seen, np.broadcast_to(seen, (ROWS, LENGTH, LENGTH)))
    )
    assert np.abs(np.asarray(one.tolist()) - np.asarray(each.tolist())).max() <= 1e-6


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_row_that_sees_nothing_is_finite_and_disturbs_no_other(framework, dtype, devices):
    arrays, mask = heads(2), np.ones((ROWS, LENGTH, LENGTH), bool)
    mask[1], mask[2, 4] = False, False  # a whole sequence, and one query
    with jax.enable_x64(dtype == "float64"):
        cast = (
            (lambda x: x.astype(jnp.dtype(dtype)))
            if framework == "jax"
            else (lambda x: x.to(getattr(torch, dtype)).requires_grad_())
        )
        q, k, v = (cast(put(a, framework, devices[framework])) for a in arrays)
        seen, attend = put(mask, framework, devices[framework]), FUSED[framework].attend
        if framework == "jax":
            out, pull = jax.vjp(lambda *x: attend(*x, seen), q, k, v)
            gradients = pull(jnp.where(seen.any(-1)[..., None, None], 1, 0) * jnp.ones_like(out))
        else:
            out = attend(q, k, v, seen)
            (out * seen.any(-1)[..., None, None]).sum().backward()
            gradients = [x.grad for x in (q, k, v)]
        assert str(out.dtype).removeprefix("torch.") == dtype
        numbers = [np.asarray(x.tolist()) for x in (out, *gradients)]
        assert all(np.isfinite(x).all() for x in numbers)
        right = torch_attention(*arrays, np.zeros((ROWS, LENGTH), int), True, None)  # everybody sees all
    seeing = mask.any(-1)
    roundoff = {"float64": 2e-16, "float32": 6e-8, "bfloat16": 4e-3, "float16": 5e-4}[dtype]
    assert np.abs(numbers[0] - right)[seeing].max() <= 20 * roundoff * np.abs(right).max()


# Modules


@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", [name for name in WITH_A_CHOICE if name != "cached"])
def test_modules_match_each_other_and_plain_numpy(name, causal, window, devices, exact):
    shape, (x, positions) = SHAPES[name], inputs()
    options = {"causal": causal, "window": window}
    out, _ = by_hand(shape, draw(shape.table(True)), x, positions, causal, window)
    left, right = (Fused(f, shape, devices[f], **options)(x, positions) for f in FRAMEWORKS)
    check(left, right, positions)
    for found in (left, right):
        check(found, out, positions)


@pytest.mark.parametrize("chunk", [1, 5, 7, 48])
@pytest.mark.parametrize("window", [None, WINDOW])
def test_cached_decoding_matches_the_full_pass_of_the_einsum(window, chunk, devices, exact):
    x, positions = inputs(length=48)
    length = 512 if window is None else window + chunk - 1
    for framework in FRAMEWORKS:
        full = Module(framework, SHAPES["cached"], devices[framework], window=window)(x, positions)
        module = Fused(framework, SHAPES["cached"], devices[framework], window=window)
        check(module.cached(x, positions, slices(48, chunk), length)[0], full, positions)


@pytest.mark.parametrize("name", WITH_A_CHOICE)
def test_gradients_of_every_parameter_and_of_x_match_those_of_the_einsum(name, devices, exact):
    shape, (x, positions) = SHAPES[name], inputs()
    table = shape.table(True)
    pull = np.random.default_rng(4).standard_normal(x.shape) * (positions >= 0)[..., None]
    found = {}
    for cls in (Module, Fused):
        left, right = (cls(f, shape, devices[f], window=WINDOW) for f in FRAMEWORKS)
        left, left_x = jax_gradients(left, x, positions, pull)
        found["jax", cls] = {**moved(table, left, "jax", "torch"), "x": left_x}
        right, right_x = torch_gradients(right, x, positions, pull)
        found["torch", cls] = {**right, "x": right_x}
    truth = found["torch", Module]
    largest = max(np.abs(g).max() for g in truth.values())
    for gradients in found.values():
        assert gradients.keys() == truth.keys()
        for path, right in truth.items():
            scale = max(np.abs(right).max(), 1e-3 * largest)
            assert np.abs(gradients[path] - right).max() <= GRADIENT_LIMIT * scale, path


# Models


@pytest.mark.parametrize("name", CONFIGS)
def test_every_submodule_and_cached_decoding_match_the_einsum(name, devices, exact):
    checkpoint = PresetCheckpoint("test", CONFIGS[name])
    given = kind(checkpoint.config).inputs(checkpoint.config)  # with padding and late positions
    truth, *found = (
        run_twin(checkpoint, "float64", devices[framework], given, ["cache"], attention)
        for framework, run_twin, attention in (
            ("torch", run_torch, "einsum"),
            ("torch", run_torch, "fused"),
            ("jax", run_jax, "fused"),
        )
    )
    for r in found:
        assert r.activations.keys() == truth.activations.keys()
        pairs = {path: (x, truth.activations[path]) for path, x in r.activations.items()}
        pairs |= {"logits": (r.logits, truth.logits), "cached": (r.cached, truth.logits)}
        for path, (left, right) in pairs.items():
            keep = real(left, given)
            assert np.isfinite(left).all()
            assert np.abs(left - right)[keep].max() <= LIMIT * np.abs(right[keep]).max(), path


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_of_models_match_the_einsum(name, devices, exact):
    checkpoint = PresetCheckpoint("test", CONFIGS[name])
    given = kind(checkpoint.config).inputs(checkpoint.config)
    arguments = [put(x, "torch", devices["torch"]) for x in given]

    def of_torch(attention):
        model = twinformers.load(checkpoint, "torch", "float64", devices["torch"], attention=attention)
        return gradients_torch(model, checkpoint, given, lambda m: m(*arguments)[0]).parameters

    model = twinformers.load(checkpoint, "jax", "float64", devices["jax"], attention="fused")
    truth = of_torch("einsum")
    largest = max(np.abs(g).max() for g in truth.values())
    for found in (of_torch("fused"), gradients_jax(model, checkpoint, given).parameters):
        for path, right in truth.items():
            scale = max(np.abs(right).max(), 1e-3 * largest)
            assert np.abs(found[path] - right).max() <= GRADIENT_LIMIT * scale, path


@pytest.mark.parametrize("chunk", [1, 7, 48])
def test_chunks_with_no_left_and_right_padding_match_the_einsum(chunk, devices, exact):
    tokens, positions = token_inputs(TINY)
    for framework in FRAMEWORKS:
        given = {}
        for attention in ("einsum", "fused"):
            model = twinformers.load(
                PresetCheckpoint("test", TINY), framework, "float64", devices[framework], attention=attention
            )
            cache = model.empty_cache(len(tokens), 512) if attention == "fused" else None
            parts = []
            with torch.inference_mode():
                for part in slices(48, chunk if attention == "fused" else 48):
                    at = [put(x[:, part], framework, devices[framework]) for x in (tokens, positions)]
                    logits, cache = model(*at, cache)
                    parts.append(np.asarray(logits.tolist()))
            given[attention] = np.concatenate(parts, 1)
        assert difference(given["fused"], given["einsum"], positions) <= LIMIT


@pytest.mark.parametrize("name", ["grouped-query", "transformer"])
def test_lower_precision_is_within_what_rounding_explains(name, kernels, jax_device, torch_device):
    report = twinformers.verify(
        PresetCheckpoint("test", CONFIGS[name]),
        dtypes=["float32", "bfloat16"],
        checks=["activations", "cache", "generation", "rounding"],
        attention="fused",
        jax_device=jax_device,
        torch_device=torch_device,
    )
    assert [r for r in report.checks if not r.ok] == [] and all(kernels.values())
    judged = {(r.dtype, r.left) for r in report.checks if r.check == "rounding" and r.limit is not None}
    assert judged == {(d, t) for d in ("float32", "bfloat16") for t in FRAMEWORKS}


def test_every_check_of_verify_passes_the_choice_on(monkeypatch):
    from twinformers.parity import training, twins, verify

    asked = []

    def load(*arguments, attention):
        asked.append((arguments[1], attention))
        return twinformers.load(*arguments, attention=attention)

    for module in (training, twins, verify):
        monkeypatch.setattr(module, "load", load)
    checks = ["logits", "gradients", "training"]
    report = twinformers.verify(
        "preset:llama-tiny", dtypes=["float64"], checks=checks, steps=1, attention="fused"
    )
    assert report.ok and {r.check for r in report.checks} == set(checks)
    assert asked == [("jax", "fused"), ("torch", "fused")] * 3


# What is left to the einsum


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_dropout_is_left_to_the_einsum(framework, kernels, devices):
    q, k, v = (put(a.astype(np.float32), framework, devices[framework]) for a in heads(2))
    mask = put(mask_by_rule(inputs()[1], True, None), framework, devices[framework])
    key = RANDOM[framework].key(3)
    attend, einsum = FUSED[framework].attend, LAYERS[framework].attend
    left, right = (f(q, k, v, mask, rate=0.4, key=key).tolist() for f in (attend, einsum))
    assert left == right and kernels[framework] == 0
    assert left != attend(q, k, v, mask).tolist()
    for options in ({"rate": 0.4}, {"rate": 0.0, "key": key}):
        attend(q, k, v, mask, **options)
    assert kernels[framework] == 3


def test_a_model_drops_the_same_weights(devices):
    config = CONFIGS["transformer"].replace(attention_dropout=0.4)
    given = kind(config).inputs(config)
    for framework in FRAMEWORKS:
        at, found = [put(x, framework, devices[framework]) for x in given], {}
        for attention in ("einsum", "fused"):
            model = twinformers.load(
                PresetCheckpoint("test", config),
                framework,
                "float32",
                devices[framework],
                attention=attention,
            )
            found[attention] = model(*at, key=RANDOM[framework].key(5))[0].tolist()
        assert found["einsum"] == found["fused"]


def test_jax_leaves_float64_to_the_einsum_because_the_library_rounds_it(kernels, devices):
    mask = mask_by_rule(inputs()[1], True, None)
    with jax.enable_x64(True):
        q, k, v, seen = given = [put(a, "jax", devices["jax"]) for a in (*heads(2), mask)]
        right = jax_models.layers.attend(*given)
        assert (jax_models.fused.attend(*given) == right).all() and kernels["jax"] == 0
        library = jax.nn.dot_product_attention(q, k, v, mask=seen[:, None])
        error = float(jnp.abs(library - right)[inputs()[1] >= 0].max())
    assert error > 1e4 * LIMIT


# Block by block, on a CPU

LONG = 2 * jax_models.fused.BLOCK + 37


def long_prompt(key_heads, kind, keys=LONG):
    """Heads and a mask of three rows, one padded on the left, one on the right; `keys` may be more."""
    rng = np.random.default_rng(5)
    q, k, v = (
        rng.standard_normal((3, n, heads, 8))
        for n, heads in ((LONG, 6), (keys, key_heads), (keys, key_heads))
    )
    positions = np.tile(np.arange(LONG), (3, 1))
    positions[1], positions[2, 200:] = np.r_[[-1] * 40, np.arange(LONG - 40)], -1
    late = np.full((3, keys - LONG), -1)  # slots of a cache that are empty
    mask = mask_by_rule(positions, kind != "bidirectional", WINDOW if kind == "window" else None)
    mask = np.concatenate([mask, np.broadcast_to((late >= 0)[:, None], (3, LONG, keys - LONG))], 2)
    if kind == "reversed":  # the first token stands last
        mask = mask[:, :, ::-1].copy()
    if kind == "one":  # a key out of order for one query of one row
        mask[0, jax_models.fused.BLOCK - 1, LONG - 1] = True  # the last of its block
    return (q, k, v, mask), positions >= 0


@pytest.mark.parametrize("keys", [LONG, LONG + 1, LONG + 70])
@pytest.mark.parametrize("key_heads", [1, 2, 6])
@pytest.mark.parametrize("kind", ["causal", "window", "bidirectional", "reversed", "one"])
def test_blocks_match_the_einsum_and_torch_whatever_the_mask(kind, key_heads, keys, devices):
    arrays, real = long_prompt(key_heads, kind, keys)
    rows, queries = np.nonzero(~arrays[3].any(-1))
    arrays[3][rows, queries, queries] = True  # what sees nothing has no right answer: here it sees itself
    weight = np.random.default_rng(6).standard_normal(arrays[0].shape)
    with jax.enable_x64(True):
        given = [put(a, "jax", devices["jax"]) for a in arrays]
        gradients = jax.jit(
            jax.grad(lambda *x: (jax_models.fused.blocks(*x, given[3]) * weight).sum(), argnums=(0, 1, 2))
        )
        found = np.asarray(jax.jit(jax_models.fused.blocks)(*given))
        of_blocks = gradients(*given[:3])
    q, k, v, mask = (torch.from_numpy(a) for a in arrays)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    truth = torch_models.layers.attend(*leaves, mask)
    (truth * torch.from_numpy(weight)).sum().backward()
    truth = truth.detach()
    assert np.abs(found - truth.numpy()).max() <= LIMIT * float(truth.abs().max())
    for mine, leaf in zip(of_blocks, leaves, strict=True):
        assert np.abs(np.asarray(mine) - leaf.grad.numpy()).max() <= LIMIT * float(leaf.grad.abs().max())


@pytest.mark.parametrize(("kind", "fewer"), [("causal", True), ("window", True), ("bidirectional", False)])
def test_blocks_leave_out_what_is_hidden_and_nothing_else(kind, fewer, devices):
    """Keys behind a block of queries are not even looked at: what is no number there does not matter."""
    (q, k, v, mask), _ = long_prompt(2, kind)
    end = 2 * jax_models.fused.BLOCK
    v[:, end:] = np.nan  # 0 times this is no number either
    with jax.enable_x64(True):
        out = np.asarray(jax_models.fused.blocks(*(put(a, "jax", devices["jax"]) for a in (q, k, v, mask))))
    assert np.isfinite(out[:, :end]).all() == fewer
    assert np.isnan(out[0, end:]).all()


def test_jax_leaves_float16_to_the_einsum_because_a_cpu_has_no_such_product(devices):
    mask = mask_by_rule(inputs()[1], True, None)
    given = [put(a.astype(np.float16), "jax", devices["jax"]) for a in heads(2)] + [jnp.asarray(mask)]
    fused, einsum = (jax.jit(f)(*given) for f in (jax_models.fused.attend, jax_models.layers.attend))
    assert fused.dtype == jnp.float16 and (fused == einsum).all()


# The choice of implementation


class Cuda:
    """What JAX asks about a GPU's software before it uses cuDNN."""

    platform_version = "cuda 12090"
    cudnn_get_version = staticmethod(lambda: 91000)


@pytest.mark.parametrize(
    ("dtype", "length", "keys", "size", "by_cudnn"),
    [
        ("bfloat16", 24, 24, 64, True),
        ("float16", 2, 48, 128, True),
        ("float32", 24, 24, 64, False),
        ("bfloat16", 24, 24, 60, False),
        ("bfloat16", 24, 24, 136, False),
        ("bfloat16", 23, 24, 64, False),
        ("bfloat16", 24, 25, 64, False),
    ],
)
def test_cudnn_is_taken_on_a_gpu_where_it_can(dtype, length, keys, size, by_cudnn, monkeypatch):
    """No GPU is needed to lower a program for one: only what it would be asked is answered here."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    q = jax.ShapeDtypeStruct((2, length, 6, size), dtype)
    k = jax.ShapeDtypeStruct((2, keys, 2, size), dtype)
    mask = jax.ShapeDtypeStruct((2, length, keys), bool)

    def calls(platform):
        loss = lambda *x: jax_models.fused.kernel(*x).astype(jnp.float32).sum()  # noqa: E731
        traced = jax.jit(jax.value_and_grad(loss)).trace(q, k, k, mask)
        return "cudnn$fmha" in traced.lower(lowering_platforms=(platform,)).as_text()

    assert not calls("cuda") and not calls("cpu"), "without cuDNN"
    monkeypatch.setattr(jax_models.fused, "get_backend", Cuda)
    monkeypatch.setattr(cudnn, "cuda_versions", Cuda)
    assert (calls("cuda"), calls("cpu")) == (by_cudnn, False)


# The choice of attention


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_choice_can_be_changed_and_taken_back(framework, kernels, devices):
    tokens, positions = (put(x, framework, devices[framework]) for x in token_inputs(TINY))
    model = twinformers.load(PresetCheckpoint("test", TINY), framework, "float32", devices[framework])
    # The static part of a module is part of what is compiled: another choice compiles anew.
    call = nnx.jit(lambda m, *x: m(*x)[0]) if framework == "jax" else (lambda m, *x: m(*x)[0])
    found = []
    for attention, layers in (("einsum", 0), ("fused", 3), ("einsum", 3)):
        FUSED[framework].use_attention(model, attention)
        found.append(np.asarray(call(model, tokens, positions).tolist()))
        assert kernels[framework] == layers
    assert (found[0] == found[2]).all() and (found[0] != found[1]).any()
    assert difference(found[0], found[1], token_inputs(TINY)[1]) <= 1e-5


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_bad_choices_are_refused(framework, devices, monkeypatch):
    with jax.enable_x64(True):
        model = Module(framework, SHAPES["multi-head"], devices[framework]).module
        one_head = Module(framework, Shape("SelfAttention", N=1, K=1), devices[framework]).module
    with pytest.raises(UsageError, match="attention: unknown") as error:
        FUSED[framework].use_attention(model, "flash")
    assert error.value.expected == "einsum or fused" and error.value.found == "'flash'"
    with pytest.raises(UsageError, match="no attention to choose") as error:
        FUSED[framework].use_attention(one_head, "fused")
    assert error.value.found == "SelfAttention"
    # Nothing is read for a model that will not be.
    monkeypatch.setattr("twinformers.loading.convert", lambda *_: pytest.fail("weights are read"))
    with pytest.raises(UsageError, match="attention: unknown"):
        twinformers.load("preset:llama-tiny", framework, attention="flash")


# The command


@pytest.mark.usefixtures("own_logging")
def test_verbs_pass_the_choice_on(monkeypatch, capsys):
    asked = {}
    for verb in ("generate", "verify", "bench"):
        monkeypatch.setattr(
            f"twinformers.cli.{verb}.{verb}",
            lambda *_, verb=verb, **options: asked.update({verb: options}) or 1 / 0,
        )
    for verb, more in (("generate", ["--prompt", "x"]), ("verify", []), ("bench", [])):
        with pytest.raises(ZeroDivisionError):
            run([verb, "preset:llama-tiny", *more, "--attention", "fused"])
        assert asked[verb]["attention"] == "fused"
        assert run([verb, "preset:llama-tiny", *more, "--attention"]) == 2
    assert "--attention" in capsys.readouterr().err


def test_a_worker_measures_what_was_chosen(kernels):
    from twinformers.benchmarks.cases import Case
    from twinformers.benchmarks.worker import Answers

    case = Case(task="prefill", tokens=20).to_dict()
    for attention, expected in (("einsum", False), ("fused", True)):
        Answers("torch", "preset:llama-tiny", "float32", "cpu", attention).prepare(case, "")
        assert bool(kernels["torch"]) is expected


# Mistakes that must be caught


def unscaled(kernel):
    """The division by sqrt(H) left out."""
    return lambda q, k, v, mask: kernel(q * q.shape[-1] ** 0.5, k, v, mask)


def inverted(kernel):
    """True for hidden, as some libraries have it."""
    return lambda q, k, v, mask: kernel(q, k, v, ~mask)


def tiled(kernel):
    """Query head n reads key-value head n % K instead of n // G."""

    def wrong(q, k, v, mask):
        order = [n % k.shape[2] for n in range(q.shape[2])]
        return kernel(q, k[:, :, order], v[:, :, order], mask)

    return wrong


@pytest.mark.parametrize("mistake", [unscaled, inverted, tiled])
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_planted_mistakes_are_caught(framework, mistake, devices, exact, monkeypatch):
    alone = SimpleNamespace(
        function=lambda: test_kernel_matches_einsum_and_the_other_framework(True, None, 2, devices, None),
        module=lambda: test_modules_match_each_other_and_plain_numpy(
            "grouped-query", True, None, devices, None
        ),
        cached=lambda: test_cached_decoding_matches_the_full_pass_of_the_einsum(None, 7, devices, None),
        model=lambda: test_chunks_with_no_left_and_right_padding_match_the_einsum(48, devices, None),
    )
    noticing = {k: f for k, f in vars(alone).items() if k != "cached" or mistake is not tiled}  # K = N there
    for test in noticing.values():
        test()
    monkeypatch.setattr(FUSED[framework], "kernel", mistake(FUSED[framework].kernel))
    for test in noticing.values():
        with pytest.raises(AssertionError):
            test()
