"""LLaMA: Flax against PyTorch and against transformers, on configurations in which nothing coincides."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch

import twinformers
from twinformers.checkpoints import convert, open_checkpoint
from twinformers.checkpoints.preset import PresetCheckpoint
from twinformers.configs import RopeScaling, preset
from twinformers.configs._sampling import bucket

TINY = preset("llama-tiny")
LINEAR = RopeScaling(rope_type="linear", factor=3.0)
CONFIGS = {
    "grouped-query": TINY,
    "multi-head": TINY.replace(num_key_value_heads=6),
    "multi-query": TINY.replace(num_key_value_heads=1),
    "tied": TINY.replace(tie_word_embeddings=True),
    "linear-scaling": TINY.replace(rope_scaling=LINEAR),
    "plain-rope": TINY.replace(rope_scaling=None),
}
LIMIT = 1e-12


def inputs(config, batch=3, length=48):
    """Rows with no, left and right padding; the second one begins at position 230."""
    rng = np.random.default_rng(5)
    tokens = rng.integers(0, config.vocab_size, (batch, length)).astype(np.int32)
    positions = np.tile(np.arange(length, dtype=np.int32), (batch, 1))
    positions[1] = np.r_[-np.ones(9), 230 + np.arange(length - 9)]
    positions[2, -7:] = -1
    return tokens, positions


def run_jax(config, tokens, positions, device, dtype="float64", chunks=None, change=None):
    with jax.enable_x64(dtype == "float64"):
        model = twinformers.load(PresetCheckpoint("test", config), "jax", dtype, device)
        cache = None if chunks is None else model.empty_cache(len(tokens), 512)
        out = []
        for part in chunks or [slice(None)]:
            logits, cache = model(
                jax.device_put(tokens[:, part], device), jax.device_put(positions[:, part], device), cache
            )
            assert str(logits.dtype) == dtype
            out.append(np.asarray(logits, np.float64 if dtype == "float64" else np.float32))
        return np.concatenate(out, 1)


def run_torch(config, tokens, positions, device, dtype="float64", chunks=None):
    model = twinformers.load(PresetCheckpoint("test", config), "torch", dtype, device)
    cache = None if chunks is None else model.empty_cache(len(tokens), 512)
    out = []
    with torch.inference_mode():
        for part in chunks or [slice(None)]:
            logits, cache = model(
                torch.tensor(tokens[:, part], device=device),
                torch.tensor(positions[:, part], device=device),
                cache,
            )
            assert logits.dtype == getattr(torch, dtype)
            out.append(logits.cpu().to(torch.float64 if dtype == "float64" else torch.float32).numpy())
    return np.concatenate(out, 1)


def difference(left, right, positions):
    """Largest difference over real tokens, relative to the largest value; NaN counts as infinite."""
    real = positions >= 0
    assert np.isfinite(left).all() and np.isfinite(right).all()
    return np.abs(left - right)[real].max() / np.abs(right[real]).max()


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_jax_matches_torch(name, jax_device, torch_device):
    tokens, positions = inputs(CONFIGS[name])
    left = run_jax(CONFIGS[name], tokens, positions, jax_device)
    right = run_torch(CONFIGS[name], tokens, positions, torch_device)
    assert difference(left, right, positions) <= LIMIT


@pytest.mark.parametrize(
    "name", [n if n == "grouped-query" else pytest.param(n, marks=pytest.mark.slow) for n in CONFIGS]
)
def test_every_submodule_matches_twin_and_transformers(name, jax_device, torch_device):
    lower = ["float32", "bfloat16"] if name == "grouped-query" else ["float32"]
    report = twinformers.verify(
        PresetCheckpoint("test", CONFIGS[name]),
        dtypes=["float64", *lower],
        jax_device=jax_device,
        torch_device=torch_device,
    )
    assert [r for r in report.checks if not r.ok] == []
    exact = [r for r in report.checks if r.dtype == "float64" and r.path]
    assert len({r.path for r in exact}) == 3 * 12 + 2 + (not CONFIGS[name].tie_word_embeddings)
    assert all(r.limit == LIMIT for r in exact)
    judged = {(r.dtype, r.left) for r in report.checks if r.check == "rounding" and r.limit is not None}
    assert judged == {(d, t) for d in lower for t in ("jax", "torch")}


@pytest.mark.parametrize("framework", ["jax", "torch"])
@pytest.mark.parametrize("chunk", [1, 5, 7, 48])
def test_cached_decoding_matches_full_pass(framework, chunk, jax_device, torch_device):
    tokens, positions = inputs(TINY)
    run, device = {"jax": (run_jax, jax_device), "torch": (run_torch, torch_device)}[framework]
    full = run(TINY, tokens, positions, device)
    chunks = [slice(s, s + chunk) for s in range(0, tokens.shape[1], chunk)]
    assert difference(run(TINY, tokens, positions, device, chunks=chunks), full, positions) <= LIMIT


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_lower_precision_twins_run_and_agree_to_their_precision(dtype, jax_device, torch_device):
    tokens, positions = inputs(TINY)
    truth = run_torch(TINY, tokens, positions, "cpu")
    roundoff = {"float32": 2**-24, "bfloat16": 2**-8, "float16": 2**-11}[dtype]
    for logits in (
        run_jax(TINY, tokens, positions, jax_device, dtype),
        run_torch(TINY, tokens, positions, torch_device, dtype),
    ):
        # A sanity bound: some hundred roundings along the longest path. The rounding model is the sharp one.
        assert difference(logits, truth, positions) <= 100 * roundoff


FIELDS = {
    "rms_norm_eps": 1e-2,
    "rope_theta": 5e3,
    "rope_scaling": LINEAR,
    "head_dim": 12,
    "num_key_value_heads": 3,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "hidden_size": 54,
    "intermediate_size": 90,
    "vocab_size": 300,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_changes_both_twins_alike(field, jax_device, torch_device):
    tokens, positions = inputs(TINY)
    changed = TINY.replace(**{field: FIELDS[field]})
    before = run_torch(TINY, tokens, positions, torch_device)
    left = run_jax(changed, tokens, positions, jax_device)
    right = run_torch(changed, tokens, positions, torch_device)
    assert difference(left, right, positions) <= LIMIT
    assert right.shape != before.shape or difference(right, before, positions) > 1e-6


def test_the_list_of_perturbed_fields_is_complete():
    # The longest sequence enters no computation; it only bounds what the engines accept.
    assert set(FIELDS) == set(TINY.to_dict()) - {"max_position_embeddings"}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_direction_of_the_weight_map_is_bit_identical(name, dtype, tmp_path):
    config = CONFIGS[name]
    first, hops = tmp_path / "0", ["jax", "torch", "hf"]
    twinformers.port(PresetCheckpoint("test", config), first, to="hf", dtype=dtype)
    source = first
    for n, to in enumerate(hops, 1):
        twinformers.port(source, tmp_path / str(n), to=to)
        source = tmp_path / str(n)
    assert (source / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()
    assert (source / "config.json").read_bytes() == (first / "config.json").read_bytes()
    with open_checkpoint(first) as checkpoint:
        assert {array.dtype.name for _, array in convert(checkpoint, "jax")} == {dtype}


@pytest.mark.parametrize("name", CONFIGS)
def test_ported_folder_loads_in_transformers_and_matches(name, tmp_path, torch_device):
    import transformers

    config = CONFIGS[name]
    twinformers.port(PresetCheckpoint("test", config), tmp_path / "hf", to="hf", dtype="float32")
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    tokens, positions = inputs(config)
    tokens, positions = tokens[:1], positions[:1]
    with torch.inference_mode():
        right = theirs(torch.tensor(tokens).long()).logits.double().numpy()
    left = run_torch(config, tokens, positions, "cpu")
    # transformers computes in float32 here; the exact comparison is `verify`'s reference check.
    assert difference(left, right, positions) <= 1e-5


def test_sampling_is_the_same_in_both_frameworks():
    from jax_models.generate import Generator as JaxGenerator
    from torch_models.generate import Generator as TorchGenerator

    left = JaxGenerator(twinformers.load("preset:llama-tiny", "jax"))
    right = TorchGenerator(twinformers.load("preset:llama-tiny", "torch"))
    prompts = [[3, 5, 7], [11, 13, 17, 19, 23, 29, 31]]
    for sampling in [twinformers.Sampling()] + [
        twinformers.Sampling(temperature=0.8, top_k=20, top_p=0.9, seed=seed) for seed in range(3)
    ]:
        a = list(left.stream(prompts, max_new_tokens=12, sampling=sampling))
        b = list(right.stream(prompts, max_new_tokens=12, sampling=sampling))
        assert a == b
        for row, prompt in enumerate(prompts):
            if row == 0 or sampling.temperature == 0:
                alone = list(left.stream([prompt], max_new_tokens=12, sampling=sampling))
                assert [t[0] for t in alone] == [t[row] for t in a]


def test_threefry_in_torch_matches_jax():
    import jax_models.random as theirs
    import torch_models.random as ours

    for seed in (0, 1, 2**32 - 1):
        for n in (0, 7, 2**31):
            a, b = theirs.fold_in(theirs.key(seed), n), ours.fold_in(ours.key(seed), n)
            assert np.array_equal(np.asarray(a), b.numpy())
            for shape in ((1,), (3, 5), (1001,)):
                assert np.array_equal(np.asarray(theirs.bits(a, shape)), ours.bits(b, shape).numpy())
                assert np.array_equal(np.asarray(theirs.uniform(a, shape)), ours.uniform(b, shape).numpy())
                gap = np.abs(np.asarray(theirs.gumbel(a, shape)) - ours.gumbel(b, shape).numpy())
                assert gap.max() <= 1e-6 * 20


def test_buckets_are_few_and_close():
    assert [bucket(n) for n in (0, 1, 16, 17, 32, 33, 65)] == [16, 16, 16, 32, 32, 48, 80]
    assert [bucket(n) for n in (512, 513, 640, 641, 1024, 1025)] == [512, 640, 640, 768, 1024, 1280]
    sizes = {bucket(n) for n in range(64, 8193)}
    assert len(sizes) == 4 * 7 + 1 and all(n <= bucket(n) <= 1.25 * n for n in range(64, 8193))


@pytest.mark.slow
def test_ten_seeds_sample_the_same_text_from_real_weights():
    from jax_models.generate import Generator as JaxGenerator
    from torch_models.generate import Generator as TorchGenerator

    tokenizer = twinformers.load_tokenizer("demo")
    prompt = [tokenizer.encode("Once upon a time")]
    # As `generate` loads them: three times as fast as the readable attention.
    left = JaxGenerator(twinformers.load("demo", "jax", attention="fused", decoding=True))
    right = TorchGenerator(twinformers.load("demo", "torch", attention="fused"))
    texts = set()
    for seed in range(10):
        sampling = twinformers.Sampling(temperature=0.8, seed=seed)
        ours, theirs = (
            [row[0] for row in engine.stream(prompt, max_new_tokens=64, sampling=sampling)]
            for engine in (left, right)
        )
        assert ours == theirs and len(ours) == 64
        texts.add(tuple(ours))
    assert len(texts) == 10


@pytest.mark.parametrize("rows", [1, 2, 32, 33])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_matches_torch(rows, bias):
    """Both orders of the product, at the row where one takes over from the other."""
    from torch_models.layers import Linear

    ours, theirs = Linear(7, 5, bias=bias), torch.nn.Linear(7, 5, bias=bias)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(rows, 1, 7)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-6, atol=1e-6)
    assert ours(x).requires_grad and ours(x.detach()).shape == (rows, 1, 5)
