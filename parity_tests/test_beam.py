"""Beam search: against transformers' generate, twin against twin, and against all translations there are."""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import types
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import jax_models.beam
import torch_models.beam
import twinformers
from twinformers.checkpoints.preset import PresetCheckpoint
from twinformers.configs import preset
from twinformers.configs._beams import Beams
from twinformers.errors import ConfigError, UsageError
from twinformers.parity.reference import float64_throughout
from twinformers.training.numbers import train_tokenizer

TINY = preset("transformer-tiny")
#: Padding starts a Marian translation, the end token an FSMT one; no table is shared, or a token
#: would follow itself.
RELEASED = {
    "marian": TINY.replace(
        model_type="marian",
        activation_function="swish",
        share_embeddings=False,
        tie_word_embeddings=False,
        pad_token_id=88,
        eos_token_id=0,
        decoder_start_token_id=88,
    ),
    "fsmt": TINY.replace(
        model_type="fsmt",
        share_embeddings=False,
        tie_word_embeddings=False,
        source_vocab_size=97,
        pad_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
    ),
}
#: Found by trying: with these the models end early and late, and do not repeat themselves all the time.
M = 12
GAIN, END = {"marian": 0.8, "fsmt": 0.5}, {"marian": 1.5, "fsmt": 1.0}
SEEDS = (2, 3, 4)
HEADS = ("lm_head.weight", "model.decoder.output_projection.weight")


@contextlib.contextmanager
def exact():
    """float64 wherever transformers says float32, asks for the default, or casts its table of positions."""
    before, tensor = torch.get_default_dtype(), torch.FloatTensor
    try:
        torch.set_default_dtype(torch.float64)
        torch.FloatTensor = torch.DoubleTensor
        with float64_throughout():
            yield
    finally:
        torch.set_default_dtype(before)
        torch.FloatTensor = tensor


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """transformers' own random models by kind and seed, in float64, and the folders they were saved in."""
    return cache(lambda kind, seed: random_model(kind, seed, tmp_path_factory.mktemp(kind)))


@pytest.fixture(scope="module")
def expected(theirs):
    """What transformers generates, by kind, seed and name of the options; each is computed once."""

    @cache
    def look(kind, seed, name):
        config = RELEASED[kind]
        return generate(theirs(kind, seed)[0], config, sources(config, seed), **both(kind, OPTIONS[name])[0])

    return look


def random_model(kind, seed, folder):
    config = RELEASED[kind]
    raw = {**config.to_hf(), "forced_eos_token_id": None}
    with exact():
        model = getattr(transformers, config.hf_class)(transformers.AutoConfig.for_model(**raw))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, x in [*model.named_parameters(), *model.named_buffers()]:
            if "embed_positions" in name:
                continue
            x.normal_(generator=generator)
            if "norm" in name and name.endswith("weight"):
                x.mul_(0.3).add_(1)
            elif "bias" in name:  # small, or one token would win wherever it stands
                x.mul_(0.3)
            elif "embed" not in name and "shared" not in name and name not in HEADS:
                x.mul_(GAIN[kind] * x.shape[1] ** -0.5)  # small, or what came before would be forgotten
        # Each token makes another one likely, or one alone would follow all the time.
        follower = torch.roll(torch.arange(config.target_vocab_size), 1)
        head = next(x for name, x in model.named_parameters() if name in HEADS)
        head.copy_(0.2 * (model.model.decoder.embed_tokens.weight[follower] + 0.5 * head))
        # So that translations end, and after different numbers of tokens. FSMT has no bias on its logits, but
        # what the last norm adds reaches all of them.
        if kind == "marian":
            model.final_logits_bias[0, config.eos_token_id] = END[kind]
        else:
            bias = model.model.decoder.layers[-1].final_layer_norm.bias
            row = head[config.eos_token_id]
            row += (END[kind] - row @ bias) / (bias @ bias) * bias
    model.generation_config.bad_words_ids = [[config.pad_token_id]]
    model.save_pretrained(folder)
    return model.eval(), folder


def sources(config, seed):
    """Five sources of different length, none with the padding token in it."""
    rng = np.random.default_rng(seed)
    allowed = np.setdiff1d(np.arange(config.source_vocab_size), [config.pad_token_id, config.eos_token_id])
    return [[*rng.choice(allowed, length).tolist(), config.eos_token_id] for length in (9, 3, 14, 1, 6)]


