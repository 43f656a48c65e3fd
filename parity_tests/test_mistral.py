"""Mistral: the twins against each other and transformers, and a cache that comes round again and again."""

from __future__ import annotations

from functools import partial

import jax
import numpy as np
import pytest
import torch

import jax_models.generate
import jax_models.layers
import jax_models.lookup
import jax_models.mistral
import torch_models.generate
import torch_models.layers
import torch_models.lookup
import torch_models.mistral
import twinformers
from jax_models import functional
from twinformers.checkpoints.preset import PresetCheckpoint
from twinformers.configs import RopeScaling, preset
from twinformers.errors import UsageError
from twinformers.parity.kinds import kind
from twinformers.parity.reference import precise, reference_model
from twinformers.parity.twins import jax_precision
from twinformers.parity.verify import CHECKS

TINY = preset("mistral-tiny")
LINEAR = RopeScaling(rope_type="linear", factor=3.0)
CONFIGS = {
    "window": TINY,
    "no-window": TINY.replace(sliding_window=None),
    "others": TINY.replace(tie_word_embeddings=True, rope_scaling=LINEAR, num_key_value_heads=10),
}
LIMIT = 1e-12
LENGTH = 70  # six windows; in pieces of 1, 5 and 7 without a remainder


def inputs(config, length=LENGTH):
    """Rows with no, left and right padding; the second one begins at position 230."""
    tokens = np.random.default_rng(5).integers(0, config.vocab_size, (3, length)).astype(np.int32)
    positions = np.tile(np.arange(length, dtype=np.int32), (3, 1))
    positions[1] = np.r_[-np.ones(9), 230 + np.arange(length - 9)]
    positions[2, -7:] = -1
    return tokens, positions


def load(framework, config, dtype="float64"):
    return twinformers.load(PresetCheckpoint("test", config), framework, dtype, "cpu")


def run(framework, config, tokens, positions, slots=None, chunk=None):
    """Logits in float64; with `slots`, piece by piece into a cache of so many, however long the window."""
    shape = config.num_hidden_layers, len(tokens), slots, config.num_key_value_heads, config.head_dim
    length = tokens.shape[1]
    parts = [slice(n, n + (chunk or length)) for n in range(0, length, chunk or length)]
    cache, out = None, []
    with jax_precision("float64"), torch.inference_mode():
        model = load(framework, config)
        if framework == "torch":
            call, put = model, torch.from_numpy
            if slots:
                device = torch.device("cpu")
                cache = torch_models.layers.empty_cache(*shape, dtype=torch.float64, device=device)
        else:
            apply, params = functional(model)
            compiled, put = jax.jit(apply), np.asarray
            cache = jax_models.layers.empty_cache(*shape, dtype=np.float64) if slots else None

            def call(*given):
                return compiled(params, *given)

        for part in parts:
            logits, cache = call(put(tokens[:, part]), put(positions[:, part]), cache)
            out.append(np.asarray(logits))
    found = np.concatenate(out, 1)
    assert found.dtype == np.float64
    return found


def theirs(config, tokens, positions):
    """transformers' logits, with the window and the padding that it makes of its own configuration."""
    with precise("float64"), torch.inference_mode():
        model = reference_model(PresetCheckpoint("test", config), "float64")
        return model(
            input_ids=torch.from_numpy(tokens).long(),
            attention_mask=torch.from_numpy((positions >= 0).astype(np.int64)),
            position_ids=torch.from_numpy(positions).long().clamp(min=0),
        ).logits.numpy()