def generate(model, config, given, **options):
    """What transformers makes of the sources, in nothing less than float64; tokens without padding."""
    width = max(map(len, given))
    tokens = torch.tensor([row + [config.pad_token_id] * (width - len(row)) for row in given])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in given])
    with exact(), torch.inference_mode():
        out = model.generate(tokens, attention_mask=mask, do_sample=False, **options)
    rows = []
    for row in out[:, 1:].tolist():  # without the start token
        end = row.index(config.eos_token_id) + 1 if config.eos_token_id in row else len(row)
        rows.append(row[:end])
    return rows


@cache
def loaded(folder, framework="torch"):
    with jax.enable_x64(True):
        return twinformers.load(folder, framework, "float64")


def translate(folder, framework, given, beams):
    with jax.enable_x64(True):
        model = loaded(folder, framework)
        engine = {"jax": jax_models.beam, "torch": torch_models.beam}[framework].Translator(model)
        return engine.translate(given, beams)


OPTIONS = {
    "default": {},
    "short ones": {"length_penalty": 0.0},
    "long ones": {"length_penalty": 2.0},
    "shortest": {"length_penalty": -1.0},
    "early": {"early_stopping": True},
    "never early": {"early_stopping": "never", "length_penalty": 0.6},
    "six beams": {"num_beams": 6},
    "greedy": {"num_beams": 1},
}


def both(kind, options):
    """The options for transformers, and as `Beams`."""
    options = {"num_beams": 4, "max_new_tokens": M, **options}
    return options, Beams(banned=(RELEASED[kind].pad_token_id,), **options)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("kind", RELEASED)
def test_torch_matches_transformers(theirs, expected, kind, name, seed):
    given, (_, beams) = sources(RELEASED[kind], seed), both(kind, OPTIONS[name])
    found = translate(theirs(kind, seed)[1], "torch", given, beams)
    assert [h.tokens for h in found] == expected(kind, seed, name)


@pytest.mark.parametrize("kind", RELEASED)
def test_random_models_tell_right_from_wrong(expected, kind):
    """Translations end early and late, not all repeat one token, and differ by the settings."""
    found = {(seed, name): expected(kind, seed, name) for seed in SEEDS for name in OPTIONS}
    rows = [row for rows in found.values() for row in rows]
    ended = [len(row) for row in rows if row[-1] == RELEASED[kind].eos_token_id]
    assert len(set(ended)) >= 4 and len(ended) < len(rows)
    assert np.mean([len(set(row)) / len(row) for row in rows]) > 0.3
    for name in OPTIONS:
        if name not in ("default", "early", "six beams"):
            assert any(found[seed, name] != found[seed, "default"] for seed in SEEDS), name


@pytest.mark.parametrize("name", ["default", "never early", "greedy"])
@pytest.mark.parametrize("kind", RELEASED)
def test_jax_matches_torch_and_transformers(theirs, expected, kind, name):
    given, (_, beams) = sources(RELEASED[kind], 4), both(kind, OPTIONS[name])
    left, right = (translate(theirs(kind, 4)[1], framework, given, beams) for framework in ("jax", "torch"))
    assert [h.tokens for h in left] == [h.tokens for h in right] == expected(kind, 4, name)
    assert np.allclose([h.score for h in left], [h.score for h in right], rtol=1e-12)


@pytest.mark.parametrize("renormalize", [False, True])
def test_settings_of_a_marian_folder_match_transformers(theirs, tmp_path, renormalize):
    """What Helsinki-NLP's generation_config.json say: padding is banned, the end is forced."""
    model, folder = theirs("marian", 3)
    config = RELEASED["marian"]
    raw = {
        "bad_words_ids": [[config.pad_token_id]],
        "forced_eos_token_id": config.eos_token_id,
        "max_length": 6,
        "num_beams": 4,
        "renormalize_logits": renormalize,
    }
    beams = Beams.from_generation(raw, config.eos_token_id, "generation_config.json")
    assert beams.force_eos and beams.max_new_tokens == 5 and beams.renormalize == renormalize
    given = sources(config, 3)
    expected = generate(model, config, given, **{k: v for k, v in raw.items() if k != "bad_words_ids"})
    assert all(row[-1] == config.eos_token_id for row in expected)
    for framework in ("jax", "torch"):
        assert [h.tokens for h in translate(folder, framework, given, beams)] == expected