def difference(left, right, positions):
    """Largest difference over real tokens, relative to the largest value."""
    real = positions >= 0
    assert np.isfinite(left).all() and np.isfinite(right).all()
    return np.abs(left - right)[real].max() / np.abs(right[real]).max()


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_match_transformers_with_its_own_window(name):
    tokens, positions = inputs(CONFIGS[name])
    expected = theirs(CONFIGS[name], tokens, positions)
    for framework in ("jax", "torch"):
        found = run(framework, CONFIGS[name], tokens, positions)
        assert difference(found, expected, positions) <= LIMIT, framework
    if name == "window":  # and it would show: one position more or less is another model
        for window in (TINY.sliding_window - 1, TINY.sliding_window + 1):
            other = theirs(TINY.replace(sliding_window=window), tokens, positions)
            assert difference(other, expected, positions) > 1e-4


def test_every_submodule_and_gradient_matches_twin_and_transformers(jax_device, torch_device):
    report = twinformers.verify(
        PresetCheckpoint("test", TINY),
        dtypes=["float64"],
        checks=(*CHECKS, "gradients"),
        jax_device=jax_device,
        torch_device=torch_device,
    )
    assert [r for r in report.checks if not r.ok] == []
    exact = [r for r in report.checks if r.check in ("activations", "reference") and r.path]
    assert len({r.path for r in exact}) == 3 * 12 + 3 and all(r.limit == LIMIT for r in exact)
    gradients = {(r.left, r.right) for r in report.checks if r.check == "gradients" and r.limit == 1e-10}
    assert gradients == {("jax", "torch"), ("jax", "transformers")}


@pytest.mark.parametrize("framework", ["jax", "torch"])
@pytest.mark.parametrize("chunk", [1, 5, 7])
def test_a_ring_that_comes_round_matches_the_full_pass(framework, chunk):
    """The fewest slots that do, four to six times round; one fewer, and keys are lost."""
    tokens, positions = inputs(TINY)
    full = run("torch", TINY, tokens, positions)
    slots = TINY.sliding_window + chunk - 1
    assert difference(run(framework, TINY, tokens, positions, slots, chunk), full, positions) <= LIMIT
    if chunk == 5:
        # Shorter than the model's own, it is none of its rings, which would refuse.
        lost = run(framework, TINY, tokens, positions, slots - 1, chunk)
        assert difference(lost, full, positions) > 1e-4


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_the_longest_calls_fill_the_models_own_ring(framework):
    tokens, positions = inputs(TINY, 192)
    slots = TINY.cache_slots(1000)
    chunk = TINY.longest_call(slots)
    full = run("torch", TINY, tokens, positions)
    assert (slots, chunk) == (74, 64)
    assert difference(run(framework, TINY, tokens, positions, slots, chunk), full, positions) <= LIMIT


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_the_models_own_cache_is_as_long_as_needed_and_says_what_is_too_much(framework):
    model, put = load(framework, TINY, "float32"), {"jax": np.asarray, "torch": torch.from_numpy}[framework]
    call = (
        partial(jax.eval_shape, model) if framework == "jax" else model
    )  # refused before anything is computed
    ring = 11 + 64 - 1  # the window, and calls of 64
    for length, slots in ((16, 16), (ring - 1, ring - 1), (ring, ring), (1000, ring)):
        assert model.empty_cache(2, length).positions.shape == (2, slots + 1)
    for length, tokens, fits in ((73, 73, True), (1000, 64, True), (1000, 65, False)):
        given = np.zeros((1, tokens), np.int32), np.arange(tokens, dtype=np.int32)[None]
        if fits:
            call(*map(put, given), model.empty_cache(1, length))
            continue
        with pytest.raises(UsageError) as error:
            call(*map(put, given), model.empty_cache(1, length))
        assert "a call of 65 tokens" in str(error.value) and error.value.found == f"{ring} slots"
    for window, slots in ((None, 9000), (4096, 4607), (512, 575)):
        config = TINY.replace(sliding_window=window)
        assert config.cache_slots(9000) == slots
        assert config.longest_call(slots) == (None if window is None else slots - window + 1)


PROMPTS = [[3, 5, 7], list(range(1, 91)), [(7 * n * n) % 241 for n in range(150)]]
AGAIN = [*PROMPTS[2][:40], 9, 8] * 3
NEW, PENALTY = 40, 1.3


@pytest.fixture(scope="module")
def continued():
    """What transformers continues each prompt with, each alone: with a penalty, `AGAIN` without."""
    found = []
    with precise("float64"):
        model = reference_model(PresetCheckpoint("test", TINY), "float64")
        model.generation_config.eos_token_id = None
        for prompt, penalty in [*((prompt, PENALTY) for prompt in PROMPTS), (AGAIN, 1.0)]:
            ids = torch.tensor([prompt])
            options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
            mask = torch.ones_like(ids)
            out = model.generate(ids, attention_mask=mask, repetition_penalty=penalty, **options)
            found.append(out[0, len(prompt) :].tolist())
    return found


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_generation_matches_transformers_token_for_token(framework, continued, monkeypatch):
    """Prompts in one batch, shorter and longer than the ring of 74 slots: the longer are read in parts."""
    generate, lookup = {
        "jax": (jax_models.generate, jax_models.lookup),
        "torch": (torch_models.generate, torch_models.lookup),
    }[framework]
    models, slots = {"jax": jax_models.mistral, "torch": torch_models.mistral}[framework], []
    place = models.place

    def noting(positions, cache, window):
        slots.append(cache.positions.shape[1] - 1)
        return place(positions, cache, window)

    monkeypatch.setattr(models, "place", noting)
    with jax_precision("float64"):
        model = load(framework, TINY)
        engine, sampling = generate.Generator(model), twinformers.Sampling(repetition_penalty=PENALTY)
        steps = engine.stream(PROMPTS, max_new_tokens=NEW, sampling=sampling)
        assert [list(row) for row in zip(*steps, strict=True)] == continued[:-1]
        assert set(slots) == {74}  # never more, whatever was read or written
        _, _, seen, _ = engine.begin(PROMPTS, NEW, sampling)
        assert [set(np.flatnonzero(row)) for row in np.asarray(seen)] == list(map(set, PROMPTS))
        # Guesses that turn out wrong stand in the ring, too, and must have taken the place of nothing.
        guessing = lookup.LookupGenerator(model)
        assert [row[0] for row in guessing.stream([AGAIN], max_new_tokens=NEW)] == continued[-1]
        assert 10 < guessing.passes < NEW - 1


def test_compare_reads_a_prompt_longer_than_the_ring_in_parts(continued):
    model, calls = load("torch", TINY), kind(TINY)

    def call(_, tokens, positions, cache):
        return model(torch.from_numpy(tokens), torch.from_numpy(positions), cache)

    with torch.inference_mode():
        found = calls.steps(TINY, call, model.empty_cache, calls.prompted(TINY, AGAIN), NEW - 1)
        assert list(found) == continued[-1]


FIELDS = {
    "sliding_window": 12,
    "rms_norm_eps": 1e-2,
    "rope_theta": 5e3,
    "rope_scaling": LINEAR,
    "head_dim": 12,
    "num_key_value_heads": 2,
    "num_attention_heads": 15,
    "num_hidden_layers": 2,
    "hidden_size": 54,
    "intermediate_size": 90,
    "vocab_size": 300,
    "tie_word_embeddings": True,
}


def test_every_field_changes_both_twins_and_transformers_alike():
    # The longest sequence enters no computation; it only bounds what the engines accept.
    assert set(FIELDS) == set(TINY.to_dict()) - {"max_position_embeddings"}
    tokens, positions = inputs(TINY)
    before = run("torch", TINY, tokens, positions)
    for field, value in FIELDS.items():
        changed = TINY.replace(**{field: value})
        expected = theirs(changed, tokens, positions)
        for framework in ("jax", "torch"):
            found = run(framework, changed, tokens, positions)
            assert difference(found, expected, positions) <= LIMIT, (field, framework)
        assert found.shape != before.shape or difference(found, before, positions) > 1e-6, field