@pytest.mark.parametrize("framework", ["jax", "torch"])
@pytest.mark.parametrize("kind", RELEASED)
def test_translating_with_a_ported_folder_matches_transformers(theirs, tmp_path, kind, framework):
    """Text in, text out: what transformers saved, with a tokenizer and the settings of its folder."""
    model, folder = theirs(kind, 3)
    folder = shutil.copytree(folder, tmp_path / "saved")
    (folder / "tokenizer.json").write_bytes(train_tokenizer(89))
    settings = json.loads((folder / "generation_config.json").read_text())
    settings |= {"num_beams": 3, "max_length": 9, "length_penalty": 0.5}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    twinformers.port(folder, tmp_path / "ported", to=framework)
    known, texts = twinformers.load_tokenizer(folder), ["nine hundred one", "seven"]
    options = {name: settings[name] for name in ("num_beams", "max_length", "length_penalty")}
    expected = generate(model, RELEASED[kind], [known.encode(t) for t in texts], **options)
    with jax.enable_x64(True):
        found = twinformers.translate(tmp_path / "ported", texts, framework=framework, dtype="float64")
    assert [r.tokens for r in found] == expected
    assert [r.text for r in found] == [known.decode(row) for row in expected]


def best_of_all(model, config, source, beams):
    """The best of all translations of up to `max_new_tokens` tokens, each scored by the full pass alone."""
    V, eos = config.target_vocab_size, config.eos_token_id
    ways = []
    for length in range(1, beams.max_new_tokens + 1):
        for ids in itertools.product(range(V), repeat=length):
            if eos not in ids[:-1] and (ids[-1] == eos or length == beams.max_new_tokens):
                ways.append(ids)
    longest = beams.max_new_tokens
    tokens = torch.tensor(
        [[config.decoder_start_token_id, *w[:-1]] + [config.pad_token_id] * (longest - len(w)) for w in ways]
    )
    positions = torch.arange(longest).repeat(len(ways), 1)
    given = torch.tensor([source]).repeat(len(ways), 1)
    with torch.inference_mode():
        logits, _ = model(given, torch.arange(len(source)).repeat(len(ways), 1), tokens, positions)
    costs = torch.log_softmax(logits, -1)
    scores = []
    for w, row in zip(ways, costs, strict=True):
        total, n = sum(row[t, token].item() for t, token in enumerate(w)), len(w)
        alpha = beams.length_penalty
        scores.append(total / (n**alpha if beams.penalty == "length" else ((5 + n) / 6) ** alpha))
    return list(ways[int(np.argmax(scores))]), max(scores)


class Unsure(PresetCheckpoint):
    """Random weights with small embeddings: no token is far likelier than the others."""

    def read(self, name):
        return super().read(name) * np.float32(0.15 if name == "embed.weight" else 1)


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_wide_search_finds_the_best_of_all_translations(framework):
    """Six tokens and three steps: with 216 beams nothing is lost. Wu's penalty, which transformers lacks."""
    config = TINY.replace(
        source_vocab_size=6,
        target_vocab_size=6,
        eos_token_id=3,
        decoder_start_token_id=2,
        scale_embedding=False,
    )
    checkpoint = Unsure("test", config, 5)
    given = [[1, 4, 5, 3], [2, 3]]
    found = []
    with jax.enable_x64(True):
        model = twinformers.load(checkpoint, "torch", "float64")
        engine = {"jax": jax_models.beam, "torch": torch_models.beam}[framework]
        engine = engine.Translator(twinformers.load(checkpoint, framework, "float64"))
        for alpha in (0.0, 0.6, 5.0):
            beams = Beams(num_beams=216, max_new_tokens=3, length_penalty=alpha, penalty="wu")
            for source, h in zip(given, engine.translate(given, beams), strict=True):
                tokens, score = best_of_all(model, config, source, beams)
                assert h.tokens == tokens and abs(h.score - score) < 1e-12
                found.append(tokens)
    assert len({len(tokens) for tokens in found}) > 1


def test_penalties_are_those_of_the_papers():
    assert np.allclose(Beams(max_new_tokens=3, length_penalty=2.0).divisors, [1, 4, 9])
    wu = Beams(max_new_tokens=3, length_penalty=0.6, penalty="wu").divisors
    assert np.allclose(wu, [1, (7 / 6) ** 0.6, (8 / 6) ** 0.6])


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_a_source_is_translated_as_alone(theirs, framework):
    _, folder = theirs("marian", 3)
    _, beams = both("marian", {})
    given = sources(RELEASED["marian"], 3)
    together = translate(folder, framework, given, beams)
    alone = [h for source in given[:2] for h in translate(folder, framework, [source], beams)]
    assert [h.tokens for h in alone] == [h.tokens for h in together[:2]]


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_reorder_gathers_rows(framework):
    engine = {"jax": jax_models.beam, "torch": torch_models.beam}[framework]
    array = jnp.array if framework == "jax" else torch.tensor
    k = np.arange(2 * 3 * 4).reshape(2, 3, 4, 1, 1)
    rows = np.array([2, 0, 0])
    cache = engine.reorder(engine.KVCache(array(k), array(-k), array(k[0, :, :, 0, 0])), array(rows))
    assert np.array_equal(cache.k, k[:, rows]) and np.array_equal(cache.v, -k[:, rows])
    assert np.array_equal(cache.positions, k[0, rows, :, 0, 0])


# What must be refused


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"num_beams": 0}, "num_beams"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"length_penalty": float("nan")}, "length_penalty"),
        ({"penalty": "none"}, "penalty"),
        ({"early_stopping": "always"}, "early_stopping"),
    ],
)
def test_bad_settings_are_refused(values, name):
    with pytest.raises(UsageError, match=name):
        Beams(**values)


@pytest.mark.parametrize(
    "raw",
    [
        {"no_repeat_ngram_size": 3},
        {"repetition_penalty": 1.2},
        {"do_sample": True},
        {"bad_words_ids": [[4, 5]]},
        {"forced_eos_token_id": 9},
        {"forced_bos_token_id": 9},
    ],
    ids=lambda raw: next(iter(raw)),
)
def test_settings_that_would_change_the_text_are_refused(raw):
    with pytest.raises(ConfigError, match=next(iter(raw))):
        Beams.from_generation(raw, 0, "generation_config.json")
    neutral = {
        "no_repeat_ngram_size": 0,
        "repetition_penalty": 1.0,
        "do_sample": False,
        "bad_words_ids": [[5]],
    }
    assert Beams.from_generation(neutral, 0, "generation_config.json").banned == (5,)


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_bad_sources_are_refused(framework):
    engine = {"jax": jax_models.beam, "torch": torch_models.beam}[framework]
    translator = engine.Translator(twinformers.load("preset:transformer-tiny", framework))
    for given, beams, match in (
        ([[]], Beams(), "empty"),
        ([[1], [89]], Beams(), "89"),
        ([[1] * 2000], Beams(), "at most 1024"),
        ([[1]], Beams(max_new_tokens=2000), "at most 1024"),
        ([[1]], Beams(banned=(89,)), "banned"),
    ):
        with pytest.raises(UsageError, match=match):
            translator.translate(given, beams)


# Whether the suite would notice


MISTAKES = {
    "scores are not reordered with their beams": ("scores=scores,", "scores=scores.flip(1),"),
    "the cache stays where it was": ("cache=reorder(cache, rows.reshape(B * n))", "cache=cache"),
    "all 2n may finish": ("(torch.arange(2 * n, device=ends.device) < n)", "True"),
    "no penalty": ("best / divisors[t]", "best"),
    "penalty of one token less": ("best / divisors[t]", "best / divisors[max(t - 1, 0)]"),
    "all beams count at first": ("[-torch.inf] * (n - 1)", "[0.0] * (n - 1)"),
    "an ended beam goes on": ("torch.where(ends, -torch.inf, best), n)", "best, n)"),
    "hope at the end": ("M - 1 if farthest else t", "M - 1"),
    "stops as soon as full": ("if beams.early_stopping is True or n == 1", "if True"),
    "nothing is banned": ("if beams.banned:", "if False:"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_planted_mistake_is_caught(theirs, expected, name):
    old, new = MISTAKES[name]
    text = Path(torch_models.beam.__file__).read_text()
    assert text.count(old) == 1
    wrong = types.ModuleType("wrong")
    exec(compile(text.replace(old, new), "wrong", "exec"), vars(wrong))
    for kind, seed, options in itertools.product(RELEASED, SEEDS, OPTIONS):
        given, (_, beams) = sources(RELEASED[kind], seed), both(kind, OPTIONS[options])
        found = wrong.Translator(loaded(theirs(kind, seed)[1])).translate(given, beams)
        if [h.tokens for h in found] != expected(kind, seed, options):
            return
    pytest.fail(f"{name}: every translation was right all the same")
